"""Labels that are the same but for case, spaces, Unicode form or a whole number's decimals."""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Mapping

from remora.errors import ConfigError
from remora.formatting import close_match, listed, quote

_NO_WIDTH = dict.fromkeys(map(ord, "\u200b\u200c\u200d\u2060\ufeff"))
_WHOLE = re.compile(r"^([-+]?\d+)\.0+$")


def label_key(label: str) -> str:
    """Return what labels have in common that differ in form only.

    That is case, spaces, also those without width, Unicode form, and the decimals of 1.0.
    """
    key = " ".join(unicodedata.normalize("NFKC", label).translate(_NO_WIDTH).casefold().split())
    return _WHOLE.sub(r"\1", key)


def twins(labels: Iterable[str]) -> list[list[str]]:
    """Return the groups of labels that differ in form only, each sorted."""
    groups: dict[str, list[str]] = {}
    for label in sorted(set(labels)):
        groups.setdefault(label_key(label), []).append(label)
    return [group for group in groups.values() if len(group) > 1]


def spoken(groups: list[list[str]]) -> list[str]:
    """Return a sentence on twins, none if there are none."""
    if not groups:
        return []
    named = "; ".join(listed(group) for group in groups[:3]) + ("; ..." if len(groups) > 3 else "")
    return [
        "labels that differ only in case, spaces, Unicode form or decimals as in 1.0 are different"
        f" labels: {named};"
        " --merge-labels makes them one"
    ]


def most_frequent_forms(labels: Iterable[str]) -> dict[str, str]:
    """Return the most frequent label of each key, the first in order on a tie."""
    counts = Counter(labels)
    forms: dict[str, str] = {}
    for label in sorted(counts, key=lambda label: (-counts[label], label)):
        forms.setdefault(label_key(label), label)
    return forms


def merged(labels: Iterable[str], forms: Mapping[str, str]) -> list[str]:
    """Return labels with twins replaced by the form that stands for them."""
    return [forms.get(label_key(label), label) for label in labels]


def renamed(labels: Iterable[str], names: Mapping[str, str]) -> list[str]:
    """Return labels by their new names, where they have one."""
    return [names.get(label, label) for label in labels]


def refuse_unknown(names: Mapping[str, str], labels: Iterable[str]) -> None:
    """Refuse to rename a label that no training row has, or to give it a blank name.

    Raises:
        ConfigError: Naming the first of them.
    """
    known = sorted(set(labels))
    for label, name in names.items():
        if label not in known:
            close = close_match(label, known)
            hint = f"did you mean {quote(close)}?" if close else f"give one of {listed(known)}"
            raise ConfigError(
                f"rename_labels has {quote(label)}, which no training row has; {hint}"
            )
        if not name.strip() or name != name.strip():
            raise ConfigError(
                f"rename_labels gives {quote(label)} the name {quote(name)}; give one without "
                "white space around it"
            )
