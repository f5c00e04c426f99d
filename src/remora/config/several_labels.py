"""What several labels a row change in the settings of a run, and what they cannot go with."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, TypeVar

from remora.errors import ConfigError

if TYPE_CHECKING:
    from remora.config.train import TrainConfig

Settings = TypeVar("Settings", bound="TrainConfig")

WORDS = (
    "answer is words and rows have several labels, each of which a head scores by itself; leave "
    "out answer"
)


def conflicts(settings: TrainConfig) -> tuple[tuple[bool, str], ...]:
    """Return settings on several labels that contradict others, as `checks.check` takes them."""
    separator, columns = settings.split_labels_at, settings.label_columns
    return (
        (settings.answer == "words" and settings.multi_label == "on", WORDS),
        (
            bool(columns) and bool(settings.label_column or separator),
            "label_columns name the columns of 0 and 1; leave out label_column and split_labels_at",
        ),
        (
            settings.multi_label == "off" and bool(separator or columns),
            "multi_label is off, and split_labels_at and label_columns are for rows with several "
            "labels; leave out one of them",
        ),
        (
            separator == "",
            "split_labels_at is empty; give the text between two labels, such as '|'",
        ),
        (
            len(columns) == 1,
            "label_columns has one name; give one for each label, separated by commas, or "
            "--label-column for a column of labels",
        ),
    )


def settled(settings: Settings, *, is_multi_label: bool) -> Settings:
    """Return the settings with what follows from whether rows have several labels.

    Raises:
        ConfigError: If a setting is for rows with one label, and the rows have several.
    """
    if not is_multi_label:
        answer, metric = settings.answer or "words", settings.metric or "accuracy"
        return replace(settings, answer=answer, metric=metric)
    refused = {
        "class_weights": settings.class_weights is not None,
        "label_texts": bool(settings.label_texts),
        "label_separator": bool(settings.label_separator),
        "the baseline zero-shot": "zero-shot" in settings.baselines,
        "the baseline probe": "probe" in settings.baselines,
        "the baseline embeddings": "embeddings" in settings.baselines,
    }
    if names := [name for name, is_given in refused.items() if is_given]:
        raise ConfigError(
            f"{names[0]} is for rows with one label, and these have several; leave it out"
        )
    if settings.answer == "words":
        raise ConfigError(WORDS)
    metric = settings.metric or "micro_f1"
    return replace(settings, answer="classes", metric=metric, multi_label="on")
