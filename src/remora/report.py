"""report.html and the page of a comparison: one file that fetches nothing."""

from __future__ import annotations

import base64
import contextlib
import csv
import hashlib
import importlib.resources
import itertools
import json
import os
import shlex
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

import remora
from remora import charts, evaluate, model_card, results, run
from remora.compare import Comparison
from remora.config import ReportConfig
from remora.errors import ConfigError, DataError, ResourceError
from remora.progress import spoken_bytes, spoken_seconds
from remora.results import Results
from remora.table import one_line

MAX_MATRIX_LABELS = 150
MAX_MESSAGE_CHARS = 1_000  # of one message
MAX_CHARS = 1_500_000  # of all messages together
NUM_STATIC_MESSAGES = 20
NUM_CONFUSIONS = 10
NUM_SHADES = 9


@dataclass(frozen=True, kw_only=True)
class Cell:
    """A cell of the confusion matrix that is not empty."""

    count: int
    shade: str  # its class in the style sheet: d for right, e for wrong, then 1 to 9
    text: str


@dataclass(frozen=True, kw_only=True)
class Message:
    """A message that was measured on."""

    row: int  # in predictions.csv, from 1
    text: str
    true: int  # places in the label set
    predicted: int
    probability: float
    baseline: int | None


def report(config: ReportConfig) -> Path:
    """Write the report of a finished run; return where it is.

    Raises:
        ConfigError: If the output is a folder.
        DataError: If the run is not finished, or its files are broken.
        ResourceError: If the report cannot be written.
    """
    return write(config.run, config.output)


def conclude(directory: Path, say: Callable[[str], None]) -> None:
    """Write README.md and report.html of a run that has just ended.

    What cannot be written is told, not raised: the run is whole without it, and its figures are
    still to be shown.
    """
    with _told("README.md", say):
        model_card.write(directory)
    refresh(directory, say)


def refresh(directory: Path, say: Callable[[str], None]) -> None:
    """Write report.html again, since files that it shows have changed; tell why, if it cannot."""
    with _told("report.html", say):
        write(directory)


@contextlib.contextmanager
def _told(name: str, say: Callable[[str], None]) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        say(f"{name} is not written ({one_line(error)}); all else of the run is there")


def write(directory: Path, output: Path | None = None) -> Path:
    """Write the report of a finished run, whole or not at all; return where it is.

    Raises:
        ConfigError: If the output is a folder.
        DataError: If the run is not finished, or its files are broken.
        ResourceError: If the report cannot be written.
    """
    path = output or directory / "report.html"
    check_output(path, "output")
    run.write_text(path, page(directory))
    return path


def write_comparison(path: Path, found: Comparison, directories: Sequence[Path]) -> None:
    """Write the page of a comparison, whole or not at all.

    Raises:
        DataError: If the files of a run are broken.
        ResourceError: If the page cannot be written.
    """
    run.write_text(path, comparison_page(found, directories))


def write_chart(path: Path, chart: charts.Chart) -> None:
    """Write a chart as a picture by itself, whole or not at all.

    Raises:
        ResourceError: If it cannot be written.
    """
    run.write_text(path, _rendered("chart.svg", {"chart": chart}))


def check_output(path: Path, flag: str) -> None:
    """Refuse a file that cannot be written to.

    Raises:
        ConfigError: If it is a folder.
        ResourceError: If it is write-protected.
    """
    if path.is_dir():
        raise ConfigError(f"{path} is a folder; give a file with --{flag}")
    if path.exists() and not os.access(path, os.W_OK):
        raise ResourceError(f"{path} is write-protected; give another file with --{flag}")


def page(directory: Path) -> str:
    """Return the report of a finished run as HTML.

    Texts of the user come into the page in two ways only: escaped by Jinja, or as JSON, from which
    the script sets text contents. The style and the script are known to the browser by their
    hashes, and everything else is forbidden to it.

    Raises:
        DataError: If the run is not finished, or its files are broken.
    """
    from markupsafe import Markup

    found = results.read(directory)
    script = _template_text("report.js")
    with _of_this_version(directory):
        context = _context(found)
        return _rendered(
            "report.html",
            context | {"data": Markup(_json_for_html(context["data"]))},
            script=Markup(script),
            script_hash=_hash(script),
        )


