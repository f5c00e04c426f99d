"""Exported and published models on standard output."""

from __future__ import annotations

from rich.console import Console

from remora.display.console import (
    figures_table,
    print_line,
    spoken_file_bytes,
    standard_output,
)
from remora.export.compress import Compressed
from remora.export.export import Exported
from remora.export.gguf import Gguf
from remora.export.merge import Parity
from remora.export.push import Pushed


def show_export(exported: Exported, console: Console | None = None) -> None:
    """Print what was written, and its measured accuracy or parity."""
    console = console or standard_output()
    result, rows = exported.result, f"{exported.result.num_rows:,} {exported.measured_on} rows"
    if isinstance(result, Parity):
        _show_parity(result, rows, console)
    elif isinstance(result, Gguf):
        _show_gguf(result, rows, console)
    else:
        _show_compressed(result, rows, console)
    size = spoken_file_bytes(exported.num_bytes)
    print_line(console, f"written    {exported.directory}, {size}")
    if exported.plot:
        print_line(console, f"plot       {exported.plot}")


def _show_parity(parity: Parity, rows: str, console: Console) -> None:
    labels = f"the same label on all {rows}"
    if parity.num_flips:
        labels = f"another label on {parity.num_flips:,} of {rows}, all of them near ties"
    print_line(
        console,
        f"parity     {labels}; log-probabilities differ by at most "
        f"{parity.largest_difference:.2g}, {parity.allowed:.2g} allowed",
    )
    print_line(console, f"stored in  {parity.dtype}")


def _show_gguf(written: Gguf, rows: str, console: Console) -> None:
    """Print what llama.cpp answers with each file."""
    print_line(console, f"llama.cpp on {rows}, the adapter {written.adapter_accuracy:.2%}:")
    table = figures_table(
        "type", "size", "accuracy", "other labels", "token by token", "other labels", "rows/s"
    )
    for each in written.files:
        table.add_row(
            each.type,
            spoken_file_bytes(each.num_bytes),
            f"{each.accuracy:.2%}",
            f"{each.num_differing:,}",
            f"{each.greedy_accuracy:.2%}",
            f"{each.num_greedy_differing:,}",
            f"{each.rows_per_second:.1f}",
        )
    console.print(table)


def _show_compressed(compressed: Compressed, rows: str, console: Console) -> None:
    if compressed.frontier:
        _show_frontier(compressed, console)
    chosen = compressed.chosen
    print_line(
        console,
        f"accuracy   {chosen.accuracy:.2%} on {rows}, the full adapter "
        f"{compressed.full_accuracy:.2%}; {chosen.num_flips:,} labels differ from the full one's",
    )
    print_line(
        console,
        f"size       {spoken_file_bytes(chosen.num_bytes)} in {compressed.dtype}, mean rank "
        f"{chosen.mean_rank:.2f}; the full adapter takes "
        f"{spoken_file_bytes(compressed.adapter_bytes)}, and the base model is "
        f"{chosen.ratio:,.0f} times larger",
    )


def _show_frontier(compressed: Compressed, console: Console) -> None:
    """Print accuracy by size on the validation rows."""
    is_distilled = any(point.cut_accuracy is not None for point in compressed.frontier)
    columns = ["size", "of the base", "mean rank", "accuracy", "other labels", ""]
    if is_distilled:
        columns.insert(3, "truncated")
    table = figures_table(*columns, num_names=0)
    for point in compressed.frontier:
        cells = [
            spoken_file_bytes(point.num_bytes),
            f"1/{point.ratio:,.0f}",
            f"{point.mean_rank:.2f}",
            f"{point.accuracy:.2%}",
            f"{point.num_flips:,}",
            "chosen" if point.num_bytes == compressed.chosen.num_bytes else "",
        ]
        if is_distilled:
            cells.insert(3, "" if point.cut_accuracy is None else f"{point.cut_accuracy:.2%}")
        table.add_row(*cells)
    again = ", some fine-tuned again after truncation" if is_distilled else ""
    print_line(console, f"on validation rows{again}:")
    console.print(table)
    console.print()


def show_push(published: Pushed, console: Console | None = None) -> None:
    """Print where a model was published, and how to use it from there."""
    console = console or standard_output()
    size = spoken_file_bytes(sum(published.files.values()))
    print_line(
        console,
        f"published  {published.url}, {'public' if published.public else 'private'}: "
        f"{len(published.files)} files, {size}",
    )
    print_line(console, f"use it     remora predict {published.repo_id} < messages.txt")
