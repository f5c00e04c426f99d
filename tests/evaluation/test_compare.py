"""Runs side by side, against scipy's tests and hand counts, through the real command line."""

from __future__ import annotations

import csv
import json
from dataclasses import replace
from pathlib import Path

import pytest
from scipy.stats import binomtest

from conftest import WAYS, WORDS
from remora.cli import main
from remora.config import CompareConfig, TrainConfig
from remora.errors import ConfigError, DataError
from remora.evaluation import compare
from remora.evaluation.metrics import measure
from remora.evaluation.multi_label import measure_sets
from remora.evaluation.next_steps import after_comparison
from remora.evaluation.predictions import write_predictions
from remora.runtime import files
from remora.training.run import train

TRUE = ["a", "b", "c", "d"] * 25


def wrong(*rows: int) -> list[str]:
    """Predictions that take the label after the true one on some rows."""
    return ["abcda"["abcd".index(t) + 1] if i in rows else t for i, t in enumerate(TRUE)]


def write_run(
    path: Path,
    predicted: list[str],
    *,
    base_bytes: int = 1000,
    baseline: list[str] | None = None,
    true: list[str] = TRUE,
    method: str = "lora",
) -> Path:
    baseline = baseline or wrong(*range(60))
    path.mkdir()
    labels = list("abcd")
    ours, theirs = (measure(labels, true, p).to_dict() for p in (predicted, baseline))
    figures = {
        "method": method,
        "metrics": ours,
        "measured_on": "test",
        "p_value": 0.5,
        "baseline": {"description": "TF-IDF + linear SVM", "seconds": 0.5, "metrics": theirs},
        "parameters": {"trainable": 5, "total": 1000},
        "base_bytes": base_bytes,
        "adapter_bytes": 50,
        "examples_per_second": 12.5,
        "peak_memory_bytes": 3_000_000,
        "train_seconds": 60.0,
    }
    files.write_json(path / "evaluation.json", figures)
    texts = [f"={i}" for i in range(len(true))]
    write_predictions(path / "predictions.csv", texts, true, predicted, [0.9] * len(true), baseline)
    return path


@pytest.fixture
def runs(tmp_path: Path) -> tuple[Path, Path]:
    small = write_run(tmp_path / "small", wrong(*range(12)))
    big = write_run(tmp_path / "big", wrong(*range(2), *range(12, 14)), base_bytes=9000)
    return small, big


def test_p_values_are_scipys_and_overlap_is_counted(runs) -> None:
    found = compare.compare_runs(CompareConfig(runs))
    assert [each.name for each in found.contenders] == ["TF-IDF + linear SVM", "small", "big"]
    pair = next(p for p in found.pairs if (p.first, p.second) == ("big", "small"))
    assert (pair.only_first_right, pair.only_second_right) == (10, 2)
    assert pair.p_value == pytest.approx(binomtest(2, 12).pvalue)
    assert pair.difference == pytest.approx(0.08)
    assert (pair.both_wrong, pair.same_wrong_label) == (2, 2)
    assert pair.both_wrong_by_chance == pytest.approx(100 * 0.12 * 0.04)
    chance = 0.12 * 0.04 + 0.88 * 0.96
    assert pair.error_consistency == pytest.approx((0.88 - chance) / (1 - chance))
    assert found.contenders[2].trainable_share == 0.005


def test_a_speed_that_was_not_measured_is_left_blank(runs, capsys) -> None:
    path = runs[0] / "evaluation.json"
    figures = json.loads(path.read_text()) | {"examples_per_second": 0.0}  # of two or three steps
    path.write_text(json.dumps(figures))
    assert remora("compare", *runs) == 0
    shown = capsys.readouterr().out
    assert "12.5" in shown
    assert " 0.0 " not in shown
    found = compare.compare_runs(CompareConfig(runs))
    assert [each.examples_per_second for each in found.contenders] == [None, None, 12.5]


def test_error_consistency_is_scikit_learns_kappa(runs) -> None:
    from sklearn.metrics import cohen_kappa_score

    found = compare.compare_runs(CompareConfig(runs))
    pair = next(p for p in found.pairs if p.second == "small")
    right = [[a == t for a, t in zip(p, TRUE, strict=True)] for p in map(predictions, runs)]
    assert pair.error_consistency == pytest.approx(cohen_kappa_score(*right))


