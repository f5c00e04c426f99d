"""What a finished run knows about itself, read for its report and what to do next."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from remora.config import TrainConfig
from remora.config.checks import is_read_once
from remora.data.corrections import read_sheet
from remora.errors import DataError
from remora.evaluation import results
from remora.evaluation.predictions import PROBABILITIES, Scored, read_probabilities
from remora.evaluation.results import Results
from remora.evaluation.rivals import Rival, of_figures
from remora.evaluation.significance import holm
from remora.formatting import escape_formula

SIGNIFICANT = 0.05
Figures = dict[str, Any]  # of a JSON file


@dataclass(frozen=True, kw_only=True)
class Suspects:
    """The rows of relabel.csv."""

    num_rows: int
    num_likely: int  # of those not decided yet, mislabelled with a probability of at least a half
    num_undecided: int
    num_changed: int  # decided to get another label or to be deleted, which it was not trained on


@dataclass(frozen=True, kw_only=True)
class RunFacts:
    """A finished run: its figures, and what its other files add to them."""

    directory: Path  # as the user gave it
    run: Results
    settings: Mapping[str, Any]  # config.toml
    summary: Mapping[str, Any]  # data.json; {} if it is missing
    records: Sequence[Figures]  # metrics.jsonl
    curve: Figures | None  # learning_curve.json
    diagnosis: Figures | None
    sheet: Sequence[Mapping[str, str]]  # rows of relabel.csv; [] if it is missing or broken
    corrected: Sequence[Mapping[str, str]] = ()  # rows of corrections.csv, likewise

    @property
    def metrics(self) -> Figures:
        """The figures on the held-out rows."""
        return dict(self.run.figures["metrics"])

    @property
    def trained(self) -> str:
        """What was trained: "adapter" or "model"."""
        return "model" if self.run.figures.get("method") == "full" else "adapter"

    @property
    def num_rows(self) -> int:
        """Held-out rows."""
        return int(self.metrics["num_rows"])

    @property
    def num_wrong(self) -> int:
        """Held-out rows that are predicted wrongly."""
        return int(self.metrics["num_rows"] - self.metrics["num_correct"])

    @property
    def error(self) -> float:
        """Share of the held-out rows that are predicted wrongly."""
        return self.num_wrong / self.num_rows

    @cached_property
    def rivals(self) -> list[tuple[Rival, float]]:
        """The baselines with their p-values, adjusted by Holm's method; the best one first."""
        rivals = of_figures(self.run.figures)
        adjusted = holm([each.p_value for each in rivals])
        return sorted(zip(rivals, adjusted, strict=True), key=lambda each: -each[0].lead)

    @property
    def better_rival(self) -> tuple[Rival, float] | None:
        """The best baseline, if it is better and not by chance, with its adjusted p-value."""
        if not self.rivals:
            return None
        rival, p_value = self.rivals[0]
        return (rival, p_value) if rival.lead > 0 and rival.is_apart(p_value) else None

    @property
    def evaluations(self) -> list[Figures]:
        """The evaluations in training on as many rows as the last one had, by step."""
        found = [each for each in self.records if "validation_accuracy" in each]
        num_rows = found[-1].get("validation_rows") if found else None
        return [each for each in found if each.get("validation_rows") == num_rows]

    @property
    def num_steps(self) -> int:
        """Optimizer steps that were taken."""
        return int(self.run.figures["num_steps"])

    @property
    def stopped_early(self) -> bool:
        """Whether validation had stopped improving before the last step of the plan."""
        planned = [each["num_steps"] for each in self.records if "num_steps" in each]
        return bool(planned) and self.num_steps < planned[-1]

    @property
    def num_train_rows(self) -> int | None:
        """Training rows, None if data.json is missing."""
        count: int | None = self.summary.get("num_train")
        return count

    @property
    def steps_per_epoch(self) -> int | None:
        """Steps in a pass over the training rows."""
        if not self.num_train_rows:
            return None
        return math.ceil(self.num_train_rows / int(self.settings.get("batch_size", 32)))

    @property
    def epochs(self) -> float | None:
        """Passes over the training rows."""
        return self.num_steps / self.steps_per_epoch if self.steps_per_epoch else None

    @property
    def default_epochs(self) -> float | None:
        """Passes over the training rows that a run of this size gets by default."""
        if not self.num_train_rows or not self.steps_per_epoch:
            return None
        kept = {
            name: self.settings[name]
            for name in ("batch_size", "start_from")
            if name in self.settings
        }
        usual = TrainConfig("rows", model="base", **kept)
        return usual.num_steps(self.num_train_rows) / self.steps_per_epoch

    @property
    def base_parameters(self) -> int:
        """Parameters of the base model."""
        parameters = self.run.figures["parameters"]
        added = 0 if self.trained == "model" else parameters["trainable"]
        return int(parameters["total"] - added)

    @property
    def rows_per_label(self) -> dict[str, int]:
        """Training rows of each label; {} in runs of earlier versions."""
        return dict(self.summary.get("rows_per_label") or {})

    @property
    def can_read_again(self) -> bool:
        """Whether the training rows can be read again, which a pipe cannot."""
        return not is_read_once(str(self.settings.get("data", "")))

    @cached_property
    def validation(self) -> Scored | None:
        """Probabilities of the validation rows, if they are others than those measured on."""
        if self.run.figures["measured_on"] != "test":
            return None
        return read_probabilities(self.directory / PROBABILITIES, self.run.labels, "validation")

    @cached_property
    def measured(self) -> Scored | None:
        """Probabilities of the rows that were measured on."""
        split = self.run.figures["measured_on"]
        return read_probabilities(self.directory / PROBABILITIES, self.run.labels, split)

    @cached_property
    def suspects(self) -> Suspects | None:
        """The rows of relabel.csv, counted; None if someone has broken or removed the file."""
        try:
            undecided = [row for row in self.sheet if not row["decision"].strip()]
            known = {(row["row"], row["decision"].strip()) for row in self.corrected}
            held_out = {escape_formula(text) for text in self.run.texts}
            changed = [
                row["decision"].strip() not in {"", row["label"]}
                and (row["row"], row["decision"].strip()) not in known
                and row["text"] not in held_out
                for row in self.sheet
            ]
            likely = [float(row["p_wrong"].replace(",", ".")) >= 0.5 for row in undecided]
        except (ValueError, KeyError):
            return None
        if not self.sheet:
            return None
        return Suspects(
            num_rows=len(self.sheet),
            num_likely=sum(likely),
            num_undecided=len(undecided),
            num_changed=sum(changed),
        )

    @cached_property
    def plan(self) -> Figures:
        """plan.json; {} if it is missing."""
        return results.read_json(self.directory / "plan.json") or {}

    @cached_property
    def environment(self) -> Figures:
        """environment.json; {} if it is missing."""
        return results.read_json(self.directory / "environment.json") or {}

    @cached_property
    def adapter(self) -> Figures:
        """The adapter's configuration, as PEFT writes it; {} if there is none."""
        return results.read_json(self.directory / "adapter" / "adapter_config.json") or {}

    @property
    def num_alike(self) -> int | None:
        """Rows with the same wrong label from the run and all trained baselines; None without one.

        Baselines that were measured on a part of the rows are left out.
        """
        given = [self.run.baseline, *(v for k, v in self.run.rivals.items() if k != "zero-shot")]
        whole = [each for each in given if each and None not in each]
        if not whole:
            return None
        answers = zip(self.run.true, self.run.predicted, *whole, strict=True)
        return sum(bool(len({*o}) == 1 and o[0] != true) for true, *o in answers)


def read_facts(directory: Path) -> RunFacts:
    """Read what a finished run knows.

    Raises:
        DataError: If the run is not finished, or one of its files is broken.
    """
    return RunFacts(
        directory=directory,
        run=results.read(directory),
        settings=results.read_settings(directory),
        summary=results.read_json(directory / "data.json") or {},
        records=results.read_records(directory),
        curve=results.read_json(directory / "learning_curve.json"),
        diagnosis=results.read_json(directory / "diagnosis.json"),
        sheet=_sheet(directory / "relabel.csv"),
        corrected=_sheet(directory / "corrections.csv"),
    )


def _sheet(path: Path) -> Sequence[Mapping[str, str]]:
    """Return the rows of a sheet of decisions; [] if someone has broken or removed the file."""
    try:
        return read_sheet(path).records if path.is_file() else []
    except DataError:
        return []