def comparison_page(found: Comparison, directories: Sequence[Path]) -> str:
    """Return the page of a comparison as HTML; there is no script in it, and texts are escaped.

    Raises:
        DataError: If the files of a run are broken.
    """
    runs = [results.read(directory) for directory in directories]
    alike = [
        {"row": row + 1, "text": _cut(runs[0].texts[row]), "true": true, "predicted": given[0]}
        for row, (true, *given) in enumerate(
            zip(runs[0].true, *(each.predicted for each in runs), strict=True)
        )
        if len(set(given)) == 1 and given[0] != true
    ]
    settings = [dict(_rows(results.read_settings(directory))) for directory in directories]
    names = list(dict.fromkeys(name for each in settings for name in each))
    values = [(name, [each.get(name, "none") for each in settings]) for name in names]
    with _of_this_version(directories[0]):
        return _rendered(
            "comparison.html",
            {
                "version": remora.__version__,
                "found": found,
                "names": [each.name for each in found.contenders if not each.is_baseline],
                "intervals": charts.intervals(
                    [
                        ("baseline" if each.is_baseline else "ours", each.name, vars(each))
                        for each in found.contenders
                    ]
                ),
                "alike": alike[:NUM_STATIC_MESSAGES],
                "num_alike": len(alike),
                "differences": [each for each in values if len(set(each[1])) > 1],
            },
        )


@contextlib.contextmanager
def _of_this_version(directory: Path) -> Iterator[None]:
    """Turn what a template or a figure lacks into one line."""
    import jinja2

    try:
        yield
    except DataError:  # of a file, which it names
        raise
    except (jinja2.TemplateError, KeyError, TypeError, ValueError) as error:
        raise DataError(
            f"the files in {directory} do not fit this version of Remora ({one_line(error)}); "
            "train it again, or use the version that wrote them"
        ) from error


def _rendered(name: str, context: Mapping[str, Any], **code: str) -> str:
    """Return a page of a template; everything in the context is escaped but what is `Markup`."""
    import jinja2
    from markupsafe import Markup

    environment = jinja2.Environment(
        loader=jinja2.FunctionLoader(_template_text),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "bytes": spoken_bytes,
        "seconds": spoken_seconds,
        "percent": _percent,
        "count": "{:,}".format,
        "isolated": _isolated,
    }
    style = _template_text("report.css")
    html = environment.get_template(name).render(
        **context, **code, style=Markup(style), style_hash=_hash(style)
    )
    return html.encode("utf-8", "replace").decode("utf-8").replace("\0", "\ufffd")


def _template_text(name: str) -> str:
    return (importlib.resources.files("remora") / "templates" / name).read_text("utf-8")


