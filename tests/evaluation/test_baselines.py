"""The baseline: its fallbacks, its limits, and a published figure."""

from __future__ import annotations

import csv
import hashlib
import random
import signal
import time
from pathlib import Path

import pytest
import torch

from remora.data.table import Table
from remora.evaluation import baselines
from remora.evaluation.baselines import BYTES_PER_CHARACTER, train_baseline, train_set_baseline
from remora.runtime import memory


@pytest.mark.parametrize(
    ("texts", "labels", "expected"),
    [
        (["a b", "c d"], ["x", "x"], {"x"}),
        (["", " ", ""], ["x", "y", "y"], {"y"}),
        (["!!", "??"], ["x", "y"], {"x", "y"}),
    ],
)
def test_baseline_of_degenerate_tables(texts, labels, expected) -> None:
    found = train_baseline(texts, labels, ["a b", "ü", ""], ["x", "x", "y"], ["x", "y"])
    assert set(found.predictions) <= expected
    assert len(found.predictions) == 3


def test_a_large_table_is_sampled_and_says_so() -> None:
    texts = [f"red {i}" if i % 2 else f"blue {i}" for i in range(400)]
    labels = ["r" if i % 2 else "b" for i in range(400)]
    found = train_baseline(texts, labels, ["red", "blue"], ["r", "b"], ["b", "r"], max_rows=100)
    assert (found.num_train_rows, found.num_all_train_rows) == (100, 400)
    assert found.predictions == ["r", "b"]


def test_a_baseline_that_would_not_fit_takes_fewer_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(baselines, "MIN_BASELINE_ROWS", 10)
    texts = ["red red red red red" if i % 2 else "blue blue blue blue" for i in range(400)]
    labels = ["r" if i % 2 else "b" for i in range(400)]
    fifty = BYTES_PER_CHARACTER * 19 * 50 + 1_000  # 26 n-grams have 16 bytes each
    for room, expected in ((10**9, 400), (fifty, 50), (0, 10)):
        found = train_baseline(texts, labels, ["red"], ["r"], ["b", "r"], max_bytes=room)
        assert found.num_train_rows == expected
        assert found.predictions == ["r"]


def rows_of(num_labels: int) -> tuple[list[str], list[str]]:
    """Return 400 texts that share few n-grams, and their labels."""
    draw = random.Random(0)
    texts = ["".join(draw.choices("abcdefghijklmnopqrstuvwxyz   ", k=60)) for _ in range(400)]
    return texts, [f"label {i % num_labels}" for i in range(400)]


@pytest.mark.parametrize(("num_labels", "expected"), [(2, 400), (100, 50)])
def test_the_coefficients_of_many_labels_count(
    monkeypatch: pytest.MonkeyPatch, num_labels: int, expected: int
) -> None:
    """They have 48,000 n-grams: 4 MB of texts, and 77 MB of coefficients for 100 labels."""
    monkeypatch.setattr(baselines, "MIN_BASELINE_ROWS", 10)
    texts, labels = rows_of(num_labels)
    names = sorted(set(labels))
    found = train_baseline(texts, labels, texts[:9], labels[:9], names, max_bytes=15_000_000)
    assert found.num_train_rows == expected
    tables = [Table(texts, [f'["{each}"]' for each in labels], multi_label=True)]
    tables += [tables[0].take(range(9)), tables[0].take(range(9, 20))]
    found = train_set_baseline(*tables, names, max_bytes=15_000_000)
    assert found.num_train_rows == (400 if num_labels == 2 else 100)  # liblinear's are of one label


def test_coefficients_that_do_not_fit_at_all_are_not_tried(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The kernel would kill the run for its memory, and again when it is resumed."""
    monkeypatch.setattr("sklearn.svm.LinearSVC.fit", lambda *_: pytest.fail("tried"))
    monkeypatch.setattr(memory, "free_bytes", lambda _: 4 * 10**7)
    texts, labels = rows_of(100)
    names = sorted(set(labels))
    with pytest.raises(torch.OutOfMemoryError):
        train_baseline(texts, labels, texts[:9], labels[:9], names, max_bytes=15_000_000)


def test_no_warning_where_the_svm_does_not_converge(monkeypatch) -> None:
    """Warnings are errors in these tests."""
    import sklearn.svm

    hurried = sklearn.svm.LinearSVC
    monkeypatch.setattr(
        sklearn.svm, "LinearSVC", lambda **given: hurried(**given | {"max_iter": 1})
    )
    found = train_baseline(
        ["red a", "blue b", "red c"], ["r", "b", "r"], ["red"], ["r"], ["b", "r"]
    )
    assert len(found.predictions) == 1


def test_lengths_must_agree() -> None:
    with pytest.raises(AssertionError):
        train_baseline(["t", "u"], ["a", "b", "b"], ["t"], ["a"], ["a", "b"])


def test_banking77_baseline_is_the_published_one(shared: Path) -> None:
    """TF-IDF + linear SVM gets about 90.6 % there."""
    tables = {}
    for split in ("train", "test"):
        with (shared / "data" / "banking77" / f"{split}.csv").open(encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
        tables[split] = [r["text"] for r in rows], [r["category"] for r in rows]
    labels = sorted(set(tables["train"][1]))
    found = train_baseline(*tables["train"], *tables["test"], labels)
    assert found.metrics.accuracy == pytest.approx(0.906, abs=0.005)


@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="needs a timer's signal")
def test_a_signal_is_answered_while_a_library_computes_in_c(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As in liblinear, whose loop over 15,000 rows of 150 labels takes ten seconds and more."""

    def stop(number: int, frame: object) -> None:
        raise KeyboardInterrupt

    def fit(*arguments: object) -> None:
        hashlib.pbkdf2_hmac("sha256", b"", b"", 10_000_000)  # seconds, without the GIL

    monkeypatch.setattr("sklearn.svm.LinearSVC.fit", fit)
    before = signal.signal(signal.SIGALRM, stop)
    texts, labels = ["red one", "blue two"] * 4, ["r", "b"] * 4
    signal.setitimer(signal.ITIMER_REAL, 0.5)
    began = time.monotonic()
    try:
        with pytest.raises(KeyboardInterrupt):
            train_baseline(texts, labels, texts, labels, ["b", "r"])
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert time.monotonic() - began < 1.5


def test_an_error_of_a_library_is_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    def fit(*arguments: object) -> None:
        raise MemoryError("no room")

    monkeypatch.setattr("sklearn.svm.LinearSVC.fit", fit)
    with pytest.raises(MemoryError, match="no room"):
        train_baseline(["a b", "c d"], ["x", "y"], ["a"], ["x"], ["x", "y"])
