"""The recipes are what the command line takes, and say what their names say."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from remora import cli
from remora.config import TrainConfig
from remora.training import run

RECIPES = Path(__file__).parents[1] / "recipes"


class Parsed(Exception):  # noqa: N818 - not an error: it ends the command where training begins
    pass


def parsed(monkeypatch: pytest.MonkeyPatch, *arguments: str | Path) -> TrainConfig:
    """Return the settings that training would begin with."""
    found: list[TrainConfig] = []

    def begin(config: TrainConfig, **_: Any) -> None:
        found.append(config)
        raise Parsed

    monkeypatch.setattr(run, "train", begin)
    monkeypatch.setattr(cli.app, "config", ())
    with pytest.raises(Parsed):
        cli.main(["train", *map(str, arguments)])
    return found[0]


@pytest.mark.parametrize("recipe", sorted(RECIPES.glob("*.toml")), ids=lambda path: path.stem)
def test_a_recipe_needs_nothing_but_data(monkeypatch: pytest.MonkeyPatch, recipe: Path) -> None:
    config = parsed(monkeypatch, "data.csv", "--config", recipe)
    assert config.data == "data.csv"
    model = config.model.split("/")[-1].lower().removesuffix("-instruct")
    assert recipe.stem == f"{model}-{config.method}"
    assert parsed(monkeypatch, "data.csv", "--config", recipe, "--seed", "7").seed == 7


def test_an_empty_list_in_a_file_is_no_value(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    path = tmp_path / "settings.toml"
    path.write_text("trackers = []\ntarget_modules = []\nlearning_curve = []\n")
    config = parsed(monkeypatch, "data.csv", "--model", "nano", "--config", path)
    assert (config.trackers, config.target_modules, config.learning_curve) == ((), (), None)


def test_gemma_trains_in_all_its_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    config = parsed(monkeypatch, "data.csv", "--config", RECIPES / "gemma-3-270m-full.toml")
    expected = TrainConfig(
        "data.csv",
        model="google/gemma-3-270m",
        method="full",
        learning_rate=5e-5,
        epochs=3,
        batch_size=16,
    )
    assert config == expected


def test_the_lora_recipe_is_the_defaults(monkeypatch: pytest.MonkeyPatch) -> None:
    from remora.models.lora import SEED_RECIPE_MODULES

    config = parsed(monkeypatch, "data.csv", "--config", RECIPES / "qwen2.5-1.5b-lora.toml")
    modules = SEED_RECIPE_MODULES
    model = "Qwen/Qwen2.5-1.5B-Instruct"
    assert config == TrainConfig("data.csv", model=model, target_modules=modules)