def _hash(code: str) -> str:
    """Return the source expression of a Content-Security-Policy that allows this code alone."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(code.encode('utf-8')).digest()).decode()}'"


def _context(found: Results) -> dict[str, Any]:
    directory, figures, labels = found.directory, found.figures, found.labels
    trained = "model" if figures.get("method") == "full" else "adapter"
    counts = _counts(found)
    shown = _matrix_labels(counts)
    kept = _kept(_messages(found))
    records = _records(directory)
    learned = results.read_json(directory / "learning_curve.json")
    planned = results.read_json(directory / "plan.json")
    summary = results.read_json(directory / "data.json")
    theirs = figures["baseline"]["metrics"]["accuracy"]
    verdict = evaluate.verdict(figures["metrics"]["accuracy"], theirs, figures["p_value"])
    return {
        "name": directory.resolve().name,
        "version": remora.__version__,
        "trained": trained,
        "figures": figures,
        "metrics": figures["metrics"],
        "baseline": figures["baseline"],
        "verdict": verdict[0].upper() + verdict[1:],
        "intervals": charts.intervals(
            [
                ("ours", trained, figures["metrics"]),
                ("baseline", figures["baseline"]["description"], figures["baseline"]["metrics"]),
            ]
        ),
        "reliability": figures.get("reliability"),
        "labels": labels,
        "places": {label: place for place, label in enumerate(labels)},
        "curves": charts.training(records),
        "learned": learned,
        "learning_curve": charts.learning_curve(learned),
        "validations": [r for r in records if "validation_accuracy" in r],
        "calibration": charts.calibration(figures.get("reliability")),
        "shown": shown,
        "cells": _cells(counts, labels, shown),
        "worst": figures["metrics"]["confusions"][:NUM_CONFUSIONS],
        "taken_for": {c["true"]: c for c in reversed(figures["metrics"]["confusions"])},
        "num_confusions": len(figures["metrics"]["confusions"]),
        "surest": [m for m in kept if m.true != m.predicted][:NUM_STATIC_MESSAGES],
        "num_kept": len(kept),
        "max_message_chars": MAX_MESSAGE_CHARS,
        "data": {
            "labels": labels,
            "shown": shown,
            "rows": counts.sum(1).tolist(),
            "mistakes": (counts.sum(0) + counts.sum(1) - 2 * counts.diagonal()).tolist(),
            "messages": [list(vars(message).values()) for message in kept],
        },
        "plan": planned,
        "diagnosis": results.read_json(directory / "diagnosis.json"),
        "suspects": _suspects(directory / "relabel.csv"),
        "memory_rows": _memory_rows(planned),
        "plan_rows": _plan_rows(planned),
        "setting_rows": _rows(results.read_settings(directory)),
        "data_rows": [r for r in _rows(summary or {}) if r[0] != "labels"],
        "environment_rows": _environment_rows(directory),
    }


def _counts(found: Results) -> NDArray[np.int64]:
    """Return the rows of each label and prediction, [true, predicted]."""
    place = {label: index for index, label in enumerate(found.labels)}
    counts = np.zeros((len(place), len(place)), dtype=np.int64)
    for (true, predicted), count in Counter(zip(found.true, found.predicted, strict=True)).items():
        counts[place[true], place[predicted]] = count
    return counts


def _matrix_labels(counts: NDArray[np.int64]) -> list[int]:
    """Choose the labels of the matrix, those with most mistakes, and put like beside like.

    Labels that are taken for each other become neighbours (average linkage, the leaves ordered so
    that neighbours are as close as can be); those without mistakes come last.
    """
    from scipy.cluster.hierarchy import leaves_list, linkage
    from scipy.spatial.distance import squareform

    both = counts + counts.T
    np.fill_diagonal(both, 0)
    mistakes = both.sum(1)
    chosen = np.argsort(-mistakes, kind="stable")[:MAX_MATRIX_LABELS]
    confused = np.sort(chosen[mistakes[chosen] > 0])
    rest = np.sort(chosen[mistakes[chosen] == 0])
    if len(confused) > 2:
        distance = 1 / (1 + both[np.ix_(confused, confused)])
        np.fill_diagonal(distance, 0)
        tree = linkage(squareform(distance), "average", optimal_ordering=True)
        confused = confused[leaves_list(tree)]
    return [*confused.tolist(), *rest.tolist()]


def _cells(
    counts: NDArray[np.int64], labels: Sequence[str], shown: Sequence[int]
) -> dict[tuple[int, int], Cell]:
    cells = {}
    num_rows = counts.sum(1)
    for i in shown:
        for j in shown:
            if not (count := int(counts[i, j])):
                continue
            share = count / num_rows[i]
            true, predicted = _isolated(labels[i]), _isolated(labels[j])
            text = f"{count:,} of {true} taken for {predicted} ({share:.0%})"
            shade = f"e{int(np.ceil(NUM_SHADES * np.sqrt(share)))}"  # a few rows shall be seen
            if i == j:
                text = f"{count:,} of {true} right ({share:.0%})"
                shade = f"d{int(np.ceil(NUM_SHADES * share))}"
            cells[i, j] = Cell(count=count, shade=shade, text=text)
    return cells


def _messages(found: Results) -> list[Message]:
    """Return all messages: mistakes first, the surest first, then the right ones, surest last."""
    place = {label: index for index, label in enumerate(found.labels)}
    answers = zip(found.texts, found.true, found.predicted, found.probability, strict=True)
    messages = [
        Message(
            row=row + 1,
            text=_cut(text),
            true=place[true],
            predicted=place[predicted],
            probability=round(probability, 4),
            baseline=None if found.baseline is None else place[found.baseline[row]],
        )
        for row, (text, true, predicted, probability) in enumerate(answers)
    ]
    wrong = sorted((m for m in messages if m.true != m.predicted), key=lambda m: -m.probability)
    return wrong + sorted(
        (m for m in messages if m.true == m.predicted), key=lambda m: m.probability
    )


def _cut(text: str) -> str:
    return text if len(text) <= MAX_MESSAGE_CHARS else text[:MAX_MESSAGE_CHARS] + " …"


def _kept(messages: Sequence[Message]) -> list[Message]:
    """Return as many of the first messages as a page shall hold."""
    ends = np.cumsum([len(message.text) for message in messages])
    return list(messages[: int(np.searchsorted(ends, MAX_CHARS, side="right"))])


def _json_for_html(value: Any) -> str:
    """Return JSON that cannot end the element it stands in, whatever texts it holds."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text


