"""Tiny random models of the architectures of transformers train as exactly as rows by themselves.

python -m pytest tests/test_architectures.py                    # a few of each kind
python -m pytest -m durability tests/test_architectures.py      # all, compared with docs/models.md
REMORA_WRITE_DOCS=1 python -m pytest -m durability tests/test_architectures.py    # writes it
"""

from __future__ import annotations

import os
import re
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tiny_architectures import Trial, causal_types, try_out

DOCS = Path(__file__).parents[1] / "docs" / "models.md"
WRITE = bool(os.environ.get("REMORA_WRITE_DOCS"))
HEAD = (
    "# Architectures that were tried\n\n"
    "A tiny random model of each causal architecture of transformers, four layers in float32. Each "
    "is loaded, checked, counted, trained for five steps and asked for labels. Then the loss and "
    "the gradients of all adapters are compared in float64 with those of each row alone in the "
    "model's own forward pass; the last column bounds the differences, relative to the loss and "
    "the largest gradient. "
    "`tests/test_architectures.py` does this and writes the table.\n\n"
    "Memory is *counted* from the model without weights, or *estimated* where the model reads "
    "values while it computes. Experts of a mixture and routers get no adapter by default.\n\n"
)
COLUMNS = (
    "| architecture | layout | attention | adapters by default | memory | exact to |\n"
    "|---|---|---|---|---|---|\n"
)
FEW = (
    "gpt_oss",  # attention sinks, experts
    "gptj",  # eager attention only
    "llama4_text",  # chunks of positions
    "stablelm",  # whole masks only
    "deepseek_v2",  # latent attention, experts that PEFT takes by the names of layers
    "phimoe",  # a router that is a linear layer
    "gemma4",  # a vision tower, shared keys and values
    "dbrx",  # operations that depend on the data
    "gpt_neo",  # a window of its own
)
NO_TEXT_MODEL = {
    # Music, speech, bytes in patches, drafts for another model, packages for images.
    *("blt", "musicgen", "musicgen_melody", "gemma4_assistant", "gemma4_unified_assistant"),
    *("gemma3n", "git", "fuyu"),
    # Their configurations do not get tiny.
    *("deepseek_v4", "cohere_compass_text", "reformer", "bailing_hybrid"),
    *("mllama", "emu3", "dots3_note"),  # the same as others, around images
    "xlstm",  # it computes its states in float32: 2e-6
    "roc_bert",  # an encoder; it adds to a layer's output in place, which no adapter survives
}


def line(trial: Trial) -> str:
    """Return an architecture's row of the page.

    Many models compute their positions in float32 whatever they are given; the others differ by
    rounding in float64.
    """
    if trial.refusal:
        found = re.split(r"; | \(", trial.refusal)[0]
        reason = re.sub(r"this model's loss .* so its", "its", found)
        return f"| {trial.architecture} | refused: {reason} | | | | |\n"
    attention = {"remora": "blocks", "sdpa": "whole masks"}.get(trial.attention, trial.attention)
    attention = attention if trial.layout == "tree" else "the model's own"
    exact = "1e-12" if trial.difference < 1e-12 else "1e-6"
    memory = "counted" if trial.counted else "estimated"
    cells = trial.architecture, trial.layout, attention, ", ".join(trial.modules), memory, exact
    return f"| {' | '.join(cells)} |\n"


def line_of_page(trial: Trial) -> str:
    """Return the page's row of an architecture, if what it says holds here; else what holds.

    What is rounded on one processor may be equal on another, which is within the page's bound too.
    """
    rounded = line(replace(trial, difference=max(trial.difference, 1e-12)))
    return rounded if rounded in DOCS.read_text(encoding="utf-8") and not WRITE else line(trial)


def tried(architecture: str, tokenizer: Any, folder: Path) -> Trial:
    """Try an architecture; a refusal is one line that says what to do."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of transformers, about random weights
        trial = try_out(architecture, tokenizer, folder)
    if trial.refusal:
        assert "\n" not in trial.refusal
        assert "; " in trial.refusal
    else:
        assert trial.difference < 1e-6
        assert trial.modules
        routers = {"gate", "router", "shared_expert_gate", "classifier"}
        assert not {*routers, "lm_head"} & set(trial.modules)
    return trial


@pytest.mark.parametrize("architecture", FEW)
def test_an_architecture_of_each_kind_is_exact(architecture, tokenizer, tmp_path):
    trial = tried(architecture, tokenizer, tmp_path)
    assert trial.counted == (architecture != "dbrx")
    assert line_of_page(trial) in DOCS.read_text(encoding="utf-8")


@pytest.mark.durability
def test_every_causal_architecture_is_exact_or_refused(tokenizer, tmp_path):
    names = [name for name in causal_types() if name not in NO_TEXT_MODEL]
    rows, failed = [], {}
    for name in names:
        try:
            rows.append(line_of_page(tried(name, tokenizer, tmp_path / name)))
        except Exception as error:
            failed[name] = f"{type(error).__name__}: {error}"
    assert not failed
    assert len(names) >= 110
    page = HEAD + COLUMNS + "".join(sorted(rows))
    if WRITE:
        DOCS.write_text(page, encoding="utf-8")
    assert DOCS.read_text(encoding="utf-8") == page
