"""A run on the hub and back: a stand-in on this machine answers huggingface_hub's own client."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard, constants, snapshot_download

import hub_server as stand_in
import xet
from conftest import WAYS, WORDS, call
from remora.config import PredictConfig, PushConfig
from remora.errors import ConfigError, DataError, ModelError
from remora.export import push
from remora.models import metadata, saved
from remora.runtime.reporter import Reporter
from remora.serving import predict

# Of huggingface_hub's own upload; warnings are errors here.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")

FILES = {"README.md", "adapter_config.json", "adapter_model.safetensors", "remora.json"}
MESSAGES = "Where is my card?\nstill no refund\ntop up again\n"


@pytest.fixture(scope="module")
def hub(base: Path) -> Iterator[stand_in.Hub]:
    with stand_in.running() as hub:
        hub.publish("models/own/base", base)
        yield hub


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("home")


@pytest.fixture(scope="module")
def trained(hub: stand_in.Hub, home: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on a base model that was named by its id on the hub."""
    folder = tmp_path_factory.mktemp("work")
    rows = [f'"{way.format(word)}",{label}\n' for label, word in WORDS.items() for way in WAYS * 2]
    (folder / "data.csv").write_text("text,label\n" + "".join(rows))
    command = ["train", str(folder / "data.csv"), "--model", "own/base", "--device", "cpu"]
    command += [
        "--output",
        str(folder),
        "--name",
        "bank",
        "--max-steps",
        "2",
        "--precision",
        "float32",
    ]
    with pytest.MonkeyPatch.context() as patch:
        hub.connect(patch, home)
        assert call(*command) == 0
    return folder / "bank"


