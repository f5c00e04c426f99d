"""Weights of classes in the loss, and the metric that selects the weights of the model."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from conftest import VOCABULARY, call, tiny_model
from data.test_table import write_csv
from remora.config import TrainConfig
from remora.data.dataset import load_dataset
from remora.data.prompt import TokenSequence
from remora.errors import DataError
from remora.training.class_weights import class_weights
from remora.tree import packing
from remora.tree import rows as padded_rows
from remora.tree.forward import answer_logits
from remora.tree.loss import loss_sum


@pytest.fixture(scope="module")
def skewed(tmp_path_factory):
    rows = [(f"where is my card {i}", "card") for i in range(36)]
    rows += [(f"the refund {i}", "refund") for i in range(4)]
    return str(write_csv(tmp_path_factory.mktemp("data") / "skewed.csv", rows))


def test_balanced_weights_are_those_of_scikit_learn(skewed):
    from sklearn.utils.class_weight import compute_class_weight

    dataset = load_dataset(skewed, validation_fraction=0, test_fraction=0)
    found = class_weights("balanced", dataset)
    expected = compute_class_weight(
        "balanced", classes=np.array(dataset.labels), y=np.array(dataset.train.labels)
    )
    assert list(found.values()) == pytest.approx(expected.tolist())
    assert class_weights(None, dataset) is None


def test_weights_of_a_table(skewed, tmp_path):
    dataset = load_dataset(skewed, validation_fraction=0, test_fraction=0)

    def weights(*rows):
        path = write_csv(tmp_path / "w.csv", rows, ("label", "weight"))
        return class_weights(str(path), dataset)

    assert weights(("refund", "9")) == {"card": 1.0, "refund": 9.0}
    with pytest.raises(DataError, match=r"has the label 'refnd', .*; did you mean 'refund'"):
        weights(("refnd", "9"))
    for wrong in ("0", "-1", "nan", "many"):
        with pytest.raises(DataError, match=f"'refund' the weight '{wrong}'; give a number above"):
            weights(("refund", wrong))
    for meant in ("balancd", "balance", "Balanced"):
        with pytest.raises(DataError, match=rf"no table of class weights {meant}; .* balanced\?"):
            class_weights(meant, dataset)
    with pytest.raises(DataError, match=r"there is no file or folder .*weights\.csv"):
        class_weights("weights.csv", dataset)
    with pytest.raises(DataError, match="has the label 'refund' twice; leave one of them"):
        weights(("refund", "9"), ("refund ", "2"))


def test_columns_of_a_table_of_weights_are_told_as_its_own(skewed, tmp_path):
    dataset = load_dataset(skewed, validation_fraction=0, test_fraction=0)
    path = write_csv(tmp_path / "w.csv", [("9", "refund")], ("Weight", "Label"))
    assert class_weights(str(path), dataset) == {"card": 1.0, "refund": 9.0}
    for header in (("refund", "9"), ("label", "wt"), ("text", "label"), ("label", "Label")):
        path = write_csv(tmp_path / "w.csv", [("card", "1")], header)
        with pytest.raises(DataError, match=r"; name one label and one weight in") as told:
            class_weights(str(path), dataset)
        assert "--" not in str(told.value)


def test_weights_by_their_labels(skewed):
    dataset = load_dataset(skewed, validation_fraction=0, test_fraction=0)
    assert class_weights({"refund": 9}, dataset) == {"card": 1.0, "refund": 9.0}
    with pytest.raises(DataError, match=r"class_weights has the label 'refnd'.*mean 'refund'"):
        class_weights({"refnd": 9}, dataset)
    with pytest.raises(DataError, match="class_weights gives 'refund' the weight 'None'; give a"):
        class_weights({"refund": None}, dataset)


@pytest.mark.parametrize("layout", [packing, padded_rows])
def test_the_loss_and_its_gradient_are_the_weighted_sum_over_rows(layout):
    model = tiny_model("qwen2").double()
    generator = torch.Generator().manual_seed(0)
    rows = [
        TokenSequence(
            [1, 5, *torch.randint(3, VOCABULARY, (n,), generator=generator).tolist()], 3, w
        )
        for n, w in ((4, 0.5), (5, 3.0), (4, 1.0))
    ]
    rows.append(rows[1]._replace(weight=0.25))  # on the same edges

    def sums(parts):
        model.zero_grad()
        total = 0.0
        for part, factor in parts:
            packed = layout.build(part)
            loss = factor * loss_sum(answer_logits(model, packed), packed)
            loss.backward()
            total += float(loss.detach())
        return total, [p.grad.clone() for p in model.parameters() if p.grad is not None]

    together, gradients = sums([(rows, 1.0)])
    apart, expected = sums([([row._replace(weight=1.0)], row.weight) for row in rows])
    assert together == pytest.approx(apart, rel=1e-6)
    for found, wanted in zip(gradients, expected, strict=True):
        # norms are computed in float32, whatever the model is stored in
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-6)


def logged(directory):
    lines = (directory / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def run(config, tmp_path, name, *more):
    """Train on a skewed table for a few steps; return what was logged."""
    command = ["train", config.data, "--model", config.model, "--output", tmp_path, "--name", name]
    command += ["--max-steps", 3, "--eval-steps", 1, "--baselines", "none", "--device", "cpu"]
    command += ["--batch-size", 16, "--dropout", 0, "--precision", "float32"]
    assert call(*command, "--learning-rate", "1e-2", "--rank", 4, *more) == 0
    return logged(tmp_path / name)


def test_weights_and_metrics_change_a_run(skewed, base, tmp_path, capsys):
    config = TrainConfig(skewed, model=str(base), validation_fraction=0, test_fraction=0)
    plain = run(config, tmp_path, "plain")
    captured = capsys.readouterr()
    assert "majority" in captured.out
    assert "imbalanced: always answering 'card'" in captured.err

    def losses(records):
        return [each["loss"] for each in records if "loss" in each]

    assert not any("validation_macro_f1" in each for each in plain)
    balanced = ("--class-weights", "balanced", "--metric", "macro_f1")
    weighted = run(config, tmp_path, "weighted", *balanced)
    assert losses(weighted) != losses(plain)
    evaluated = [each for each in weighted if "validation_macro_f1" in each]
    assert evaluated
    best = -1.0
    for each in evaluated:
        assert each["validation_best"] >= (each["validation_macro_f1"] > best)
        best = max(best, each["validation_macro_f1"])
    by_loss = [
        e for e in run(config, tmp_path, "loss", "--metric", "log_loss") if "validation_loss" in e
    ]
    best = float("inf")
    for each in by_loss:
        assert each["validation_best"] == (each["validation_loss"] < best)
        best = min(best, each["validation_loss"])
