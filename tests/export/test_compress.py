"""The size that is chosen, and what an adapter of that size does in stock PEFT.

Also covers remora.export.sizes.
"""

from __future__ import annotations

import json
import math
import re
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import peft
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import exporting
from conftest import WORDS
from exporting import labels, refused, remora
from remora.config import ExportConfig
from remora.data.dataset import load_data
from remora.export import distill, truncate
from remora.export.sizes import Trials
from remora.models import saved
from remora.runtime import files, run_directory
from remora.runtime.reporter import Reporter
from remora.tree import scoring

# PEFT still reads an attribute that transformers has renamed.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")

original, place = exporting.original, exporting.place


@pytest.mark.parametrize("tolerance", ["0.5", "100"])
def test_compress_shows_the_frontier_and_keeps_the_smallest_that_is_good_enough(
    place: Path, capsys, tolerance: str
) -> None:
    assert remora("run", "--compress", "--json", "--tolerance", tolerance) == 0
    told = json.loads(capsys.readouterr().out)
    full = sum(path.stat().st_size for path in Path("run/adapter").iterdir())
    assert told["adapter_bytes"] == full
    sizes = [point["num_bytes"] for point in told["frontier"]]
    assert len(sizes) >= 3
    assert sizes == sorted(set(sizes), reverse=True)
    assert sizes[0] == full
    assert told["frontier"][0]["accuracy"] == 1
    assert full // 16 < sizes[-1] <= full // 8  # the next half does not suffice for anything
    base_bytes = Path("base/model.safetensors").stat().st_size
    assert [p["ratio"] for p in told["frontier"]] == pytest.approx([base_bytes / s for s in sizes])
    least = 11 / 12 if tolerance == "0.5" else 0  # half a point is less than a row of 12
    assert told["least_accuracy"] == pytest.approx(least)
    good = [point for point in told["frontier"] if point["accuracy"] >= least]
    chosen = min(good, key=lambda point: point["num_bytes"])
    folder = place / "run" / "compressed"
    assert sum(path.stat().st_size for path in folder.iterdir()) == chosen["num_bytes"]
    assert told["chosen"]["num_bytes"] == told["num_bytes"] == chosen["num_bytes"]
    assert told["full_accuracy"] == 1
    drawn = ElementTree.parse(told["plot"]).getroot()
    assert Path(told["plot"]) == place / "run" / "compressed.svg"
    dots = [dot for dot in drawn.iter() if dot.get("class") == "dot accuracy"]
    assert [float(dot[0].text.split(":")[0]) for dot in dots] == pytest.approx(
        [full / size for size in sizes], rel=1e-3
    )
    # What was measured is what the folder does.
    adapted, prompt, _ = saved.load_adapter(
        folder, base=None, dtype=torch.float32, device=torch.device("cpu")
    )
    scorer = scoring.Scorer(adapted, prompt)
    dataset = load_data(run_directory.read_settings(Path("run")))
    for table, point in ((dataset.validation, chosen), (dataset.test, told["chosen"])):
        found = [prompt.labels[i] for i in scorer.probabilities(table.texts).argmax(1)]
        right = sum(a == b for a, b in zip(found, table.labels, strict=True))
        assert point["accuracy"] == pytest.approx(right / len(table))
        assert point["num_flips"] == len(table) - right  # the full adapter is right everywhere


def test_the_tolerance_decides_the_size(place: Path, capsys) -> None:
    sizes = []
    for tolerance in ("0", "100"):
        assert remora("run", "--compress", "--tolerance", tolerance, "--output", tolerance) == 0
        sizes.append(sum(path.stat().st_size for path in Path(tolerance).iterdir()))
    assert sizes[0] > sizes[1]
    shown = capsys.readouterr().out
    assert shown.count(" chosen\n") == 2
    assert "mean rank" in shown


def test_stock_peft_predicts_the_same_from_a_compressed_adapter(place: Path) -> None:
    assert remora("run", "--compress", "--budget", "13kB", "--output", "out") == 0
    assert sum(path.stat().st_size for path in Path("out").iterdir()) <= 13_000
    stock = peft.PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained("base"), "out"
    ).eval()
    adapted, prompt, card = saved.load_adapter(
        Path("out"), base=None, dtype=torch.float32, device=torch.device("cpu")
    )
    assert card.labels == tuple(sorted(WORDS))
    ids = torch.tensor(prompt.stems(["Where is my card?"]))
    torch.testing.assert_close(
        stock(input_ids=ids).logits, adapted(input_ids=ids).logits, rtol=1e-4, atol=1e-4
    )
    assert [label for label, _ in labels(Path("out"))] == [
        label for label, _ in labels(Path("run"))
    ]


def test_a_ratio_is_of_the_base_models_weights(place: Path, capsys) -> None:
    assert remora("run", "--compress", "--ratio", "15", "--json", "--dtype", "bfloat16") == 0
    told = json.loads(capsys.readouterr().out)
    folder = place / "run" / "compressed"
    size = sum(path.stat().st_size for path in folder.iterdir())
    assert size <= Path("base/model.safetensors").stat().st_size / 15
    assert told["chosen"]["ratio"] >= 15
    assert (told["frontier"], told["plot"], told["dtype"]) == ([], None, "bfloat16")
    stored = load_file(folder / "adapter_model.safetensors").values()
    assert {tensor.dtype for tensor in stored} == {torch.bfloat16}