def test_full_lora_and_baseline_of_one_base(base: Path, tmp_path: Path, capsys) -> None:
    """Three contenders that were really trained; p-values as scipy has them on their files."""
    rows = [(w.format(word), label) for label, word in WORDS.items() for w in WAYS for _ in "ab"]
    table = tmp_path / "table.csv"
    with table.open("w", newline="") as file:
        csv.writer(file).writerows([("text", "label"), *rows * 2])
    common = {"model": str(base), "output": tmp_path, "test": str(table), "device": "cpu"}
    runs = [
        train(
            TrainConfig(
                str(table), method=method, name=method, max_steps=steps, seed=seed, **common
            )
        ).directory
        for method, steps, seed in (("full", 2, 0), ("lora", 1, 0))
    ]
    capsys.readouterr()
    found = compare.compare_runs(CompareConfig((*runs,)))
    true = [label for _, label in rows * 2]
    with (runs[0] / "predictions.csv").open(newline="") as file:
        answers = {"TF-IDF + linear SVM": [row["baseline"] for row in csv.DictReader(file)]}
    answers |= {run.name: predictions(run) for run in runs}
    assert {each.name for each in found.contenders} == set(answers)
    assert len(found.pairs) == 3
    for pair in found.pairs:
        right = [
            [a == t for a, t in zip(answers[name], true, strict=True)]
            for name in (pair.first, pair.second)
        ]
        first, second = (
            sum(x and not y for x, y in zip(*order, strict=True)) for order in (right, right[::-1])
        )
        assert (pair.only_first_right, pair.only_second_right) == (first, second)
        wanted = binomtest(first, first + second).pvalue if first + second else 1.0
        assert pair.p_value == pytest.approx(wanted, rel=1e-12)
        assert pair.adjusted_p_value >= pair.p_value
    assert any(pair.p_value < 0.05 for pair in found.pairs)
    shares = {each.name: each.trainable_share for each in found.contenders}
    assert shares["full"] == 1
    assert 0 < shares["lora"] < 0.5


def test_a_model_that_trained_in_all_weights_needs_no_base(runs, tmp_path: Path) -> None:
    full = write_run(tmp_path / "full", wrong(0), base_bytes=9000, method="full")
    found = {
        each.name: each for each in compare.compare_runs(CompareConfig((*runs, full))).contenders
    }
    assert found["big"].num_bytes == 9050  # base and adapter
    assert found["full"].num_bytes == found["full"].artifact_bytes == 50


def remora(*arguments: str | Path) -> int:
    """Run the command line in this process."""
    try:
        return main([*map(str, arguments)])
    except SystemExit as done:
        return int(done.code or 0)


def predictions(path: Path) -> list[str]:
    with (path / "predictions.csv").open(newline="") as file:
        return [row["predicted"] for row in csv.DictReader(file)]


def test_the_answer_turns_on_whether_the_difference_may_be_chance(tmp_path: Path) -> None:
    small = write_run(tmp_path / "small", wrong(*range(12)))
    like = write_run(tmp_path / "like", wrong(*range(11)), base_bytes=9000)
    far = write_run(tmp_path / "far", wrong(0), base_bytes=9000)
    answer = compare.compare_runs(CompareConfig((small, like))).answer
    assert answer.startswith("The bigger model does not earn its keep: the lead of like over the")
    assert "small may be chance (+1.0 points" in answer
    answer = compare.compare_runs(CompareConfig((far, small))).answer
    assert answer.startswith("The bigger model earns its keep: far is better than small")
    largest = write_run(tmp_path / "largest", wrong(*range(21)), base_bytes=90_000)
    answer = compare.compare_runs(CompareConfig((far, small, largest))).answer
    assert answer.startswith("The bigger model earns its keep: far is better than small")
    assert answer.endswith(" largest, bigger still, is 20.0 points worse.")
    strong = replace(CompareConfig((small,)), runs=(write_run(tmp_path / "x", wrong(*range(70))),))
    assert compare.compare_runs(strong).answer == (
        "No bigger model earns its keep: TF-IDF + linear SVM is the most accurate, and none is "
        "smaller. x, bigger still, is 10.0 points worse."
    )


