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
from remora.data.prompt import Prompt
from remora.evaluation import results
from remora.export import vllm_client
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


def test_a_label_is_not_cut_where_a_character_takes_several_tokens() -> None:
    label = "überweisung, 日本語 🎉"  # 18 characters, 23 tokens of nano
    found = vllm_client.request([label, "a"], "Where is it?")["max_tokens"]
    assert found == 1 + len(label.encode()) > 23


def test_another_prompt_is_not_written(place: Path, capsys, monkeypatch) -> None:
    monkeypatch.setattr(Prompt, "chat_template", "{{ messages[-1]['content'] }}")
    assert remora("run", "--vllm") == 4
    assert "renders another prompt than the adapter was trained with" in capsys.readouterr().err
    assert not Path("run/vllm").exists()
