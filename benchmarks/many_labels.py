"""Validation with 1,500 labels and a model that is unsure: rows per second, and how long it takes.

An untrained base model is asked for one of 1,500 labels of three words. It is measured as an
evaluation during training does it, and beside that with every label looked at, on fewer rows.
Seconds of the CPU are those of all threads, whatever else the machine does.

    python benchmarks/many_labels.py
"""

from __future__ import annotations

import argparse
import itertools
import time
from typing import Any

import numpy as np
import torch

import workload
from remora.data.prompt import Prompt
from remora.models import hub, loading
from remora.tree.scoring import Scorer

AREAS = (
    "card",
    "account",
    "payment",
    "refund",
    "transfer",
    "top-up",
    "cash",
    "loan",
    "order",
    "sim",
)
THINGS = (
    *("request", "address", "limit", "fee", "code", "statement", "balance", "currency"),
    *("receipt", "contract", "invoice", "device", "password", "notice", "insurance"),
)
STATES = (
    *("lost", "late", "wrong", "new", "pending"),
    *("declined", "missing", "double", "changed", "closed"),
)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="nano")
    parser.add_argument("--rows", type=int, default=300)
    parser.add_argument("--every-label-rows", type=int, default=12)
    parser.add_argument("--separator", default=" > ")
    options = parser.parse_args()
    labels = [options.separator.join(each) for each in itertools.product(AREAS, THINGS, STATES)]
    folder = hub.find(options.model)
    prompt = Prompt(
        loading.load_tokenizer(folder), labels, instruction="Classify the message.", max_length=512
    )
    model = loading.load_base(folder, "lora", torch.float32, torch.device("cpu")).eval()
    texts = workload.banking77("test")[0]
    texts = texts[:: len(texts) // options.rows][: options.rows]
    true = np.random.default_rng(0).integers(len(labels), size=len(texts)).tolist()

    found: dict[str, Any] = {"labels": len(labels), "torch_threads": torch.get_num_threads()}
    rows = []

    def measure(name: str, num_rows: int, compute: Any) -> None:
        began, cpu_began = time.perf_counter(), time.process_time()
        compute()
        seconds, cpu = time.perf_counter() - began, time.process_time() - cpu_began
        found[name] = {"rows": num_rows, "seconds": seconds, "cpu_seconds": cpu}
        rows.append([name, f"{num_rows:,}", f"{seconds:.1f} s", f"{cpu:.1f} s"])

    few = texts[: options.every_label_rows]
    evaluating = Scorer(model, prompt)
    evaluating.evaluate(texts[:4], true[:4])  # sets up libraries and the prefix
    measure("evaluation", len(texts), lambda: evaluating.evaluate(texts, true))
    argmax = Scorer(model, prompt, tolerance=1.0)
    measure("argmax", len(few), lambda: argmax.probabilities(few))
    whole = Scorer(model, prompt, tolerance=0.0)
    measure("every label", len(few), lambda: whole.probabilities(few))
    workload.print_table(["way", "rows", "took", "of the CPU"], rows)
    each = {name: found[name]["rows"] / found[name]["cpu_seconds"] for name, *_ in rows}
    times = each["evaluation"] / each["every label"]
    print(f"\nevaluation is {times:.1f} times the rate of every label, by the CPU")
    workload.write("many-labels", found)


if __name__ == "__main__":
    main()
