"""The report of a run in Chromium: its size, how long it takes to open, what it asks for.

Each opening is by a browser of its own with an empty profile, until the page's load event, by when
its script has run. Pictures of its sections are written where `--pictures` says.

    python benchmarks/report_page.py runs/banking77-nano
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
from pathlib import Path

import workload

sys.path.insert(0, str(workload.ROOT / "tests"))

import chromium

PICTURES = (
    # name, what stands at the top, colour scheme, width, height
    ("report-next", "next", "light", 1200, 520),
    ("report-result", "result", "light", 1200, 410),
    ("report-confusion", "matrix-controls", "dark", 1200, 880),
    ("report-diagnosis", "diagnosis", "light", 1200, 680),
    ("report-phone", "messages", "dark", 390, 844),
)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path)
    parser.add_argument("--times", type=int, default=10)
    parser.add_argument("--pictures", type=Path, help="folder to write pictures to")
    options = parser.parse_args()
    executable = chromium.find()
    if executable is None:
        raise SystemExit(f"error: no browser found; install one of {', '.join(chromium.NAMES)}")

    from remora.report import pages

    path = pages.write(options.run)
    seconds, requests, console = [], set(), []
    for _ in range(options.times):
        with (
            tempfile.TemporaryDirectory() as profile,
            chromium.Page(executable, Path(profile)) as page,
        ):
            seconds.append(page.open(path))
            num_elements = page.run("document.querySelectorAll('*').length")
            requests |= set(page.requests)
            console += page.console
    result = {
        "bytes": path.stat().st_size,
        "elements": num_elements,
        "seconds": seconds,
        "requests": len(requests - {path.resolve().as_uri()}),
        "console": console,
    }
    workload.print_table(
        ["page", "elements", "median", "slowest", "requests", "complaints"],
        [
            [
                f"{result['bytes'] / 1e3:.0f} kB",
                f"{num_elements:,}",
                f"{statistics.median(seconds):.2f} s",
                f"{max(seconds):.2f} s",
                str(result["requests"]),
                str(len(console)),
            ]
        ],
    )
    workload.write("report_page", result)
    if options.pictures:
        with (
            tempfile.TemporaryDirectory() as profile,
            chromium.Page(executable, Path(profile)) as page,
        ):
            take(page, path, options.pictures)


def take(page: chromium.Page, path: Path, folder: Path) -> None:
    """Write the pictures."""
    page.send("Emulation.setScrollbarsHidden", hidden=True)
    for name, top, scheme, width, height in PICTURES:
        page.resize(width, height)
        page.prefer(scheme)
        page.open(path)
        page.run(f"document.getElementById('{top}').scrollIntoView()")
        page.screenshot(folder / f"{name}.png")


if __name__ == "__main__":
    main()