def test_of_runs_of_one_size_none_is_called_bigger(tmp_path: Path) -> None:
    """For instance two sizes of a learning curve."""
    fewer, more = write_run(tmp_path / "fewer", wrong(*range(12))), write_run(tmp_path / "m", TRUE)
    answer = compare.compare_runs(CompareConfig((fewer, more))).answer
    assert answer.startswith("Neither is bigger, and one is better: m is better than fewer")
    like = write_run(tmp_path / "like", wrong(*range(11)))
    answer = compare.compare_runs(CompareConfig((fewer, like))).answer
    assert answer.startswith("Neither is bigger: the lead of like over fewer may be chance")
    # Adapters of one base, of which one takes a few bytes more
    figures = json.loads((like / "evaluation.json").read_text())
    larger = figures["adapter_bytes"] + figures["base_bytes"] // 20
    files.write_json(like / "evaluation.json", figures | {"adapter_bytes": larger})
    assert compare.compare_runs(CompareConfig((fewer, like))).answer == answer


def test_only_what_is_smaller_is_called_so(tmp_path: Path) -> None:
    first, second = (
        write_run(tmp_path / name, wrong(*range(n)), baseline=wrong(*range(60)))
        for name, n in (("first", 8), ("second", 10))
    )
    answer = compare.compare_runs(CompareConfig((first, second))).answer
    assert answer.startswith("The bigger model earns its keep: first is better than TF-IDF")
    assert answer.endswith(
        "second, of the same size, is 2.0 points worse, which may be chance (p = 0.5)."
    )
    assert "smaller" not in answer
    third = write_run(tmp_path / "third", TRUE, baseline=wrong(*range(60)))
    found = compare.compare_runs(CompareConfig((first, second, third), bar=0.9))
    assert "third is better than first and every other one that is no bigger (" in found.answer
    assert found.bar is not None
    assert found.bar.startswith("first is one of the smallest that reach 90.0%: 92.00%")
    for run in (first, second):
        figures = json.loads((run / "evaluation.json").read_text())
        files.write_json(run / "evaluation.json", figures | {"baseline": None})
    alike = compare.compare_runs(CompareConfig((first, second)))
    assert alike.answer == (
        "None is bigger: first is the most accurate, and none is smaller. second, of the same "
        "size, is 2.0 points worse, which may be chance (p = 0.5)."
    )
    assert alike.by_label is not None
    assert (alike.by_label.first, alike.by_label.second) == ("second", "first")
    alone = compare.compare_runs(CompareConfig((first,)))
    assert alone.answer == "There is nothing to compare first with."
    assert alone.by_label is None


def test_bar_volume_and_cost_through_the_command_line(runs, capsys) -> None:
    assert remora("compare", *runs, "--bar", "0.85") == 0
    shown = capsys.readouterr().out
    assert "small is the smallest that reaches 85.0%: 88.00%, but its 95% interval starts" in shown
    assert "The bigger model" in shown
    assert "mistakes that every run makes" not in shown  # there is none twice
    assert remora("compare", runs[0]) == 0
    assert "    3  a predicted as b" in capsys.readouterr().out
    arguments = ["--bar", "0.93", "--json", "--volume", "10000", "--cost-per-error", "0.5"]
    assert remora("compare", *runs, *arguments) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["bar"].startswith("big is the smallest that reaches 93.0%: 96.00%")
    assert "gets 800 more right than small" in found["value"]
    assert "worth 400.00" in found["value"]
    assert found["shared_mistakes"][0] == {"true": "a", "predicted": "b", "count": 1}
    none = compare.compare_runs(CompareConfig(runs, bar=0.99))
    assert none.bar == "None reaches 99.0%; big comes closest with 96.00%."


def of_sets(*predicted: tuple[str, int]) -> list[str]:
    """Return predicted sets, each as often as its number says."""
    return [given for given, count in predicted for _ in range(count)]


def write_run_of_sets(path: Path, true: list[str], predicted: list[str], size: int) -> Path:
    """Write a run of several labels; its baseline gives every row the label a."""
    baseline = ['["a"]'] * len(true)
    ours, theirs = (measure_sets(list("abc"), true, each) for each in (predicted, baseline))
    write_run(path, TRUE, base_bytes=size)
    figures = json.loads((path / "evaluation.json").read_text(encoding="utf-8"))
    figures["metrics"] = ours.to_dict()
    figures["baseline"]["metrics"] = theirs.to_dict()
    files.write_json(path / "evaluation.json", figures)
    files.write_text(path / "config.toml", TrainConfig("data.csv", model="nano").to_toml())
    texts = [f"={i}" for i in range(len(true))]
    write_predictions(path / "predictions.csv", texts, true, predicted, [0.9] * len(true), baseline)
    return path


