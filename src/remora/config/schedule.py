"""How long and how fast a run learns by default, and how often it is measured, by its size."""

from __future__ import annotations

import math

from remora.config.checks import Method

LEAST_EPOCHS, MOST_EPOCHS = 3, 20
"""Passes over the training rows by default, with many rows and with few."""

WARM_SHARE, WARM_RATE = 1 / 3, 1 / 2
"""Passes and learning rate of a run that begins with another one's adapter, as shares of those
without; docs/log.md has the measurements."""

MOST_CLASSES_RATE = 2e-3
"""Highest default learning rate of an adapter with a linear head of one label a row; below it is
that of words. docs/log.md has the measurements."""

LEAST_STEPS = 250
"""Steps that few rows are passed over for; docs/log.md has the measurements."""

EVAL_SHARE = 1 / 3
"""Most validation rows in an evaluation, for each training row since the one before. A row is
scored in about half the time that training on it takes: its backward pass is left out."""

LEAST_EVAL_ROWS = 100
"""Validation rows in an evaluation that are not too many, however few training rows there are."""


def default_learning_rate(width: int, method: Method) -> float:
    """Return the peak learning rate for a model of a hidden size; docs/log.md says why.

    From a width of 1536 on 2e-4 for an adapter and 2e-5 for all weights, as in the recipes in use;
    more for narrower models, down to a width of 192.
    """
    narrower = min(8.0, max(1.0, 1536 / width))
    if method == "full":
        return 2e-5 * narrower**2
    return 2e-4 * math.pow(narrower, 5 / 3)
