"""What a run is measured beside: which baselines it can afford, and what they answer."""

from __future__ import annotations

import contextlib
import functools
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from remora.config import Method, TrainConfig
from remora.data import splits
from remora.data.prompt import Prompt
from remora.data.table import Table
from remora.errors import PeerLostError, Stopped
from remora.evaluation import regression
from remora.evaluation.rivals import Answers
from remora.formatting import one_line
from remora.models import encoder
from remora.planning import timing
from remora.planning.plan import Plan
from remora.runtime import files, memory, sharding, threads
from remora.training.session import Session
from remora.training.trainable import as_base
from remora.tree import features
from remora.tree.forward import text_config
from remora.tree.scoring import BATCH_ROWS, pooled

SHARE = 0.1
"""Share of a run's time that zero-shot and probe may take together, by `auto`."""

MAX_TRAIN_ROWS = 50_000
ZERO_SHOT_ROWS, MIN_ZERO_SHOT_ROWS = 500, 100
"""Held-out rows that `auto` scores zero-shot: so many if it can, and no fewer than these."""

PROBE_ROWS = 1_000
"""Held-out rows that a probe of `auto` is measured on, before it gets more."""

MIN_MEMORY_ROWS = 1_000
"""Training rows that a probe gets whatever the memory; fewer would be no baseline."""

Item = TypeVar("Item")
Result = TypeVar("Result")


@dataclass(frozen=True, kw_only=True)
class Chosen:
    """The baselines of a run, and the rows that they get."""

    svm: bool = False
    zero_shot_rows: int = 0  # held-out rows to score
    probe_rows: int = 0  # training rows to compute features of
    probe_held_out: int = 0  # held-out rows to compute features of
    embeddings: Path | None = None  # the sentence encoder's folder
    left_out: tuple[str, ...] = ()  # that `auto` cannot afford

    def line(self, num_train: int, num_held_out: int) -> str:
        """Return a sentence that names them."""

        def few(verb: str, rows: int, of: int) -> str:
            return f" {verb} {rows:,} of {of:,} rows" if rows < of else ""

        named = ["svm"] if self.svm else []
        if self.zero_shot_rows:
            named.append(f"zero-shot{few('on', self.zero_shot_rows, num_held_out)}")
        if self.probe_rows:
            trained = few("trained on", self.probe_rows, num_train)
            measured = few("measured on", self.probe_held_out, num_held_out)
            named.append(f"probe{trained}{' and' if trained and measured else ''}{measured}")
        named += ["embeddings"] if self.embeddings else []
        text = f"baselines: {', '.join(named)}"
        if self.left_out:
            text += (
                f"; {' and '.join(self.left_out)} would take more than a tenth of the run's time, "
                f"add {'them' if len(self.left_out) > 1 else 'it'} by "
                f"--baselines {','.join(('auto', *self.left_out))}"
            )
        return text


@dataclass(frozen=True, kw_only=True)
class ProbeFeatures:
    """The base model's features for a probe."""

    train_rows: Sequence[int]
    held_out_rows: Sequence[int]
    states: NDArray[np.float16]  # [train_rows and held_out_rows, H]
    seconds: float


@dataclass(kw_only=True)
class OfBase:
    """What baselines need of the base model, in the first process; None where it failed."""

    zero_shot: Answers | None = None
    features: ProbeFeatures | None = None


def find_encoder(config: TrainConfig) -> Path | None:
    """Return the folder of the sentence encoder, if the settings ask for embeddings.

    Raises:
        ConfigError: If sentence-transformers is not installed.
        ModelError: If the encoder cannot be used.
    """
    return encoder.find(config.embedding_model) if "embeddings" in config.baselines else None


