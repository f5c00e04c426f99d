"""Bad tables."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import json
import zipfile
from pathlib import Path
from types import SimpleNamespace

from bad_input.workshop import GOOD_ROWS, Case, Workshop, several, table, train
from conftest import WORDS, call
from on_ray import StandIn
from remora.data import locations
from remora.serving import ray_workers


def zipped(members: dict[str, str]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return buffer.getvalue()


def on_ray(
    shop: Workshop,
    source: str,
    output: str,
    *more: str,
    installed: bool = True,
    memory_bytes: float | None = None,
) -> list[str]:
    """The command on a Ray that is not needed: none answers, or its room is known."""
    spec, patch = importlib.util.find_spec, shop.patch()
    found = object() if installed else None
    patch.setattr(importlib.util, "find_spec", lambda n: found if n == "ray" else spec(n))
    if memory_bytes is None:
        more = ("--address", "127.0.0.1:1", *more)
    else:
        nodes = [{"Alive": True, "Resources": {"CPU": 8.0, "memory": memory_bytes}}]
        ray = SimpleNamespace(nodes=lambda: nodes)
        patch.setattr(ray_workers, "connected", lambda _: contextlib.nullcontext(ray))
    return ["predict", "runs/good", source, "--engine", "ray", "--output", output, *more]


def begun_on_ray(shop: Workshop, output: str) -> None:
    """Leave the folder of a command that came as far as its cluster."""
    shop.write("begun.csv", table(GOOD_ROWS))
    assert call(*on_ray(shop, "begun.csv", output)) == 2


def changed_source(shop: Workshop) -> list[str]:
    begun_on_ray(shop, "answers.csv")
    shop.write("begun.csv", table(GOOD_ROWS[1:]))
    return on_ray(shop, "begun.csv", "answers.csv")


def changing_source(shop: Workshop) -> list[str]:
    command = on_ray(shop, "good.csv", "changing.csv", memory_bytes=0.0)
    patch = shop.patch()
    patch.setattr(ray_workers, "connected", lambda _: contextlib.nullcontext(StandIn()))
    patch.setattr(locations, "changed", lambda _: True)
    return command


def other_run(shop: Workshop) -> list[str]:
    begun_on_ray(shop, "other.csv")
    return on_ray(shop, "begun.csv", "other.csv", "--top-k", "2")


CASES: list[Case] = [
    ("no such table", 3, lambda s: train("none.csv")),
    ("an empty file", 3, lambda s: train(s.write("empty.csv", ""))),
    (
        "an empty file of messages",
        3,
        lambda s: ["predict", "runs/good", s.write("empty.txt", "")],
    ),
    ("a header and no rows", 3, lambda s: train(s.write("header.csv", "text,label\n"))),
    ("columns of other names", 3, lambda s: train(s.write("names.csv", table(GOOD_ROWS, "a,b")))),
    ("a missing column", 3, lambda s: train("good.csv", "--label-column", "topic")),
    (
        "a single label",
        3,
        lambda s: train(s.write("one.csv", table([(t, "same") for t, _ in GOOD_ROWS]))),
    ),
    (
        "an empty label, with --strict",
        3,
        lambda s: train(s.write("blank.csv", table([*GOOD_ROWS, ("a text", "")])), "--strict"),
    ),
    (
        "a label column of texts",
        3,
        lambda s: train(
            s.write("own.csv", "id,text\n" + "".join(f"{i},word {i}\n" for i in range(30))),
            "--label-column",
            "id",
        ),
    ),
    (
        "lines of fastText",
        3,
        lambda s: train(
            s.write("fast.txt", "__label__refund give it back\n__label__card where is it\n" * 9),
            *("--input-format", "csv"),
        ),
    ),
    ("a table of one column", 3, lambda s: train(s.write("single.csv", "text\na\nb\n"))),
    (
        "a title above the header",
        3,
        lambda s: train(s.write("title.csv", "Tickets 2024,\nbody,team\n" + "a b c,x\n" * 9)),
    ),
    (
        "labels inside objects",
        3,
        lambda s: train(
            s.write("objects.jsonl", '{"text": "a b", "annotations": [{"label": 1}]}\n' * 9)
        ),
    ),
    (
        "vectors of 0 and 1 as labels",
        3,
        lambda s: train(s.write("vector.jsonl", '{"text": "a b", "label": [0, 1, 0]}\n' * 9)),
    ),
    (
        "lists of labels without quotes",
        3,
        lambda s: train(s.write("bare.csv", 'text,label\na b,"[x, y]"\n')),
    ),
    (
        "a test label of another form",
        3,
        lambda s: train("good.csv", "--test", s.write("t.csv", table([("a", "Refund")]))),
    ),
    (
        "a row with too many fields",
        3,
        lambda s: train(s.write("wide.csv", table(GOOD_ROWS) + "a,b,c\n")),
    ),
    (
        "bytes that are not UTF-8",
        3,
        lambda s: train(s.write("bytes.csv", table(GOOD_ROWS).encode() + b"caf\xe9,refund\n")),
    ),
    (
        "broken JSON lines",
        3,
        lambda s: train(s.write("broken.jsonl", '{"text": "a", "label": "b"}\n{"text": \n')),
    ),
    ("a broken Parquet file", 3, lambda s: train(s.write("broken.parquet", b"PAR1nothing"))),
    ("a broken workbook", 3, lambda s: train(s.write("table.xlsx", b"PK\x03\x04"))),
    ("a file of another kind", 3, lambda s: train(s.write("table.dat", table(GOOD_ROWS)))),
    (
        "a table without a header",
        3,
        lambda s: train(s.write("bare.tsv", "ham\tsee you later\nspam\twin a prize\nham\tok\n")),
    ),
    (
        "a zip of two tables",
        3,
        lambda s: train(s.write("two.zip", zipped({"a.csv": "x", "b.csv": "y"}))),
    ),
    (
        "columns of 0 and 1",
        3,
        lambda s: train(s.write("flags.csv", "text,toxic,threat\na,1,0\nb,0,1\n")),
    ),
    (
        "a list of labels, where each row is to have one",
        3,
        lambda s: train(
            s.write("lists.jsonl", '{"text": "a", "label": ["x", "y"]}\n'), "--multi-label", "off"
        ),
    ),
    (
        "a list of labels without commas, as NumPy writes it",
        3,
        lambda s: train(s.write("numpy.csv", "text,label\na,\"['x' 'y']\"\n")),
    ),
    (
        "a list of labels in a list",
        3,
        lambda s: train(s.write("nested.jsonl", '{"text": "a", "label": ["x", ["y"]]}\n')),
    ),
    (
        "a blank label in a list",
        3,
        lambda s: train(s.write("blank.jsonl", '{"text": "a", "label": ["x", ""]}\n')),
    ),
    (
        "several labels a row, and none in any",
        3,
        lambda s: train(s.write("none.jsonl", '{"text": "a", "label": []}\n' * 4)),
    ),
    (
        "a column of 0 and 1 with a 2",
        3,
        lambda s: train(
            *(s.write("flags.csv", "text,toxic,threat\na,1,0\nb,0,2\n"),),
            *("--label-columns", "toxic,threat"),
        ),
    ),
    (
        "several labels a row, one of them in the test rows only",
        3,
        lambda s: train(
            *(several(s), "--test"),
            s.write("unheard.jsonl", '{"text": "a", "label": ["x", "unheard"]}\n'),
        ),
    ),
    (
        "several labels a row in the test rows only",
        3,
        lambda s: train("good.csv", "--test", several(s, *WORDS)),
    ),
    (
        "a separator of levels that no label holds",
        3,
        lambda s: train("good.csv", "--label-separator", " > "),
    ),
    (
        "a label with an empty level",
        3,
        lambda s: train(
            s.write("empty.csv", table([("a", "x > y"), ("b", "x >  > z")] * 4)),
            *("--label-separator", " > "),
        ),
    ),
    (
        "labels whose levels differ in spaces only",
        3,
        lambda s: train(
            s.write("spaces.csv", table([("a", "x > y"), ("b", "x  > y")] * 4)),
            *("--label-separator", " > "),
        ),
    ),
    (
        "a chat with two questions",
        3,
        lambda s: train(s.write("chat.jsonl", json.dumps({"messages": [{"role": "user"}] * 2}))),
    ),
    (
        "names for columns of a table that has its own",
        2,
        lambda s: train(s.write("named.jsonl", "{}\n"), "--columns", "text,label"),
    ),
    ("standard input without a format", 2, lambda s: train("-")),
    (
        "a class weight for a label that is not there",
        3,
        lambda s: train(
            *("good.csv", "--class-weights"), s.write("weights.csv", "label,weight\nrefnud,2\n")
        ),
    ),
    (
        "a class weight of 0",
        3,
        lambda s: train(
            *("good.csv", "--class-weights"), s.write("weights.csv", "label,weight\nrefund,0\n")
        ),
    ),
    (
        "a new name for a label that is not there",
        2,
        lambda s: train("good.csv", "--rename-labels", '{"refnud": "money"}'),
    ),
    (
        "a blank name for a label",
        2,
        lambda s: train("good.csv", "--rename-labels", '{"refund": " "}'),
    ),
    (
        "a test table without labels",
        3,
        lambda s: train("good.csv", "--test", s.write("test.csv", "id,text\n1,a\n")),
    ),
    (
        "an output of no known format",
        2,
        lambda s: ["predict", "runs/good", "good.csv", "--output", "out.xml"],
    ),
    (
        "engine ray without Ray",
        2,
        lambda s: on_ray(s, "good.csv", "parts.csv", installed=False),
    ),
    (
        "engine ray without an output",
        2,
        lambda s: ["predict", "runs/good", "good.csv", "--engine", "ray"],
    ),
    ("a Ray cluster that does not answer", 2, lambda s: on_ray(s, "good.csv", "silent.csv")),
    (
        "workers of Ray that have no room for the model",
        5,
        lambda s: on_ray(s, "good.csv", "roomless.csv", memory_bytes=1e8),
    ),
    ("a glob without files", 3, lambda s: on_ray(s, "none/*.parquet", "parts.csv")),
    ("a URL of no known file system", 2, lambda s: on_ray(s, "nowhere://a/b.csv", "parts.csv")),
    ("a source that changed between two starts", 3, changed_source),
    ("a source that changes while it is read", 3, changing_source),
    ("a folder of parts of another run", 2, other_run),
    (
        "a folder of other things for the parts",
        2,
        lambda s: on_ray(s, "good.csv", Path(s.write("photos.csv/me.png", "")).parent.name),
    ),
    (
        "a column to keep that is not there",
        3,
        lambda s: ["predict", "runs/good", "good.csv", "--id-column", "key"],
    ),
    (
        "two thresholds",
        2,
        lambda s: [
            *("predict", "runs/good", "good.csv", "--threshold", "0.5"),
            *("--abstain-at-accuracy", "0.9"),
        ],
    ),
    (
        "standard input for a choice of models",
        2,
        lambda s: ["choose", "-", "--input-format", "csv", "--models", "base", "--bar", "0.9"],
    ),
    (
        "another text for a label that an earlier adapter knows",
        2,
        lambda s: train(
            *("good.csv", "--from", "runs/good", "--label-texts", '{"refund": "money back"}')
        ),
    ),
    (
        "standard input for two processes",
        2,
        lambda s: train("-", "--input-format", "csv", "--devices", "2"),
    ),
    (
        "a test table with an unknown label",
        3,
        lambda s: train("good.csv", "--test", s.write("test.csv", table([("a", "unknown")]))),
    ),
    ("a push of a folder that is no run", 3, lambda s: ["push", "base", "me/bank"]),
    (
        "an evaluation table with an unknown label",
        3,
        lambda s: ["eval", "runs/good", s.write("test.csv", table([("a", "unknown")]))],
    ),
]
