"""What `predict --engine ray` costs beside plain `predict`, and whether every row is there once.

A model of one layer and 16 dimensions, trained for six steps, so that the work around the model is
what is measured; short messages of the sample in the package, each with its number. First plain
`predict` on the first rows, twice, since the difference of two runs leaves their start out. It has
one thread, as each worker has: so small a model loses by more. Then `--engine ray` on all rows, and
plain `predict` again, since a machine is not always as fast. CPU time and memory of all processes
are looked up every second.

    python benchmarks/ray_predict.py --rows 5000000 --folder build/ray_predict

In the end each number has to be there exactly once, and the first rows with the labels and the
probabilities of plain `predict`, to the bit. The same command goes on where it was stopped.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow
import pyarrow.parquet

import workload

INTERVAL_SECONDS = 1.0
GROUP_ROWS = 100_000
WORDS = 7
"""Words of a message that are kept."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=200_000)
    parser.add_argument("--plain-rows", type=int, default=100_000, help="of them by plain predict")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--part-rows", type=int, default=20_000)
    parser.add_argument("--folder", type=Path, help="folder for rows, model and answers")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as made:
        folder = (options.folder or Path(made)).absolute()
        folder.mkdir(parents=True, exist_ok=True)
        compare(folder, options)


def compare(folder: Path, options: argparse.Namespace) -> None:
    num_plain = min(options.plain_rows, options.rows)
    run = train(folder)
    sizes = num_plain // 5, num_plain
    plain = [predicted(folder, run, num_rows, "before") for num_rows in sizes]
    out = folder / f"ray-{options.rows}.parquet"
    more = ["--engine", "ray", "--output", str(out), "--part-rows", str(options.part_rows)]
    more += ["--workers", str(options.workers), "--worker-cores", "1"]
    starts = measured(command(run, rows(folder, options.rows), *more), out)
    check(out, options.rows, folder / f"plain-{num_plain}-before.parquet")
    plain += [predicted(folder, run, num_rows, "after") for num_rows in sizes]
    num_more = 2 * (num_plain - num_plain // 5)
    few, many, few_after, many_after = plain
    alone = {
        what: num_more / (many[what] - few[what] + many_after[what] - few_after[what])
        for what in ("cpu", "seconds")
    }
    report(starts, alone, options)


def command(run: Path, source: Path, *more: str) -> list[str]:
    given = ["predict", str(run), str(source), "--device", "cpu", *more]
    return [sys.executable, "-m", "remora", *given]


def train(folder: Path) -> Path:
    """Return the run directory of the small model."""
    if (folder / "runs" / "small" / "evaluation.json").exists():
        return folder / "runs" / "small"
    import torch
    from transformers import AutoModelForCausalLM, Qwen2Config

    torch.manual_seed(0)
    tokenizer = workload.qwen_tokenizer("tiny")
    shape = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "vocab_size": len(tokenizer)}
    AutoModelForCausalLM.from_config(Qwen2Config(**shape, **heads)).save_pretrained(folder / "base")
    tokenizer.save_pretrained(folder / "base")
    texts, labels = workload.messages("tiny")
    kept = sorted(set(labels))[:4]
    table = [(text, label) for text, label in zip(texts, labels, strict=True) if label in kept]
    columns = dict(zip(("text", "label"), map(list, zip(*table, strict=True)), strict=True))
    pyarrow.parquet.write_table(pyarrow.table(columns), folder / "table.parquet")
    given = [str(folder / "table.parquet"), "--model", str(folder / "base"), "--name", "small"]
    given += ["--output", str(folder / "runs"), "--answer", "classes", "--max-steps", "6"]
    given += ["--baselines", "none", "--device", "cpu", "--precision", "float32"]
    subprocess.run([sys.executable, "-m", "remora", "train", *given], check=True)
    return folder / "runs" / "small"


def rows(folder: Path, num_rows: int) -> Path:
    """Return a Parquet file of numbered messages; its first rows are those of a shorter one."""
    path = folder / f"rows-{num_rows}.parquet"
    if path.exists():
        return path
    short = [" ".join(text.split()[:WORDS]) for text in workload.messages("tiny")[0]]
    schema = pyarrow.schema([("id", pyarrow.int64()), ("text", pyarrow.string())])
    begun = path.with_suffix(".begun")
    with pyarrow.parquet.ParquetWriter(begun, schema) as writer:
        for start in range(0, num_rows, GROUP_ROWS):
            ids = range(start, min(start + GROUP_ROWS, num_rows))
            texts = [f"{short[i * 7919 % len(short)]} {i}" for i in ids]
            writer.write_table(pyarrow.table([ids, texts], schema=schema))
    return begun.rename(path)


def predicted(folder: Path, run: Path, num_rows: int, when: str) -> dict[str, Any]:
    """Return what plain `predict` took on the first rows; it is run once."""
    out = folder / f"plain-{num_rows}-{when}.parquet"
    if not out.exists():
        for old in folder.glob(f"{out.name}.samples"):
            old.unlink()
    line = command(run, rows(folder, num_rows), "--output", str(out))
    return measured(line, out, OMP_NUM_THREADS="1")[-1][-1]


