"""Predictions stand beside the columns of the input, in its order, and alter none of them."""

from __future__ import annotations

import csv
import io
import json
import os
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.csv
import pyarrow.parquet
import pytest

import workbooks
from conftest import WORDS, call
from data.test_table import write, write_csv
from remora.config import PredictConfig
from remora.data.label_sets import set_text
from remora.models import metadata
from remora.serving import pauses, predict
from remora.serving.label_set_columns import open_predictions
from remora.tree.scoring import Scorer
from service import write_adapter

COLUMNS = ["id", "text", "note", "n", "when", "=sum", "label", "emoji"]
CELLS = [
    ("007", "where is my card?", "-1", "1.50", "2026-01-01", "=1+1", "refund", "\U0001f600"),
    ("008", "- the refund again", 'a "b"\nc, d', "", " x ", "@me", "-1", "é"),
    ("009", "  ", "\t", "0", "", "+5", "", "'"),
    ("010", "=top up, day {}", "nan", "1e5", "NULL", "-", "card arrival", "\u202e"),
]


@pytest.fixture(scope="module")
def run(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_adapter(
        tmp_path_factory.mktemp("runs") / "a", base, 1, labels=[*list(WORDS), "-1"]
    )


def predicted(run: Path, source: object, *more: object) -> int:
    return call("predict", run, source, "--device", "cpu", *more)


def rows_of(text: str) -> list[list[str]]:
    return list(csv.reader(io.StringIO(text, newline="")))


def test_csv_keeps_every_column_as_it_is(run, tmp_path, capsys):
    path = write_csv(tmp_path / "a.csv", CELLS, COLUMNS)
    assert predicted(run, path) == 0
    captured = capsys.readouterr()
    header, *rows = rows_of(captured.out)
    assert header == [*COLUMNS, "predicted_label", "predicted_probability"]
    assert [tuple(row[:8]) for row in rows] == CELLS
    assert [bool(row[8]) for row in rows] == [True, True, False, True]
    assert all(row[8] in {*WORDS, "-1", ""} for row in rows)
    assert "1 row with a blank text, without a label; row 3" in captured.err
    assert predicted(run, path, "--output", tmp_path / "out.csv") == 0
    assert (tmp_path / "out.csv").read_text(encoding="utf-8") == captured.out
    assert capsys.readouterr().out == ""


def test_json_lines_and_parquet_keep_values_and_types(run, tmp_path):
    records = [{"n": 1.5, "text": "a", "tags": ["x"], "ok": True, "none": None}]
    path = write(tmp_path / "a.jsonl", "".join(json.dumps(r) + "\n" for r in records * 3))
    assert predicted(run, path, "--output", tmp_path / "out.jsonl") == 0
    lines = (tmp_path / "out.jsonl").read_text().splitlines()
    assert len(lines) == 3
    for line in lines:
        found = json.loads(line)
        assert found.pop("labels")[0]["label"] in {*WORDS, "-1"}
        assert found == records[0]
    schema = pyarrow.schema(
        [("n", pyarrow.int16()), ("when", pyarrow.timestamp("ms")), ("text", pyarrow.string())]
    )
    table = pyarrow.table({"n": [1, None], "when": [10**12, 0], "text": ["a", "b"]}, schema=schema)
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    out = tmp_path / "out.parquet"
    assert predicted(run, tmp_path / "a.parquet", "--output", out, "--top-k", "2") == 0
    found = pyarrow.parquet.read_table(out)
    assert found.select(schema.names).equals(table)
    names = ["label", "probability", "label_2", "probability_2"]
    assert found.column_names == [*schema.names, *names]
    assert found.column("probability").type == pyarrow.float64()
    assert predicted(run, path, "--output", out) == 0  # another input, without a schema
    assert pyarrow.parquet.read_table(out).column("n").to_pylist() == [1.5] * 3


def test_carriage_returns_come_back(run, tmp_path, capsys):
    record = {"id\r": "1\r", "text": "lost \r card", "x": "a\r\nb", "n": "\n", "m": "c"}
    path = write(tmp_path / "a.jsonl", json.dumps(record) + "\n")
    assert predicted(run, path, "--output", tmp_path / "out.csv") == 0
    assert predicted(run, path) == 0
    written = (tmp_path / "out.csv").read_bytes()
    assert capsys.readouterr().out.encode() == written
    assert b'"1\r","lost \r card","a\r\nb","\n",c,' in written
    assert not written.endswith(b"\r\n")
    with (tmp_path / "out.csv").open(encoding="utf-8", newline="") as file:
        header, row = csv.reader(file)
    assert dict(zip(header[:5], row[:5], strict=True)) == record
    assert predicted(run, tmp_path / "out.csv", "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert [found[name] for name in ("text", "x", "n")] == ["lost \r card", "a\r\nb", "\n"]


def test_several_labels_stand_beside_the_columns_that_are_kept(run, tmp_path):
    card = replace(metadata.parse_card(run / "adapter"), multi_label=True)
    out = tmp_path / "out.parquet"
    config = PredictConfig(run, "a.parquet", id_column=("id",), output=str(out))
    schema = pyarrow.schema([("id", pyarrow.int16()), ("labels", pyarrow.list_(pyarrow.string()))])
    with open_predictions(config, card, ["id"], schema, str(out)) as writer:
        writer.write([1], [("refund", 0.75), ("top up", 0.25)], set_text(["refund"]))
        writer.write([2], [], None)
    found = pyarrow.parquet.read_table(out)
    assert found.column_names == ["id", "labels", "probabilities"]
    assert found["id"].type == pyarrow.int16()
    assert found["labels"].to_pylist() == [["refund"], None]


def test_a_number_that_a_workbook_lacks_is_null(run, tmp_path, capsys):
    rows = [("id", "text", "note"), (1, "card", "a"), (2, "refund", ""), ("", "top up", "")]
    path, out = workbooks.write(tmp_path / "a.xlsx", rows), tmp_path / "out.parquet"
    assert predicted(run, path, "--output", out) == 0
    found = pyarrow.parquet.read_table(out)
    assert found["id"].to_pylist() == [1, 2, None]
    assert found["note"].to_pylist() == ["a", "", ""]
    assert predicted(run, path, "--json") == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["id"] for line in lines] == [1, 2, None]
    path = workbooks.write(tmp_path / "b.xlsx", [("id", "text"), (1, "a"), ("x", "b")])
    assert predicted(run, path, "--output", out) == 3
    assert "Parquet cannot hold the column 'id' as it is" in capsys.readouterr().err


def test_columns_of_one_name_are_refused_where_one_would_be_lost(run, tmp_path, capsys):
    path = write(tmp_path / "a.csv", "id,id,text\n1,2,fee\n")
    assert predicted(run, path) == 0
    assert rows_of(capsys.readouterr().out)[1][:3] == ["1", "2", "fee"]
    for more in (("--json",), ("--output", tmp_path / "o.parquet"), ("--id-column", "id")):
        assert predicted(run, path, *more) == 3
        told = capsys.readouterr().err
        assert "a.csv has 2 columns called 'id'" in told
        assert "; rename all but one" in told
    assert not (tmp_path / "o.parquet").exists()
    assert predicted(run, path, "--id-column", "text", "--json") == 0
    assert json.loads(capsys.readouterr().out)["text"] == "fee"
    path = write(tmp_path / "b.csv", "id,text\n1,fee\n")
    assert predicted(run, path, "--id-column", "id", "--id-column", "id") == 0
    assert rows_of(capsys.readouterr().out)[0] == ["id", "label", "probability"]


def test_lists_of_class_numbers_are_written_to_parquet_by_name(run, tmp_path):
    table = pyarrow.table({"text": ["a", "b"], "tags": [[0, 1], []]})
    for feature in ([{"names": ["x", "y"]}], {"feature": {"names": ["x", "y"]}}):
        metadata = {"huggingface": json.dumps({"info": {"features": {"tags": feature}}})}
        described = table.replace_schema_metadata(metadata)
        pyarrow.parquet.write_table(described, tmp_path / "a.parquet")
        out = tmp_path / "out.parquet"
        assert predicted(run, tmp_path / "a.parquet", "--output", out) == 0
        assert pyarrow.parquet.read_table(out)["tags"].to_pylist() == [["x", "y"], []]


def refuse_constant(name: str) -> None:
    raise AssertionError(f"{name} is no JSON")


def test_numbers_that_json_lacks_are_null(run, tmp_path, capsys):
    nested = {"deep": [1.0, -np.inf], "even": {"deeper": np.inf}}
    table = {"text": ["a", "b"], "x": [np.nan, 1.5], "list": [[np.nan, 2.0]] * 2}
    pyarrow.parquet.write_table(pyarrow.table(table | {"in": [nested] * 2}), tmp_path / "a.parquet")
    kept = {"list": [None, 2.0], "in": {"deep": [1.0, None], "even": {"deeper": None}}}
    wanted = [{"text": "a", "x": None} | kept, {"text": "b", "x": 1.5} | kept]
    write(tmp_path / "a.jsonl", '{"text": "a", "x": [NaN, {"y": -Infinity}]}\n')
    lines = [{"text": "a", "x": [None, {"y": None}]}]
    for name, records in (("a.parquet", wanted), ("a.jsonl", lines)):
        assert predicted(run, tmp_path / name, "--json") == 0
        printed = capsys.readouterr().out
        assert predicted(run, tmp_path / name, "--output", tmp_path / "out.jsonl") == 0
        assert (tmp_path / "out.jsonl").read_text() == printed
        found = [json.loads(x, parse_constant=refuse_constant) for x in printed.splitlines()]
        assert all(record.pop("labels") for record in found)
        assert found == records
    assert predicted(run, tmp_path / "a.parquet") == 0
    header, first, _ = rows_of(capsys.readouterr().out)
    assert json.loads(first[header.index("in")], parse_constant=refuse_constant) == kept["in"]


def test_id_columns_alone(run, tmp_path, capsys):
    path = write_csv(tmp_path / "a.csv", CELLS, COLUMNS)
    assert predicted(run, path, "--id-column", "id", "--id-column", "n") == 0
    header, *rows = rows_of(capsys.readouterr().out)
    assert header == ["id", "n", "label", "probability"]
    assert [row[0] for row in rows] == ["007", "008", "009", "010"]
    assert predicted(run, path, "--id-column", "key") == 3
    assert "has no column 'key' to keep; correct --id-column" in capsys.readouterr().err


def test_what_predict_writes_is_read_by_eval(run, tmp_path, capsys):
    path = write_csv(tmp_path / "a.csv", [("a", "-1"), ("b", "refund")], ("text", "label"))
    assert predicted(run, path, "--output", tmp_path / "out.csv") == 0
    for name in ("a.csv", "out.csv"):
        assert call("eval", run, tmp_path / name, "--device", "cpu") == 0
    assert "error" not in capsys.readouterr().err


@pytest.mark.parametrize(
    ("verb", "flag", "name"),
    [
        ("predict", "--output", "no/x.csv"),
        ("eval", "--predictions", "no/x.csv"),
        ("eval", "--predictions", "x.parquet"),
    ],
)
def test_what_cannot_be_written_is_told_before_the_model_is_loaded(
    run, tmp_path, monkeypatch, capsys, verb, flag, name
):
    def load(*_, **__):
        raise AssertionError("the model was loaded")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(predict, "open_trained", load)
    monkeypatch.setattr(predict.Predictor, "of", load)
    write_csv(tmp_path / "a.csv", [("a", "-1"), ("b", "refund")], ("text", "label"))
    code, told = (2, "end its name with .csv") if name == "x.parquet" else (5, f"file with {flag}")
    assert call(verb, run, "a.csv", flag, name, "--device", "cpu") == code
    assert told in capsys.readouterr().err


def test_a_table_out_of_scope_needs_a_message(run, tmp_path, capsys):
    path = write_csv(tmp_path / "a.csv", [("a", "-1"), ("b", "refund")], ("text", "label"))
    outside = write_csv(tmp_path / "b.csv", [(" ",), ("\t",)], ("text",))
    assert call("eval", run, path, "--out-of-scope", outside, "--device", "cpu", "--json") == 3
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "b.csv has blank texts only; give messages that no label fits" in captured.err


def test_a_failing_disk_is_told_with_the_flag_of_eval(run, tmp_path, monkeypatch, capsys):
    def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.chdir(tmp_path)
    path = write_csv(tmp_path / "a.csv", [("a", "-1"), ("b", "refund")], ("text", "label"))
    monkeypatch.setattr("remora.runtime.files.os.replace", fail)
    assert call("eval", run, path, "--predictions", "p.csv", "--device", "cpu") == 5
    assert "or give another file with --predictions" in capsys.readouterr().err


def test_cells_are_made_safe_for_spreadsheets_on_request(run, tmp_path, capsys):
    path = write_csv(tmp_path / "a.csv", [("=1+1", "-5")], ("text", "n"))
    for more, cells in (((), ["=1+1", "-5"]), (("--spreadsheet-safe",), ["'=1+1", "'-5"])):
        assert predicted(run, path, *more) == 0
        assert rows_of(capsys.readouterr().out)[1][:2] == cells


def test_the_threshold_withholds_labels(run, tmp_path, capsys):
    path = write(tmp_path / "a.txt", "where is my card?\n\nthe refund again\n")
    assert predicted(run, path) == 0
    every = rows_of(capsys.readouterr().out)
    assert predicted(run, path, "--threshold", "1") == 0
    captured = capsys.readouterr()
    assert "2 of 3 rows are below the threshold 1.0000 and have no label" in captured.err
    none = rows_of(captured.out)
    assert [row[1] for row in none] == ["label", "", "", ""]
    assert [row[2] for row in none] == [row[2] for row in every]
    assert predicted(run, path, "--threshold", "0", "--json") == 0
    records = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [record["abstained"] for record in records] == [False, True, False]
    assert [len(record["labels"]) for record in records] == [1, 0, 1]
    assert predicted(run, path, "--abstain-at-accuracy", "0.9") == 3
    assert "has no probabilities of validation rows" in capsys.readouterr().err
    assert predicted(run, path, "--threshold", "1", "--abstain-at-accuracy", "0.9") == 2
    assert predicted(run, path, "--json", "--output", tmp_path / "a.csv") == 2
    assert predicted(run, path, "--output", tmp_path / "a.xml") == 2
    assert "a.xml has no format by its name; end it with one of .csv" in capsys.readouterr().err


def test_the_columns_of_the_training_table_are_remembered(run, tmp_path, base, capsys):
    card = json.loads((run / "adapter" / "remora.json").read_text())
    other = write_adapter(tmp_path / "b", base, 1, labels=list(WORDS))
    card |= {"text_columns": ["clean_text"], "label_column": "kind", "labels": list(WORDS)}
    (other / "adapter" / "remora.json").write_text(json.dumps(card))
    rows = [("x y", "where is my card?", "refund"), ("z", "the refund", "card arrival")]
    path = write_csv(tmp_path / "a.csv", rows, ("text", "clean_text", "kind"))
    assert predicted(other, path) == 0
    by_itself = rows_of(capsys.readouterr().out)
    assert predicted(other, path, "--text-column", "clean_text") == 0
    assert rows_of(capsys.readouterr().out) == by_itself
    assert predicted(other, path, "--text-column", "text") == 0
    assert rows_of(capsys.readouterr().out) != by_itself
    assert call("eval", other, path, "--device", "cpu") == 0
    broken = {**card, "text_columns": [5]}
    (other / "adapter" / "remora.json").write_text(json.dumps(broken))
    assert predicted(other, path) == 4


def test_characters_that_a_console_lacks(run, tmp_path, monkeypatch):
    path = write(tmp_path / "a.jsonl", '{"text": "a", "x": "\U0001f600 \\ud83d"}\n')
    for more, shown in ((("--json",), '"x": "\U0001f600 \\ud83d"'), ((), "\U0001f600 \\ud83d")):
        out = io.BytesIO()
        monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(out, encoding="cp1252", newline="\r\n"))
        assert predicted(run, path, *more) == 0
        sys.stdout.flush()
        assert shown in out.getvalue().decode("utf-8")
        assert b"\r" not in out.getvalue()


