"""A copy of an adapter's files, all of one moment, even while its folder is replaced."""

from __future__ import annotations

import contextlib
import shutil
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from remora.errors import ModelError
from remora.formatting import one_line
from remora.models import metadata, untrusted
from remora.runtime import files

MAX_ATTEMPTS = 5
"""How often a folder is copied that is replaced meanwhile, or is missing for a moment."""


@dataclass(frozen=True, kw_only=True)
class Snapshot:
    """A copy of an adapter's files."""

    folder: Path
    sha256: str  # of the three files of untrusted.ADAPTER_FILES, one after the other
    card: metadata.AdapterCard


@contextlib.contextmanager
def taken(folder: Path) -> Iterator[Snapshot]:
    """Copy an adapter's files into a temporary folder, which lasts as long as the context.

    Raises:
        ModelError: If one is missing or broken.
    """
    # Windows deletes no file that is still mapped into memory; it is left to the system then.
    with tempfile.TemporaryDirectory(prefix="remora-", ignore_cleanup_errors=True) as made:
        copied = Path(made)
        _copy(folder, copied)
        try:
            card = metadata.read_card(copied)
        except ModelError as error:
            raise renamed(error, copied, folder) from error
        sha256 = files.sha256([copied / name for name in untrusted.ADAPTER_FILES])
        yield Snapshot(folder=copied, sha256=sha256, card=card)


def _copy(folder: Path, target: Path) -> None:
    """Copy the files, again if the folder was another one before than after."""
    for attempt in range(1, MAX_ATTEMPTS + 1):
        try:
            before = folder.stat()
            for name in untrusted.ADAPTER_FILES:
                source = untrusted.followed(folder / name)
                shutil.copyfile(source, target / name, follow_symlinks=False)
            after = folder.stat()
            if (before.st_ino, before.st_dev) == (after.st_ino, after.st_dev):
                return
        except OSError as error:
            if attempt == MAX_ATTEMPTS:
                metadata.read_card(folder)  # which says what is missing
                raise ModelError(
                    f"{folder} cannot be read ({one_line(error)}); restore it"
                ) from error
        time.sleep(0.05)
        for path in target.iterdir():
            path.unlink()
    raise ModelError(f"{folder} changes while it is read; try again when it is complete")


def renamed(error: ModelError, copied: Path, folder: Path) -> ModelError:
    """Return an error about a copy as one about the folder that was copied."""
    return ModelError(str(error).replace(str(copied), str(folder)))
