"""Long messages in windows: training, validation, predictions, features, and what is told."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from conftest import WAYS, WORDS, call, tiny_model
from data.test_cutting import make, texts_of
from data.test_table import write_csv
from remora.config import PlanConfig, TrainConfig
from remora.data.dataset import load_data
from remora.data.prompt import Prompt
from remora.errors import Stopped
from remora.planning.planner import make_plan
from remora.planning.survey import Survey, effective_batches
from remora.runtime.reporter import Reporter, Step
from remora.training.run import train
from remora.training.session import open_session
from remora.tree import scoring
from remora.tree.scoring import Scorer
from stock import exhaustive

MESSAGES = ["why?", "where is my card " * 20, "the refund again and again " * 9, "my card"]
TRUE = [0, 1, 2, 0]


@pytest.mark.parametrize("layout", ["tree", "rows"])
def test_the_answer_to_a_message_is_the_mean_over_its_windows(tokenizer: Any, layout: Any) -> None:
    """Each window is a message of its own to the stock model."""
    model = tiny_model("qwen2", torch.float64, vocabulary=len(tokenizer))
    prompt = make(tokenizer, kept="windows")
    windows = [texts_of(tokenizer, stems) for stems in prompt.windows(MESSAGES)]
    expected = np.stack([exhaustive(model, prompt, texts).mean(0) for texts in windows])
    scorer = Scorer(model, prompt, tolerance=0, layout=layout)
    assert scorer.told_cut is None
    np.testing.assert_allclose(scorer.probabilities(MESSAGES), expected, atol=1e-6)
    cut = [len(texts) for texts in windows if len(texts) > 1]
    assert scorer.told_cut == (
        f"2 messages are longer than 60 tokens and were read in {sum(cut)} windows, "
        f"{sum(cut) / 2:.1f} each"
    )
    correct, losses = scorer.evaluate(MESSAGES, TRUE)
    assert correct.tolist() == (expected.argmax(1) == TRUE).tolist()
    long = [1, 2]
    assert losses[long] == pytest.approx(-np.log(expected[long, [1, 2]]))
    alone = Scorer(model, make(tokenizer), layout=layout).evaluate([MESSAGES[0]], [0])
    assert losses[0] == pytest.approx(alone[1][0])


@pytest.mark.parametrize("layout", ["tree", "rows"])
def test_windows_are_not_averaged_roughly(tokenizer: Any, layout: Any) -> None:
    """Whatever the tolerance; a message of one window is searched as ever, whoever is beside it."""
    labels = [f"{a} {b}" for a in ("card", "refund", "top up") for b in ("late", "lost", "fee")]
    model = tiny_model("qwen2", torch.float64, vocabulary=len(tokenizer))
    with torch.no_grad():
        for name, weights in model.named_parameters():
            weights.mul_(1 if "norm" in name else 8)  # surer, so that windows differ in answers
    prompt = Prompt(tokenizer, labels, instruction="", max_length=60, kept="windows")
    draw = np.random.default_rng(0)
    words = ["card", "refund", "where is my", "again and again", "top up", "why?", "fee late"]
    words.append("x9 ü")
    long = [" ".join(draw.choice(words) for _ in range(30)) for _ in range(30)]
    short = [f"my card {i}" for i in range(5)]
    short.append(texts_of(tokenizer, prompt.windows(long[:1])[0])[0])  # as one of the windows
    exact, rough, alone = (
        Scorer(model, prompt, tolerance=tolerance, layout=layout).probabilities(messages)
        for tolerance, messages in ((0, [*long, *short]), (1, [*long, *short]), (1, short))
    )
    assert (rough.argmax(1) == exact.argmax(1)).all()
    off = np.abs(rough - exact).max(1)
    assert off[: len(long)].max() <= 0.01 / (1 - 0.01) < off[len(long) :].max()
    np.testing.assert_allclose(alone, rough[len(long) :], atol=1e-9)


@pytest.mark.parametrize("kept", ["head", "tail", "both"])
def test_truncated_messages_are_counted(tokenizer: Any, kept: Any) -> None:
    model = tiny_model("qwen2", torch.float64, vocabulary=len(tokenizer))
    scorer = Scorer(model, make(tokenizer, kept=kept))
    scorer.probabilities(["why?", MESSAGES[1]])
    told = f"longer than 60 tokens and {{}} truncated as in training (--truncate {kept})"
    assert scorer.told_cut == "1 message is " + told.format("was")
    scorer.probabilities([MESSAGES[2]])
    assert scorer.told_cut == "2 messages are " + told.format("were")


def test_means_of_equal_and_unequal_groups() -> None:
    values = np.arange(12, dtype=np.float32).reshape(6, 2)
    assert scoring.pooled(values, [1, 3, 2]).tolist() == [[0, 1], [4, 5], [9, 10]]
    assert scoring.pooled(values, [1] * 6) is values


@pytest.fixture
def documents(base: Path, tmp_path: Path) -> TrainConfig:
    rows = [
        ("hello " * (3 * i + 9) + way.format(word) + f" {i}", label)
        for i in range(4)
        for label, word in WORDS.items()
        for way in WAYS
    ]
    return TrainConfig(
        str(write_csv(tmp_path / "long.csv", rows)),
        model=str(base),
        output=tmp_path / "runs",
        max_steps=6,
        batch_size=8,
        micro_batch_tokens=120,
        eval_steps=2,
        max_length=48,
        truncate="windows",
        precision="float32",
        device="cpu",
        rank=4,
        dropout=0.2,
        name="run",
    )


class Told(Reporter):
    """Keeps what is told, and asks to stop at a step."""

    def __init__(self, step: int = -1) -> None:
        self.lines: list[str] = []
        self.losses: list[float] = []
        self._step = step

    def say(self, line: str) -> None:
        self.lines.append(line)

    def stepped(self, step: Step) -> None:
        self.losses.append(step.loss)
        if step.step == self._step:
            raise Stopped("asked to stop")


def test_a_run_in_windows_says_so_resumes_exactly_and_predicts_the_same(
    documents: TrainConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = Told()
    first = train(replace(documents, output=tmp_path / "whole"), reporter=whole)
    (line,) = [each for each in whole.lines if " training messages are longer" in each]
    assert line.partition(" training")[2].startswith(" messages are longer than 48 tokens and are")
    stopped = Told(step=3)
    with pytest.raises(Stopped):
        train(documents, reporter=stopped)
    resumed = Told()
    second = train(documents, reporter=resumed)
    assert stopped.losses[:3] + resumed.losses == whole.losses
    digests = {
        hashlib.sha256((each.directory / "adapter/adapter_model.safetensors").read_bytes()).digest()
        for each in (first, second)
    }
    assert len(digests) == 1
    card = json.loads((second.directory / "adapter/remora.json").read_text())
    assert card["truncate"] == "windows"

    # The held-out rows get the same answers again, from eval
    assert call("eval", second.directory, documents.data, "--device", "cpu", "--json") == 0
    captured = capsys.readouterr()
    assert "were read in" in captured.err
    out = tmp_path / "out.csv"
    given = ("--device", "cpu", "--output", out)
    assert call("predict", second.directory, documents.data, *given) == 0
    assert "messages are longer than 48 tokens and were read in" in capsys.readouterr().err
    assert len(out.read_text().splitlines()) == len(Path(documents.data).read_text().splitlines())
    assert call("diagnose", second.directory) in {0, 3}
    assert call("export", second.directory, "--vllm", "--output", tmp_path / "x") == 4
    assert "reads long messages in windows" in capsys.readouterr().err


def test_a_step_averages_over_documents(documents: TrainConfig) -> None:
    """The first step's loss is the mean over documents of the mean over their windows."""
    config = replace(documents, max_steps=1, dropout=0.0, baselines=("none",))
    told = Told()
    train(config, reporter=told)
    assert any(line.startswith("layout: tree") for line in told.lines)
    dataset = load_data(config)
    with open_session(config, dataset) as session:
        (batch,) = effective_batches(
            dataset, session.prompt, 1, batch_size=config.batch_size, seed=config.seed
        )
        assert len(batch) > config.batch_size
        losses = []
        for row in batch:  # one by one, in the model's own forward pass
            ids = torch.tensor([row.token_ids])
            logits = session.model(ids).logits[0, row.answer_start - 1 : -1].float()
            loss = torch.nn.functional.cross_entropy(logits, ids[0, row.answer_start :])
            losses.append(loss.item())
        lengths = [row.num_targets for row in batch]
    weighted = [row.weight * n for row, n in zip(batch, lengths, strict=True)]
    expected = sum(w * x for w, x in zip(weighted, losses, strict=True)) / sum(weighted)
    assert told.losses[0] == pytest.approx(expected, rel=1e-4)


def test_a_plan_counts_tokens_of_documents(documents: TrainConfig) -> None:
    dataset = load_data(documents)
    with open_session(documents, dataset) as session:
        planned = session.plan
        batches = effective_batches(
            dataset, session.prompt, 6, batch_size=documents.batch_size, seed=documents.seed
        )
    survey = Survey(batches)
    assert survey.num_rows == 6 * 8
    assert len(survey.rows) > survey.num_rows
    assert planned.num_rows == len(dataset.train)
    total = survey.extremes(planned.micro_batch_tokens).num_tokens
    assert planned.tree_tokens == pytest.approx(total / survey.num_rows)
    head = make_plan(PlanConfig.taken_from(replace(documents, truncate="head")))
    assert planned.message_tokens > 1.5 * head.message_tokens
    assert planned.eval_tokens > 1.5 * head.eval_tokens
