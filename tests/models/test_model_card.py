"""README.md of a run as the hub reads it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from huggingface_hub import ModelCard

import finished
from remora.errors import DataError
from remora.models import model_card

LABELS = ["card arrival", "a|b `code` <script>", "refund\n# not a heading"]


def write(path: Path, **settings: str) -> Path:
    texts = [f"message {i}" for i in range(30)]
    true = [i % 3 for i in range(30)]
    predicted = [0 if i % 5 == 0 else i % 3 for i in range(30)]
    return finished.write(
        path, labels=LABELS, texts=texts, true=true, predicted=predicted, **settings
    )


def test_the_hub_reads_what_was_measured(tmp_path: Path) -> None:
    run = write(tmp_path / "my run", model="Qwen/Qwen2.5-0.5B", data="hf:owner/table:config")
    model_card.write(run)
    found = ModelCard.load(run / "README.md")
    assert found.data.base_model == "Qwen/Qwen2.5-0.5B"
    assert found.data.datasets == "owner/table"
    assert (found.data.library_name, found.data.pipeline_tag) == ("peft", "text-classification")
    assert found.data.model_name == "my run"
    measured = json.loads((run / "evaluation.json").read_text())["metrics"]
    assert {each.metric_type: each.metric_value for each in found.data.eval_results} == {
        "accuracy": measured["accuracy"],
        "f1": measured["macro_f1"],
    }
    assert {each.dataset_split for each in found.data.eval_results} == {"test"}
    assert f"Accuracy {measured['accuracy']:.2%}" in found.text
    assert "for `Qwen/Qwen2.5-0.5B`, trained by Remora on `owner/table`" in found.text


def test_a_model_that_trained_in_all_weights_is_called_that(tmp_path: Path) -> None:
    run = write(tmp_path / "run", model="Qwen/Qwen2.5-0.5B", method="full")
    found = ModelCard(model_card.card(run))
    assert found.data.base_model == "Qwen/Qwen2.5-0.5B"
    assert found.data.library_name == "transformers"
    assert found.data.tags == ["remora"]
    assert "All weights of `Qwen/Qwen2.5-0.5B`, trained by Remora on `data.csv`" in found.text


def test_folders_of_this_machine_are_not_published(tmp_path: Path) -> None:
    model, data = tmp_path / "secret" / "base", tmp_path / "secret" / "table.csv"
    text = model_card.card(write(tmp_path / "run", model=str(model), data=str(data)))
    assert "secret" not in text
    assert "for `base`, trained by Remora on `table.csv`" in text
    card = ModelCard(text)
    assert card.data.base_model is None
    assert card.data.eval_results[0].dataset_name == "table.csv"


def test_labels_stay_text(tmp_path: Path) -> None:
    text = model_card.card(write(tmp_path / "run"))
    assert "`` a|b `code` <script> ``" in text
    assert "`refund # not a heading`" in text
    assert "\n# not a heading" not in text


def test_what_is_no_run_has_no_card(tmp_path: Path) -> None:
    run = write(tmp_path / "run")
    (run / "adapter" / "remora.json").unlink()
    with pytest.raises(
        DataError, match="has no trained model; give the directory of a finished run"
    ):
        model_card.write(run)
    assert not (run / "README.md").exists()
