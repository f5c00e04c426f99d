"""What a run is measured beside: accuracy and time of every baseline, and what `auto` costs.

One `remora train` with all baselines on all rows, and one with those that `auto` takes. Sentence
embeddings are those of all-MiniLM-L6-v2, which `real_models.py` fetches. Finished runs are read,
not repeated.

    python benchmarks/baselines.py
    python benchmarks/baselines.py --data banking77 --epochs 3
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import real_models
import workload
from remora import display
from remora.config import TrainConfig
from remora.evaluation.rivals import of_figures, seconds_of, verdict
from remora.training import resume
from remora.training.run import train

BASELINES = {"all": ("svm", "zero-shot", "probe", "embeddings"), "auto": ("auto",)}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", default="sample:support", help="banking77, or a source of train")
    parser.add_argument("--model", default="nano")
    parser.add_argument("--epochs", type=float, default=5)
    parser.add_argument("--rows-per-class", type=int)
    parser.add_argument("--list-labels", action="store_true")
    parser.add_argument("--runs", type=Path, default=Path("runs/baselines"))
    options = parser.parse_args()
    told = {}
    for name, chosen in BASELINES.items():
        figures = measured(name, chosen, options)
        told[name] = figures
        rivals = of_figures(figures)
        rows = [
            [
                each.description,
                each.rows or "all rows",
                f"{each.accuracy:.2%}",
                "{:.1%} to {:.1%}".format(*each.accuracy_interval),
                f"{100 * each.difference:+.1f}",
                f"{each.p_value:.2g}",
                f"{each.seconds:.1f} s",
                f"{each.seconds / seconds_of(figures):.1%}",
            ]
            for each in rivals
        ]
        ours = figures["metrics"]
        interval = "{:.1%} to {:.1%}".format(*ours["accuracy_interval"])
        seconds = f"{seconds_of(figures):.1f} s"
        rows.append(["adapter", "all rows", f"{ours['accuracy']:.2%}", interval, "", "", seconds])
        print(f"\n--baselines {','.join(chosen)}\n")
        workload.print_table(
            ["", "rows", "accuracy", "95 % interval", "points", "p", "time", "of the run"],
            [[*row, *[""] * (8 - len(row))] for row in rows],
        )
        print(f"\n{verdict(rivals, 'adapter', seconds_of(figures))}")
    workload.write(f"baselines-{options.model}-{Path(options.data).name}", told)


def measured(name: str, chosen: tuple[str, ...], options: argparse.Namespace) -> dict[str, Any]:
    """Return evaluation.json of a run with some baselines, trained unless that is done."""
    data, test = options.data, None
    if data == "banking77":
        folder = workload.SHARED / "data" / "banking77"
        data, test = str(folder / "train.csv"), str(folder / "test.csv")
    output = options.runs / f"{options.model}-{Path(options.data).name}"
    if not resume.is_finished(output / name):
        here = options.model in real_models.MODELS
        config = TrainConfig(
            data,
            test=test,
            model=str(real_models.fetch(options.model)) if here else options.model,
            epochs=options.epochs,
            rows_per_class=options.rows_per_class,
            list_labels=options.list_labels,
            baselines=chosen,
            embedding_model=str(real_models.fetch("minilm")),
            output=output,
            name=name,
        )
        with display.TerminalReporter().live() as reporter:
            display.show_result(train(config, reporter=reporter))
    path = output / name / "evaluation.json"
    figures: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return figures


if __name__ == "__main__":
    main()
