"""The verb push: a run's adapter on the Hugging Face hub, in one commit.

The repository holds PEFT's two files, remora.json and the model card at its top level, so PEFT and
Remora load it by its id. Nothing else leaves the run directory: settings, predictions and report
name files of this machine, or contain messages.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import remora
from remora.config import PushConfig
from remora.errors import ConfigError, RemoraError
from remora.evaluation import results
from remora.formatting import one_line
from remora.models import hub, metadata, model_card, untrusted
from remora.runtime.reporter import Reporter

if TYPE_CHECKING:
    from huggingface_hub import HfApi


CARD = "README.md"
MADE_BY_THE_HUB = {".gitattributes", CARD}
"""The files of a repository that was made on the hub's website and never pushed to."""


@dataclass(frozen=True, kw_only=True)
class Pushed:
    """The files that were published, and their address."""

    repo_id: str
    url: str
    commit: str
    public: bool
    base_model: str
    files: dict[str, int]  # bytes of each

    def to_dict(self) -> dict[str, Any]:
        """Return the figures as `--json` prints them."""
        return asdict(self)


def push_run(config: PushConfig, *, reporter: Reporter | None = None) -> Pushed:
    """Publish a run's adapter with its model card; after an error no file is published.

    Raises:
        ConfigError: If there is no token, the hub refuses or cannot be reached, or the repository
            holds something else.
        DataError: If this is not a finished run.
        ModelError: If the adapter is broken, or the run has none.
    """
    reporter = reporter or Reporter()
    results.read(config.run)  # raises if the run is not finished
    folder = metadata.adapter_folder(config.run)
    card = metadata.read_card(folder)
    base = card.base_model
    untrusted.read_shapes([folder / "adapter_model.safetensors"])
    files = _files(config.run, folder, base)
    with _hub_errors(config.repo_id):
        api = _client()
        _make_repository(api, config)
        if warning := _base_warning(card):
            reporter.say(warning)
        commit = _commit(api, config.repo_id, files)
        url = f"{api.endpoint}/{config.repo_id}"
    return Pushed(
        repo_id=config.repo_id,
        url=url,
        commit=commit,
        public=config.public,
        base_model=Path(base).name if Path(base).is_absolute() else base,
        files={name: len(content) for name, content in files.items()},
    )


def _files(directory: Path, folder: Path, base: str) -> dict[str, bytes]:
    """Return the files to publish by name; a local base model is left by its folder's name only."""
    files = {
        name: untrusted.followed(folder / name).read_bytes() for name in untrusted.ADAPTER_FILES
    }
    if Path(base).is_absolute():
        for name, key in (
            ("adapter_config.json", "base_model_name_or_path"),
            ("remora.json", "base_model"),
        ):
            values = untrusted.read_json(folder / name) | {key: Path(base).name}
            files[name] = (json.dumps(values, indent=2, ensure_ascii=False) + "\n").encode()
    card = directory / CARD
    text = card.read_bytes() if card.is_file() else model_card.card(directory).encode()
    return files | {CARD: text}


def _base_warning(card: metadata.AdapterCard) -> str | None:
    """Return a warning if others need more than the hub to use this base model."""
    base = card.base_model
    if Path(base).is_absolute():
        name = Path(base).name
        kind = "file" if card.gguf_sha256 and not Path(base).is_dir() else "folder"
        return (
            f"the base model is a local {kind}, of which only the name {name} is published; others "
            "need a copy of it, given with --model"
        )
    if (hub.EMBEDDED / base).is_dir():
        return f"the base model {base} is part of Remora; PEFT alone does not find it"
    return None


def _client() -> HfApi:
    """Return the hub's client.

    Raises:
        ConfigError: If the hub is switched off by HF_HUB_OFFLINE, or there is no token.
    """
    from huggingface_hub import HfApi, get_token, is_offline_mode

    if is_offline_mode():
        raise ConfigError("HF_HUB_OFFLINE is set, so nothing can be pushed; unset it")
    if get_token() is None:
        raise ConfigError(
            "there is no token for the Hugging Face hub; set HF_TOKEN, or log in with "
            "`hf auth login`"
        )
    return HfApi(library_name="remora", library_version=remora.__version__)


def _make_repository(api: HfApi, config: PushConfig) -> None:
    """Make the repository, unless it exists and the adapter may go into it.

    Raises:
        ConfigError: If it holds something else, or is public or private against the settings.
    """
    from huggingface_hub.errors import RepositoryNotFoundError

    try:
        existing = api.model_info(config.repo_id)
    except RepositoryNotFoundError:
        api.create_repo(config.repo_id, private=not config.public)
        return
    names = {file.rfilename for file in existing.siblings or ()} - MADE_BY_THE_HUB
    if names and not names.issuperset(untrusted.ADAPTER_FILES):
        raise ConfigError(
            f"{config.repo_id} holds something other than a Remora adapter "
            f"({min(names)}); give another name"
        )
    if not existing.private and not config.public:
        raise ConfigError(f"{config.repo_id} is public already; give --public, or another name")
    if existing.private and config.public:
        raise ConfigError(
            f"{config.repo_id} is private; make it public on its page first, or leave out --public"
        )


def _commit(api: HfApi, repo_id: str, files: dict[str, bytes]) -> str:
    """Upload files in one commit and return its hash; `upload_folder` may make several."""
    from huggingface_hub import CommitOperationAdd

    operations = [CommitOperationAdd(name, content) for name, content in files.items()]
    commit = api.create_commit(
        repo_id, operations=operations, commit_message="Adapter trained with Remora"
    )
    return str(commit.oid)


@contextlib.contextmanager
def _hub_errors(repo_id: str) -> Iterator[None]:
    """Turn an error of the hub or the network into one line."""
    from huggingface_hub.errors import HfHubHTTPError

    try:
        yield
    except RemoraError:
        raise
    except Exception as error:  # of requests, of the hub or of its Rust client
        if isinstance(error, HfHubHTTPError) and error.response.status_code < 500:
            raise ConfigError(
                f"the hub refuses to publish {repo_id} ({one_line(error)}); "
                "check the name, and that the token may write there"
            ) from error
        raise ConfigError(
            f"{repo_id} could not be published ({one_line(error)}); check the network and "
            "HF_ENDPOINT, then try again"
        ) from error
