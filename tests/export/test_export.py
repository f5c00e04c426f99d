"""What is exported is the same classifier, or is not written: stock transformers and PEFT check."""

from __future__ import annotations

import csv
import io
import json
import math
import os
import re
import resource
import shutil
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from conftest import ARCHITECTURES, WAYS, WORDS, randomize_adapter, tiny_model
from remora.cli import main
from remora.config import ExportConfig, PredictConfig, TrainConfig
from remora.data.dataset import load_data
from remora.data.table import Table
from remora.errors import ConfigError
from remora.export import compress, distill, merge, truncate
from remora.models import loading, lora, saved
from remora.runtime import files, run_directory
from remora.runtime.reporter import Reporter
from remora.serving import predict
from remora.training.run import train
from remora.tree import scoring

# PEFT still reads an attribute that transformers has renamed.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")

MESSAGES = [way.format(word) for way in WAYS for word in WORDS.values()]


@pytest.fixture(scope="module")
def original(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run, its base model and its table in one folder, to be copied."""
    place = tmp_path_factory.mktemp("original")
    shutil.copytree(base, place / "base")
    with (place / "data.csv").open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["text", "label"])
        for i in range(8):
            for label, word in WORDS.items():
                writer.writerows([f"{way.format(word)} {i}", label] for way in WAYS)
    config = TrainConfig(
        str(place / "data.csv"),
        model=str(place / "base"),
        output=place,
        name="run",
        learning_rate=1e-2,
        epochs=6,
        batch_size=8,
        rank=8,
        precision="float32",
        device="cpu",
    )
    result = train(config)
    assert result.metrics.accuracy == 1
    return place


@pytest.fixture
def place(original: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy that a test may change; the paths in it lead there."""
    copied = shutil.copytree(original, tmp_path / "place")
    for path in (copied / "run" / "config.toml", copied / "run" / "adapter" / "remora.json"):
        path.write_text(path.read_text().replace(str(original), str(copied)))
    monkeypatch.chdir(copied)
    return copied


def remora(*arguments: str | Path, verb: str = "export") -> int:
    """Run the command line in this process."""
    try:
        return main([verb, *map(str, arguments), "--device", "cpu"])
    except SystemExit as done:
        return int(done.code or 0)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def refused(place: Path, capsys, code: int, wanted: str, *arguments: str | Path) -> None:
    """An export ends with one line and a code, and leaves every file and folder as it was."""
    before, folders = contents(place), sorted(place.rglob("*"))
    assert remora(*arguments) == code
    captured = capsys.readouterr()
    assert captured.out == ""
    (line,) = [line for line in captured.err.splitlines() if line.strip() and "merging" not in line]
    assert line.startswith("error: ")
    assert wanted in line
    assert contents(place) == before
    assert sorted(place.rglob("*")) == folders


def labels(path: Path) -> list[tuple[str, float]]:
    config = PredictConfig(path, precision="float32", device="cpu", source="messages.txt")
    Path("messages.txt").write_text("\n".join(MESSAGES))
    return [best[0] for _, best in predict.predict_stream(config)]


# Merging


def test_stock_transformers_loads_the_merged_model_alone(place: Path, capsys) -> None:
    ids = torch.tensor([[5, 6, 7, 8, 9]])
    base = AutoModelForCausalLM.from_pretrained("base")
    wanted = peft.PeftModel.from_pretrained(base, "run/adapter").eval()(input_ids=ids).logits
    assert remora("run", "--merge", "--json") == 0
    shutil.rmtree("base")
    told = json.loads(capsys.readouterr().out)
    folder = place / "run" / "merged"
    assert told["directory"] == str(folder)
    assert told["num_bytes"] == sum(path.stat().st_size for path in folder.iterdir())
    assert (told["num_flips"], told["num_rows"], told["measured_on"]) == (0, 12, "test")
    assert 0 <= told["largest_difference"] < 1e-3
    merged = AutoModelForCausalLM.from_pretrained(folder)
    assert merged.dtype == torch.float32
    torch.testing.assert_close(merged(input_ids=ids).logits, wanted, rtol=1e-3, atol=1e-3)


def test_stock_generate_writes_the_labels_that_predict_gives(place: Path) -> None:
    """By the merged model's own settings: a chat model's would draw them, and avoid repetition."""
    chat = {"do_sample": True, "temperature": 0.7, "top_k": 20, "repetition_penalty": 1.1}
    end = json.loads(Path("base/config.json").read_text())["eos_token_id"]
    Path("base/generation_config.json").write_text(json.dumps({**chat, "eos_token_id": end}))
    assert remora("run", "--merge", "--output", "out") == 0
    card = json.loads(Path("out/remora.json").read_text())
    model = AutoModelForCausalLM.from_pretrained("out")
    tokenizer = AutoTokenizer.from_pretrained("out", padding_side="left")
    asked = [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": f"{card['instruction']}\n\n{message}"}],
            tokenize=False,
            add_generation_prompt=True,
        )
        for message in MESSAGES
    ]
    inputs = tokenizer(asked, add_special_tokens=False, padding=True, return_tensors="pt")
    written = model.generate(**inputs)[:, inputs.input_ids.shape[1] :]
    found = tokenizer.batch_decode(written, skip_special_tokens=True)
    assert [text.strip() for text in found] == [label for label, _ in labels(Path("run"))]