# Files of the run


def _records(directory: Path) -> list[dict[str, Any]]:
    """Return the records of metrics.jsonl, the last of each step; a torn line is left out."""
    path = directory / "metrics.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    records = [record for record in map(_record, lines) if record]
    found = {(record["step"], "loss" in record): record for record in records}
    return sorted(found.values(), key=lambda record: record["step"])


def _record(line: str) -> dict[str, Any] | None:
    try:
        record: dict[str, Any] = json.loads(line)
    except ValueError:
        return None
    return record


def _suspects(path: Path) -> list[dict[str, str]]:
    """Return the first rows of relabel.csv; a person may have changed or removed the file."""
    if not path.is_file():
        return []
    try:
        with path.open(encoding="utf-8", newline="") as file:
            rows = list(itertools.islice(csv.DictReader(file), NUM_STATIC_MESSAGES))
        return [
            {"row": row["row"]}
            | {k: _cut(results.as_it_was(row[k])) for k in ("text", "label", "suggested")}
            for row in rows
        ]
    except (OSError, ValueError, KeyError, AttributeError, TypeError, csv.Error):
        return []


def _memory_rows(planned: dict[str, Any] | None) -> list[tuple[str, str]]:
    memory = planned["memory"] if planned else {}
    return [(name.replace("_", " "), spoken_bytes(count)) for name, count in memory.items()]


def _plan_rows(planned: dict[str, Any] | None) -> list[tuple[str, str]]:
    if planned is None:
        return []
    fewer = planned["padded_tokens"] / planned["tree_tokens"]
    return [
        ("device", planned["device"]),
        ("parameters", f"{planned['parameters']:,}"),
        ("of which train", f"{planned['trainable']:,}"),
        ("training rows", f"{planned['num_rows']:,}"),
        ("steps", f"{planned['num_steps']:,} of {planned['batch_size']:,} rows"),
        ("tokens a row, padded", f"{planned['padded_tokens']:.1f}"),
        ("tokens a row, in trees", f"{planned['tree_tokens']:.1f} ({fewer:.1f} times fewer)"),
        ("operations an example", f"{planned['operations_per_example'] / 1e9:,.1f} GFLOP"),
    ]


def _environment_rows(directory: Path) -> list[tuple[str, str]]:
    found = results.read_json(directory / "environment.json") or {}
    if found.get("command"):
        found["command"] = shlex.join(found["command"])
    return _rows(found)


def _rows(values: Mapping[str, Any], above: str = "") -> list[tuple[str, str]]:
    """Return a file's keys and values as text; what is nested gets its place in the name."""
    found = []
    for name, value in values.items():
        if isinstance(value, dict) and value:
            found += _rows(value, f"{above}{name}: ")
        else:
            found.append((above + name.replace("_", " "), _spoken(value)))
    return found


def _percent(share: float, digits: int = 1) -> str:
    return f"{100 * share:.{digits}f}%"


def _isolated(text: str) -> str:
    """Return a text whose direction of writing stays its own, for where there is no markup."""
    return f"\u2068{text}\u2069"


def _spoken(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list):
        return ", ".join(map(_spoken, value)) or "none"
    if isinstance(value, int):
        return f"{value:,}"
    return "none" if value is None else str(value)
