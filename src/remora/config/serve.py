"""The settings of `remora serve`."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field
from pathlib import Path

from cyclopts import Parameter

from remora.config.checks import DeviceName, PrecisionName, parse_bytes
from remora.errors import ConfigError


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class ServeConfig:
    """Settings of `remora serve`."""

    adapters: tuple[str, ...] = field(kw_only=False)
    """Run directories, adapters' folders or ids on the Hugging Face hub, of one base model, or one
    whole model. Each is named by its run, or as NAME=FOLDER."""

    host: str = "127.0.0.1"
    """Address to listen on. Any but a loopback address needs a token, in the environment variable
    REMORA_TOKEN or in `token_file`."""

    port: int = 8000
    """Port to listen on; 0 takes a free one."""

    token_file: Path | None = None
    """File with the token that clients must show."""

    max_body: str = "1MB"
    """Most bytes of a request's body."""

    max_text_length: int = 20_000
    """Most characters of a text."""

    max_texts: int = 256
    """Most texts in a request."""

    max_queue: int = 1024
    """Most texts that wait; a request for which there is no room is told to come again."""

    timeout_seconds: float = 30.0
    """Longest time to an answer; after it a request is told to come again."""

    read_seconds: float = 4.0
    """Longest time for a request's headers, and again for its body; as long may a connection be
    idle."""

    model: str | None = None
    """Base model, where it no longer is where the adapters were trained."""

    tolerance: float = 0.01
    """Most probability that the labels not looked at may hold together. 1 only makes sure of the
    likeliest label: that is faster, and the probabilities are rough."""

    micro_batch_tokens: int = 2048
    """Most tokens computed at once; limits memory, changes no result."""

    precision: PrecisionName = "auto"
    """Arithmetic of the forward pass."""

    device: DeviceName = "auto"
    """Where to compute."""

    def __post_init__(self) -> None:
        """Check every value; raises ConfigError."""
        problems = [
            f"{name} is {getattr(self, name)}; give {wanted}"
            for name, wanted, good in (
                ("port", "a whole number from 0 to 65535", 0 <= self.port <= 65_535),
                ("max_text_length", "a whole number from 1", self.max_text_length >= 1),
                ("max_texts", "a whole number from 1", self.max_texts >= 1),
                ("max_queue", "at least max_texts", self.max_queue >= self.max_texts),
                ("timeout_seconds", "a number above 0", 0 < self.timeout_seconds < math.inf),
                ("tolerance", "a number from 0 to 1", 0 <= self.tolerance <= 1),
                ("read_seconds", "a number above 0", 0 < self.read_seconds < math.inf),
                ("micro_batch_tokens", "a whole number from 1", self.micro_batch_tokens >= 1),
            )
            if not good
        ]
        if not self.adapters:
            problems.append("no adapter is given; give one or more run directories")
        if problems:
            raise ConfigError("; ".join(problems))
        self.body_bytes()
        self.folders()

    def body_bytes(self) -> int:
        """Return the most bytes of a request's body; raises ConfigError."""
        return parse_bytes("max_body", self.max_body, "1MB or 500kB") or 0

    def folders(self) -> dict[str, Path]:
        """Return the folder of each adapter's name; raises ConfigError."""
        folders: dict[str, Path] = {}
        for given in self.adapters:
            name, is_named, folder = given.partition("=")
            if not is_named or "/" in name:  # a folder's name may have an equals sign
                path, folder = Path(given).absolute(), given
                name = path.parent.name if path.name in {"adapter", "model"} else path.name
            if not re.fullmatch(r"[\w.-]+", name):
                raise ConfigError(
                    f"an adapter is named {name!r}; name it with letters, digits, dots, hyphens "
                    f"and underscores, as in my-name={folder}"
                )
            if name in folders:
                raise ConfigError(
                    f"two adapters are named {name}; name one otherwise, as in other={folder}"
                )
            folders[name] = Path(folder)
        return folders
