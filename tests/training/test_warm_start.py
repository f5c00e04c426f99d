"""`--from`: a run that begins with another one's adapter, and labels that join."""

from __future__ import annotations

import csv
import json
import shutil
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from conftest import WAYS, WORDS, call
from remora.config import ExportConfig, TrainConfig
from remora.data.dataset import Dataset, load_data
from remora.errors import ConfigError, DataError, ModelError
from remora.evaluation import results
from remora.export import gguf, vllm
from remora.models import lora, metadata, saved
from remora.runtime.reporter import Reporter
from remora.training.run import train
from remora.training.session import open_session

OLD = list(WORDS)[:-1]
NEW = list(WORDS)[-1]
RATE = 1e-2


def write(path: Path, labels: list[str], repeats: int = 6) -> Path:
    with path.open("w", newline="", encoding="utf-8") as file:
        rows = csv.writer(file)
        rows.writerow(["text", "label"])
        for number in range(repeats):
            for label in labels:
                rows.writerows([f"{way.format(WORDS[label])} {number}", label] for way in WAYS)
    return path


@pytest.fixture(scope="module")
def place(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a run on all labels but one, and the tables of that run and of the next."""
    folder = tmp_path_factory.mktemp("warm")
    write(folder / "old.csv", OLD)
    write(folder / "all.csv", [*OLD, NEW])
    train(settings(folder, base, folder / "old.csv", name="first", epochs=6, baselines=("none",)))
    return folder


def settings(place: Path, base: Path, data: Path, **others) -> TrainConfig:
    plain = {"learning_rate": RATE, "batch_size": 8, "precision": "float32", "device": "cpu"}
    plain |= {"model": str(base), "output": place / "runs", "rank": 8, "dropout": 0.0}
    return TrainConfig(str(data), **{**plain, **others})


@pytest.fixture
def config(place: Path, base: Path) -> TrainConfig:
    return settings(place, base, place / "all.csv", start_from=str(place / "runs" / "first"))


def test_it_begins_with_the_runs_weights_and_answers(config: TrainConfig, place: Path) -> None:
    said: list[str] = []
    reporter = Reporter()
    reporter.say = said.append  # type: ignore[method-assign]
    adapter = place / "runs" / "first" / "adapter"
    with open_session(config, load_data(config), reporter=reporter) as session:
        weights = load_file(adapter / "adapter_model.safetensors")
        for path, layer in lora.lora_layers(session.model):
            for part in ("lora_A", "lora_B"):
                own = getattr(layer, part)["default"].weight
                assert own.requires_grad
                assert torch.equal(own, weights[f"{path}.{part}.weight"])
        before = metadata.read_card(adapter)
        answers = dict(zip(session.prompt.labels, session.prompt.answers, strict=True))
        assert [list(answers[label]) for label in OLD] == [
            before.rendered["answers"][before.labels.index(label)] for label in OLD
        ]
        assert NEW in answers
    (line,) = (line for line in said if line.startswith("beginning with the adapter"))
    assert f"{len(OLD)} labels are known, 1 join" in line


def test_rows_that_the_run_has_learned_are_not_held_out(config: TrainConfig, place: Path) -> None:
    first = load_data(replace(config, data=str(place / "old.csv"), start_from=None))
    learned = {*first.train.texts}
    rows = load_data(config)
    assert rows.test is not None
    held_out = {*rows.test.texts, *rows.validation.texts}
    assert not held_out & learned
    assert set(rows.test.labels) == set(WORDS)
    without = load_data(replace(config, start_from=None))
    assert {*without.test.texts, *without.validation.texts} & learned
    assert len(rows.train) == len(without.train)


def test_the_text_columns_are_those_of_the_run(tmp_path: Path) -> None:
    """What a run leaves is written here, without training one."""
    rows = [
        (f"about {label}", f"{n} of {label}", f"note {n}", label)
        for n in range(20)
        for label in OLD
    ]

    config = partial(TrainConfig, model="m")

    def table(*names: str) -> str:
        with (path := tmp_path / "t.csv").open("w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows([names, *rows])
        return str(path)

    def after(*columns: str) -> Dataset:
        settings = config(table("title", "body", "text", "label"), text_column=columns)
        summary, run = load_data(settings).summary, tmp_path / "run"
        run.mkdir(exist_ok=True)
        (run / "config.toml").write_text(settings.to_toml(), encoding="utf-8")
        (run / "data.json").write_text(json.dumps(summary.to_dict()), encoding="utf-8")
        return load_data(config(settings.data, start_from=str(run)))

    for columns in (("title", "body"), ("body",)):
        found = after(*columns)
        assert found.summary.text_columns == columns
        first = load_data(config(found.summary.source, text_column=columns))
        assert not {*found.test.texts, *found.validation.texts} & {*first.train.texts}
    # Of one column the name is not read, so another may stand for it
    begun = str(tmp_path / "run")
    other = config(table("title", "x", "text", "label"), start_from=begun)
    assert load_data(other).summary.text_columns == ("text",)
    after("title", "body")
    source = table("title", "x", "text", "label")
    with pytest.raises(
        DataError, match=r"no column 'body', and the run .* reads 'title', 'body'; "
    ):
        load_data(config(source, start_from=begun))
    named = config(source, start_from=begun, text_column=("title", "x"))
    assert load_data(named).summary.text_columns == ("title", "x")
    (tmp_path / "run" / "data.json").unlink()  # an adapter alone tells its columns in its card
    (tmp_path / "run" / "remora.json").write_text('{"text_columns": ["title", "body"]}')
    with pytest.raises(DataError, match="no column 'body', and the run"):
        load_data(config(source, start_from=begun))


def test_rows_that_are_gone_are_told(config: TrainConfig, place: Path, tmp_path: Path) -> None:
    run = shutil.copytree(place / "runs" / "first", tmp_path / "run")
    text = (run / "config.toml").read_text()
    (run / "config.toml").write_text(text.replace("old.csv", "moved.csv"))
    (remark,) = load_data(replace(config, start_from=str(run))).summary.remarks
    assert "cannot be read" in remark
    assert "give --test" in remark
    write(place / "moved.csv", OLD, repeats=2)
    (remark,) = load_data(replace(config, start_from=str(run))).summary.remarks
    assert "has changed" in remark
    (place / "moved.csv").unlink()


def test_a_label_joins_and_the_others_stay(config: TrainConfig, place: Path, base: Path) -> None:
    result = train(replace(config, name="second", epochs=8, baselines=("none",)))
    assert result.metrics.accuracy == 1
    card = metadata.read_card(result.directory / "adapter")
    assert set(card.labels) == set(WORDS)
    # A run after that one leaves out what either has learned.
    third = replace(config, start_from=str(result.directory))
    learned = {*load_data(config).train.texts}
    held_out = load_data(third)
    assert not {*held_out.test.texts, *held_out.validation.texts} & learned


def test_it_takes_a_third_of_the_steps_at_half_the_rate(config: TrainConfig) -> None:
    default = replace(config, learning_rate=None)
    assert default.rate(1536) == pytest.approx(1e-4)
    assert replace(default, start_from=None).rate(1536) == pytest.approx(2e-4)
    assert config.rate(1536) == RATE
    for rows in (100, 10_000):
        anew = replace(config, start_from=None).num_steps(rows)
        assert abs(config.num_steps(rows) - anew / 3) <= 1
    assert replace(config, epochs=5.0).num_steps(8) == 5


def test_labels_that_are_gone_are_told(config: TrainConfig, tmp_path: Path) -> None:
    said: list[str] = []
    reporter = Reporter()
    reporter.say = said.append  # type: ignore[method-assign]
    fewer = replace(config, data=str(write(tmp_path / "few.csv", [*OLD[1:], NEW])))
    with open_session(fewer, load_data(fewer), reporter=reporter) as session:
        assert set(session.prompt.labels) == {*OLD[1:], NEW}
    assert any(f"1 label of {config.start_from} is not in the table" in line for line in said)


TEXTS = {OLD[1]: "money back"}


def after_texts(place: Path, base: Path, output: Path, **others: Any) -> TrainConfig:
    """Return the settings of a run that begins with one of other texts for its labels."""
    few = {"output": output, "max_steps": 4, "baselines": ("none",), **others}
    run = train(settings(place, base, place / "old.csv", **few, label_texts=TEXTS)).directory
    return settings(place, base, place / "all.csv", **few, start_from=str(run), name="next")


@pytest.mark.parametrize("list_labels", [False, True])
def test_known_labels_are_written_as_the_run_writes_them(
    list_labels: bool, place: Path, base: Path, tmp_path: Path
) -> None:
    config, new = after_texts(place, base, tmp_path, list_labels=list_labels), {NEW: "no credit"}
    for given in (new, TEXTS | new):
        config = replace(config, label_texts=given)
        with open_session(config, load_data(config)) as session:
            assert session.prompt.label_texts == session.card.label_texts == TEXTS | new
            listed = "card arrival, money back, no credit." in session.prompt.head
            assert listed == list_labels
    for label, text, there in ((OLD[1], "refund", "money back"), (OLD[0], "card", OLD[0])):
        other = replace(config, label_texts={label: text})
        wanted = f"writes {there!r} for the label {label!r} and label_texts has {text!r}; give"
        with pytest.raises(ConfigError, match=wanted):
            open_session(other, load_data(other)).__enter__()


def test_exports_allow_the_texts_of_the_run(
    place: Path, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, said = after_texts(place, base, tmp_path), list[str]()
    reporter = Reporter()
    reporter.say = said.append  # type: ignore[method-assign]
    run = train(config, reporter=reporter).directory
    told = f"labels are written as in {config.start_from}, such as 'refund' as 'money back'"
    assert told in said
    assert not [line for line in said if "cannot encode" in line]
    prompt = saved.open_trained(run, device="cpu").prompt
    written = {OLD[0]: OLD[0], OLD[1]: "money back", NEW: NEW}
    decoded = prompt.tokenizer.batch_decode(prompt.answers, skip_special_tokens=True)
    assert [text.strip() for text in decoded] == list(written.values())
    for name in ("vllm", "gguf"):
        (tmp_path / name).mkdir()
    export = ExportConfig(run, vllm=True, device="cpu")
    vllm.write_vllm(export, tmp_path / "vllm", results.read(run), Reporter())
    labels = json.loads((tmp_path / "vllm" / "labels.json").read_text(encoding="utf-8"))
    assert labels == {text: label for label, text in written.items()}
    measured = gguf.Gguf(num_rows=1, adapter_accuracy=1.0, files=(SimpleNamespace(name="a"),))
    monkeypatch.setattr(gguf, "_readme", lambda *_, **__: "")
    gguf._write_beside(tmp_path / "gguf", prompt, measured, is_adapter=True)
    grammar = (tmp_path / "gguf" / "labels.gbnf").read_text(encoding="utf-8")
    rules = grammar.removeprefix("root ::= ").strip().split(" | ")
    assert [json.loads(each) for each in rules] == list(written.values())


WRONG = {
    "rank": (["--rank", "4"], 2, "has rank 8 and these settings have 4; give --rank 8"),
    "layers": (["--target-modules", "q_proj"], 2, "on other layers; give --target-modules down_"),
    "instruction": (["--instruction", "Sort."], 2, "--instruction 'Classify the message.'; give"),
    "curve": (["--learning-curve", "2,all"], 2, "trains each size anew; leave out --from"),
    "full": (["--method", "full"], 2, "first/model"),
    "nothing": (["--from", "no-run"], 4, "no-run"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_does_not_fit_is_one_line(
    name: str, config: TrainConfig, place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags, code, wanted = WRONG[name]
    given = {"--model": config.model, "--output": place / "runs", "--rank": "8"}
    given |= {"--from": config.start_from, flags[0]: flags[1]}
    assert call("train", config.data, *(word for flag in given.items() for word in flag)) == code
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: ")
    assert wanted in error
    assert [path.name for path in (place / "runs").iterdir() if path.name.startswith("all")] == []


def test_another_base_is_named(config: TrainConfig, place: Path, tmp_path: Path) -> None:
    run = shutil.copytree(place / "runs" / "first", tmp_path / "run")
    card = (run / "adapter" / "remora.json").read_text()
    sha256 = metadata.read_card(run / "adapter").base_sha256
    (run / "adapter" / "remora.json").write_text(card.replace(sha256, "0" * 64))
    other = replace(config, start_from=str(run))
    with pytest.raises(ModelError, match=f"has other weights; give --model {config.model}"):
        open_session(other, load_data(other)).__enter__()
