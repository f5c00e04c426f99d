"""README.md and docs/: commands exist, links lead somewhere, the reference is that of the code.

Whether the pages build, and links between them, is for `make docs`.
"""

import importlib.util
import re
import shlex
from pathlib import Path

import pytest

from remora import cli

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
README = ROOT / "README.md"
PAGES = sorted(DOCS.rglob("*.md"))
GENERATED = DOCS / "reference" / "commands.md"

MAX_README_WORDS = 900
OPERATORS = {"|", "||", "&", "&&", ";", "<", ">", ">>"}


def code_lines(text):
    """Yield each line of code blocks, fenced or indented, with continued lines joined."""
    inside, before_blank = None, True
    for line in text.replace("\\\n", " ").splitlines():
        if fence := re.match(r" *(`{3,})", line):
            inside = None if inside == fence[1] else inside or fence[1]
        elif inside or (line.startswith("    ") and before_blank):
            yield line.strip()
            continue  # an indented block goes on
        before_blank = not line.strip()


def commands(text):
    """Return the arguments of each `remora` command line in code blocks."""
    found = []
    for line in code_lines(text):
        if not re.search(r"(^|[ /])remora [a-z]", line):
            continue
        lexer = shlex.shlex(line.removeprefix("$ "), posix=True, punctuation_chars=True)
        lexer.whitespace_split = True
        words = list(lexer)
        for place, word in enumerate(words):
            before = words[place - 1] if place else ";"
            if word == "remora" and (before in {*OPERATORS, ")", "-m"} or "=" in before):
                rest = words[place + 1 :]
                end = next((i for i, each in enumerate(rest) if each in OPERATORS), len(rest))
                found.append(rest[:end])
    return found


def every_command():
    """Return each command line once, named by the first page that has it."""
    found = {}
    for path in (README, ROOT / "CONTRIBUTING.md", *PAGES):
        if path != GENERATED:  # which shows what to fill in
            for arguments in commands(path.read_text(encoding="utf-8")):
                found.setdefault(tuple(arguments), path.stem)
    return [
        pytest.param(arguments, id=f"{page}: {' '.join(arguments)}")
        for arguments, page in found.items()
    ]


class ParseOnly:
    """The command line's verbs, which are parsed, checked and not run."""

    def __init__(self, app):
        self.app, self.config = app, ()

    def __call__(self, tokens, **how):
        self.app.config = self.config
        try:
            self.app.parse_args(tokens, **how)
        finally:
            self.app.config = ()


def parse(arguments, monkeypatch):
    monkeypatch.chdir(ROOT)  # recipes are named from here
    whole = cli.app.meta
    monkeypatch.setattr(cli, "app", ParseOnly(cli.app))
    whole(list(arguments), exit_on_error=False, print_error=False, result_action="return_value")


@pytest.mark.parametrize("arguments", every_command())
def test_commands_exist(arguments, monkeypatch):
    parse(arguments, monkeypatch)


def test_commands_are_found():
    assert commands(
        "a\n\n    remora train x.csv --model m < in.txt\n\n```\n$ remora report r\n```"
    ) == [
        ["train", "x.csv", "--model", "m"],
        ["report", "r"],
    ]
    text = (
        "```sh\nT=$(openssl rand) remora serve \\\n  runs/a\necho 'a b' | remora predict r > f\n```"
    )
    assert commands(text) == [["serve", "runs/a"], ["predict", "r"]]
    assert commands("remora train is a verb; ```remora```") == []


@pytest.mark.parametrize("wrong", ["trian x --model m", "train x --model m --rnak 8", "predict"])
def test_wrong_commands_are_refused(wrong, monkeypatch):
    with pytest.raises(cli.cyclopts.CycloptsError):
        parse(wrong.split(), monkeypatch)


def test_flags_in_sentences_exist():
    flags = {
        flag
        for verb in (cli.app.meta, *(cli.app[name] for name in cli.app if name[0] != "-"))
        for argument in verb.assemble_argument_collection()
        for flag in argument.names
    }
    named = [
        (path.name, flag)
        for path in (README, *PAGES)
        for flag in re.findall(r"(?<!`)`(--[a-z-]+)", path.read_text(encoding="utf-8"))
    ]
    assert [each for each in named if each[1] not in flags] == []


@pytest.mark.parametrize("columns", ["40", "300"])
def test_reference_is_that_of_the_settings(columns, monkeypatch):
    monkeypatch.setenv("COLUMNS", columns)
    spec = importlib.util.spec_from_file_location("generate", DOCS / "generate.py")
    generate = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(generate)
    written = GENERATED.read_text(encoding="utf-8")
    assert written == generate.commands(), f"write it again with: {generate.COMMAND}"
    for name in cli.app:
        assert name.startswith("-") or f"## remora {name}\n" in written


def test_readme_is_short():
    assert len(README.read_text(encoding="utf-8").split()) <= MAX_README_WORDS


@pytest.mark.parametrize("name", ["README.md", "CONTRIBUTING.md"])
def test_links_lead_to_files(name):
    text = (ROOT / name).read_text(encoding="utf-8")
    targets = re.findall(r"\]\(([^)\s]+)\)", text)
    local = [each for each in targets if not re.match(r"[a-z]+:", each)]
    assert local, "no link is found at all"
    assert [each for each in local if not (ROOT / each.partition("#")[0]).exists()] == []


def test_every_page_is_in_the_navigation():
    listed = {DOCS / "index.md"}
    for path in PAGES:
        text = path.read_text(encoding="utf-8")
        for tree in re.findall(r"^```\{toctree\}\n(.*?)^```", text, re.M | re.S):
            names = [line for line in tree.split("\n") if line and not line.startswith(":")]
            listed |= {(path.parent / f"{name}.md").resolve() for name in names}
    assert {str(page.relative_to(DOCS)) for page in set(PAGES) - listed} == set()
    assert {str(page) for page in listed - set(PAGES)} == set()
