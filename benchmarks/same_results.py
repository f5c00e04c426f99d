"""Show that a change altered no result: the same runs by another revision and by this tree.

Both are run as a user would, by `python -m remora`, from the source of a revision (by default
`main`) and from the working tree, in the same environment, one thread a process. Compared bit for
bit are what each step and evaluation logged (losses, gradients' norms, learning rates, accuracies),
every file of weights and of probabilities, predictions, plans, learning curves, diagnoses, and what
`predict`, `eval` and `compare` print. Times, speeds, paths and the memory that is free differ by
nature and are left out, and so are sentences, whose wording may change. The last two cases run
both: the working tree reads a run that the revision made, and resumes one that the revision began.

    python benchmarks/same_results.py --base main
    python benchmarks/same_results.py --base v0.1.0 --cases lora full
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]

NUM_TRAIN, NUM_TEST = 200, 24
"""Rows of the sample table that each run has: few, so that all of them take minutes."""

ROWS = ["train.csv", "--test", "test.csv", "--model", "nano"]
ROWS += ["--validation-fraction", "0.06"]
SHORT = ["--eval-steps", "5"]
TRAIN = {
    "lora": [*SHORT, "--max-steps", "12"],
    "variants": [*SHORT, "--max-steps", "6", "--use-dora", "--use-rslora", "--list-labels"],
    "loraplus": [*SHORT, "--max-steps", "6", "--loraplus-lr-ratio", "8", "--alpha", "8"],
    "bfloat16": [*SHORT, "--max-steps", "6", "--precision", "bfloat16"],
    "small_micro_batches": [
        *(*SHORT, "--max-steps", "6", "--micro-batch-tokens", "300", "--checkpointing", "on"),
    ],
    "qlora": [*SHORT, "--max-steps", "6", "--method", "qlora"],
    "full": [*SHORT, "--max-steps", "6", "--method", "full"],
    "two_processes": [*SHORT, "--max-steps", "6", "--devices", "2"],
    "sharded": [*SHORT, "--max-steps", "6", "--method", "full", "--devices", "2", "--shard", "on"],
    "learning_curve": ["--learning-curve", "3,6", "--max-steps", "8", "--eval-steps", "4"],
}
"""Runs by the flags that they have beside those of all."""

READS = {
    "predict": ["predict", "runs/lora", "messages.txt", "--top-k", "3"],
    "predict_full": ["predict", "runs/full", "messages.txt"],
    "predict_qlora": ["predict", "runs/qlora", "messages.txt", "--json"],
    "eval": ["eval", "runs/lora", "test.csv", "--abstain-at-accuracy", "0.9", "--json"],
    "compare": ["compare", "runs/lora", "runs/full", "--json"],
    "plan": ["plan", *ROWS, "--device", "t4", "--json"],
    "plan_full": ["plan", *ROWS, "--device", "h100", "--method", "full", "--json"],
    "diagnose": ["diagnose", "runs/lora", "--json"],
    "merge": ["export", "runs/lora", "--merge", "--json"],
    "compress": ["export", "runs/lora", "--compress", "--ratio", "20", "--json"],
}
"""What is asked of those runs afterwards, and compared as it is printed."""

VARYING = {
    *("seconds", "train_seconds", "validation_seconds", "test_seconds"),
    *("examples_per_second", "supervised_tokens_per_second"),
    *("peak_memory_bytes", "measured_peak_bytes", "peak_bytes", "runtime", "available_bytes"),
    *("free_disk_bytes", "speed_up", "directory", "path", "output", "fits"),
    *("device", "why", "seconds_are", "reason", "answer", "caution"),
}
"""Keys whose values are times, or of the machine at that moment, or paths, or wording."""

MESSAGES = ("where is my sim", "please cancel my contract", "the bill is too high", "hello there")


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--base", default="main", help="the revision to compare with")
    parser.add_argument("--cases", nargs="+", choices=[*TRAIN, *READS], help="by default all")
    parser.add_argument("--keep", type=Path, help="folder for the revision's runs, used again")
    options = parser.parse_args()
    cases = options.cases or [*TRAIN, *READS]
    with tempfile.TemporaryDirectory() as name:
        temporary = Path(name)
        source = temporary / "source"
        git("worktree", "add", "--detach", str(source), options.base)
        try:
            base = Tree(source / "src", options.keep or temporary / "base")
            head = Tree(ROOT / "src", temporary / "head")
            differing = [case for case in cases if not same(case, base, head)]
            if not options.cases:
                differing += [case for case in (reads, resumes) if not case(base, head)]
        finally:
            git("worktree", "remove", "--force", str(source))
    print(f"{len(differing)} differ" if differing else "all are the same, bit for bit")
    return 1 if differing else 0


class Tree:
    """A source tree, and the folder that its commands run in."""

    def __init__(self, source: Path, folder: Path) -> None:
        self.source, self.folder = source, folder.absolute()
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / "messages.txt").write_text("\n".join(MESSAGES) + "\n", encoding="utf-8")
        for name, count in (("train.csv", NUM_TRAIN), ("test.csv", NUM_TEST)):
            path = ROOT / "src" / "remora" / "samples" / "support" / name
            header, *rows = path.read_text(encoding="utf-8").splitlines(keepends=True)
            chosen = [header, *rows[:: len(rows) // count]]
            (self.folder / name).write_text("".join(chosen), encoding="utf-8")

    def start(self, *arguments: str) -> subprocess.Popen[str]:
        environment = {
            **{k: v for k, v in os.environ.items() if not k.startswith(("REMORA_", "MASTER_"))},
            **{"PYTHONPATH": str(self.source), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
            "PYTHONHASHSEED": "0",  # PEFT writes a set of names
        }
        return subprocess.Popen(
            [sys.executable, "-m", "remora", *arguments],
            cwd=self.folder,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def run(self, *arguments: str) -> str:
        process = self.start(*arguments)
        output, errors = process.communicate()
        if process.returncode != 0:
            raise SystemExit(f"{' '.join(arguments)} in {self.source} failed:\n{errors}")
        return output

    def result(self, case: str) -> dict[str, Any]:
        """Return what a case gives; what is there already is read."""
        kept = self.folder / f"{case}.json"
        if not kept.is_file():
            if case in TRAIN:
                self.run("train", *ROWS, "--device", "cpu", *TRAIN[case], "--name", case)
                found = read(self.folder / "runs" / case)
            else:
                for needed in {"runs/lora", "runs/full", "runs/qlora"} & set(READS[case]):
                    self.result(needed.removeprefix("runs/"))
                found = {"stdout": printed(self.run(*READS[case]))}
                found |= {f: v for f, v in read(self.folder).items() if case in WRITES.get(f, ())}
            kept.write_text(json.dumps(found), encoding="utf-8")
        result: dict[str, Any] = json.loads(kept.read_text(encoding="utf-8"))
        return result


WRITES = {"runs/lora/relabel.csv": ("diagnose",), "runs/lora/diagnosis.json": ("diagnose",)}


def same(case: str, base: Tree, head: Tree) -> bool:
    return compare(case, base.result(case), head.result(case))


def reads(base: Tree, head: Tree) -> bool:
    """Whether the working tree predicts with the revision's run as the revision does."""
    base.result("lora")
    asked = ("predict", str(base.folder / "runs" / "lora"), "messages.txt", "--top-k", "3")
    return compare("an older run is read", base.run(*asked), head.run(*asked))


