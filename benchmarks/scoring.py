"""Rows per second of closed-set scoring, against generating the label and matching its text.

The base model in the package with an adapter trained on Banking77, for a short while or as a run
given, float32. `generate()` runs greedily with its key-value cache, one message at a time and in
batches sorted by length, also with the cache of what all prompts begin with. Best-first search is
compared with looking at every label on all test rows, with what `generate()` writes on some.

    python benchmarks/scoring.py
    python benchmarks/scoring.py --list-labels
    python benchmarks/scoring.py --run runs/banking77-nano
"""

from __future__ import annotations

import argparse
import copy
import sys
import time
from pathlib import Path
from typing import Any

import workload


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    add_arguments(parser)
    parser.add_argument("--generate-rows", type=int, default=512)
    parser.add_argument("--rows", type=int, default=3_080, help="test rows, evenly spread")
    options = parser.parse_args()
    adapted, prompt, dataset = adapter(options)
    every = max(1, len(dataset.test) // options.rows)
    texts, true = dataset.test.texts[::every], dataset.test.labels[::every]
    results: dict[str, Any] = {"rows": len(texts)}
    rows = []

    few = texts[:: max(1, len(texts) // options.generate_rows)][: options.generate_rows]
    for size, keep_prefix in ((1, False), (32, False), (128, False), (32, True), (128, True)):
        way = "generate(), prefix kept" if keep_prefix else "generate()"
        told(f"{way}, batches of {size}")
        some = few[: len(few) // 4] if size == 1 else few
        run = generating(adapted, prompt, size, keep_prefix=keep_prefix)
        seconds, found = timed(run, some)
        results[f"{way}, batch {size}"] = len(some) / seconds
        rows.append([way, str(size), f"{len(some) / seconds:.1f}"])
    answers = {}
    for tolerance, name in ((1.0, "argmax"), (1e-2, "best-first, to 0.01"), (0.0, "every label")):
        told(f"Remora, {name}")
        seconds, answers[tolerance] = timed(scoring(adapted, prompt, tolerance), texts)
        results[name] = len(texts) / seconds
        rows.append([f"Remora, {name}", "", f"{len(texts) / seconds:.1f}"])
    same = [int((answers[t] == answers[0.0]).sum()) for t in (1e-2, 1.0)]
    places = {text: index for index, text in enumerate(texts)}
    matched = sum(
        a == prompt.labels[answers[0.0][places[t]]] for a, t in zip(found, few, strict=True)
    )
    workload.print_table(["way", "batch", "rows/s"], rows)
    one = results["generate(), batch 1"]
    ordinary, kept = (
        max(v for k, v in results.items() if k.startswith(way))
        for way in ("generate(), batch", "generate(), prefix kept")
    )
    for name in ("argmax", "best-first, to 0.01"):
        print(
            f"\n{name} is {results[name] / one:.1f} times generate() one message at a time, "
            f"{results[name] / ordinary:.1f} times at its best batch, "
            f"{results[name] / kept:.1f} times with the prefix kept"
        )
    print(
        f"argmax as by looking at every label: {same[1]} of {len(texts)} rows "
        f"(to 0.01: {same[0]})\n"
        f"generate() writes the label that scores best on {matched} of {len(few)} rows, "
        f"a label of the set on {sum(a is not None for a in found)}"
    )
    results |= {"same_argmax": same, "generate_agrees": matched}
    correct = [int(i) == prompt.labels.index(t) for i, t in zip(answers[0.0], true, strict=True)]
    print(f"accuracy {sum(correct) / len(correct):.2%}")
    workload.write("scoring-labels-listed" if options.list_labels else "scoring", results)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what `adapter` needs."""
    parser.add_argument("--run", type=Path, help="a run on Banking77, instead of training")
    parser.add_argument("--train-steps", type=int, default=300)
    parser.add_argument("--model", default="nano")
    parser.add_argument("--learning-rate", type=float, default=4e-3)
    parser.add_argument("--list-labels", action="store_true", help="list them in the prompt")


def told(what: str) -> None:
    """Say what runs now."""
    print(what, file=sys.stderr, flush=True)


def adapter(options: argparse.Namespace) -> tuple[Any, Any, Any]:
    """Return an adapted model, its prompt and Banking77."""
    import torch

    from remora.data.dataset import load_dataset
    from remora.models import saved

    if options.run is None:
        return trained(options)
    dataset = load_dataset(str(workload.SHARED / "data" / "banking77"), seed=0)
    adapted, prompt, _ = saved.load_adapter(
        options.run, base=None, dtype=torch.float32, device=torch.device("cpu")
    )
    return adapted.eval(), prompt, dataset


def trained(options: argparse.Namespace) -> tuple[Any, Any, Any]:
    """Train an adapter for a short while."""

    from remora.config import TrainConfig
    from remora.data.dataset import load_dataset
    from remora.training.loop import fit
    from remora.training.session import open_session

    config = TrainConfig(
        str(workload.SHARED / "data" / "banking77"),
        model=options.model,
        list_labels=options.list_labels,
        validation_fraction=0.0,
        max_steps=options.train_steps,
        learning_rate=options.learning_rate,
        micro_batch_tokens=2_048,
        precision="float32",
        device="cpu",
    )
    told(f"training {options.model} for {options.train_steps} steps")
    dataset = load_dataset(config.data, validation_fraction=0.0, seed=0)
    with open_session(config, dataset) as session:
        fit(session)
    return session.model.eval(), session.prompt, dataset


def scoring(model: Any, prompt: Any, tolerance: float) -> Any:
    from remora.tree.scoring import Scorer

    scorer = Scorer(model, prompt, tolerance=tolerance)
    return lambda texts: scorer.probabilities(texts).argmax(1)


def generating(model: Any, prompt: Any, size: int, *, keep_prefix: bool = False) -> Any:
    """Generate in batches, sorted by length, padded on the left, as one would by hand.

    With `keep_prefix` what all prompts begin with is computed once, and its cache copied for each
    batch; padding then stands behind it.
    """
    import torch
    from transformers import DynamicCache

    longest = max(map(len, prompt.answers))
    end = prompt.answers[0][-1]
    by_tokens = {answer: prompt.labels[i] for i, answer in enumerate(prompt.answers)}
    prefix = list(prompt.prefix) if keep_prefix else []
    kept = DynamicCache()
    if prefix:
        with torch.inference_mode():
            model(input_ids=torch.tensor([prefix]), past_key_values=kept, use_cache=True)

    @torch.inference_mode()
    def run(texts: list[str]) -> list[str | None]:
        stems = prompt.stems(texts)
        assert all(list(stem[: len(prefix)]) == prefix for stem in stems)
        order = sorted(range(len(stems)), key=lambda i: len(stems[i]))
        found: list[str | None] = [None] * len(stems)
        for start in range(0, len(order), size):
            chosen = order[start : start + size]
            width = max(len(stems[i]) for i in chosen)
            ids = torch.full((len(chosen), width), end)
            attention = torch.zeros_like(ids)
            for row, i in enumerate(chosen):
                rest = stems[i][len(prefix) :]
                ids[row, width - len(rest) :] = torch.tensor(rest)
                attention[row, width - len(rest) :] = 1
            more = {}
            if prefix:
                ids[:, : len(prefix)], attention[:, : len(prefix)] = torch.tensor(prefix), 1
                more["past_key_values"] = copy.deepcopy(kept)
                more["past_key_values"].batch_repeat_interleave(len(chosen))
            written = model.generate(
                input_ids=ids,
                attention_mask=attention,
                max_new_tokens=longest,
                do_sample=False,
                num_beams=1,
                eos_token_id=end,
                pad_token_id=end,
                **more,
            )[:, width:].tolist()
            for i, tokens in zip(chosen, written, strict=True):
                answer = tokens[: tokens.index(end) + 1] if end in tokens else tokens
                found[i] = by_tokens.get(tuple(answer))
        return found

    return run


def timed(run: Any, texts: list[str]) -> tuple[float, Any]:
    run(texts[:8])
    began = time.perf_counter()
    result = run(texts)
    return time.perf_counter() - began, result


if __name__ == "__main__":
    main()
