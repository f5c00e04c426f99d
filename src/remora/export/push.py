"""A run's adapter on the Hugging Face hub: what another person needs of it, in one commit.

The repository holds PEFT's two files, remora.json and the model card, all at its top. So PEFT and
Remora load it by its id. Nothing else leaves the run directory: settings, predictions and report
name files of this machine, or hold messages.
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
from remora.models import adapter_card, hub, model_card, untrusted
from remora.runtime.reporter import Reporter

if TYPE_CHECKING:
    from huggingface_hub import HfApi


CARD = "README.md"
MADE_BY_THE_HUB = {".gitattributes", CARD}
"""What a repository may hold that somebody made on the hub's pages, and nobody pushed to."""


@dataclass(frozen=True, kw_only=True)
class Pushed:
    """What was published, and where."""

    repo_id: str
    url: str
    commit: str
    public: bool
    base_model: str
    files: dict[str, int]  # bytes of each

    def to_dict(self) -> dict[str, Any]:
        """Return it as JSON holds it."""
        return asdict(self)


def push_run(config: PushConfig, *, reporter: Reporter | None = None) -> Pushed:
    """Publish a run's adapter with its model card; after an error none of its files are there.

    Raises:
        ConfigError: If there is no token, the hub refuses or cannot be reached, or the repository
            is not for this adapter.
        DataError: If this is no finished run.
        ModelError: If the adapter is broken, or the run has none.
    """
    reporter = reporter or Reporter()
    results.read(config.run)  # which refuses a run that is not finished
    folder = adapter_card.adapter_folder(config.run)
    base = adapter_card.read_card(folder).base_model
    untrusted.read_shapes([folder / "adapter_model.safetensors"])
    files = _files(config.run, folder, base)
    with _hub_errors(config.repo_id):
        api = _client()
        _make_repository(api, config)
        if told := _limits(base):
            reporter.say(told)
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
    """Return what is published, by its names; a folder of this machine is called by its name."""
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


def _limits(base: str) -> str | None:
    """Say who cannot use an adapter of this base model."""
    if Path(base).is_absolute():
        name = Path(base).name
        return (
            f"the base model is a folder of this machine, which is published by its name {name} "
            "only; others need a copy of it, and give it with --model"
        )
    if (hub.EMBEDDED / base).is_dir():
        return f"the base model {base} comes with Remora; PEFT alone does not find it"
    return None


def _client() -> HfApi:
    """Return the hub's client.

    Raises:
        ConfigError: If it may not ask the hub, or has no token for it.
    """
    from huggingface_hub import HfApi, get_token, is_offline_mode

    if is_offline_mode():
        raise ConfigError("HF_HUB_OFFLINE is set, so the hub is not asked; unset it to push")
    if get_token() is None:
        raise ConfigError(
            "there is no token for the hub; set HF_TOKEN, or log in with `hf auth login`"
        )
    return HfApi(library_name="remora", library_version=remora.__version__)


def _make_repository(api: HfApi, config: PushConfig) -> None:
    """Make the repository, unless there is one that the adapter may go into.

    Raises:
        ConfigError: If there is one of another kind, or one that is public or private as not asked.
    """
    from huggingface_hub.errors import RepositoryNotFoundError

    try:
        found = api.model_info(config.repo_id)
    except RepositoryNotFoundError:
        api.create_repo(config.repo_id, private=not config.public)
        return
    names = {file.rfilename for file in found.siblings or ()} - MADE_BY_THE_HUB
    if names and not names.issuperset(untrusted.ADAPTER_FILES):
        raise ConfigError(
            f"{config.repo_id} holds something else than an adapter of Remora "
            f"({min(names)}); give another name"
        )
    if not found.private and not config.public:
        raise ConfigError(f"{config.repo_id} is public already; give --public, or another name")
    if found.private and config.public:
        raise ConfigError(
            f"{config.repo_id} is private; make it public on its page first, or leave out --public"
        )


def _commit(api: HfApi, repo_id: str, files: dict[str, bytes]) -> str:
    """Upload files in one commit, and return its name; `upload_folder` may make several."""
    from huggingface_hub import CommitOperationAdd

    operations = [CommitOperationAdd(name, content) for name, content in files.items()]
    done = api.create_commit(
        repo_id, operations=operations, commit_message="Adapter trained with Remora"
    )
    return str(done.oid)


@contextlib.contextmanager
def _hub_errors(repo_id: str) -> Iterator[None]:
    """Turn what comes of the hub or of the network into one line."""
    from huggingface_hub.errors import HfHubHTTPError

    try:
        yield
    except RemoraError:
        raise
    except Exception as error:  # of the connection or the hub: all end here
        if isinstance(error, HfHubHTTPError) and error.response.status_code < 500:
            raise ConfigError(
                f"the hub refuses to publish {repo_id} ({one_line(error)}); "
                "check the name, and that the token may write there"
            ) from error
        raise ConfigError(
            f"{repo_id} could not be published ({one_line(error)}); check the network and "
            "HF_ENDPOINT, then run the command again"
        ) from error