def scored(monkeypatch, seconds=0.0):
    """Let the scorer answer without a model; return the sizes of its batches."""
    sizes = []

    def probabilities(self, texts, advance=None):
        sizes.append(len(texts))
        return np.tile([0.5, 0.3, 0.1, 0.1], (len(texts), 1))

    monkeypatch.setattr(Scorer, "probabilities", probabilities)
    return sizes


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="named pipes are of POSIX")
def test_a_pause_in_the_input_is_answered(run, tmp_path, monkeypatch):
    scored(monkeypatch)
    reading, writing = os.pipe()
    out = io.StringIO()
    written = []

    class Output(io.StringIO):
        def flush(self):
            written.append((time.monotonic(), self.getvalue().count("\n")))

    with os.fdopen(reading, "r") as pipe:
        monkeypatch.setattr(sys, "stdin", pipe)
        sent = []

        def write_lines():
            for text in (b"one\ntwo\n", b"\n", b"three\n"):
                sent.append(time.monotonic())
                os.write(writing, text)
                time.sleep(1)
            os.close(writing)

        thread = threading.Thread(target=write_lines)
        thread.start()
        out = Output()
        predict.write_predictions(PredictConfig(run, device="cpu"), out)
        thread.join()
    assert [count for _, count in written] == [3, 4, 5]  # with the header
    assert [row[0] for row in rows_of(out.getvalue())] == ["text", "one", "two", "", "three"]
    for (answered, _), began in zip(written[1:], sent[1:], strict=True):
        assert answered - began < 0.9


