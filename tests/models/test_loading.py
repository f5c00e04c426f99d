"""Base models are found, loaded or refused in one line.

Also covers remora.models.hub.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import socket
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from huggingface_hub import constants

from conftest import tiny_config, tiny_model
from hub_server import running
from remora.errors import ModelError, ResourceError
from remora.models import loading
from remora.models.hub import find
from remora.runtime import files
from remora.tree import attention


@pytest.fixture(scope="module")
def saved(tmp_path_factory, tokenizer):
    folder = tmp_path_factory.mktemp("models") / "base"
    tiny_model("qwen2", torch.float32, vocabulary=len(tokenizer)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def copy(saved, tmp_path):
    return shutil.copytree(saved, tmp_path / "copy")


def refused(call, *words):
    with pytest.raises(ModelError) as caught:
        call()
    told = str(caught.value)
    assert "\n" not in told
    assert "; " in told
    for word in words:
        assert word in told
    return told


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_saved_model_comes_back(saved, tokenizer, dtype):
    assert find(str(saved)) == saved.resolve()
    loaded = loading.load(saved, dtype)
    expected = tiny_model("qwen2", torch.float32, vocabulary=len(tokenizer)).state_dict()
    found = loaded.state_dict()
    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        assert torch.equal(tensor, expected[name].to(dtype)), name
    ids = torch.tensor([[5, 6, 7]])
    assert loaded(ids).logits.isfinite().all()
    assert {p.dtype for p in loaded.parameters()} == {dtype}
    text = "Where is my card?"
    assert loading.load_tokenizer(saved)(text).input_ids == tokenizer(text).input_ids


@pytest.mark.parametrize(("architecture", "kind"), [("qwen2", attention.NAME), ("gemma2", "eager")])
def test_attention_follows_the_token_tree_where_it_can(tmp_path, architecture, kind):
    tiny_model(architecture, torch.float32).save_pretrained(tmp_path)
    loaded = loading.load(tmp_path, torch.float32)
    assert loaded.config._attn_implementation == kind
    assert loaded(torch.tensor([[5, 6, 7]])).logits.isfinite().all()


def test_what_is_no_model_folder_is_refused(tmp_path):
    refused(lambda: find(str(tmp_path / "none")), "there is no folder")
    refused(lambda: find("./owner/name"), "there is no folder")
    refused(lambda: find("nothing"), "there is no folder nothing")
    refused(lambda: find(str(tmp_path)), "no config.json")
    for name, told in (("weights.bin", "is a file"), ("weights.gguf", "is not a GGUF file")):
        (tmp_path / name).touch()
        refused(lambda name=name: find(str(tmp_path / name)), told)


def test_pickled_weights_are_never_opened(copy):
    (copy / "model.safetensors").rename(copy / "pytorch_model.bin")
    trap = copy / "opened"

    # Unpickling this file would make the trap.
    class Trap:
        def __reduce__(self):
            return os.mkdir, (str(trap),)

    torch.save({"x": Trap()}, copy / "pytorch_model.bin")
    refused(lambda: loading.load(copy, torch.float32), "no weights in safetensors format")
    assert not trap.exists()


def test_missing_tensors_are_refused(copy):
    from safetensors.torch import load_file, save_file

    weights = load_file(copy / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"], weights["model.norm.weight"]
    save_file(weights, copy / "model.safetensors", metadata={"format": "pt"})
    refused(
        lambda: loading.load(copy, torch.float32),
        "lack model.layers.1.mlp.up_proj.weight and 1 more",
    )


def test_truncated_weights_are_refused(copy):
    path = copy / "model.safetensors"
    path.write_bytes(path.read_bytes()[:5000])
    refused(lambda: loading.load(copy, torch.float32), "cannot be loaded")


@pytest.mark.parametrize(
    "text", ["{", "[]", "", json.dumps({"model_type": "no-such-architecture"}), "{}"]
)
def test_broken_and_unknown_configurations_are_refused(copy, text):
    (copy / "config.json").write_text(text)
    refused(lambda: loading.load(copy, torch.float32), "cannot be read")


def test_a_model_that_is_no_language_model_is_refused(copy):
    (copy / "config.json").write_text(json.dumps({"model_type": "vit"}))
    refused(lambda: loading.load(copy, torch.float32), "causal language model")


def test_a_folder_without_a_tokenizer_is_refused(copy):
    for path in copy.glob("tokenizer*"):
        path.unlink()
    refused(lambda: loading.load_tokenizer(copy), "tokenizer")


def test_the_hash_is_that_of_the_weight_files_in_order(tmp_path):
    parts = {
        "model-00002.safetensors": b"b" * 3_000_000,
        "model-00001.safetensors": b"a",
        "x.bin": b"c",
    }
    for name, content in parts.items():
        (tmp_path / name).write_bytes(content)
    expected = hashlib.sha256(b"a" + b"b" * 3_000_000).hexdigest()
    assert files.weights_sha256(tmp_path) == expected


def test_the_context_is_the_shorter_of_models_and_tokenizers():
    config = tiny_config("qwen2", context=256)
    assert loading.context_length(config, SimpleNamespace(model_max_length=int(1e30))) == 256
    assert loading.context_length(config, SimpleNamespace(model_max_length=64)) == 64


@pytest.fixture
def hub(copy, tmp_path, monkeypatch):
    """A hub with own/base, connected to this process."""
    with running() as hub:
        hub.publish("models/own/base", copy)
        hub.connect(monkeypatch, tmp_path / "home")
        yield hub


def cached(home):
    (folder,) = (home / "hub" / "models--own--base" / "snapshots").iterdir()
    return folder


def test_a_hub_id_is_fetched_without_pickles_and_code(hub, saved, copy):
    refused_files = ("pytorch_model.bin", "modeling.py", "consolidated.safetensors")
    hub.publish("models/own/base", copy).files.update(dict.fromkeys(refused_files, b"x"))
    folder = find("own/base")
    assert {p.name for p in folder.iterdir()} == {p.name for p in copy.iterdir()}
    assert files.weights_sha256(folder) == files.weights_sha256(saved)
    assert loading.load(folder, torch.float32).config.model_type == "qwen2"
    assert not [line for line in hub.requests if line.endswith(refused_files)]


def test_a_process_finds_the_hub_by_its_variables(hub, tmp_path):
    kept = {k: v for k, v in os.environ.items() if not k.startswith("HF_")}
    done = subprocess.run(
        [sys.executable, "-c", "from remora.models import hub; print(hub.find('own/base'))"],
        env=kept | hub.environment(tmp_path / "other"),
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert done.stdout.strip() == str(cached(tmp_path / "other"))


def test_an_unknown_hub_id_is_refused(hub):
    refused(lambda: find("own/none"), "there is neither a folder nor a hub model own/none; ")


def test_a_hub_model_of_gguf_files_only_is_to_be_downloaded(hub):
    names = ("m.Q4_K_M.gguf", "m.Q8_0.gguf")
    hub.publish("models/own/small", {"README.md": b"x", **dict.fromkeys(names, b"GGUF")})
    told = "own/small on the hub holds GGUF files only, 'm.Q4_K_M.gguf', 'm.Q8_0.gguf'; download"
    refused(lambda: find("own/small"), told)
    assert not [line for line in hub.requests if line.endswith(".gguf")]


def test_a_gated_model_is_refused_until_its_terms_are_accepted(hub):
    hub.repositories["models/own/base"].gated = True
    refused(lambda: find("own/base"), "own/base is gated on the hub; accept its terms")
    hub.repositories["models/own/base"].gated = False
    loading.load_config(find("own/base"))


def test_a_hub_that_does_not_answer_is_refused(hub, tmp_path, monkeypatch):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        hub.url = f"http://127.0.0.1:{free.getsockname()[1]}"
    hub.connect(monkeypatch, tmp_path / "home")
    refused(lambda: find("own/base"), "own/base is not a folder and could not be fetched")


def test_a_connection_that_is_cut_goes_on_where_it_ended(hub, saved, monkeypatch):
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 1_000)  # what it writes down at once
    hub.cut_after["model.safetensors"] = 30_000
    assert files.weights_sha256(find("own/base")) == files.weights_sha256(saved)
    path = f"/own/base/resolve/{hub.repositories['models/own/base'].sha}/model.safetensors"
    asked = [line for line in hub.requests if line.startswith(f"GET {path}")]
    assert asked == [f"GET {path}", f"GET {path} from 30000"]


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json"])
@pytest.mark.parametrize("what", ["altered", "cut short"])
def test_a_file_that_the_hub_does_not_have_is_refused(hub, name, what):
    whole = hub.repositories["models/own/base"].files[name]
    middle = len(whole) // 2
    altered = whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1 :]
    hub.served[name] = altered if what == "altered" else whole[:middle]
    for _ in range(2):  # it stays refused
        told = refused(lambda: find("own/base"), f"{name} differs from the hub's file")
    del hub.served[name]
    os.remove(told.split("; remove ")[1].removesuffix(" and run the command again"))
    loading.load(find("own/base"), torch.float32)


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS, errno.EACCES])
def test_a_cache_that_cannot_be_written_is_no_matter_of_the_connection(number, monkeypatch):
    def fail(*_: object, **__: object) -> None:
        raise OSError(number, os.strerror(number), "/cache/hub")

    monkeypatch.setattr("huggingface_hub.snapshot_download", fail)
    expected = rf"^own/base cannot be kept in the hub's cache \({os.strerror(number)}: /cache/hub\)"
    with pytest.raises(ResourceError, match=expected):
        find("own/base")


def test_what_was_fetched_is_there_without_the_hub(hub, tmp_path, monkeypatch):
    folder = find("own/base", weights=False)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    refused(lambda: find("own/none"), "own/none is neither a folder", "HF_HUB_OFFLINE is set")
    assert find("own/base", weights=False) == folder
    refused(lambda: find("own/base"), "nor complete in the hub's cache", "HF_HUB_OFFLINE is set")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    assert find("own/base") == folder
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    before = list(hub.requests)
    assert find("own/base") == folder
    assert hub.requests == before


def test_blobs_that_repositories_share_are_let_in(hub, tmp_path):
    link = find("own/base") / "model.safetensors"
    blob = link.parent / os.readlink(link)
    shared = tmp_path / "home" / "hub" / "blobs" / "ab" / ("ab" * 32)
    shared.parent.mkdir(parents=True)
    blob.rename(shared)
    blob.symlink_to(os.path.relpath(shared, blob.parent))
    loading.load(find("own/base"), torch.float32)
