"""The frozen features that a diagnosis judges by: kept by the run, or computed from its base."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from conftest import WORDS
from remora.config import DiagnoseConfig, TrainConfig
from remora.data.dataset import load_data
from remora.diagnosis import diagnose
from remora.diagnosis import features as judges
from remora.errors import ModelError
from remora.runtime.reporter import Reporter
from remora.training.run import train
from remora.tree import features


def test_a_diagnosis_takes_the_features_that_the_run_kept(config: TrainConfig, monkeypatch) -> None:
    config = replace(config, baselines=("probe",), max_steps=1, validation_fraction=0.0)
    run = train(config).directory
    computed: list[int] = []
    extract = features.Extractor.features

    def noted(self, stems):
        computed.append(len(stems))
        return extract(self, stems)

    monkeypatch.setattr(features.Extractor, "features", noted)
    settings = diagnose.load(DiagnoseConfig(run))[0]
    texts = load_data(config).train.texts
    kept = judges.frozen_features(
        texts, sorted(WORDS), settings, Reporter(), run / features.FEATURES
    )
    assert computed == []
    again = judges.frozen_features(texts, sorted(WORDS), settings, Reporter())
    assert sum(computed) == len(set(texts))
    np.testing.assert_allclose(kept, again, atol=2e-3)
    # A row that the run had not, such as one it validated on, is computed
    computed.clear()
    more = judges.frozen_features(
        ["another message", *texts], sorted(WORDS), settings, Reporter(), run / features.FEATURES
    )
    assert computed == [1]
    assert len(more) == len(texts) + 1


def test_a_diagnosis_looks_for_the_base_where_the_run_had_it(
    config: TrainConfig, tmp_path: Path, monkeypatch
) -> None:
    """config.toml has the path as it was given; it may be relative."""
    shutil.copytree(config.model, tmp_path / "base")
    monkeypatch.chdir(tmp_path)
    run = train(replace(config, model="base", baselines=("svm",), max_steps=1)).directory
    (tmp_path / "else").mkdir()
    monkeypatch.chdir(tmp_path / "else")
    settings, dataset, _ = diagnose.load(DiagnoseConfig(run))
    given = (dataset.train.texts, sorted(WORDS))
    there = judges.frozen_features(*given, settings, Reporter(), run / features.FEATURES)
    (tmp_path / "base").rename(tmp_path / "moved")
    with pytest.raises(ModelError, match=r"base, which is not there; say where it is .* --model$"):
        judges.frozen_features(*given, settings, Reporter(), run / features.FEATURES)
    settings = diagnose.load(DiagnoseConfig(run, model=str(tmp_path / "moved")))[0]
    moved = judges.frozen_features(*given, settings, Reporter(), run / features.FEATURES)
    np.testing.assert_array_equal(there, moved)