def resumes(base: Tree, head: Tree) -> bool:
    """Whether the working tree finishes a run that the revision began with the same bits."""
    command = [
        "train",
        *ROWS,
        "--device",
        "cpu",
        *TRAIN["lora"],
        "--checkpoint-minutes",
        "0",
        "--name",
        "begun",
    ]
    command += ["--output", str(head.folder / "runs")]
    run = head.folder / "runs" / "begun"
    process = base.start(*command)
    while process.poll() is None and not (run / "checkpoints" / "step-00000004").is_dir():
        time.sleep(0.01)
    process.kill()
    process.communicate()
    if not (run / "checkpoints").is_dir():
        raise SystemExit("the revision's run ended before it could be stopped")
    head.run(*command)
    whole, resumed = base.result("lora"), read(run)
    names = [name for name in whole if name.endswith(("metrics.jsonl", "safetensors", ".csv"))]
    return compare(
        "an older run is resumed",
        {name: whole[name] for name in names},
        {name: resumed.get(name) for name in names},
    )


def read(folder: Path) -> dict[str, Any]:
    """Return what the files of a folder say: text without what varies, the hashes of weights."""
    found: dict[str, Any] = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.suffix == ".safetensors":
            found[name] = hashlib.sha256(path.read_bytes()).hexdigest()
        elif path.name == "metrics.jsonl":
            lines = path.read_text(encoding="utf-8").splitlines()
            found[name] = [constant(json.loads(line)) for line in lines]
        elif path.name in {"environment.json", "holder.json"}:
            continue
        elif path.suffix == ".json":
            found[name] = constant(json.loads(path.read_text(encoding="utf-8")))
        elif path.suffix in {".csv", ".toml"}:
            found[name] = path.read_text(encoding="utf-8")
    return found


def printed(text: str) -> Any:
    try:
        return constant(json.loads(text))
    except ValueError:
        return text


def constant(value: Any) -> Any:
    """Return a value of JSON without the keys that vary."""
    if isinstance(value, dict):
        return {k: constant(v) for k, v in value.items() if k not in VARYING}
    if isinstance(value, list):
        return [constant(each) for each in value]
    if isinstance(value, str) and re.search(r"[,;:] | \(", value):
        return "a sentence"
    return value


def compare(what: str, one: Any, other: Any) -> bool:
    """Print whether two results are the same, and where they differ first."""
    difference = first_difference(one, other, "")
    print(f"{what}: {'the same' if difference is None else difference}", flush=True)
    return difference is None


def first_difference(one: Any, other: Any, where: str) -> str | None:
    if isinstance(one, dict) and isinstance(other, dict):
        for key in sorted(one.keys() | other.keys()):
            if key not in one or key not in other:
                return f"{where}/{key} is only {'there' if key in one else 'here'}"
            if found := first_difference(one[key], other[key], f"{where}/{key}"):
                return found
        return None
    if isinstance(one, list) and isinstance(other, list) and len(one) == len(other):
        pairs = enumerate(zip(one, other, strict=True))
        return next(
            (d for i, (a, b) in pairs if (d := first_difference(a, b, f"{where}/{i}"))), None
        )
    return None if one == other else f"{where} differs: {str(one)[:200]!r} and {str(other)[:200]!r}"


def git(*arguments: str) -> None:
    subprocess.run(["git", *arguments], cwd=ROOT, check=True, capture_output=True)


if __name__ == "__main__":
    sys.exit(main())