def test_the_merged_base_is_the_base_and_the_tokenizer_its_own(place: Path) -> None:
    assert remora("run", "--merge", "--output", "out") == 0
    base, merged = load_file("base/model.safetensors"), load_file("out/model.safetensors")
    adapter = load_file("run/adapter/adapter_model.safetensors")
    assert base.keys() == merged.keys()
    for name, weight in base.items():
        a = adapter.get(f"base_model.model.{name.replace('.weight', '.lora_A.weight')}")
        if a is None:
            assert torch.equal(merged[name], weight)
            continue
        b = adapter[f"base_model.model.{name.replace('.weight', '.lora_B.weight')}"]
        torch.testing.assert_close(merged[name], weight + 4 * (b @ a), rtol=1e-5, atol=1e-5)
        assert not torch.equal(merged[name], weight)
    first, second = (AutoTokenizer.from_pretrained(name) for name in ("base", "out"))
    assert first.chat_template == second.chat_template
    assert first.get_vocab() == second.get_vocab()


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_predict_works_on_a_merged_model_of_any_dtype(place: Path, dtype: str, capsys) -> None:
    assert remora("run", "--merge", "--dtype", dtype, "--output", "out") == 0
    shown = capsys.readouterr().out
    assert "the same label on all 12 test rows" in shown
    assert f"stored in  {dtype}" in shown
    stored = load_file("out/model.safetensors").values()
    assert {tensor.dtype for tensor in stored} == {getattr(torch, dtype)}
    assert json.loads(Path("out/config.json").read_text())["dtype"] == dtype
    wanted = labels(Path("run"))
    shutil.rmtree("base")
    found = labels(Path("out"))
    assert [label for label, _ in found] == [label for label, _ in wanted]
    tolerance = {"float32": 1e-4, "float16": 0.02, "bfloat16": 0.1}[dtype]
    assert [p for _, p in found] == pytest.approx([p for _, p in wanted], abs=tolerance)


def test_weights_are_stored_as_the_base_stores_them(place: Path) -> None:
    config = json.loads(Path("base/config.json").read_text())
    weights = load_file("base/model.safetensors")
    save_file(
        {n: t.bfloat16() for n, t in weights.items()}, "base/model.safetensors", {"format": "pt"}
    )
    Path("base/config.json").write_text(json.dumps({**config, "dtype": "bfloat16"}))
    card = json.loads(Path("run/adapter/remora.json").read_text())
    card["base_sha256"] = files.weights_sha256(Path("base"))
    Path("run/adapter/remora.json").write_text(json.dumps(card))
    assert remora("run", "--merge", "--output", "out") == 0
    stored = load_file("out/model.safetensors").values()
    assert {tensor.dtype for tensor in stored} == {torch.bfloat16}


def test_a_merged_model_needs_no_base_and_is_checked(place: Path, capsys) -> None:
    assert remora("run", "--merge", "--output", "out") == 0
    capsys.readouterr()
    Path("m.txt").write_text("Where is my card?\n")
    assert remora("out", "m.txt", "--model", "base", verb="predict") == 4
    assert "leave out --model" in capsys.readouterr().err
    assert remora("out", "m.txt", verb="predict") == 0
    (row,) = csv.DictReader(io.StringIO(capsys.readouterr().out))
    assert row["label"] == "card arrival"
    shutil.copy("base/model.safetensors", "out/model.safetensors")
    assert remora("out", "m.txt", verb="predict") == 4
    assert "are not those that were written" in capsys.readouterr().err


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_fast_layers_do_not_disturb_merging(architecture: str, tmp_path: Path) -> None:
    ids = torch.tensor([[5, 6, 7, 8, 9]])
    base = tiny_model(architecture).eval()
    plain = base(input_ids=ids).logits
    adapted = lora.add_adapter(base, rank=4, alpha=10, dropout=0.1).double()
    randomize_adapter(adapted)
    wanted = adapted.eval()(input_ids=ids).logits.detach()
    assert not torch.allclose(wanted, plain, atol=1e-3)
    adapted.merge_and_unload().save_pretrained(tmp_path)
    stock = AutoModelForCausalLM.from_pretrained(
        tmp_path, dtype=torch.float64, attn_implementation=loading._attention(base.config)
    )
    torch.testing.assert_close(stock.eval()(input_ids=ids).logits, wanted, rtol=1e-6, atol=1e-6)