def test_a_given_size_needs_no_table_and_a_choice_does(place: Path, capsys) -> None:
    Path("data.csv").unlink()
    refused(place, capsys, 3, "give --budget or --ratio", "run", "--compress")
    assert remora("run", "--compress", "--budget", "12kB") == 0


@pytest.fixture
def lessons(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The steps of each time that an adapter learned again."""
    steps: list[int] = []
    real = distill.distill

    def note(*arguments, num_steps, **settings):
        steps.append(num_steps)
        real(*arguments, num_steps=num_steps, **settings)

    monkeypatch.setattr(distill, "distill", note)
    return steps


def test_what_cutting_cost_too_much_learns_again(place: Path, capsys, lessons) -> None:
    assert remora("run", "--compress", "--json") == 0
    assert not lessons
    capsys.readouterr()
    assert remora("run", "--compress", "--distill", "--json", "--output", "learned") == 0
    frontier = json.loads(capsys.readouterr().out)["frontier"]
    learned = [point for point in frontier if point["cut_accuracy"] is not None]
    assert 0 < len(learned) < len(frontier)
    assert all(point["cut_accuracy"] < 1 - 0.5 / 100 for point in learned)
    assert all(point["accuracy"] == 1 for point in frontier if point not in learned)
    num_rows = len(load_data(run_directory.read_settings(Path("run"))).train)
    assert len(lessons) >= len(learned)
    assert set(lessons) == {6 * math.ceil(num_rows / 32)}


def test_learning_again_moves_numbers_in_8_bits(place: Path) -> None:
    adapter = truncate.read(Path("run/adapter"))
    trials = Trials(ExportConfig(Path("run"), compress=True), adapter, 1, Reporter())
    cut = truncate.fit(adapter, 12_000, torch.float8_e4m3fn, {})
    table = load_data(run_directory.read_settings(Path("run"))).train
    learned = trials.distilled(cut, table)
    assert learned.num_bytes == cut.num_bytes
    products = []
    for number, artifact in enumerate((cut, learned)):
        folder = place / str(number)
        folder.mkdir()
        for name, content in artifact.files.items():
            (folder / name).write_bytes(content)
        updates = truncate.read(folder).updates
        products.append([u.left * u.values @ u.right for u in updates.values()])
    moved = [float((a - b).norm() / a.norm()) for a, b in zip(*products, strict=True)]
    assert sum(moved) / len(moved) > 0.2, moved  # 0.02 where the numbers are large


def test_what_learned_to_no_use_is_not_taken(place: Path, capsys, monkeypatch) -> None:
    worse = []
    real = Trials.measure

    def trial(self, artifact, *rows):
        point = real(self, artifact, *rows)
        return replace(point, accuracy=0.0) if any(artifact is each for each in worse) else point

    def distilled(self, artifact, table):
        worse.append(replace(artifact, files=dict(artifact.files)))
        return worse[-1]

    monkeypatch.setattr(Trials, "measure", trial)
    monkeypatch.setattr(Trials, "distilled", distilled)
    assert remora("run", "--compress", "--distill", "--json") == 0
    frontier = json.loads(capsys.readouterr().out)["frontier"]
    assert worse
    assert all(p["accuracy"] > 0 and p["cut_accuracy"] is None for p in frontier)


def test_a_given_size_learns_again_where_it_was_cut(place: Path, capsys, lessons) -> None:
    for budget, count in (("12kB", 1), ("100kB", 1)):  # the second keeps all
        settings = ("--distill", "--budget", budget, "--output", budget)
        assert remora("run", "--compress", *settings) == 0
        assert len(lessons) == count
    Path("data.csv").unlink()
    capsys.readouterr()
    refused(place, capsys, 3, "cannot be read", "run", "--compress", "--distill", "--budget", "9kB")
    assert remora("run", "--compress", "--budget", "12kB", "--output", "cut") == 0
    assert len(lessons) == 1
    for folder, most in (("12kB", 12_000), ("cut", 12_000), ("100kB", 100_000)):
        assert sum(path.stat().st_size for path in Path(folder).iterdir()) <= most
    learned, cut = (truncate.read(Path(name)).updates for name in ("12kB", "cut"))
    assert len(learned) >= len(cut)  # spread over at least as many modules


def test_a_changed_table_is_not_chosen_on(place: Path, capsys) -> None:
    with Path("data.csv").open("a", encoding="utf-8") as file:
        file.write("another card,refund\n")
    refused(place, capsys, 3, "not those that run was trained on", "run", "--compress")


def test_rows_to_choose_on(place: Path, capsys) -> None:
    settings = Path("run/config.toml")
    settings.write_text(
        re.sub("validation_fraction = .*", "validation_fraction = 0.0", settings.read_text())
    )
    summary = load_data(run_directory.read_settings(Path("run"))).summary
    files.write_json(Path("run/data.json"), summary.to_dict())
    refused(place, capsys, 3, "run has no validation rows; give --budget", "run", "--compress")
    figures = json.loads(Path("run/evaluation.json").read_text())
    files.write_json(Path("run/evaluation.json"), figures | {"measured_on": "validation"})
    assert remora("run", "--compress") == 0
    assert "on 12 validation rows" in capsys.readouterr().out


def test_nothing_is_good_enough(place: Path, monkeypatch, capsys) -> None:
    point = Trials.write

    def worse(trials, artifact, folder, table, full):
        return replace(point(trials, artifact, folder, table, full), accuracy=0.5)

    monkeypatch.setattr(Trials, "write", worse)
    refused(place, capsys, 4, "loses more than 0.5 points of accuracy", "run", "--compress")
