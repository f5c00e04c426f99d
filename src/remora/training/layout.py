"""The layout of a run: the one that its model follows, by a check before the first step."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from remora.data.prompt import Prompt, TokenSequence
from remora.data.table import Table
from remora.errors import ModelError
from remora.runtime.process_group import ProcessGroup
from remora.runtime.reporter import Reporter
from remora.training import trainable
from remora.tree import layouts
from remora.tree.check import check_rows, check_tree
from remora.tree.scoring import Scorer


def settle(
    model: Any,
    prompt: Prompt,
    table: Table,
    heaviest: tuple[Sequence[TokenSequence], int],
    asked: str,
    accelerator: Any,
    group: ProcessGroup,
    reporter: Reporter,
) -> None:
    """Check a model in its layout, and let one that does not follow the tree compute rows.

    Args:
        model: The model, with its adapter.
        prompt: Its prompt.
        table: Rows to check it with.
        heaviest: The batch with the largest micro-batch, and the most tokens of one.
        asked: The layout of the settings: auto, tree or rows.
        accelerator: accelerate's Accelerator, for the arithmetic of the run.
        group: The processes that train together, which all get the same layout.
        reporter: Told which layout it is, and why.

    Raises:
        ModelError: If it does not compute as it should in the layout that is asked for, or in any.
    """
    with accelerator.autocast():
        why = "which its attention and positions follow"
        if layouts.of(model) == "tree" and (
            refusal := _refused(model, prompt, table, heaviest, group)
        ):
            with group.together():
                if asked != "auto":
                    raise refusal
            layouts.assign(model, "rows")
            why = str(refusal).split(";")[0]
        elif layouts.of(model) == "rows":
            declared = layouts.why_rows(type(layouts.base_of(model)), model.config)
            why = (declared or "as before") if asked == "auto" else "as requested"
        if layouts.of(model) == "rows":
            with group.together():
                check_rows(model, trainable.short_rows(table, prompt))
        remark = Scorer(model, prompt).remark
    reporter.say(f"layout: {layouts.of(model)}, {why}" + (f"; {remark}" if remark else ""))


def _refused(
    model: Any,
    prompt: Prompt,
    table: Table,
    heaviest: tuple[Sequence[TokenSequence], int],
    group: ProcessGroup,
) -> ModelError | None:
    """Return why a model does not follow the tree, in some process; None if it does in all."""
    refusal: ModelError | None = None
    try:
        check_tree(model, trainable.short_rows(table, prompt), *heaviest)
    except ModelError as error:
        refusal = error
    if not group.any(refusal is not None):
        return None
    return refusal or ModelError("it does not follow the tree in another process")