def choose(session: Session, held_out: Table, encoder_folder: Path | None) -> Chosen:
    """Choose the baselines of a run; all processes call it together."""
    config, group = session.config, session.group
    names = set(config.baselines)
    num_train, num_held_out = len(session.dataset.train), len(held_out)
    width, num_labels = text_config(session.model).hidden_size, len(session.dataset.labels)
    most = min(num_train, MAX_TRAIN_ROWS, regression.max_rows(width, num_labels))
    rows = (0, 0, 0)
    if session.dataset.multi_label:  # the others are for rows with one label
        return Chosen(svm=bool(names & {"auto", "svm"}))
    if "auto" in names:
        rows = affordable(
            SHARE * forward_tokens(session.plan, config.method),
            session.plan,
            label_tokens(session.prompt),
            most,
            num_held_out,
        )
    zero_shot_rows, probe_rows, probe_held_out = rows
    if session.prompt.classes:  # a head answers nothing before it is trained
        zero_shot_rows = 0
    if "zero-shot" in names:
        zero_shot_rows = num_held_out
    if "probe" in names:
        probe_rows, probe_held_out = most, num_held_out
    # The same in every process: one that had planned with other micro-batches counts other tokens
    rows = group.share([zero_shot_rows, probe_rows, probe_held_out])
    zero_shot_rows, probe_rows, probe_held_out = rows
    found = {"zero-shot": zero_shot_rows, "probe": probe_rows}
    if session.prompt.classes:
        del found["zero-shot"]
    return Chosen(
        svm=bool(names & {"auto", "svm"}),
        zero_shot_rows=zero_shot_rows,
        probe_rows=probe_rows,
        probe_held_out=probe_held_out,
        embeddings=encoder_folder,
        left_out=tuple(each for each in found if "auto" in names and not found[each]),
    )


def forward_tokens(plan: Plan, method: Method) -> float:
    """Return the tokens of forward passes that would take as long as a run.

    Counted, not measured, so that a run that is repeated or resumed chooses the same baselines.
    """
    share = timing.FORWARD_SHARE if method == "full" else timing.FROZEN_FORWARD_SHARE
    training = plan.run_tokens * (1 / share + plan.checkpointing)
    validation = plan.num_evaluations * plan.eval_rows * plan.eval_tokens
    return training + validation + plan.num_scored_rows * plan.scored_tokens


def label_tokens(prompt: Prompt) -> int:
    """Return the tokens of all labels, those that they share counted once."""
    return len({answer[:end] for answer in prompt.answers for end in range(1, len(answer) + 1)})


def affordable(
    budget: float, plan: Plan, num_label_tokens: int, num_train: int, num_held_out: int
) -> tuple[int, int, int]:
    """Return the held-out rows of zero-shot, and the training and held-out rows of a probe.

    0 of a kind if it is to be left out. Counted are the tokens of forward passes: of a message,
    those that it shares with no other; for zero-shot those of all labels too.

    Args:
        budget: Tokens of forward passes that both may take together.
        plan: Counts the tokens of a message.
        num_label_tokens: Tokens of all labels.
        num_train: Most training rows of a probe.
        num_held_out: Held-out rows there are.
    """
    per_message, prefix = max(1.0, plan.message_tokens), plan.prefix_tokens
    # Zero-shot takes at most a third
    per_row = per_message + num_label_tokens
    wanted = min(num_held_out, ZERO_SHOT_ROWS)
    zero_shot = min(wanted, int((budget / 3 - prefix) / per_row))
    if zero_shot < min(wanted, MIN_ZERO_SHOT_ROWS):
        zero_shot = 0
    # The probe takes the rest; one of fewer than half of the rows would be a weak rival
    rows = int((budget - (prefix + zero_shot * per_row if zero_shot else 0) - prefix) / per_message)
    train = min(num_train, rows - min(num_held_out, PROBE_ROWS))
    if 2 * train < num_train:
        return zero_shot, 0, 0
    return zero_shot, train, min(num_held_out, rows - train)


def of_base(session: Session, chosen: Chosen, held_out: Table, directory: Path) -> OfBase:
    """Compute what baselines need of the base model; all processes call it together.

    What fails is left out, and reported.

    Args:
        session: The session that has trained. If all weights did, they are the base's afterwards.
        chosen: The baselines.
        held_out: The rows to measure on.
        directory: The run directory, in which features are kept.

    Raises:
        Stopped: If the run was asked to stop.
    """
    found = OfBase()
    wanted = {"zero-shot": chosen.zero_shot_rows, "probe": chosen.probe_rows}
    names = " and ".join(name for name, num_rows in wanted.items() if num_rows)
    if not names:
        return found
    with contextlib.ExitStack() as stack:
        base = as_base(session.model, session.card, session.base_folder, session.precision.base)
        with attempt(session, names):
            _agreed(session, lambda: stack.enter_context(base))
            if chosen.zero_shot_rows:
                with attempt(session, "zero-shot"):
                    found.zero_shot = _zero_shot(session, chosen, held_out)
            if chosen.probe_rows:
                with attempt(session, "probe"):
                    found.features = _features(session, chosen, held_out, directory)
    return found