@pytest.fixture(autouse=True)
def connected(hub: stand_in.Hub, home: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Log in to the hub, on which there is the base model only."""
    hub.connect(monkeypatch, home, stand_in.TOKEN)
    hub.requests.clear()
    yield
    hub.cut_requests.clear()
    for name in hub.repositories.keys() - {"models/own/base"}:
        del hub.repositories[name]


def answers(adapter: Path, folder: Path) -> list[tuple[str, list[tuple[str, float]]]]:
    (folder / "messages.txt").write_text(MESSAGES)
    config = PredictConfig(adapter, str(folder / "messages.txt"), top_k=3, device="cpu")
    return list(predict.predict_stream(config))


def refused(kind: type[Exception], settings: PushConfig, *words: str) -> None:
    with pytest.raises(kind) as caught:
        push.push_run(settings)
    assert "\n" not in str(caught.value)
    assert "; " in str(caught.value)
    for word in words:
        assert word in str(caught.value)


def test_what_is_pushed_comes_back_byte_for_byte(
    hub: stand_in.Hub, trained: Path, tmp_path: Path
) -> None:
    done = push.push_run(PushConfig(trained, "me/bank"))
    repository = hub.repositories["models/me/bank"]
    assert repository.private
    assert not done.public
    assert repository.commits == [sorted(FILES)]  # one commit
    assert (done.url, done.commit) == (f"{hub.url}/me/bank", repository.sha)
    assert done.base_model == "own/base"
    folder = Path(snapshot_download("me/bank"))
    assert {path.name for path in folder.iterdir()} == FILES | {".gitattributes"}
    for name in FILES:
        source = trained if name == "README.md" else trained / "adapter"
        assert (folder / name).read_bytes() == (source / name).read_bytes()
        assert done.files[name] == (source / name).stat().st_size
    assert ModelCard.load(folder / "README.md").data.base_model == "own/base"
    assert answers(Path("me/bank"), tmp_path) == answers(trained, tmp_path)


def test_stock_peft_loads_it_by_its_id(
    hub: stand_in.Hub, trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call("push", str(trained), "me/bank", "--json") == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["commit"] == hub.repositories["models/me/bank"].sha
    code = (
        "import json, peft, torch\n"
        "model = peft.AutoPeftModelForCausalLM.from_pretrained('me/bank')\n"
        "print(json.dumps(model(torch.tensor([[5, 6, 7]])).logits[0, -1].tolist()))"
    )
    kept = {k: v for k, v in os.environ.items() if not k.startswith("HF_")}
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=kept | hub.environment(tmp_path / "home") | {"HF_TOKEN": stand_in.TOKEN},
        capture_output=True,
        text=True,
        check=False,
        timeout=100,
    )
    assert done.returncode == 0, done.stderr
    adapted, _, _ = saved.load_adapter(
        trained, base=None, dtype=torch.float32, device=torch.device("cpu")
    )
    expected = adapted(torch.tensor([[5, 6, 7]])).logits[0, -1]
    found = torch.tensor(json.loads(done.stdout))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_the_command_line_says_where_it_is(
    hub: stand_in.Hub, trained: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call("push", str(trained), "me/bank", "--public") == 0
    assert not hub.repositories["models/me/bank"].private
    shown = capsys.readouterr().out
    assert f"published  {hub.url}/me/bank, public: 4 files, " in shown
    assert "remora predict me/bank < messages.txt" in shown


def test_a_second_push_replaces_the_first(hub: stand_in.Hub, trained: Path, tmp_path: Path) -> None:
    first = push.push_run(PushConfig(trained, "me/bank"))
    copy = shutil.copytree(trained, tmp_path / "bank")
    (copy / "README.md").write_text((copy / "README.md").read_text() + "\nMore to know.\n")
    second = push.push_run(PushConfig(copy, "me/bank"))
    assert first.commit != second.commit
    assert hub.repositories["models/me/bank"].commits == [sorted(FILES), ["README.md"]]
    assert hub.repositories["models/me/bank"].files["README.md"].endswith(b"\nMore to know.\n")


def test_no_folder_of_this_machine_is_published(
    hub: stand_in.Hub, trained: Path, base: Path, tmp_path: Path
) -> None:
    copy = shutil.copytree(trained, tmp_path / "bank")
    elsewhere = shutil.copytree(base, tmp_path / "secret" / "base")
    for name, key in (
        ("adapter_config.json", "base_model_name_or_path"),
        ("remora.json", "base_model"),
    ):
        path = copy / "adapter" / name
        path.write_text(json.dumps(json.loads(path.read_text()) | {key: str(elsewhere)}))
    (copy / "README.md").unlink()
    said: list[str] = []
    reporter = Reporter()
    reporter.say = said.append  # type: ignore[method-assign]
    assert push.push_run(PushConfig(copy, "me/bank"), reporter=reporter).base_model == "base"
    files = hub.repositories["models/me/bank"].files
    assert not [name for name, content in files.items() if b"secret" in content]
    assert said == [
        "the base model is a local folder, of which only the name base is published; others need a "
        "copy of it, given with --model"
    ]
    with pytest.raises(ModelError, match="there is no folder base"):
        answers(Path("me/bank"), tmp_path)
    shutil.rmtree(copy)
    (tmp_path / "messages.txt").write_text(MESSAGES)
    config = PredictConfig(
        Path("me/bank"), str(tmp_path / "messages.txt"), model=str(elsewhere), device="cpu"
    )
    assert len(list(predict.predict_stream(config))) == 3


# What is refused


def test_a_run_that_is_not_finished_is_refused(
    hub: stand_in.Hub, trained: Path, tmp_path: Path
) -> None:
    refused(DataError, PushConfig(tmp_path / "none", "me/bank"), "there is no folder")
    copy = shutil.copytree(trained, tmp_path / "bank")
    (copy / "evaluation.json").unlink()
    refused(DataError, PushConfig(copy, "me/bank"), "has no evaluation.json")
    assert hub.requests == []


def test_a_broken_adapter_is_refused(hub: stand_in.Hub, trained: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(trained, tmp_path / "bank")
    path = copy / "adapter" / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    refused(ModelError, PushConfig(copy, "me/bank"), "cannot be loaded")
    shutil.rmtree(copy / "adapter")
    refused(ModelError, PushConfig(copy, "me/bank"), "is not an adapter of Remora")
    assert hub.requests == []


def test_a_name_that_is_none_of_the_hub_is_refused(trained: Path) -> None:
    for name in ("bank", "me/bank/adapter", "me/my bank", "../bank", ""):
        with pytest.raises(ConfigError, match="; give it as owner/name"):
            PushConfig(trained, name)


def test_without_a_token_the_hub_is_not_asked(
    hub: stand_in.Hub, trained: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("HF_TOKEN")
    refused(ConfigError, PushConfig(trained, "me/bank"), "there is no token for the")
    assert hub.requests == []


def test_a_token_of_a_login_is_taken(hub: stand_in.Hub, trained: Path, home: Path) -> None:
    os.environ.pop("HF_TOKEN")
    (home / "token").write_text(stand_in.TOKEN)
    try:
        push.push_run(PushConfig(trained, "me/bank"))
    finally:
        (home / "token").unlink()


def test_offline_the_hub_is_not_asked(
    hub: stand_in.Hub, trained: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    refused(ConfigError, PushConfig(trained, "me/bank"), "HF_HUB_OFFLINE is set")
    assert hub.requests == []


def test_a_wrong_token_is_refused(trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_of_somebody_else")
    refused(ConfigError, PushConfig(trained, "me/bank"), "Invalid credentials")


def test_a_name_of_others_is_refused(hub: stand_in.Hub, trained: Path) -> None:
    refused(ConfigError, PushConfig(trained, "you/bank"), "the hub refuses to publish you/bank")
    hub.publish("models/you/bank", {}, writable=False, private=True)
    refused(ConfigError, PushConfig(trained, "you/bank"), "you are not allowed to write here")
    assert hub.repositories["models/you/bank"].files == {}


def test_a_repository_of_something_else_is_left_alone(
    hub: stand_in.Hub, trained: Path, base: Path
) -> None:
    hub.publish("models/me/model", base, private=True)
    before = dict(hub.repositories["models/me/model"].files)
    refused(ConfigError, PushConfig(trained, "me/model"), "something other than a Remora adapter")
    assert hub.repositories["models/me/model"].files == before


@pytest.mark.parametrize("private", [True, False])
def test_nothing_is_public_or_private_by_chance(
    hub: stand_in.Hub, trained: Path, private: bool
) -> None:
    made = hub.publish("models/me/bank", {"README.md": b"to come"}, private=private)
    settings = PushConfig(trained, "me/bank", public=private)
    refused(ConfigError, settings, "is private;" if private else "is public already;")
    assert made.commits == []
    assert push.push_run(PushConfig(trained, "me/bank", public=not private)).public is not private


@pytest.mark.parametrize(
    "request_line",
    ["GET /api/models/me/bank", "POST /api/repos/create", "POST /api/models/me/bank/commit/main"],
)
def test_a_connection_that_is_cut_publishes_nothing(
    hub: stand_in.Hub, trained: Path, request_line: str
) -> None:
    hub.cut_requests.add(request_line)
    refused(ConfigError, PushConfig(trained, "me/bank"), "me/bank could not be published")
    made = hub.repositories.get("models/me/bank")
    assert made is None or made.files.keys() == {".gitattributes"}
    hub.cut_requests.clear()
    push.push_run(PushConfig(trained, "me/bank"))  # the same again
    assert hub.repositories["models/me/bank"].commits == [sorted(FILES)]


def test_weights_go_and_come_by_the_protocol_of_large_files(
    hub: stand_in.Hub, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    """The hub's own way today; its client is in Rust and reads its variables once a process."""
    pytest.importorskip("hf_xet")
    monkeypatch.setattr(hub, "uses_xet", True)
    monkeypatch.setattr(hub, "storage", xet.Storage())

    def remora(home: str, *command: str) -> subprocess.CompletedProcess[str]:
        kept = {k: v for k, v in os.environ.items() if not k.startswith("HF_")}
        return subprocess.run(
            [sys.executable, "-m", "remora", *command],
            env=kept | hub.environment(tmp_path / home) | {"HF_TOKEN": stand_in.TOKEN},
            input=MESSAGES,
            capture_output=True,
            text=True,
            check=False,
            timeout=100,
        )

    done = remora("home", "push", str(trained), "me/large")
    assert done.returncode == 0, done.stderr
    pushed = hub.repositories["models/me/large"].files
    weights = (trained / "adapter" / "adapter_model.safetensors").read_bytes()
    assert pushed["adapter_model.safetensors"] == weights
    assert not [line for line in hub.requests if "/lfs/" in line]
    hub.requests.clear()
    fetched = remora("home", "predict", "me/large")
    assert fetched.returncode == 0, fetched.stderr
    (tmp_path / "messages.txt").write_text(MESSAGES)
    capsys.readouterr()
    assert call("predict", trained, tmp_path / "messages.txt") == 0
    assert fetched.stdout.splitlines() == capsys.readouterr().out.splitlines()
    assert len(fetched.stdout.splitlines()) == 4
    assert [line for line in hub.requests if line.startswith("GET /xorb/")]
    ((name, xorb),) = hub.storage.xorbs.items()
    hub.storage.xorbs[name] = xorb[:1_000] + bytes([xorb[1_000] ^ 1]) + xorb[1_001:]
    altered = remora("other", "predict", "me/large")
    assert altered.returncode == ModelError.exit_code, altered.stderr
    assert "differs from the hub's file, by its checksum" in altered.stderr.splitlines()[-1]


# Adapters by their id


def test_an_id_is_asked_of_the_hub_only_where_it_can_be_no_folder(
    hub: stand_in.Hub, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.publish("models/runs/bank", trained / "adapter")
    hub.publish("models/mine/bank", trained / "adapter")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine").mkdir()
    for name in ("runs/bank", "mine/bank", "./mine/bank", "../bank", "bank", "a/b/c"):
        assert metadata.adapter_folder(Path(name)) == Path(name)
    assert hub.requests == []
    (tmp_path / "mine").rmdir()
    assert metadata.read_card(metadata.adapter_folder(Path("mine/bank"))).base_model == "own/base"


def test_of_a_base_model_that_is_no_adapter_no_weights_are_fetched(
    hub: stand_in.Hub, base: Path
) -> None:
    hub.publish("models/own/other", base)
    with pytest.raises(
        ModelError, match="own/other on the hub was not trained by Remora, it has no"
    ):
        metadata.adapter_folder(Path("own/other"))
    assert not [line for line in hub.requests if line.endswith("safetensors")]


def test_an_adapter_that_is_altered_on_its_way_is_refused(
    hub: stand_in.Hub, trained: Path, tmp_path: Path
) -> None:
    push.push_run(PushConfig(trained, "me/altered"))
    weights = hub.repositories["models/me/altered"].files["adapter_model.safetensors"]
    hub.served["adapter_model.safetensors"] = weights[:-1] + bytes([weights[-1] ^ 1])
    try:
        with pytest.raises(ModelError, match="differs from the hub's file"):
            answers(Path("me/altered"), tmp_path)
    finally:
        hub.served.clear()


def test_an_adapter_is_used_without_the_hub_once_it_was_fetched(
    hub: stand_in.Hub, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    push.push_run(PushConfig(trained, "me/fetched"))
    expected = answers(Path("me/fetched"), tmp_path)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    hub.requests.clear()
    assert answers(Path("me/fetched"), tmp_path) == expected
    with pytest.raises(
        ModelError, match="me/none is neither a folder nor complete in the hub's cache"
    ):
        answers(Path("me/none"), tmp_path)
    assert hub.requests == []


def test_a_base_that_changed_on_the_hub_is_refused(
    hub: stand_in.Hub, trained: Path, base: Path, tmp_path: Path
) -> None:
    files = hub.repositories["models/own/base"].files
    weights = files["model.safetensors"]
    files["model.safetensors"] = weights[:-1] + bytes([weights[-1] ^ 1])
    try:
        with pytest.raises(ModelError, match="was trained on other weights"):
            answers(trained, tmp_path)
    finally:
        files["model.safetensors"] = weights


def test_the_service_takes_an_id(hub: stand_in.Hub, trained: Path) -> None:
    from remora.serving import snapshot

    push.push_run(PushConfig(trained, "me/served"))
    with snapshot.taken(metadata.adapter_folder(Path("me/served"))) as copied:
        assert copied.card == metadata.read_card(trained / "adapter")
