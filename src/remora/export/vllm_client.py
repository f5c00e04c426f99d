"""Asks vLLM's server for the label of messages; needs Python alone.

    ./serve.sh
    python client.py http://127.0.0.1:8000 "where is my card"

vLLM takes the most probable token after the other, among those that lead to a label.
"""

from __future__ import annotations

import json
import sys
import urllib.request
from pathlib import Path


def request(labels: list[str], message: str) -> dict[str, object]:
    """Return the body of a request to /v1/chat/completions."""
    return {
        "model": "classifier",
        "messages": [{"role": "user", "content": message}],
        "temperature": 0,
        # A character may take several tokens, but hardly more than bytes
        "max_tokens": 1 + max(len(label.encode()) for label in labels),
        "structured_outputs": {"choice": labels},
    }


if __name__ == "__main__":
    texts = json.loads(Path(__file__).with_name("labels.json").read_text(encoding="utf-8"))
    url = sys.argv[1].rstrip("/") + "/v1/chat/completions"
    for message in sys.argv[2:]:
        body = json.dumps(request([*texts], message)).encode()
        asked = urllib.request.Request(url, body, {"Content-Type": "application/json"})
        with urllib.request.urlopen(asked) as answer:
            text = json.load(answer)["choices"][0]["message"]["content"]
        sys.stdout.write(f"{texts[text]}\n")
