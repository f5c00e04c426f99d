"""A run with a head over classes as an ONNX model, written only if ONNX Runtime gives its labels.

torch's own exporter writes the graph. The model reads token ids and gives the logits of the
classes; a client of a few lines makes the trained prompt of a message.
"""

from __future__ import annotations

import contextlib
import gc
import importlib.util
import io
import logging
import shutil
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import AutoModelForSequenceClassification

from remora.config import ExportConfig
from remora.data import chat_template
from remora.data.prompt import Prompt
from remora.errors import ConfigError, ModelError
from remora.evaluation.results import Results
from remora.export.merge import TOLERANCES, Parity, compare_probabilities, write_merged
from remora.formatting import one_line, quote
from remora.models import loading, metadata
from remora.models.saved import open_trained
from remora.runtime import files
from remora.runtime.reporter import Reporter
from remora.tree import scoring

PACKAGES = ("onnx", "onnxscript", "onnxruntime")

LARGEST_FILE = 2**31 - 2**26
"""Bytes of weights that fit beside the graph; a protobuf message ends at 2 GiB."""


class LastToken(nn.Module):
    """The head at the last token of each row: right-padded rows to logits, [rows, classes]."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.body: Any = model.base_model
        self.score: Any = model.score

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        """Return the logits of the classes."""
        hidden = self.body(
            input_ids=input_ids, attention_mask=attention_mask, use_cache=False
        ).last_hidden_state
        last = attention_mask.sum(1) - 1
        rows = torch.arange(input_ids.shape[0], device=input_ids.device)
        logits: torch.Tensor = self.score(hidden[rows, last])
        return logits


def require() -> None:
    """Make sure that what writes and runs ONNX models is installed.

    Raises:
        ConfigError: If it is not.
    """
    if missing := [name for name in PACKAGES if importlib.util.find_spec(name) is None]:
        raise ConfigError(
            f"--onnx needs {', '.join(missing)}, which is not installed; run pip install "
            "'remora[onnx]'"
        )


def write_onnx(config: ExportConfig, folder: Path, results: Results, reporter: Reporter) -> Parity:
    """Write a run's classifier as an ONNX model into an empty folder, and compare its labels.

    Args:
        config: The settings.
        folder: Where to write.
        results: The run's rows.
        reporter: Shows the progress.

    Raises:
        ConfigError: If a package is missing.
        ModelError: If torch cannot export the architecture, or the model answers otherwise.
        ResourceError: If the disk fails.
    """
    require()
    trained = open_trained(config.run, base=config.model, device=config.device, precision="float32")
    scorer = trained.scorer(max_tokens=config.micro_batch_tokens)
    wanted = scoring.score_table(scorer, results.texts, "adapter", reporter)
    prompt, thresholds = trained.prompt, trained.card.thresholds
    if getattr(prompt.tokenizer, "backend_tokenizer", None) is None:
        raise ModelError(
            "this model's tokenizer has no tokenizer.json, which the client of an ONNX model "
            "reads; use --merge"
        )
    del trained, scorer
    gc.collect()  # the layers hold references to themselves
    if metadata.is_full(config.run):
        _write_model(metadata.adapter_folder(config.run), folder, reporter)
    else:
        merged = folder / "merged"  # removed at the end
        merged.mkdir()
        reporter.say("merging in float32")
        write_merged(config, torch.float32, merged)
        _write_model(merged, folder, reporter)
        shutil.rmtree(merged)
    with files.disk_errors(folder):
        _write_beside(folder, prompt, thresholds)
    got = _answer(folder, prompt, results.texts, reporter)
    parity = compare_probabilities(
        wanted, got, thresholds, dtype="float32", allowed=TOLERANCES["float32"]
    )
    if not parity.holds:
        raise ModelError(
            "the ONNX model is not the same classifier: "
            f"{parity.num_flips:,} of {parity.num_rows:,} rows get another label, and "
            f"log-probabilities differ by up to {parity.largest_difference:.3g} "
            f"({parity.allowed:.3g} allowed), so nothing was written; use --merge"
        )
    return parity


def _write_model(source: Path, folder: Path, reporter: Reporter) -> None:
    """Export a model folder with a head over classes by torch, in float32."""
    reporter.say("writing model.onnx")
    with loading.without_progress_bar():
        model = AutoModelForSequenceClassification.from_pretrained(source, dtype=torch.float32)
    classifier = LastToken(model.eval())
    # Numbers that are no dimension of a model, so that none is taken for a constant
    ids = torch.ones(3, 7, dtype=torch.long)
    free = {0: torch.export.Dim("rows"), 1: torch.export.Dim("tokens")}
    num_bytes = sum(p.numel() * p.element_size() for p in classifier.parameters())
    with _quiet():
        try:
            program = torch.onnx.export(
                classifier,
                (ids, torch.ones_like(ids)),
                input_names=["input_ids", "attention_mask"],
                output_names=["logits"],
                dynamic_shapes=(free, free),
                dynamo=True,
                verbose=False,
            )
        except Exception as error:  # of torch's exporter, which has no class for all of them
            raise ModelError(
                f"torch's exporter cannot write this model as ONNX ({quote(one_line(error))}); "
                "use --merge"
            ) from error
    assert program is not None
    with files.disk_errors(folder):
        program.save(folder / "model.onnx", external_data=num_bytes > LARGEST_FILE)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep the exporter's notes off the terminal."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with (
            warnings.catch_warnings(),
            contextlib.redirect_stdout(io.StringIO()),
        ):
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


def _write_beside(folder: Path, prompt: Prompt, thresholds: Sequence[float]) -> None:
    """Write the tokenizer, the prompt, the labels and the client."""
    from remora.export import onnx_client  # needs ONNX Runtime

    control = chat_template.control_tokens(prompt.tokenizer)
    prompt.tokenizer.backend_tokenizer.save(str(folder / "tokenizer.json"))
    files.write_json(
        folder / "classifier.json",
        {
            "labels": list(prompt.labels),
            "thresholds": list(thresholds),  # only where a message may have several labels
            "head": prompt.head,
            "tail": prompt.tail,
            "max_length": prompt.max_length,
            "control_tokens": control.pattern if control else "",
        },
    )
    shutil.copyfile(onnx_client.__file__, folder / "client.py")


def _answer(folder: Path, prompt: Prompt, messages: list[str], reporter: Reporter) -> np.ndarray:
    """Let the client answer the run's rows by ONNX Runtime.

    Raises:
        ModelError: If it reads other tokens than those of training.
    """
    from remora.export import onnx_client  # needs ONNX Runtime

    client = onnx_client.Classifier(folder, torch.get_num_threads())
    parts: list[np.ndarray] = []
    done = 0
    for batch in onnx_client.batches(messages):
        for message, ids, wanted in zip(
            batch, client.token_ids(batch), prompt.stems(batch), strict=True
        ):
            if ids != wanted and prompt.is_plain(message):
                raise ModelError(
                    "the client reads other tokens than the adapter was trained with, for the "
                    f"message {quote(message)}, so nothing was written; use --merge"
                )
        parts.append(client.probabilities(batch))
        done += len(batch)
        reporter.scoring("model.onnx", done, len(messages))
    return np.concatenate(parts).astype(np.float64)