def answers(session: Session, chosen: Chosen, base: OfBase, held_out: Table) -> list[Answers]:
    """Return the answers of all baselines but the SVM; the first process alone calls it."""
    found = [base.zero_shot] if base.zero_shot else []
    if base.features is not None:
        with attempt(session, "probe"):
            found.append(_probe(session, base.features, held_out))
    if chosen.embeddings:
        with attempt(session, "embeddings"):
            found.append(_embeddings(session, chosen.embeddings, held_out))
    return found


class _Failed(Exception):  # noqa: N818  (the one line of it is shown)
    """A baseline could not be computed in one of the processes."""


@contextlib.contextmanager
def attempt(session: Session, name: str) -> Iterator[None]:
    """Leave a baseline out if it fails, whatever the reason: it must not cost the run anything."""
    reason = None
    try:
        yield
    except (Stopped, PeerLostError):
        raise
    except Exception as error:
        reason = "memory does not suffice" if memory.is_exhausted(error) else one_line(error)
    if reason:
        memory.release(session.device)
        session.reporter.say(f"the baseline {name} is left out: {reason}")


def _agreed(session: Session, compute: Callable[[], Result]) -> Result:
    """Return what this process computes; all processes fail if one does.

    With sharded weights a process that fails leaves the others in the middle of a pass, so there
    its error ends the run.
    """
    result, reason = None, None
    try:
        result = compute()
    except Exception as error:
        if sharding.has_shards(session.model):
            raise
        reason = "memory does not suffice" if memory.is_exhausted(error) else one_line(error)
    failed = [each for each in session.group.gather(reason) if each]
    if failed:
        raise _Failed(failed[0])
    return result  # type: ignore[return-value]


def _in_batches(
    session: Session,
    what: str,
    items: Sequence[Item],
    compute: Callable[[Sequence[Item]], NDArray[Any]],
) -> list[NDArray[Any]]:
    """Return the results of batches, of which each process computes a part; the first has all."""
    group, parts = session.group, []

    def own(batch: Sequence[Item]) -> NDArray[Any]:
        with sharding.in_step(session.model, group):
            return compute(group.part(batch))

    for start in range(0, len(items), BATCH_ROWS * group.size):
        memory.trim()
        batch = items[start : start + BATCH_ROWS * group.size]
        gathered = group.gather_arrays(_agreed(session, functools.partial(own, batch)))
        parts += gathered if group.is_first else []
        session.reporter.scoring(what, start + len(batch), len(items))
        session.stop.check()
    return parts


def _zero_shot(session: Session, chosen: Chosen, held_out: Table) -> Answers | None:
    """Score held-out rows with the base model; None in other processes than the first."""
    began = time.perf_counter()
    rows = splits.sample_rows(held_out.labels, chosen.zero_shot_rows, session.config.seed)
    scorer = session.scorer(tolerance=1)  # the likeliest label is all that is needed
    session.reporter.say(f"baseline zero-shot: scoring {len(rows):,} rows")
    parts = _in_batches(
        session,
        "zero-shot",
        [held_out.texts[i] for i in rows],
        lambda texts: scorer.probabilities(texts).argmax(1),
    )
    if not session.group.is_first:
        return None
    return Answers(
        name="zero-shot",
        description=f"{_base_name(session)}, zero-shot",
        rows=rows,
        predicted=[session.dataset.labels[i] for i in np.concatenate(parts)],
        seconds=time.perf_counter() - began,
        num_bytes=files.folder_bytes(session.base_folder, "*.safetensors"),
    )


def _features(
    session: Session, chosen: Chosen, held_out: Table, directory: Path
) -> ProbeFeatures | None:
    """Return the features for a probe, those kept in the directory if they are all there.

    None in other processes than the first.
    """
    began = time.perf_counter()
    seed, train, group = session.config.seed, session.dataset.train, session.group
    measured = splits.sample_rows(held_out.labels, chosen.probe_held_out, seed)
    most = _fitting_rows(session, chosen.probe_rows, len(measured))
    rows = splits.sample_rows(train.labels, most, seed)
    texts = [*(train.texts[i] for i in rows), *(held_out.texts[i] for i in measured)]
    windows = session.prompt.windows(texts)
    stems = [tuple(stem) for own in windows for stem in own]
    path = directory / features.FEATURES
    key = features.key(session.card.base_sha256, session.card.method)
    kept = features.read(path, stems, key) if group.is_first else features.NONE
    are_kept = group.share(len(kept.features) == len(set(stems)))
    if are_kept:
        seconds = kept.seconds
        found = [kept.features[stem][None] for stem in stems] if group.is_first else []
    else:
        session.reporter.say(f"baseline probe: features of {len(stems):,} rows")
        found = _in_batches(session, "features", stems, session.extractor().features)
        seconds = time.perf_counter() - began
    if not group.is_first:
        return None
    states = np.concatenate(found)
    of_rows = pooled(states[:, 0], list(map(len, windows)))
    if not are_kept:
        with files.optional(features.FEATURES, session.reporter.say):
            features.write(path, stems, states, key, seconds)
    return ProbeFeatures(
        train_rows=rows, held_out_rows=measured, states=of_rows.copy(), seconds=seconds
    )


