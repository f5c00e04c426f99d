"""Rows per second of closed-set scoring, against generating the label and matching its text.

craftgpt-5m with an adapter trained for a short while on Banking77, float32. `generate()` runs
greedily in several batch sizes, with its key-value cache; the best one counts. Best-first search is
compared with looking at every label on all test rows.

    python benchmarks/scoring.py
"""

from __future__ import annotations

import argparse
import time
from typing import Any

import workload


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--train-steps", type=int, default=300)
    parser.add_argument("--generate-rows", type=int, default=512)
    options = parser.parse_args()
    adapted, prompt, dataset = trained(options.train_steps)
    texts = dataset.test.texts
    results: dict[str, Any] = {"rows": len(texts)}
    rows = []

    answers = {}
    for tolerance, name in ((0.0, "every label"), (1e-2, "best-first, to 0.01"), (1.0, "argmax")):
        seconds, answers[tolerance] = timed(scoring(adapted, prompt, tolerance), texts)
        results[name] = len(texts) / seconds
        rows.append([f"Remora, {name}", "", f"{len(texts) / seconds:.0f}"])
    same = [int((answers[t] == answers[0.0]).sum()) for t in (1e-2, 1.0)]
    few = texts[: options.generate_rows]
    for size in (1, 32, 128):
        seconds, found = timed(generating(adapted, prompt, size), few)
        results[f"generate, batch {size}"] = len(few) / seconds
        rows.append(["generate() + string match", str(size), f"{len(few) / seconds:.0f}"])
    matched = sum(a == prompt.labels[i] for a, i in zip(found, answers[0.0], strict=False))
    workload.print_table(["way", "batch", "rows/s"], rows)
    best = max(v for k, v in results.items() if k.startswith("generate"))
    print(
        f"\nargmax search is {results['argmax'] / best:.1f} times generate() at its best batch, "
        f"probabilities to 0.01 {results['best-first, to 0.01'] / best:.1f} times\n"
        f"argmax as by looking at every label: {same[1]} of {len(texts)} rows "
        f"(to 0.01: {same[0]})\n"
        f"generate() writes the label that scores best on {matched} of {len(few)} rows, "
        f"a label of the set on {sum(a is not None for a in found)}"
    )
    results |= {"same_argmax": same, "generate_agrees": matched}
    workload.write("scoring", results)


def trained(steps: int) -> tuple[Any, Any, Any]:
    import torch

    from remora import data, plan, train
    from remora.config import TrainConfig

    config = TrainConfig(
        str(workload.SHARED / "data" / "banking77"),
        model=str(workload.SHARED / "models" / "craftgpt-5m"),
        validation_fraction=0.0,
        max_steps=steps,
        learning_rate=3e-3,
        micro_batch_tokens=256,
        precision="float32",
        device="cpu",
    )
    dataset = data.load_dataset(config.data, validation_fraction=0.0, seed=0)
    device = torch.device("cpu")
    precision = plan.choose_precision(device, config.precision)
    torch.manual_seed(0)
    adapted, prompt, _, _ = train.prepare(config, dataset.labels, precision, device)
    with train.accelerator_for(precision, device) as accelerator:
        train.fit(adapted, prompt, dataset, config, accelerator=accelerator, precision=precision)
    return adapted.eval(), prompt, dataset


def scoring(model: Any, prompt: Any, tolerance: float) -> Any:
    from remora.score import Scorer

    scorer = Scorer(model, prompt, tolerance=tolerance, max_tokens=1024)
    return lambda texts: scorer.probabilities(texts).argmax(1)


def generating(model: Any, prompt: Any, size: int) -> Any:
    """Generate in batches, sorted by length, padded on the left, as one would by hand."""
    import torch

    longest = max(map(len, prompt.answers))
    end = prompt.answers[0][-1]
    by_tokens = {answer: prompt.labels[i] for i, answer in enumerate(prompt.answers)}

    @torch.inference_mode()
    def run(texts: list[str]) -> list[str | None]:
        stems = prompt.stems(texts)
        order = sorted(range(len(stems)), key=lambda i: len(stems[i]))
        found: list[str | None] = [None] * len(stems)
        for start in range(0, len(order), size):
            chosen = order[start : start + size]
            width = max(len(stems[i]) for i in chosen)
            ids = torch.full((len(chosen), width), end)
            attention = torch.zeros_like(ids)
            for row, i in enumerate(chosen):
                ids[row, width - len(stems[i]) :] = torch.tensor(stems[i])
                attention[row, width - len(stems[i]) :] = 1
            written = model.generate(
                input_ids=ids,
                attention_mask=attention,
                max_new_tokens=longest,
                do_sample=False,
                eos_token_id=end,
                pad_token_id=end,
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
