"""An adapter that was cut comes back to what the whole one says, and the whole one stays."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional

from conftest import WAYS, WORDS
from remora.data.table import Table
from remora.export import distill, truncate
from remora.models import saved
from remora.runtime.device import Precision
from remora.runtime.reporter import Reporter
from service import write_adapter

TABLE = Table(
    [f"{way.format(word)} {i}" for i in range(3) for word in WORDS.values() for way in WAYS],
    [label for _ in range(3) for label in WORDS for _ in WAYS],
)
PRECISION = Precision(compute=torch.float32, base=torch.float32, reason="a test")


@torch.no_grad()
def answers(adapted: Any, prompt: Any, adapter: str, table: Table = TABLE) -> torch.Tensor:
    """Return log-probabilities [answer tokens, vocabulary] by ordinary forward passes."""
    adapted.set_adapter(adapter)
    parts = []
    for row in prompt.rows(table.texts[:12], table.labels[:12]):
        logits = adapted(input_ids=torch.tensor([row.token_ids])).logits[0]
        parts.append(logits[row.answer_start - 1 : -1].log_softmax(-1))
    return torch.cat(parts)


def divergence(adapted: Any, prompt: Any) -> float:
    """Return the mean divergence of the cut adapter from the whole one, in nats a token."""
    wanted, found = (answers(adapted, prompt, name) for name in ("default", "compressed"))
    return float((wanted.exp() * (wanted - found)).sum(1).mean())


@pytest.fixture
def cut(base: Path, tmp_path: Path) -> tuple[Any, Any]:
    """A model with a whole adapter and one that was cut to a third of its bytes, and the prompt."""
    folder = write_adapter(tmp_path / "run", base, seed=0) / "adapter"
    whole = truncate.read(folder)
    ranks = dict.fromkeys(whole.updates, 1)
    artifact = truncate.pack(whole, ranks, torch.float32, {})
    small = tmp_path / "small"
    small.mkdir()
    for name, content in artifact.files.items():
        (small / name).write_bytes(content)
    adapted, prompt, _ = saved.load_adapter(
        folder, base=None, dtype=torch.float32, device=torch.device("cpu")
    )
    adapted.load_adapter(str(small), adapter_name="compressed")
    return adapted.eval(), prompt


def teach(
    adapted: Any,
    prompt: Any,
    table: Table = TABLE,
    *,
    num_steps: int = 40,
    max_tokens: int = 2_048,
) -> None:
    distill.distill(
        adapted,
        prompt,
        table,
        teacher="default",
        student="compressed",
        num_steps=num_steps,
        learning_rate=1e-2,
        max_tokens=max_tokens,
        precision=PRECISION,
        reporter=Reporter(),
    )


def weights(adapted: Any, adapter: str | None) -> dict[str, torch.Tensor]:
    """Return copies of an adapter's weights, or with None of the base's."""
    return {
        name: parameter.detach().clone()
        for name, parameter in adapted.named_parameters()
        if (f".{adapter}." in name if adapter else "lora_" not in name)
    }


def test_it_comes_nearer_and_nothing_else_moves(cut: tuple[Any, Any]) -> None:
    adapted, prompt = cut
    wanted, before = answers(adapted, prompt, "default"), divergence(adapted, prompt)
    still = {**weights(adapted, "default"), **weights(adapted, None)}
    teach(adapted, prompt)
    assert divergence(adapted, prompt) < before / 3
    assert torch.equal(answers(adapted, prompt, "default"), wanted)
    for name, weight in {**weights(adapted, "default"), **weights(adapted, None)}.items():
        assert torch.equal(weight, still[name]), name


def test_the_micro_batch_changes_no_result(cut: tuple[Any, Any]) -> None:
    """Nor does it matter whether rows that are the same are computed as one."""
    adapted, prompt = cut
    table = Table([text[:-2] for text in TABLE.texts], TABLE.labels)
    assert len(set(table.texts)) == len(table) / 3
    found = []
    for max_tokens in (2_048, 30):
        begun = weights(adapted, "compressed")
        teach(adapted, prompt, table, num_steps=3, max_tokens=max_tokens)
        found.append(answers(adapted, prompt, "compressed"))
        with torch.no_grad():
            for name, parameter in adapted.named_parameters():
                if name in begun:
                    parameter.copy_(begun[name])
    torch.testing.assert_close(found[0], found[1], rtol=1e-3, atol=1e-3)
    assert (found[0] - answers(adapted, prompt, "compressed")).abs().max() > 0.1


def test_labels_count_too(cut: tuple[Any, Any]) -> None:
    """Where the whole adapter is wrong, the cut one learns from the label."""
    adapted, prompt = cut
    labels = list(WORDS)
    other = dict(zip(labels, labels[1:] + labels[:1], strict=True))
    table = Table(TABLE.texts, [other[label] for label in TABLE.labels])
    rows = prompt.rows(table.texts[:12], table.labels[:12])
    targets = torch.tensor([token for row in rows for token in row.token_ids[row.answer_start :]])
    teach(adapted, prompt, table, num_steps=60)
    losses = [
        float(functional.nll_loss(answers(adapted, prompt, name, table), targets))
        for name in ("default", "compressed")
    ]
    assert losses[1] < 0.9 * losses[0], losses


def test_it_learns_with_its_own_dropout_and_to_the_same_bits(cut: tuple[Any, Any]) -> None:
    adapted, prompt = cut
    begun = weights(adapted, "compressed")
    found = []
    for number, rate in enumerate((0.0, 0.5, 0.5)):
        torch.manual_seed(number)  # whatever the caller's random numbers are
        for layer in adapted.modules():
            if "compressed" in getattr(layer, "lora_dropout", ()):
                layer.lora_dropout["compressed"] = torch.nn.Dropout(rate)
                layer.lora_dropout["default"] = torch.nn.Dropout(0.5)  # is not for who teaches
        teach(adapted, prompt, num_steps=3)
        assert not adapted.training
        found.append(weights(adapted, "compressed"))
        adapted.load_state_dict(begun, strict=False)
    plain, *dropped = found
    assert any(not torch.equal(plain[name], dropped[0][name]) for name in plain)
    assert all(torch.equal(dropped[0][name], dropped[1][name]) for name in plain)
