"""The layout of a run: the one that its model follows, by a check before the first step."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from remora.data.prompt import TokenSequence
from remora.errors import ModelError
from remora.runtime.process_group import ProcessGroup
from remora.tree import layouts
from remora.tree.check import check_rows, check_tree


def settle(model: Any, rows: Sequence[TokenSequence], requested: str, group: ProcessGroup) -> str:
    """Check a model in its layout, and let one that does not follow the tree compute rows.

    Returns:
        Why it has the layout that it has now.

    Raises:
        ModelError: If it does not compute as it should in the layout that is asked for, or in any.
    """
    why = layouts.why_rows(type(layouts.base_of(model)), model.config) or ""
    if layouts.of(model) == "tree":
        refusal: ModelError | None = None
        try:
            check_tree(model, rows)
        except ModelError as error:
            refusal = error
        with group.together():
            if refusal and requested != "auto":
                raise refusal
        if not group.any(refusal is not None):
            return "which its attention and positions follow"
        layouts.assign(model, "rows")
        why = str(refusal or "it fails the check in another process").split(";")[0]
    with group.together():
        check_rows(model, rows)
    return (why or "as before") if requested == "auto" else "as requested"
