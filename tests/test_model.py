"""Base models are found, loaded or refused in one line."""

from __future__ import annotations

import hashlib
import http.server
import json
import os
import shutil
import socket
import subprocess
import sys
import threading
from types import SimpleNamespace

import pytest
import torch

from conftest import tiny_config, tiny_model
from remora import attention, model
from remora.errors import ModelError


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
    assert model.find(str(saved)) == saved.resolve()
    loaded = model.load(saved, dtype)
    expected = tiny_model("qwen2", torch.float32, vocabulary=len(tokenizer)).state_dict()
    found = loaded.state_dict()
    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        assert torch.equal(tensor, expected[name].to(dtype)), name
    ids = torch.tensor([[5, 6, 7]])
    assert loaded(ids).logits.isfinite().all()
    assert {p.dtype for p in loaded.parameters()} == {dtype}
    text = "Where is my card?"
    assert model.load_tokenizer(saved)(text).input_ids == tokenizer(text).input_ids


@pytest.mark.parametrize(("architecture", "kind"), [("qwen2", attention.NAME), ("gemma2", "eager")])
def test_attention_follows_the_token_tree_where_it_can(tmp_path, architecture, kind):
    tiny_model(architecture, torch.float32).save_pretrained(tmp_path)
    loaded = model.load(tmp_path, torch.float32)
    assert loaded.config._attn_implementation == kind
    assert loaded(torch.tensor([[5, 6, 7]])).logits.isfinite().all()


def test_what_is_no_model_folder_is_refused(tmp_path):
    refused(lambda: model.find(str(tmp_path / "none")), "there is no folder")
    refused(lambda: model.find("./owner/name"), "there is no folder")
    refused(lambda: model.find("nothing"), "there is no folder nothing")
    refused(lambda: model.find(str(tmp_path)), "no config.json")
    file = tmp_path / "weights.gguf"
    file.touch()
    refused(lambda: model.find(str(file)), "is a file")


def test_pickled_weights_are_never_opened(copy):
    (copy / "model.safetensors").rename(copy / "pytorch_model.bin")
    trap = copy / "opened"

    # Unpickling this file would make the trap.
    class Trap:
        def __reduce__(self):
            return os.mkdir, (str(trap),)

    torch.save({"x": Trap()}, copy / "pytorch_model.bin")
    refused(lambda: model.load(copy, torch.float32), "no weights in safetensors format")
    assert not trap.exists()