def broken_merge(monkeypatch, change) -> None:
    """Let PEFT change its adapter before it merges."""
    stock = peft.tuners.lora.LoraModel.merge_and_unload

    def changed(tuner, *args, **kwargs):
        with torch.no_grad():
            for layer in tuner.model.modules():
                if isinstance(layer, peft.tuners.lora.LoraLayer):
                    change(layer)
        return stock(tuner, *args, **kwargs)

    monkeypatch.setattr(peft.tuners.lora.LoraModel, "merge_and_unload", changed)


def scale(factor):
    def change(layer):
        layer.scaling["default"] *= factor

    return change


@pytest.mark.parametrize(
    ("factor", "dtype"),
    [(0, "float32"), (0, "bfloat16"), (0.97, "float32"), (1.05, "float32"), (2, "bfloat16")],
)
def test_a_merge_that_does_nothing_or_scales_wrongly_is_refused(
    place: Path, monkeypatch, capsys, factor: float, dtype: str
) -> None:
    broken_merge(monkeypatch, scale(factor))
    refused(place, capsys, 4, "the merged model is not the", "run", "--merge", "--dtype", dtype)


def test_a_merge_that_forgets_the_adapter_says_what_it_flips(place: Path, monkeypatch, capsys):
    monkeypatch.setattr(
        peft.tuners.lora.LoraModel,
        "merge_and_unload",
        peft.tuners.lora.LoraModel.unload,
    )
    assert remora("run", "--merge") == 4
    line = capsys.readouterr().err.splitlines()[-1]
    base = AutoModelForCausalLM.from_pretrained("base")
    _, prompt, _ = saved.load_adapter(
        Path("run"), base=None, dtype=torch.float32, device=torch.device("cpu")
    )
    dataset = load_data(run_directory.read_settings(Path("run")))
    base.requires_grad_(False)
    flips = 0
    for stem, true in zip(prompt.stems(dataset.test.texts), dataset.test.labels, strict=True):
        scores = []
        for answer in prompt.answers:
            logits = base(input_ids=torch.tensor([[*stem, *answer]])).logits[0].log_softmax(-1)
            places = range(len(stem) - 1, len(stem) + len(answer) - 1)
            scores.append(sum(float(logits[i, t]) for i, t in zip(places, answer, strict=True)))
        flips += prompt.labels[int(np.argmax(scores))] != true
    assert flips > 0
    assert f"{flips} of 12 rows get another label" in line


def test_a_merge_that_is_not_finite_is_refused(place: Path, monkeypatch, capsys) -> None:
    broken_merge(monkeypatch, scale(float("nan")))
    refused(place, capsys, 4, "weights that are no numbers", "run", "--merge")


def test_what_is_compared_is_what_lies_on_the_disk(place: Path, monkeypatch, capsys) -> None:
    stock = PreTrainedModel.save_pretrained

    def broken(saved, folder, **kwargs):
        stock(saved, folder, **kwargs)
        weights = load_file(folder / "model.safetensors")
        weights["model.layers.1.mlp.down_proj.weight"] *= 0.9
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})

    monkeypatch.setattr(PreTrainedModel, "save_pretrained", broken)
    refused(place, capsys, 4, "the merged model is not the adapter", "run", "--merge")


def test_the_less_an_adapter_does_the_nearer_must_the_merge_be(
    place: Path, monkeypatch, capsys
) -> None:
    path = Path("run/adapter/adapter_model.safetensors")
    weights = {n: 0.3 * t if "lora_B" in n else t for n, t in load_file(path).items()}
    save_file(weights, path)
    assert remora("run", "--merge", "--dtype", "float32", "--json", "--output", "out") == 0
    allowed = json.loads(capsys.readouterr().out)["allowed"]
    assert 0.001 < allowed <= 0.01
    broken_merge(monkeypatch, scale(0))
    arguments = "run", "--merge", "--dtype", "bfloat16"
    assert remora(*arguments) == 4
    moved = float(re.search(r"differ by up to (\S+)", capsys.readouterr().err)[1])
    assert moved < 0.3  # what bfloat16 alone would be allowed
    refused(place, capsys, 4, "the merged model is not the adapter", *arguments)


