"""The settings of `remora serve`."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path

from cyclopts import Parameter

from remora.config.checks import (
    DEFAULT_MICRO_BATCH_TOKENS,
    Count,
    DeviceName,
    FileSize,
    OneOrMore,
    Port,
    Positive,
    PrecisionName,
    Share,
    check,
    convert,
    to_bytes,
)
from remora.errors import ConfigError


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class ServeConfig:
    """Settings of `remora serve`."""

    adapters: OneOrMore = field(kw_only=False)
    """Run directories, adapter folders or Hugging Face Hub ids that share one base model, or one
    fully fine-tuned model. Each is named after its run, or as NAME=FOLDER."""

    host: str = "127.0.0.1"
    """Address to listen on. Any but a loopback address needs a token, in the environment variable
    REMORA_TOKEN or in `token_file`."""

    port: Port = 8000
    """Port to listen on; 0 takes a free one."""

    token_file: Path | None = None
    """File with the token that clients must send."""

    max_body: FileSize = "1MB"
    """Largest request body, in bytes."""

    max_text_length: Count = 20_000
    """Longest text, in characters."""

    max_texts: Count = 256
    """Most texts in a request."""

    max_queue: int = 1024
    """Most texts waiting; a request that does not fit gets 503 with Retry-After."""

    timeout_seconds: Positive = 30.0
    """Longest time to an answer; after it the request gets 503 with Retry-After."""

    read_seconds: Positive = 4.0
    """Longest time to read a request's headers, and again to read its body; also how long a
    connection may be idle."""

    model: str | None = None
    """Base model, if it has moved since training."""

    tolerance: Share = 0.01
    """Maximum total probability left on unexplored labels. With 1, only the most probable label is
    certain: faster, but probabilities are rough."""

    micro_batch_tokens: Count = DEFAULT_MICRO_BATCH_TOKENS
    """Most tokens computed at once; limits memory, changes no result."""

    precision: PrecisionName = "auto"
    """Arithmetic of the forward pass."""

    device: DeviceName = "auto"
    """Device to compute on."""

    def __post_init__(self) -> None:
        """Check every value; raises ConfigError."""
        convert(self)
        check(
            self,
            (
                self.max_queue < self.max_texts,
                f"max_queue is {self.max_queue}; give at least max_texts",
            ),
            (not self.adapters, "no adapter is given; give one or more run directories"),
        )
        self.folders()

    def body_bytes(self) -> int:
        """Return the size of the largest request body in bytes."""
        return to_bytes(self.max_body)

    def folders(self) -> dict[str, Path]:
        """Return each adapter's folder by its name.

        Raises:
            ConfigError: If a name cannot be part of a URL, or two adapters have the same name.
        """
        folders: dict[str, Path] = {}
        for given in self.adapters:
            name, is_named, folder = given.partition("=")
            if not is_named or "/" in name:  # a folder's name may have an equals sign
                path, folder = Path(given).absolute(), given
                name = path.parent.name if path.name in {"adapter", "model"} else path.name
            if not re.fullmatch(r"[\w.-]+", name):
                raise ConfigError(
                    f"an adapter is named {name!r}; use only letters, digits, dots, hyphens and "
                    f"underscores, as in my-name={folder}"
                )
            if name in folders:
                raise ConfigError(
                    f"two adapters are named {name}; rename one, as in other={folder}"
                )
            folders[name] = Path(folder)
        return folders