def test_rows_before_a_fault_are_answered(run, tmp_path, monkeypatch, capsys):
    sizes = scored(monkeypatch)
    lines = [json.dumps({"text": f"t{i}"}) for i in range(70)] + ["{"]
    assert predicted(run, write(tmp_path / "a.jsonl", "\n".join(lines))) == 3
    captured = capsys.readouterr()
    assert len(captured.out.splitlines()) == 71
    assert "row 71 is not valid JSON" in captured.err
    assert sizes == [64, 6]


def test_batches_do_not_wait_and_pass_errors_on():
    def items():
        yield from range(5)
        raise ValueError("end")

    for pausing in (True, False):
        found = []
        with pytest.raises(ValueError, match="end"):
            found.extend(pauses.batches(items(), 2, pausing=pausing))
    assert not pauses.may_pause(__file__)
    for pausing in (True, False):
        batches = pauses.batches(iter(range(5)), 2, pausing=pausing)
        assert list(batches) == [[0, 1], [2, 3], [4]]


@pytest.mark.durability
@pytest.mark.parametrize("suffix", ["csv", "jsonl", "parquet"])
def test_a_million_rows_in_flat_memory(run, tmp_path, monkeypatch, suffix):
    resource = pytest.importorskip("resource", reason="not on Windows")
    scored(monkeypatch)

    def peak(num_rows):
        source = tmp_path / f"{num_rows}.csv"
        with source.open("w") as file:
            file.write(",".join(COLUMNS) + "\n")
            file.writelines(f"{i},text {i},a,b,c,=d,-1,é\n" for i in range(num_rows))
        out = tmp_path / f"out.{suffix}"
        config = PredictConfig(run, str(source), output=out, device="cpu")
        predict.write_predictions(config, io.StringIO())
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, source, out

    before, _, _ = peak(20_000)
    after, source, out = peak(1_000_000)
    assert after - before < 60_000  # kB
    if suffix == "csv":
        with source.open() as file, out.open() as joined:
            assert all(
                b.startswith(a.rstrip("\n") + ",") for a, b in zip(file, joined, strict=True)
            )
    elif suffix == "jsonl":
        with source.open(newline="") as file, out.open() as joined:
            rows = csv.DictReader(file)
            for row, line in zip(rows, joined, strict=True):
                found = json.loads(line)
                assert {name: found[name] for name in COLUMNS} == row
    else:
        table = pyarrow.parquet.read_table(out).select(COLUMNS)
        given = pyarrow.csv.read_csv(
            source,
            convert_options=pyarrow.csv.ConvertOptions(
                column_types=dict.fromkeys(COLUMNS, pyarrow.string())
            ),
        )
        assert table.equals(given)


