"""One adapter by every way that Remora gives: do they say the same of all test rows of Banking77?

The base model in the package, an adapter trained on all rows, or the run that --run names. In
float32, labels looked at until the others hold at most 0.0001:

- `remora predict` and `remora serve` with the run;
- `predict --engine ray`, and `Predictor` in Spark's `mapInPandas`, where these are installed (Spark
  needs Java too);
- stock PEFT and transformers: their own forward passes, one message at a time, no code of Remora
  but the labels and the instruction in remora.json;
- `remora export --merge`, stored in float32 and as the base is, by `predict`, the first by `serve`;
- `remora export --compress`, of the size it chooses, by `predict` and by stock PEFT;
- `generate()` of transformers on the merged model, with the settings that the model brings (beams)
  and greedy: the text it writes.

Also `predict` in bfloat16 arithmetic, which is the default on processors that have it.

    python benchmarks/same_answers.py

With --keep, what was exported and found stays in a folder, and a later call goes on from there.
"""

from __future__ import annotations

import argparse
import copy
import csv
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

import workload

LABELS_AT_ONCE = 8
TOLERANCE = 1e-4
"""Most probability of the labels that are not looked at."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--run", type=Path, help="a finished run on Banking77")
    parser.add_argument("--rows", type=int, help="only the first test rows")
    parser.add_argument("--keep", type=Path, help="folder for what is exported and found")
    parser.add_argument("--engines", action="store_true", help="only predict, serve, Ray and Spark")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as made:
        folder = (options.keep or Path(made)).absolute()
        folder.mkdir(exist_ok=True)
        directory = options.run or train(folder)
        texts, true = (column[: options.rows] for column in workload.banking77("test"))
        compare(directory.absolute(), texts, true, folder, only_engines=options.engines)


def train(folder: Path) -> Path:
    """Train nano as its card says; return the run directory."""
    data = str(workload.SHARED / "data" / "banking77")
    remora("train", data, "--model", "nano", "--name", "run", "--output", folder)
    return folder / "run"


def remora(*arguments: object) -> str:
    """Run Remora in a process of its own; return what it writes to standard output."""
    command = [sys.executable, "-m", "remora", *map(str, arguments)]
    environment = {**os.environ, "PYTHONWARNINGS": "ignore"}
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False, env=environment)
    if done.returncode != 0:
        raise SystemExit(f"error: {' '.join(command)} ended in {done.returncode}")
    return done.stdout


def compare(
    directory: Path, texts: list[str], true: list[str], folder: Path, *, only_engines: bool
) -> None:
    card = json.loads((directory / "adapter" / "remora.json").read_text(encoding="utf-8"))
    base = packaged(card["base_model"])
    table = folder / "texts.csv"
    with table.open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([["text"], *([text] for text in texts)])
    labels = card["labels"]
    ways: dict[str, NDArray[np.float64]] = {}
    for name, way, *arguments in (
        ("predict", predicted, directory, table, labels, "float32"),
        ("serve", served, directory, texts, labels),
        *engines(directory, table, labels, folder),
    ):
        ways[name] = kept(folder, name, way, *arguments)
    if only_engines:
        workload.write("same_answers_engines", {"rows": len(texts), "ways": show(ways, card, true)})
        return
    for name, settings in (
        ("merged-float32", ("--merge", "--dtype", "float32")),
        ("merged-as-base", ("--merge",)),
        ("compressed", ("--compress",)),
    ):
        if not (folder / name).exists():
            remora("export", directory, *settings, "--output", folder / name)

    merged, rounded = folder / "merged-float32", folder / "merged-as-base"
    compressed = folder / "compressed"
    for name, way, *arguments in (
        ("predict, bfloat16 arithmetic", predicted, directory, table, labels, "bfloat16"),
        ("predict, merged, float32", predicted, merged, table, labels, "float32"),
        ("predict, merged, as the base", predicted, rounded, table, labels, "float32"),
        ("predict, compressed", predicted, compressed, table, labels, "float32"),
        ("serve, merged, float32", served, merged, texts, labels),
        ("stock PEFT", scored, base, directory / "adapter", card, texts),
        ("stock PEFT, compressed", scored, base, compressed, card, texts),
    ):
        ways[name] = kept(folder, name, way, *arguments)
    results = show(ways, card, true)
    print()
    written = {}
    for name, settings in (("as the model says", {}), ("greedy", {"num_beams": 1})):
        found = kept(folder, f"generate, {name}", generated, merged, base, card, texts, settings)
        written[name] = writing(found.tolist(), ways["predict, merged, float32"], labels, true)
        figures = written[name]
        print(
            f"generate(), {name}: the likeliest label on {figures['likeliest']} of {len(texts)} "
            f"rows, another label on {figures['other_label']} (on {figures['other_is_less']} of "
            f"them a less probable one), no label on {figures['no_label']}; accuracy "
            f"{figures['accuracy']:.2%}"
        )
    workload.write("same_answers", {"rows": len(texts), "ways": results, "generate": written})


def show(
    ways: dict[str, NDArray[np.float64]], card: dict[str, Any], true: list[str]
) -> dict[str, Any]:
    """Print how each way agrees with `predict`; return the figures."""
    rows, results = [], {}
    for name, probabilities in ways.items():
        other = "predict, compressed" if name == "stock PEFT, compressed" else "predict"
        figures = agreement(probabilities, ways[other], card["labels"], true)
        results[name] = {"compared_with": other, **figures}
        rows.append(
            [
                name,
                other,
                str(figures["other_labels"]),
                f"{figures['largest_difference']:.1e}",
                f"{figures['accuracy']:.2%}",
            ]
        )
    header = ["way", "compared with", "rows with another label", "largest difference", "accuracy"]
    workload.print_table([*header[:3], f"{header[3]} of a probability", header[4]], rows)
    return results


def kept(folder: Path, name: str, way: Callable[..., Any], *arguments: Any) -> NDArray[Any]:
    """Return what a way finds, from the folder if it was found before."""
    path = folder / f"{name.replace(', ', '-').replace(' ', '-')}.npy"
    if not path.exists():
        began = time.perf_counter()
        np.save(path.with_suffix(".part.npy"), np.asarray(way(*arguments)))
        path.with_suffix(".part.npy").rename(path)
        print(f"{name}: {time.perf_counter() - began:.0f} s", file=sys.stderr, flush=True)
    return np.load(path)


def packaged(base: str) -> Path:
    """Return the folder of a base model, also of the one in the package."""
    from remora.models import hub

    return Path(hub.find(base))


def predicted(path: Path, table: Path, labels: list[str], precision: str) -> NDArray[np.float64]:
    """Return the probabilities [rows, labels] that `remora predict` gives."""
    lines = remora("predict", path, table, *flags(labels, precision), "--json").splitlines()
    return matrix([json.loads(line) for line in lines], labels)


def flags(labels: list[str], precision: str) -> list[object]:
    """Return the flags by which `remora predict` gives the probabilities of all labels."""
    given: list[object] = ["--top-k", len(labels), "--tolerance", TOLERANCE]
    return [*given, "--precision", precision, "--device", "cpu"]


def engines(directory: Path, table: Path, labels: list[str], folder: Path) -> list[tuple[Any, ...]]:
    """Return the ways that need what may not be installed."""
    ways = [("predict --engine ray", on_ray, "ray"), ("Predictor in Spark", on_spark, "pyspark")]
    found: list[tuple[Any, ...]] = []
    for name, way, package in ways:
        if importlib.util.find_spec(package) is None:
            print(f"{name}: left out, since {package} is not installed", file=sys.stderr)
        else:
            found.append((name, way, directory, table, labels, folder))
    return found


def on_ray(directory: Path, table: Path, labels: list[str], folder: Path) -> NDArray[np.float64]:
    """Return the probabilities [rows, labels] of two workers of Ray."""
    output = folder / "ray.jsonl"
    workers = ("--engine", "ray", "--workers", 2, "--worker-cores", 1, "--part-rows", 1000)
    remora("predict", directory, table, *flags(labels, "float32"), *workers, "--output", output)
    lines = [line for part in sorted(output.glob("part-*")) for line in part.open(encoding="utf-8")]
    return matrix([json.loads(line) for line in lines], labels)


def on_spark(directory: Path, table: Path, labels: list[str], folder: Path) -> NDArray[np.float64]:
    """Return the probabilities [rows, labels] of two threads of a local Spark."""
    from pyspark.sql import SparkSession

    import remora as package

    os.environ.setdefault("PYSPARK_PYTHON", sys.executable)
    predictor = package.Predictor(
        directory,
        device="cpu",
        precision="float32",
        top_k=len(labels),
        tolerance=TOLERANCE,
    )

    def classify(frames: Any) -> Any:
        yield from map(predictor, frames)

    ends = ["", *(f"_{k}" for k in range(2, len(labels) + 1))]
    columns = [f"label{end} string, probability{end} double" for end in ends]
    with table.open(encoding="utf-8", newline="") as file:
        texts = [row["text"] for row in csv.DictReader(file)]
    spark = SparkSession.builder.master("local[2]").getOrCreate()
    try:
        frame = spark.createDataFrame(list(enumerate(texts)), "id int, text string")
        schema = ", ".join(["id int", "text string", *columns])
        rows = frame.mapInPandas(classify, schema).orderBy("id").collect()
    finally:
        spark.stop()
    return matrix(
        [
            {
                "labels": [
                    {"label": row[f"label{end}"], "probability": row[f"probability{end}"]}
                    for end in ends
                ]
            }
            for row in rows
        ],
        labels,
    )


def matrix(answers: list[Any], labels: list[str]) -> NDArray[np.float64]:
    place = {label: index for index, label in enumerate(labels)}
    found = np.full((len(answers), len(labels)), np.nan)
    for row, answer in enumerate(answers):
        for one in answer["labels"]:
            found[row, place[one["label"]]] = one["probability"]
    assert not np.isnan(found).any()
    return found


def served(directory: Path, texts: list[str], labels: list[str]) -> NDArray[np.float64]:
    """Return the probabilities [rows, labels] that `remora serve` answers, 64 messages a time."""
    command = [sys.executable, "-m", "remora", "serve", str(directory), "--port", "0"]
    command += ["--tolerance", str(TOLERANCE), "--precision", "float32", "--device", "cpu"]
    command += ["--timeout-seconds", "600"]
    answers: list[Any] = []
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as service:
        try:
            assert service.stderr is not None
            said = next(line for line in service.stderr if "http://" in line)
            url = next(word for word in said.split() if word.startswith("http://")).rstrip(",.")
            for start in range(0, len(texts), 64):
                body = {"texts": texts[start : start + 64], "top_k": len(labels)}
                request = urllib.request.Request(
                    f"{url}/v1/classify",
                    json.dumps(body).encode(),
                    {"content-type": "application/json"},
                )
                with urllib.request.urlopen(request) as answer:
                    answers += json.load(answer)["results"]
        finally:
            service.terminate()
    return matrix(answers, labels)


def with_peft(base: Path, adapter: Path) -> Any:
    import peft

    return peft.PeftModel.from_pretrained(whole(base), str(adapter)).eval()


def whole(folder: Path) -> Any:
    import torch
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def asked(tokenizer: Any, card: dict[str, Any], text: str) -> str:
    """Return a message in the chat template, as anyone would write it."""
    content = f"{card['instruction']}\n\n{text.strip()}"
    return tokenizer.apply_chat_template(
        [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
    )


def scored(
    base: Path, adapter: Path, card: dict[str, Any], texts: list[str]
) -> NDArray[np.float64]:
    """Return probabilities by PEFT's ordinary forward passes: the message, then labels, padded.

    Labels whose first token is more probable come first. A label is at most as probable as its
    first token, so the rest is not looked at once it holds no more than TOLERANCE.
    """
    import torch
    from transformers import AutoTokenizer

    model, tokenizer = with_peft(base, adapter), AutoTokenizer.from_pretrained(base)
    written = [card["label_texts"].get(label, label) for label in card["labels"]]
    answers = [
        tokenizer(text + tokenizer.eos_token, add_special_tokens=False).input_ids
        for text in written
    ]
    found = np.zeros((len(texts), len(answers)))
    for row, text in enumerate(texts):
        ids = tokenizer(
            asked(tokenizer, card, text), add_special_tokens=False, return_tensors="pt"
        ).input_ids
        with torch.inference_mode():
            start = model(input_ids=ids, use_cache=True)
            first = start.logits[0, -1].log_softmax(-1).double().exp().numpy()
            order = sorted(range(len(answers)), key=lambda i: -first[answers[i][0]])
            while order and (
                sum({answers[i][0]: first[answers[i][0]] for i in order}.values())
                > TOLERANCE * found[row].sum()
            ):
                chosen, order = order[:LABELS_AT_ONCE], order[LABELS_AT_ONCE:]
                longest = max(len(answers[i]) for i in chosen)
                targets = torch.tensor(
                    [answers[i] + [-1] * (longest - len(answers[i])) for i in chosen]
                )
                cache = copy.deepcopy(start.past_key_values)
                cache.batch_repeat_interleave(len(chosen))
                counts = targets >= 0
                mask = torch.cat([torch.ones(len(chosen), ids.shape[1]), counts], 1).long()
                rest = model(
                    input_ids=targets.clamp(0), attention_mask=mask, past_key_values=cache
                ).logits[:, :-1]
                logits = torch.cat([start.logits[:, -1:].expand(len(chosen), -1, -1), rest], 1)
                each = logits.log_softmax(-1).gather(2, targets.clamp(0)[..., None])[..., 0]
                found[row, chosen] = (each * counts).sum(1).double().exp().numpy()
    return found / found.sum(1, keepdims=True)


def generated(
    merged: Path, base: Path, card: dict[str, Any], texts: list[str], settings: dict[str, int]
) -> list[str]:
    """Return what generate() writes, in batches of 64 padded on the left."""
    import torch
    from transformers import AutoTokenizer

    model = whole(merged)
    tokenizer = AutoTokenizer.from_pretrained(base, padding_side="left")
    prompts = [asked(tokenizer, card, text) for text in texts]
    order = sorted(range(len(texts)), key=lambda i: len(prompts[i]))
    found = [""] * len(texts)
    for start in range(0, len(order), 64):
        chosen = order[start : start + 64]
        inputs = tokenizer(
            [prompts[i] for i in chosen],
            add_special_tokens=False,
            padding=True,
            return_tensors="pt",
        )
        with torch.inference_mode():
            tokens = model.generate(**inputs, **settings)[:, inputs.input_ids.shape[1] :]
        for i, text in zip(
            chosen, tokenizer.batch_decode(tokens, skip_special_tokens=True), strict=True
        ):
            found[i] = text.strip()
    by_text = {card["label_texts"].get(label, label): label for label in card["labels"]}
    return [by_text.get(text, text) for text in found]


def agreement(
    one: NDArray[np.float64], other: NDArray[np.float64], labels: list[str], true: list[str]
) -> dict[str, Any]:
    """Compare probabilities [rows, labels]."""
    right = [labels[i] == label for i, label in zip(one.argmax(1), true, strict=True)]
    return {
        "other_labels": int((one.argmax(1) != other.argmax(1)).sum()),
        "largest_difference": float(np.abs(one - other).max()),
        "accuracy": sum(right) / len(right),
    }


def writing(
    found: list[str], probabilities: NDArray[np.float64], labels: list[str], true: list[str]
) -> dict[str, Any]:
    """Compare what was written with the likeliest labels."""
    place = {label: index for index, label in enumerate(labels)}
    best = [labels[i] for i in probabilities.argmax(1)]
    others = [i for i, text in enumerate(found) if text != best[i] and text in place]
    return {
        "likeliest": sum(text == label for text, label in zip(found, best, strict=True)),
        "other_label": len(others),
        "other_is_less": sum(
            bool(probabilities[i, place[found[i]]] < probabilities[i].max()) for i in others
        ),
        "no_label": sum(text not in place for text in found),
        "accuracy": sum(a == b for a, b in zip(found, true, strict=True)) / len(true),
    }


if __name__ == "__main__":
    main()
