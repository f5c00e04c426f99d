"""The settings of `remora tune`."""

from __future__ import annotations

from dataclasses import dataclass

from cyclopts import Parameter

from remora.config.checks import Count, Names, check
from remora.config.help_pages import grouped
from remora.config.train import TrainConfig

SEARCHED = ("learning_rate", "rank", "epochs", "label_texts", "list_labels", "answer")


@grouped(trials="Choice", json="Output")
@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class TuneConfig(TrainConfig):
    """Settings of `remora tune`: those of `remora train`, and what is searched."""

    trials: Count = 20
    """Settings to try, the given ones first; unpromising ones end early."""

    search: Names = ("learning_rate", "rank", "epochs", "label_texts")
    """Settings to search, separated by commas: learning_rate (a quarter to four times the given
    one), rank (4 to 64, alpha in proportion), epochs (half to twice), label_texts (labels as they
    are or as words), list_labels (off or on), answer (words or classes)."""

    json: bool = False
    """Write the trials and the figures as JSON to standard output."""

    def __post_init__(self) -> None:
        """Check every value.

        Raises:
            ConfigError: Naming everything that is wrong.
        """
        super().__post_init__()
        unknown = [name for name in self.search if name not in SEARCHED]
        check(
            self,
            (
                bool(unknown) or not self.search,
                f"search has {', '.join(map(repr, unknown)) or 'no name'}; give some of "
                f"{', '.join(SEARCHED)}",
            ),
            (self.learning_curve is not None, "tune trains no learning curve; leave it out"),
            (self.devices > 1, "tune trains on one device; leave out devices"),
            (
                "epochs" in self.search and self.max_steps is not None,
                "max_steps ends every trial, so epochs cannot be searched; give --search "
                "learning_rate,rank,label_texts",
            ),
            (
                "rank" in self.search and (self.method == "full" or self.start_from is not None),
                "there is no rank to search here; give --search learning_rate,epochs",
            ),
            *self._conflicts_of_answers(),
            (
                self.validation_fraction == 0 and self.validation is None,
                "tune compares trials on validation rows; give --validation-fraction above 0",
            ),
        )

    def _conflicts_of_answers(self) -> tuple[tuple[bool, str], ...]:
        """Return settings that only one of two answers takes, where both are searched."""
        is_searched = "answer" in self.search
        return (
            (
                is_searched and self.multi_label == "on",
                "rows with several labels are answered by classes only, so answer cannot be "
                "searched; leave it out of search",
            ),
            (
                is_searched and bool(self.label_texts),
                "label_texts are for words only, so answer cannot be searched; leave out one of "
                "them",
            ),
            (
                is_searched and "zero-shot" in self.baselines,
                "the baseline zero-shot is for words only, so answer cannot be searched; leave "
                "out one of them",
            ),
            (
                is_searched and self.metric == "log_loss",
                "the log_loss of words is of tokens and that of classes of rows, so answer cannot "
                "be searched by it; give --metric accuracy or macro_f1",
            ),
            (
                is_searched and self.start_from is not None,
                "the run to start from answers in one way, so answer cannot be searched; leave it "
                "out of search",
            ),
        )
