"""The engine: the answers of `predict`, one generation for each request, many adapters.

Also covers remora.serving.adapters and remora.serving.snapshot.
"""

from __future__ import annotations

import hashlib
import shutil
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future
from pathlib import Path

import numpy as np
import pytest
import torch

from conftest import build_tokenizer, tiny_model
from remora.errors import ModelError
from remora.runtime.device import choose_precision
from remora.serving import snapshot
from remora.serving.engine import Answer, Batch, Engine, QueueFullError
from service import predicted, write_adapter, write_adapters

TEXTS = ["Where is my card?", "the refund again", "Still no top up!", "why card why", "refund"]


def engine(folders: dict[str, Path], **settings) -> Engine:
    precision = choose_precision(torch.device("cpu"), "float32")
    return Engine(
        folders,
        **{
            "base": None,
            "precision": precision,
            "device": torch.device("cpu"),
            "micro_batch_tokens": 2048,
            "tolerance": 0.01,
            "max_queue": 1024,
            **settings,
        },
    )


@pytest.fixture(scope="module")
def folders(base: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    parent = tmp_path_factory.mktemp("adapters")
    few = write_adapter(parent / "few", base, 3, modules=["q_proj", "down_proj"])
    return {**write_adapters(parent, base), "few": few}


@pytest.fixture(scope="module")
def loaded(folders: dict[str, Path]) -> Iterator[Engine]:
    made = engine(folders)
    yield made
    made.stop()


def same(answer: Answer, expected: list[list[tuple[str, float]]]) -> bool:
    found = [dict(zip(answer.labels, row, strict=True)) for row in answer.probabilities.tolist()]
    return all(
        list(found[i]) and abs(found[i][label] - probability) < 1e-5
        for i, best in enumerate(expected)
        for label, probability in best
    )


def sha256(folder: Path) -> str:
    names = ("adapter_config.json", "adapter_model.safetensors", "remora.json")
    return hashlib.sha256(
        b"".join((folder / "adapter" / n).read_bytes() for n in names)
    ).hexdigest()


@pytest.mark.parametrize("name", ["bank", "mail", "few"])
def test_each_adapter_answers_as_predict_does(
    loaded: Engine, folders: dict[str, Path], name: str
) -> None:
    others = [loaded.classify(other, TEXTS) for other in folders]  # mixed with the others' requests
    answer = loaded.classify(name, TEXTS).result()
    expected = predicted(folders[name], TEXTS, top_k=len(answer.labels))
    assert same(answer, expected)
    assert answer.labels[int(answer.probabilities[0].argmax())] == expected[0][0][0]
    assert answer.sha256 == sha256(folders[name])
    for other in others:
        other.result()
    apart = predicted(folders["bank" if name != "bank" else "few"], TEXTS, top_k=2)
    assert not all(abs(a[0][1] - b[0][1]) < 1e-4 for a, b in zip(expected, apart, strict=True))


@pytest.mark.parametrize("architecture", ["gpt2", "gemma2", "mistral"])
def test_other_architectures_answer_as_predict_does(architecture: str, tmp_path: Path) -> None:
    tokenizer = build_tokenizer()
    tokenizer.save_pretrained(tmp_path / "base")
    base = tiny_model(architecture, torch.float32, scale=2, vocabulary=len(tokenizer))
    base.save_pretrained(tmp_path / "base")
    folders = {n: write_adapter(tmp_path / n, tmp_path / "base", ord(n)) for n in "ab"}
    made = engine(folders)
    for name in "aba":
        expected = predicted(folders[name], TEXTS, top_k=3)
        assert same(made.classify(name, TEXTS).result(), expected)
    made.stop()


def test_the_layers_are_computed_fused(loaded: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    from remora.models import fused_lora

    calls = []
    fused = fused_lora._fused

    def count(layer, adapter: str, *inputs, **kwargs):
        calls.append(adapter)
        return fused(layer, adapter, *inputs, **kwargs)

    monkeypatch.setattr(fused_lora, "_fused", count)
    loaded.classify("mail", TEXTS).result()
    assert set(calls) == {loaded.generations["mail"].module}
    num_rounds = len(calls) / (2 * 7)  # two layers with seven adapted matrices each
    assert num_rounds == int(num_rounds) >= 1


def test_what_waits_together_is_computed_together(folders: dict[str, Path]) -> None:
    batches: list[Batch] = []
    first = threading.Event()

    def hold(batch: Batch) -> None:
        batches.append(batch)
        first.wait()

    made = engine(folders, on_batch=hold)
    futures = [made.classify("bank", ["the first"])]
    while not batches:
        time.sleep(0.001)
    futures += [made.classify("bank" if i % 2 else "mail", [f"card {i}"]) for i in range(8)]
    first.set()
    for future in futures:
        future.result()
    made.stop()
    assert [(b.adapter, b.num_requests) for b in batches] == [("bank", 1), ("mail", 4), ("bank", 4)]


def test_the_queue_is_bounded_and_cancelled_requests_leave_it(folders: dict[str, Path]) -> None:
    begun, hold = threading.Event(), threading.Event()

    def wait(batch: Batch) -> None:
        begun.set()
        hold.wait()

    made = engine(folders, max_queue=3, on_batch=wait)
    futures: list[Future[Answer]] = [made.classify("bank", ["the first"])]
    begun.wait()
    futures.append(made.classify("bank", ["a", "b"]))
    with pytest.raises(QueueFullError):
        made.classify("bank", ["c", "d"])
    futures.append(made.classify("mail", ["c"]))
    assert made.num_waiting == 3
    assert futures[1].cancel()
    hold.set()
    futures[2].result()
    made.classify("bank", ["a", "b", "c"]).result()
    assert made.num_waiting == 0
    made.stop()


def test_a_text_that_cannot_be_read_spoils_no_other_request(
    folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    begun, hold = threading.Event(), threading.Event()

    def wait(batch: Batch) -> None:
        begun.set()
        hold.wait()

    made = engine(folders, on_batch=wait)
    made.classify("bank", ["the first"])
    begun.wait()
    bad, good = made.classify("bank", ["\ud800"]), made.classify("bank", TEXTS)
    hold.set()
    with pytest.raises(Exception):  # noqa: B017, PT011 - the tokenizer's own
        bad.result()
    assert same(good.result(), predicted(folders["bank"], TEXTS, top_k=3))
    made.stop()


@pytest.fixture
def changing(folders: dict[str, Path], tmp_path: Path) -> dict[str, Path]:
    return {
        name: Path(shutil.copytree(folder, tmp_path / name)) for name, folder in folders.items()
    }


def test_a_reload_takes_over_with_labels_and_hash(changing: dict[str, Path], base: Path) -> None:
    made = engine(changing)
    assert not made.reload("bank")
    before = made.classify("bank", TEXTS).result()
    for seed, labels in ((7, ["yes", "no", "perhaps"]), (8, ["one", "two"])):
        write_adapter(changing["bank"], base, seed, labels)
        assert made.classify("bank", TEXTS).result().sha256 != sha256(changing["bank"])
        assert made.reload("bank")
        after = made.classify("bank", TEXTS).result()
        assert after.labels == tuple(labels)
        assert after.sha256 == sha256(changing["bank"]) != before.sha256
        assert same(after, predicted(changing["bank"], TEXTS, top_k=len(labels)))
    assert same(made.classify("mail", TEXTS).result(), predicted(changing["mail"], TEXTS, top_k=2))
    assert len(made._adapters._adapted.peft_config) == 3  # the generations before are gone
    made.stop()


def test_what_cannot_be_used_leaves_the_one_before(changing: dict[str, Path], base: Path) -> None:
    made = engine(changing)
    adapter = changing["bank"] / "adapter"
    whole = {path.name: path.read_bytes() for path in adapter.iterdir()}
    weights = whole["adapter_model.safetensors"]
    broken = {
        "adapter_model.safetensors": weights[: len(weights) // 2],
        "adapter_config.json": whole["adapter_config.json"].replace(b'"r": 4', b'"r": 5'),
        "remora.json": b"{",
    }
    for name, content in broken.items():
        (adapter / name).write_bytes(content)
        with pytest.raises(ModelError) as failure:
            made.reload("bank")
        assert str(adapter) in str(failure.value)
        assert "remora-" not in str(failure.value)
        (adapter / name).write_bytes(whole[name])
    shutil.rmtree(adapter)
    with pytest.raises(ModelError):
        made.reload("bank")
    write_adapter(changing["bank"], base, 1, base_sha256="0" * 64)
    with pytest.raises(ModelError, match="other base"):
        made.reload("bank")
    answer = made.classify("bank", TEXTS).result()
    assert answer.sha256 == hashlib.sha256(b"".join(whole[n] for n in sorted(whole))).hexdigest()
    write_adapter(changing["bank"], base, 1)
    assert same(answer, predicted(changing["bank"], TEXTS, top_k=3))
    assert len(made._adapters._adapted.peft_config) == 3
    made.stop()


def test_adapters_of_two_bases_are_refused(changing: dict[str, Path], base: Path) -> None:
    write_adapter(changing["mail"], base, 2, base_sha256="0" * 64)
    with pytest.raises(ModelError, match="mail was trained on other base weights"):
        engine(changing)


def swap_under_requests(
    folders: dict[str, Path], base: Path, parent: Path, num_swaps: int, num_requests: int
) -> None:
    """Check that an answer is that of the generation whose hash it bears, and of no old one."""
    versions = [write_adapter(parent / f"version-{i}", base, 10 + i) for i in range(4)]
    expected = {sha256(v): predicted(v, TEXTS, top_k=3) for v in versions}
    assert len({best[0][0][1] for best in expected.values()}) == len(versions)
    made = engine(folders)
    live, done = folders["bank"] / "adapter", threading.Event()

    def replace(version: Path) -> str:
        shutil.copytree(version / "adapter", live.with_name("new"))
        live.rename(live.with_name("old"))
        live.with_name("new").rename(live)
        shutil.rmtree(live.with_name("old"))
        assert made.reload("bank")
        return sha256(folders["bank"])

    served = [replace(versions[-1])]
    seen: set[str] = set()
    problems: list[str] = []

    def ask() -> None:
        for i in range(num_requests):
            oldest = len(served) - 1
            answer = made.classify("bank", TEXTS[: 1 + i % 5]).result()
            newest = len(served)  # one more may be served than is noted yet
            if not same(answer, expected[answer.sha256][: len(answer.probabilities)]):
                problems.append("an answer of another generation than it says")
            if answer.sha256 not in served[oldest:] and newest == len(served):
                time.sleep(0.5)
                if answer.sha256 not in served[oldest:]:
                    problems.append("an answer of a generation that was replaced before")
            seen.add(answer.sha256)
        done.set()

    asking = threading.Thread(target=ask)
    asking.start()
    for number in range(num_swaps):
        served += [replace(versions[number % 4])]
    asking.join()
    made.stop()
    assert not problems
    assert done.is_set()
    assert len(seen) > 1


def test_swaps_under_requests(changing: dict[str, Path], base: Path, tmp_path: Path) -> None:
    swap_under_requests(changing, base, tmp_path, num_swaps=8, num_requests=60)


@pytest.mark.durability
def test_200_swaps_under_10_000_requests(
    changing: dict[str, Path], base: Path, tmp_path: Path
) -> None:
    swap_under_requests(changing, base, tmp_path, num_swaps=200, num_requests=10_000)


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs /proc/self/maps")
def test_no_file_of_a_snapshot_stays_mapped(loaded: Engine) -> None:
    """Windows would not delete it, and its disk space would not be free before the process ends."""
    assert loaded.generations
    maps = Path("/proc/self/maps").read_text().splitlines()
    assert not [line for line in maps if "remora-" in line and "adapter_model" in line]


def test_a_folder_that_keeps_changing_is_refused(
    changing: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = changing["bank"] / "adapter"
    old, real = folder.with_name("old"), shutil.copyfile

    def copy(source: Path, target: Path, **settings: bool) -> None:
        real(source, target, **settings)
        if target.name == "remora.json":  # the last
            folder.rename(old)
            shutil.copytree(old, folder, copy_function=real)
            shutil.rmtree(old)

    monkeypatch.setattr(snapshot.shutil, "copyfile", copy)
    changes_ever = pytest.raises(ModelError, match="changes while it is read; try again")
    with changes_ever, snapshot.taken(folder):
        pass


def test_probabilities_sum_to_one(loaded: Engine) -> None:
    assert np.allclose(loaded.classify("bank", TEXTS).result().probabilities.sum(1), 1)