def test_missing_tensors_are_refused(copy):
    from safetensors.torch import load_file, save_file

    weights = load_file(copy / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"], weights["model.norm.weight"]
    save_file(weights, copy / "model.safetensors", metadata={"format": "pt"})
    refused(
        lambda: model.load(copy, torch.float32),
        "lack model.layers.1.mlp.up_proj.weight and 1 more",
    )


def test_truncated_weights_are_refused(copy):
    path = copy / "model.safetensors"
    path.write_bytes(path.read_bytes()[:5000])
    refused(lambda: model.load(copy, torch.float32), "cannot be loaded")


@pytest.mark.parametrize(
    "text", ["{", "[]", "", json.dumps({"model_type": "no-such-architecture"}), "{}"]
)
def test_broken_and_unknown_configurations_are_refused(copy, text):
    (copy / "config.json").write_text(text)
    refused(lambda: model.load(copy, torch.float32), "cannot be read")


def test_a_model_that_is_no_language_model_is_refused(copy):
    (copy / "config.json").write_text(json.dumps({"model_type": "vit"}))
    refused(lambda: model.load(copy, torch.float32), "causal language model")


def test_a_folder_without_a_tokenizer_is_refused(copy):
    for path in copy.glob("tokenizer*"):
        path.unlink()
    refused(lambda: model.load_tokenizer(copy), "tokenizer")


def test_the_hash_is_that_of_the_weight_files_in_order(tmp_path):
    parts = {
        "model-00002.safetensors": b"b" * 3_000_000,
        "model-00001.safetensors": b"a",
        "x.bin": b"c",
    }
    for name, content in parts.items():
        (tmp_path / name).write_bytes(content)
    expected = hashlib.sha256(b"a" + b"b" * 3_000_000).hexdigest()
    assert model.weights_sha256(tmp_path) == expected


def test_the_context_is_the_shorter_of_models_and_tokenizers():
    config = tiny_config("qwen2", context=256)
    assert model.context_length(config, SimpleNamespace(model_max_length=int(1e30))) == 256
    assert model.context_length(config, SimpleNamespace(model_max_length=64)) == 64


class Hub(http.server.BaseHTTPRequestHandler):
    """As much of the hub as a download needs."""

    folder = None
    requested: list[str]

    def do_GET(self):
        self.answer(body=True)

    def do_HEAD(self):
        self.answer(body=False)

    def answer(self, body):
        path = self.path.split("?")[0]
        self.requested.append(path)
        sha = "0" * 40
        headers = {"X-Repo-Commit": sha}
        if path.startswith("/api/models/own/base"):
            files = sorted(p.name for p in self.folder.iterdir())
            content = json.dumps(
                [{"type": "file", "path": n, "size": 1, "oid": n} for n in files]
                if "/tree/" in path
                else {"id": "own/base", "sha": sha, "siblings": [{"rfilename": n} for n in files]}
            ).encode()
            headers["Content-Type"] = "application/json"
            status = 200
        elif path.startswith("/own/base/resolve/"):
            content = (self.folder / path.rsplit("/", 1)[-1]).read_bytes()
            headers["ETag"] = f'"{hashlib.sha256(content).hexdigest()}"'
            status = 200
        else:
            content, status = b"{}", 404
            headers["X-Error-Code"] = "RepoNotFound"
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if body:
            self.wfile.write(content)

    def log_message(self, *_):
        pass


@pytest.fixture
def hub(copy):
    (copy / "pytorch_model.bin").write_bytes(b"pickled")
    (copy / "modeling.py").write_text("")
    (copy / "consolidated.safetensors").write_bytes(b"the weights again")
    handler = type("Handler", (Hub,), {"folder": copy, "requested": []})
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield SimpleNamespace(port=server.server_port, requested=handler.requested)
    server.shutdown()
    thread.join()
    server.server_close()


def find_in_a_process(name, port, home):
    code = (
        "import sys\nfrom remora import errors, model\n"
        "try: print(model.find(sys.argv[1]))\n"
        "except errors.ModelError as error: print('refused', error)"
    )
    kept = {
        k: v for k, v in os.environ.items() if not k.startswith("HF_") and "proxy" not in k.lower()
    }
    settings = {"HF_ENDPOINT": f"http://127.0.0.1:{port}", "HF_HOME": str(home)}
    done = subprocess.run(
        [sys.executable, "-c", code, name],
        env=kept | settings | {"HF_HUB_DISABLE_TELEMETRY": "1", "NO_PROXY": "*"},
        cwd=home,
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    return done.stdout.strip()


def test_a_hub_id_is_fetched_without_pickles_and_code(hub, saved, copy, tmp_path):
    from pathlib import Path

    folder = Path(find_in_a_process("own/base", hub.port, tmp_path))
    expected = {p.name for p in copy.iterdir()} - {
        "pytorch_model.bin",
        "modeling.py",
        "consolidated.safetensors",
    }
    assert {p.name for p in folder.iterdir()} == expected
    assert model.weights_sha256(folder) == model.weights_sha256(saved)
    refused_files = (".bin", ".py", "consolidated.safetensors")
    assert not [path for path in hub.requested if path.endswith(refused_files)]


def test_an_unknown_hub_id_is_refused(hub, tmp_path):
    told = find_in_a_process("own/none", hub.port, tmp_path)
    assert told.startswith("refused there is neither a folder nor a hub model own/none; ")
    assert "\n" not in told


def test_a_hub_that_does_not_answer_is_refused(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    told = find_in_a_process("own/base", port, tmp_path)
    assert told.startswith("refused own/base is no folder here and could not be fetched")
    assert "\n" not in told