def test_an_adapter_that_does_nothing_is_refused(place: Path, capsys) -> None:
    path = Path("run/adapter/adapter_model.safetensors")
    weights = {n: 0 * t if "lora_B" in n else t for n, t in load_file(path).items()}
    save_file(weights, path)
    refused(place, capsys, 4, "could not be told from its base; train it", "run", "--merge")


def test_only_near_ties_may_flip() -> None:
    wanted = np.array([[0.50, 0.49, 0.01], [0.6, 0.3, 0.1], [0.2, 0.3, 0.5]])
    flipped_tie = wanted.copy()
    flipped_tie[0] = [0.495, 0.496, 0.009]
    parity = merge._compare(wanted, flipped_tie, dtype="bfloat16", allowed=0.3)
    assert (parity.num_flips, parity.num_near_ties, parity.holds) == (1, 1, True)
    assert parity.largest_difference == pytest.approx(np.log(0.010 / 0.009))
    strict = merge._compare(wanted, flipped_tie, dtype="float32", allowed=0.01)
    assert (strict.num_flips, strict.num_near_ties, strict.holds) == (1, 0, False)
    clear = wanted.copy()
    clear[1] = [0.44, 0.45, 0.11]  # within 0.5 of each other now, and 0.7 apart before
    parity = merge._compare(wanted, clear, dtype="bfloat16", allowed=0.5)
    assert (parity.num_flips, parity.num_near_ties, parity.holds) == (1, 0, False)


def test_what_no_answer_depends_on_is_not_compared() -> None:
    wanted = np.array([[0.9, 0.1 - 1e-9, 1e-9]])
    assert merge._compare(
        wanted, np.array([[0.9, 0.1 - 1e-6, 1e-6]]), dtype="float32", allowed=0.01
    ).holds


def test_merging_needs_the_rows_but_not_the_table(place: Path) -> None:
    Path("data.csv").unlink()
    assert remora("run", "--merge") == 0


# Compressing


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
    assert full // 32 < sizes[-1] <= full // 16  # the next half does not suffice for anything
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
    trials = compress._Trials(ExportConfig(Path("run"), compress=True), adapter, 1, Reporter())
    cut = truncate.fit(adapter, 12_000, torch.float8_e4m3fn, {})
    table = load_data(run_directory.read_settings(Path("run"))).train
    learned = trials.distilled(cut, Table(table.texts * 20, table.labels * 20))
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
    assert sum(moved) / len(moved) > 0.03, moved  # half of that where the numbers are large


def test_what_learned_to_no_use_is_not_taken(place: Path, capsys, monkeypatch) -> None:
    worse = []
    real = compress._Trials.trial

    def trial(self, artifact, *rows):
        point = real(self, artifact, *rows)
        return replace(point, accuracy=0.0) if any(artifact is each for each in worse) else point

    def distilled(self, artifact, table):
        worse.append(replace(artifact, files=dict(artifact.files)))
        return worse[-1]

    monkeypatch.setattr(compress._Trials, "trial", trial)
    monkeypatch.setattr(compress._Trials, "distilled", distilled)
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

    point = compress._Trials.point

    def worse(trials, artifact, folder, table, full):
        return replace(point(trials, artifact, folder, table, full), accuracy=0.5)

    monkeypatch.setattr(compress._Trials, "point", worse)
    refused(place, capsys, 4, "loses more than 0.5 points of accuracy", "run", "--compress")


# Bad input


def test_no_pickle_is_read(place: Path, monkeypatch, capsys) -> None:
    def fail(*args, **kwargs):
        raise AssertionError("pickle")

    monkeypatch.setattr(torch, "load", fail)
    assert remora("run", "--merge") == 0
    assert remora("run", "--compress", "--budget", "12kB") == 0
    capsys.readouterr()
    Path("run/adapter/adapter_model.safetensors").rename("run/adapter/adapter_model.bin")
    for what in (["--merge"], ["--compress", "--budget", "12kB"]):
        refused(place, capsys, 4, "has no adapter_model.safetensors", "run", *what, "--output", "x")


