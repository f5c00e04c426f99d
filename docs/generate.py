"""Writes docs/reference/commands.md from the command line's own settings.

python docs/generate.py    # after a change of a verb, a setting or its help
"""

from __future__ import annotations

import types
import typing
from pathlib import Path
from typing import Any

from cyclopts import App
from cyclopts.argument import Argument

from remora.cli import app
from remora.config.help_pages import EXAMPLES, GROUPS

PAGE = Path(__file__).parent / "reference" / "commands.md"
COMMAND = "python docs/generate.py"

INTRODUCTION = f"""\
# Commands and settings

<!-- Generated from the fields in remora.config; to write it again: {COMMAND} -->

    remora VERB ARGUMENTS [--flag VALUE ...]

Each setting is a flag and a key of a TOML file. The key is the name of the flag with underscores: \
`--learning-rate 2e-4` is `learning_rate = 2e-4`. `--config FILE` reads such a file. A flag wins \
over the file, the file over the default. An argument in capitals needs no flag; its key is its \
name in small letters, such as `data`. An unknown key or flag is an error that names the nearest \
one. A switch such as `--merge` is off unless given, `true` or `false` in TOML; \
`--no-merge` overrides the file.

`remora VERB --help` lists the same settings in the terminal.
"""


def commands() -> str:
    """Return the page: a section for each verb, a row for each setting."""
    train = dict(_settings(app["train"]))
    parts = [INTRODUCTION, "## Every verb\n", _table(_settings(app.meta))]
    for name in app:
        if name.startswith("-"):
            continue
        verb = app[name]
        settings = _settings(verb)
        parts.append(f"## remora {name}\n\n    remora {name} {_usage(verb)}\n")
        parts.append(f"{_description(verb)}\n")
        if name == "plan":
            parts.append("Its own, and those that differ from [train](#remora-train):\n")
            parts.append(_table([each for each in settings if train.get(each[0]) != each[1]]))
        else:
            parts += _tables(verb)
        parts.append("For example:\n\n" + "".join(f"    {each}\n" for each in EXAMPLES[name]))
    return "\n".join(parts)


def _arguments(verb: App) -> list[Argument]:
    found = verb.assemble_argument_collection(parse_docstring=True)
    return [each for each in found if each.show and each.name != "*"]


def _settings(verb: App) -> list[tuple[str, str]]:
    """Return the name of each setting and its row of the table."""
    return [(each.name, _row(each)) for each in _arguments(verb)]


def _table(settings: list[tuple[str, str]]) -> str:
    head = ["| setting | value | default | |", "|---|---|---|---|"]
    return "\n".join(head + [row for _, row in settings]) + "\n"


def _tables(verb: App) -> list[str]:
    """Return a table for each group of settings in the verb's help, in its order."""
    groups: dict[str, list[tuple[str, str]]] = {title: [] for title in ("", *GROUPS)}
    for each in _arguments(verb):
        (group,) = each.parameter.group
        title = group.name if group.name in GROUPS else ""
        groups[title].append((each.name, _row(each)))
    return [
        (f"**{title}**\n\n" if title else "") + _table(rows)
        for title, rows in groups.items()
        if rows
    ]


def _usage(verb: App) -> str:
    words = []
    for argument in _arguments(verb):
        place = argument.name[2:].replace("-", "_").upper()
        if typing.get_origin(argument.hint) is tuple:
            place += " ..."
        if not _is_positional(argument):
            if argument.required:
                words.append(f"{argument.name} {place}")
        else:
            words.append(place if argument.required else f"[{place}]")
    return " ".join([*words, "[--flag VALUE ...]"])


def _row(argument: Argument) -> str:
    name = argument.name
    if _is_positional(argument):
        name = name[2:].replace("-", "_").upper()
    kind, choices = _kind(argument.hint)
    default = argument.field_info.default
    if argument.required:
        shown = "required"
    elif default is False or default in (None, (), {}) or callable(default):
        shown = ""
    else:
        shown = f"`{','.join(default) if isinstance(default, tuple) else default}`"
    cells = (f"`{name}`", kind, shown, _one_line(argument.parameter.help) + choices)
    return "| " + " | ".join(cell.replace("|", r"\|") for cell in cells) + " |"


def _kind(hint: Any) -> tuple[str, str]:
    """Return the kind of value in a word, and the choices as a sentence."""
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if origin in {typing.Union, types.UnionType}:
        (hint,) = (each for each in inner if each is not type(None))
        return _kind(hint)
    if origin is typing.Literal:
        return "choice", f" One of {', '.join(f'`{each}`' for each in inner)}."
    if origin is tuple:
        return f"{_kind(inner[0])[0]}, several", ""
    if origin is dict:
        return "text by label", ""
    return {str: "text", Path: "path", int: "integer", float: "number", bool: "switch"}[hint], ""


def _is_positional(argument: Argument) -> bool:
    return "POSITIONAL" in argument.field_info.kind.name


def _description(verb: App) -> str:
    described = verb.help.split("Parameters\n")[0].strip()
    return "\n\n".join(_one_line(paragraph) for paragraph in described.split("\n\n"))


def _one_line(text: str) -> str:
    return " ".join(text.split())


if __name__ == "__main__":
    PAGE.write_text(commands(), encoding="utf-8")