def test_several_labels_are_compared_by_micro_f1(tmp_path: Path, capsys) -> None:
    whole, two = '["a", "b", "c"]', '["a", "b"]'
    true = of_sets((whole, 100))
    # More rows with all labels right, and yet half of all labels are missing
    rough = write_run_of_sets(tmp_path / "rough", true, of_sets((whole, 50), ("[]", 50)), 1000)
    fine = write_run_of_sets(tmp_path / "fine", true, of_sets((whole, 30), (two, 70)), 9000)
    found = compare.compare_runs(CompareConfig((rough, fine), bar=0.8, volume=1000))
    assert found.measure == "micro-F1"
    by_name = {each.name: each for each in found.contenders}
    assert by_name["rough"].accuracy == 0.5 > by_name["fine"].accuracy == 0.3
    assert by_name["fine"].score == pytest.approx(2 * 230 / 530)
    assert by_name["TF-IDF + linear SVM"].score == pytest.approx(2 * 100 / 400)
    pair = next(each for each in found.pairs if (each.first, each.second) == ("fine", "rough"))
    assert pair.difference == pytest.approx(2 * 230 / 530 - 2 * 150 / 450)
    assert pair.difference_interval[0] > 0.1
    assert pair.p_value < 0.001
    assert (pair.only_first_right, pair.only_second_right) == (0, 20)
    assert "earns its keep: fine is better than rough" in found.answer
    assert "points of micro-F1" in found.answer
    assert found.bar == "fine is the smallest that reaches 80.0% micro-F1: 86.79%."
    assert found.value is not None
    assert "gets -200 more right in all labels than rough" in found.value
    assert after_comparison(found, (rough, fine))[0].sentence == "Take fine."
    # On the terminal, as JSON, on a page
    assert remora("compare", rough, fine, "--report", tmp_path / "c.html") == 0
    shown = capsys.readouterr().out
    assert "all labels right" in shown.splitlines()[0]
    assert "fine over rough: +20.13 points of micro-F1" in shown
    assert "(approximate randomization test; " in shown
    page = (tmp_path / "c.html").read_text(encoding="utf-8")
    assert "All labels right" in page
    assert "p: approximate randomization test of it" in page
    assert remora("compare", rough, fine, "--json") == 0
    assert json.loads(capsys.readouterr().out)["measure"] == "micro-F1"


def test_runs_with_other_rows_are_refused(runs, tmp_path: Path, capsys) -> None:
    turned = ["b", "a", *TRUE[2:]]
    other = write_run(tmp_path / "other", TRUE, true=turned)
    assert remora("compare", runs[0], other) == 3
    told = capsys.readouterr().err.strip()
    assert "differ, first in row 1; train both with the same --test table" in told
    fewer = write_run(tmp_path / "fewer", TRUE[:99], true=TRUE[:99], baseline=TRUE[:99])
    with pytest.raises(DataError, match=r"measured on 100 rows, .* on 99; train both"):
        compare.compare_runs(CompareConfig((runs[0], fewer)))


def test_what_is_no_finished_run_is_refused(runs, tmp_path: Path) -> None:
    (runs[1] / "predictions.csv").unlink()
    with pytest.raises(DataError, match=r"big has no predictions.csv; give the directory of"):
        compare.compare_runs(CompareConfig(runs))
    (runs[0] / "evaluation.json").write_text("{}")
    with pytest.raises(DataError, match=r"the figures in .* are broken .*; train it again"):
        compare.compare_runs(CompareConfig(runs[:1]))
    with pytest.raises(ConfigError, match="a run is given twice"):
        compare.compare_runs(CompareConfig((runs[0], runs[0])))


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"bar": 93.0}, "bar is 93.0; give a share"),
        ({"volume": 0}, "volume is 0; give"),
        ({"volume": 1, "cost_per_error": -1.0}, "cost_per_error is -1.0; give"),
        ({"cost_per_error": 1.0}, "cost_per_error is given without volume; give both"),
        ({"runs": ()}, "no run is given"),
    ],
)
def test_wrong_settings_are_refused(settings, told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        CompareConfig(**{"runs": (Path("run"),), **settings})