BAD = {
    "neither": (2, "neither merge nor compress is given; give --merge or --compress", []),
    "both": (2, "merge and compress are both given; give", ["--merge", "--compress"]),
    "a budget to merge": (2, "budget and ratio need compress", ["--merge", "--budget", "3MB"]),
    "a merge that learns": (2, "distill needs compress", ["--merge", "--distill"]),
    "8 bits merged": (2, "dtype float8 needs compress", ["--merge", "--dtype", "float8"]),
    "two sizes": (2, "give one of them", ["--compress", "--budget", "3MB", "--ratio", "9"]),
    "no amount": (2, "give an amount such as", ["--compress", "--budget", "lots"]),
    "no ratio": (2, "ratio is 0.0; give", ["--compress", "--ratio", "0"]),
    "no tolerance": (2, "tolerance is -1.0; give", ["--compress", "--tolerance", "-1"]),
    "no tokens": (2, "micro_batch_tokens is 0", ["--merge", "--micro-batch-tokens", "0"]),
    "impossible budget": (2, "1,000 bytes do not suffice", ["--compress", "--budget", "1kB"]),
    "impossible ratio": (2, "smallest takes", ["--compress", "--ratio", "1e6"]),
    "output in use": (2, "exists already; give another --output", ["--merge", "--output", "base"]),
    "output is a file": (2, "exists already", ["--compress", "--output", "data.csv"]),
    "another base": (4, "was trained on other weights", ["--merge", "--model", "other"]),
    "another base, compressed": (
        4,
        "was trained on other weights",
        ["--compress", "--budget", "12kB", "--model", "other"],
    ),
    "no base": (4, "there is no folder ./none", ["--merge", "--model", "./none"]),
    "a run below a file": (5, "cannot write to", ["--merge", "--output", "data.csv/x"]),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_line_and_leaves_nothing(name: str, place: Path, capsys) -> None:
    code, wanted, arguments = BAD[name]
    shutil.copytree("base", "other")
    weights = load_file("other/model.safetensors")
    weights["model.norm.weight"] *= 2
    save_file(weights, "other/model.safetensors", metadata={"format": "pt"})
    refused(place, capsys, code, wanted, "run", *arguments)


@pytest.mark.parametrize("what", ["--merge", "--compress"])
def test_what_is_no_run_is_refused(place: Path, capsys, what: str) -> None:
    refused(place, capsys, 3, "give the directory of a finished run", "base", what)
    shutil.rmtree("run/adapter")
    refused(place, capsys, 4, "is no adapter of Remora", "run", what)


@pytest.mark.parametrize("what", [["--merge"], ["--compress", "--budget", "12kB"]])
def test_a_base_that_was_moved_is_given(place: Path, capsys, what: list[str]) -> None:
    Path("base").rename("moved")
    refused(place, capsys, 4, "there is no folder", "run", *what)
    assert remora("run", *what, "--model", "moved", "--output", "out") == 0


@pytest.mark.parametrize("what", [["--merge"], ["--compress", "--budget", "12kB"]])
def test_the_tokens_at_once_are_limited(place: Path, monkeypatch, what: list[str]) -> None:
    limits = set()
    stock = scoring.Scorer.__init__

    def note(scorer, *args, max_tokens, **kwargs):
        limits.add(max_tokens)
        stock(scorer, *args, max_tokens=max_tokens, **kwargs)

    monkeypatch.setattr(scoring.Scorer, "__init__", note)
    assert remora("run", *what, "--micro-batch-tokens", "77") == 0
    assert limits == {77}


def test_an_empty_folder_may_be_the_output(place: Path) -> None:
    Path("out").mkdir()
    assert remora("run", "--compress", "--budget", "12kB", "--output", "out") == 0
    assert Path("out/remora.json").is_file()


@pytest.mark.parametrize("what", ["--merge", "--compress"])
def test_a_full_disk_is_one_line_and_leaves_nothing(place: Path, capsys, what: str) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    budget = ["--budget", "12kB"] if what == "--compress" else []
    resource.setrlimit(resource.RLIMIT_FSIZE, (8_000, hard))
    try:
        refused(place, capsys, 5, "cannot write to", "run", what, *budget)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_files_are_on_the_disk_before_they_take_their_place(place: Path, monkeypatch) -> None:
    synced = []

    def note(handle: int) -> None:
        path = Path(os.readlink(f"/proc/self/fd/{handle}"))
        synced.append((path.name, Path("out").exists()))

    monkeypatch.setattr(os, "fsync", note)
    assert remora("run", "--compress", "--budget", "12kB", "--output", "out") == 0
    names = {"adapter_model.safetensors", "adapter_config.json", "remora.json", "out"}
    assert {name for name, there in synced if not there} == names
    assert synced[-1] == ("place", True)


def test_several_problems_are_told_at_once() -> None:
    with pytest.raises(ConfigError, match=r"merge and compress .*; ratio is -1"):
        ExportConfig(Path("run"), ratio=-1)
