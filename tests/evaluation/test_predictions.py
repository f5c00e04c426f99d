"""The predictions and probabilities that a run keeps."""

from __future__ import annotations

import numpy as np
import pytest

from remora.errors import ModelError
from remora.evaluation.predictions import (
    PROBABILITIES,
    Scored,
    read_probabilities,
    write_probabilities,
)


def test_probabilities_come_back_and_broken_ones_are_refused(tmp_path) -> None:
    path = tmp_path / PROBABILITIES
    scored = Scored(probabilities=np.array([[0.25, 0.75], [1.0, 0.0]]), true=np.array([1, 1]))
    write_probabilities(path, ["a", "b"], {"validation": scored})
    back = read_probabilities(path, ["a", "b"], "validation")
    np.testing.assert_array_equal(back.probabilities, scored.probabilities)
    np.testing.assert_array_equal(back.correct, [True, False])
    assert read_probabilities(path, ["a", "b"], "test") is None
    assert read_probabilities(tmp_path / "none", ["a", "b"], "test") is None
    with pytest.raises(ModelError, match="is of other labels than the adapter"):
        read_probabilities(path, ["b", "a"], "validation")
    path.write_bytes(path.read_bytes()[:20])
    with pytest.raises(ModelError, match=r"is broken .*; restore it, or delete it"):
        read_probabilities(path, ["a", "b"], "validation")