def _fitting_rows(session: Session, num_train: int, num_held_out: int) -> int:
    """Return the training rows whose features fit into half of the free memory."""
    width = text_config(session.model).hidden_size
    # Five parts of 16 bits, twice while batches are joined; one in 32 bits, with copies, to fit
    row_bytes = width * (features.NUM_PARTS * 2 * 2 + 3 * 4)
    free = memory.free_bytes(torch.device("cpu"))
    fitting = num_train
    if free is not None:
        fitting = max(MIN_MEMORY_ROWS, free // 2 // row_bytes - num_held_out)
    return int(session.group.share(min(num_train, fitting)))


def _probe(session: Session, given: ProbeFeatures, held_out: Table) -> Answers:
    """Train a linear probe on the base's features, and let it predict held-out rows."""
    began = time.perf_counter()
    train = session.dataset.train
    labels = [train.labels[i] for i in given.train_rows]
    num_train = len(labels)
    session.reporter.say(f"baseline probe: fitting it to {num_train:,} rows")
    states = given.states
    predicted = regression.predict(
        states[:num_train], labels, states[num_train:], seed=session.config.seed
    )
    weights = 8 * len(set(labels)) * (states.shape[1] + 1)
    return Answers(
        name="probe",
        description=f"{_base_name(session)}, linear probe",
        rows=given.held_out_rows,
        predicted=predicted,
        seconds=given.seconds + time.perf_counter() - began,
        num_bytes=files.folder_bytes(session.base_folder, "*.safetensors") + weights,
        num_train_rows=num_train,
        num_all_train_rows=len(train),
    )


def _embeddings(session: Session, folder: Path, held_out: Table) -> Answers:
    """Train a regression on sentence embeddings, and let it predict the held-out rows."""
    began = time.perf_counter()
    train = session.dataset.train
    model = encoder.load(folder, session.device)
    width = encoder.embed(model, train.texts[:1]).shape[1]
    most = min(MAX_TRAIN_ROWS, regression.max_rows(width, len(session.dataset.labels)))
    rows = splits.sample_rows(train.labels, most, session.config.seed)
    texts = [*(train.texts[i] for i in rows), *held_out.texts]
    session.reporter.say(f"baseline embeddings: encoding {len(texts):,} rows")
    parts = []
    for start in range(0, len(texts), BATCH_ROWS):
        threads.adapt(session.device)
        parts.append(encoder.embed(model, texts[start : start + BATCH_ROWS]))
        session.reporter.scoring("embeddings", start + len(parts[-1]), len(texts))
    session.reporter.say(f"baseline embeddings: fitting a regression to {len(rows):,} rows")
    found, labels = np.concatenate(parts), [train.labels[i] for i in rows]
    predicted = regression.predict(
        found[: len(rows)], labels, found[len(rows) :], seed=session.config.seed
    )
    weights = 8 * len(set(labels)) * (width + 1)
    return Answers(
        name="embeddings",
        description=f"{_encoder_name(session, folder)} + logistic regression",
        rows=range(len(held_out)),
        predicted=predicted,
        seconds=time.perf_counter() - began,
        num_bytes=files.folder_bytes(folder, "*.safetensors") + weights,
        num_train_rows=len(rows),
        num_all_train_rows=len(train),
    )


def _base_name(session: Session) -> str:
    """Return the base model's name without its folder or owner, and whether it is in 4 bits."""
    name = Path(session.card.base_model).name
    return f"{name} in 4 bits" if session.config.method == "qlora" else name


def _encoder_name(session: Session, folder: Path) -> str:
    given = Path(session.config.embedding_model).expanduser()
    return folder.resolve().name if given.is_dir() else given.name