def test_several_text_columns_are_those_of_training(base, tmp_path, capsys):
    rows = [
        (f"{i}", "card", f"{'where' if i % 2 else 'refund'} {i}", "ab"[i % 2]) for i in range(20)
    ]
    path = write_csv(tmp_path / "a.csv", rows, ("id", "title", "body", "label"))
    columns = ("--text-column", "title", "--text-column", "body")
    settings = ("--max-steps", "1", "--baselines", "none", "--device", "cpu", "--name", "x")
    out = tmp_path / "runs"
    assert call("train", path, *columns, "--model", base, *settings, "--output", out) == 0
    run = out / "x"
    card = json.loads((run / "adapter" / "remora.json").read_text())
    assert (card["text_columns"], card["label_column"]) == (["title", "body"], "label")
    assert call("diagnose", run) in {0, 3}  # reads the settings again
    assert call("eval", run, path, "--device", "cpu") == 0
    capsys.readouterr()
    assert predicted(run, path) == 0
    header, *rows = rows_of(capsys.readouterr().out)
    assert header == ["id", "title", "body", "label", "predicted_label", "predicted_probability"]
    whole = [(f"title: {row[1]}\nbody: {row[2]}", "") for row in rows]
    path = write_csv(tmp_path / "b.csv", whole, ("text", "n"))
    assert predicted(run, path) == 3
    assert "has no column 'title', which the model was trained on" in capsys.readouterr().err
    assert predicted(run, path, "--text-column", "text") == 0
    joined = rows_of(capsys.readouterr().out)[1:]
    assert [row[-2:] for row in joined] == [row[-2:] for row in rows]
