"""A folder for vLLM, which cannot run here: its model, its prompts and the client's requests.

Also covers remora.export.vllm_client.
"""

from __future__ import annotations

import http.server
import json
import os
import stat
import subprocess
import sys
import threading
from pathlib import Path

from transformers import AutoTokenizer

import exporting
from exporting import remora
from remora.evaluation import results
from remora.models import saved

original, place = exporting.original, exporting.place


def test_the_folder_has_the_trained_prompt_inside(place: Path, capsys) -> None:
    assert remora("run", "--vllm", "--json") == 0
    assert json.loads(capsys.readouterr().out)["num_flips"] == 0
    folder = Path("run/vllm")
    prompt = saved.open_trained(Path("run"), device="cpu").prompt
    texts = results.read(Path("run")).texts
    tokenizer = AutoTokenizer.from_pretrained(folder)
    for text, wanted in zip(texts, prompt.stems(texts), strict=True):
        asked = [{"role": "user", "content": text}]
        ids = tokenizer.apply_chat_template(asked, add_generation_prompt=True, return_dict=False)
        assert ids == wanted
    script = folder / "serve.sh"
    if os.name == "posix":
        assert script.stat().st_mode & stat.S_IXUSR
    assert f"--max-model-len {prompt.max_length} --generation-config vllm" in script.read_text()

    # The client, against a server that takes what vLLM takes
    asked_of: list[dict[str, object]] = []

    class Server(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            asked_of.append(json.loads(self.rfile.read(int(self.headers["content-length"]))))
            answer = {"choices": [{"message": {"content": prompt.labels[1]}}]}
            self.send_response(200)
            self.end_headers()
            self.wfile.write(json.dumps(answer).encode())

        def log_message(self, *arguments: object) -> None:
            pass

    with http.server.HTTPServer(("127.0.0.1", 0), Server) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}"
        command = [sys.executable, "-I", folder / "client.py", url, "Where is it?"]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        server.shutdown()
    assert done.stdout == f"{prompt.labels[1]}\n"
    (body,) = asked_of
    assert body["messages"] == [{"role": "user", "content": "Where is it?"}]
    assert body["structured_outputs"] == {"choice": list(prompt.labels)}
    assert (body["model"], body["temperature"]) == ("classifier", 0)


def test_another_prompt_is_not_written(place: Path, capsys, monkeypatch) -> None:
    from remora.export import gguf

    monkeypatch.setattr(gguf, "chat_template", lambda prompt: "{{ messages[-1]['content'] }}")
    assert remora("run", "--vllm") == 4
    assert "renders another prompt than the adapter was trained with" in capsys.readouterr().err
    assert not Path("run/vllm").exists()