def measured(line: list[str], out: Path, **variables: str) -> list[list[dict[str, Any]]]:
    """Run a command unless it has finished; return the samples of each of its starts."""
    log = out.with_name(f"{out.name}.samples")
    done = out.is_file() or (out.is_dir() and json.loads((out / "_remora.json").read_text()))
    if not (done and (done is True or done["finished"])):
        with (
            log.open("a") as file,
            subprocess.Popen(line, env={**os.environ, **variables}) as process,
        ):
            sampled = samples(psutil.Process(process.pid), out)
            for number, sample in enumerate(sampled):
                file.write(json.dumps(sample | {"first": number == 0}) + "\n")
                file.flush()
            if process.wait():
                raise SystemExit(process.returncode)
    starts: list[list[dict[str, Any]]] = []
    for sample in map(json.loads, log.read_text().splitlines()):
        if sample["first"]:
            starts.append([])
        starts[-1].append(sample)
    return starts


def samples(process: psutil.Process, out: Path) -> Iterator[dict[str, Any]]:
    """Yield rows, CPU seconds and bytes of each kind of process, until the process ends."""
    spent: dict[int, tuple[str, float]] = {}
    began = time.monotonic()
    while process.is_running() and process.status() != psutil.STATUS_ZOMBIE:
        held = {"driver": 0, "worker": 0, "ray": 0}
        try:
            family = [process, *process.children(recursive=True)]
        except psutil.Error:
            break
        for each in family:
            try:
                name = " ".join(each.cmdline())
                kind = "driver" if each == process else "worker" if "ray::_A" in name else "ray"
                times = each.cpu_times()
                spent[each.pid] = kind, times.user + times.system
                held[kind] = max(held[kind], each.memory_info().rss)
            except psutil.Error:
                continue
        kinds = {kind: sum(t for k, t in spent.values() if k == kind) for kind in held}
        yield {
            "seconds": time.monotonic() - began,
            "rows": num_written(out),
            "cpu": sum(kinds.values()),
            "cpu_of": kinds,
            "bytes_of": held,
        }
        time.sleep(INTERVAL_SECONDS)


def num_written(out: Path) -> int:
    try:
        journal = json.loads((out / "_remora.json").read_text())
    except (OSError, ValueError):
        return 0
    return sum(part["rows"] for part in journal["parts"])


def check(out: Path, num_rows: int, plain: Path) -> None:
    """Compare each id, and the first rows with those of plain `predict`; exit 1 if one differs."""
    expected = pyarrow.parquet.read_table(plain)
    found = np.zeros(num_rows, dtype=np.int64)
    place = 0
    for path in sorted(out.glob("part-*.parquet")):
        part = pyarrow.parquet.read_table(path)
        np.add.at(found, part["id"].to_numpy(), 1)
        beside = expected.slice(place, len(part))
        if not part.slice(0, len(beside)).equals(beside):
            raise SystemExit(f"error: {path} differs from {plain}")
        place += len(part)
    if not (found == 1).all():
        raise SystemExit(f"error: {int((found != 1).sum()):,} rows are not there once")
    print(
        f"{num_rows:,} rows are there once; the first {len(expected):,} as plain predict has them"
    )


def report(
    starts: list[list[dict[str, Any]]], alone: dict[str, float], options: argparse.Namespace
) -> None:
    """Print rows per second, between the first and the last part of each start, and memory."""
    num_rows, spent, seconds = 0, dict.fromkeys(("worker", "driver", "ray"), 0.0), 0.0
    held = []
    for start in starts:
        # Where a part has just been listed
        steps = [b for a, b in itertools.pairwise(start) if b["rows"] > a["rows"]]
        if len(steps) < 2:
            continue
        first, last = steps[0], steps[-1]
        num_rows += last["rows"] - first["rows"]
        seconds += last["seconds"] - first["seconds"]
        for kind in spent:
            spent[kind] += last["cpu_of"][kind] - first["cpu_of"][kind]
        held += steps
    total = sum(spent.values())
    if not total:
        raise SystemExit("error: too few parts to measure; give more --rows")
    rate, clock = num_rows / total, num_rows / seconds / options.workers
    table = [
        ["predict", f"{alone['cpu']:,.0f}", "", f"{alone['seconds']:,.0f}", ""],
        ["--engine ray", f"{rate:,.0f}", f"{rate / alone['cpu']:.0%}"],
    ]
    table[-1] += [f"{clock:,.0f}", f"{clock / alone['seconds']:.0%}"]
    for kind, name in {"worker": "its workers", "driver": "reads and writes", "ray": "Ray"}.items():
        table.append([f"  {name}", f"{1e6 * spent[kind] / num_rows:,.0f} us a row", "", "", ""])
    header = ["", "rows per CPU second", "of predict", "by the clock, a worker", "of predict"]
    workload.print_table(header, table)
    chosen = [held[round(i * (len(held) - 1) / 4)] for i in range(5)]
    memory = []
    for each in chosen:
        held_by = [f"{each['bytes_of'][kind] / 1e6:,.0f} MB" for kind in ("driver", "worker")]
        memory.append([f"{each['rows']:,}", *held_by])
    workload.print_table(["rows", "reads and writes", "largest worker"], memory)
    result: dict[str, Any] = {"predict": alone, "ray": {"cpu": rate, "seconds": clock}}
    result |= {"spent": spent, "rows": num_rows, "held": chosen}
    workload.write("ray_predict", {"machine": workload.machine(), **result})


if __name__ == "__main__":
    main()
