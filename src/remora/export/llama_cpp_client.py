"""Asks llama.cpp's server for the most probable label of a message; needs Python alone.

    llama-server -m MODEL.gguf --jinja --port 8080
    python client.py http://127.0.0.1:8080 "where is my card"

Taking the most probable token after the other can follow the beginning of a label that is not the
most probable one. This searches best-first: it asks for the probabilities of the next token, and
goes on from the most probable beginning until that is a whole label.
"""

from __future__ import annotations

import heapq
import json
import sys
import urllib.request
from pathlib import Path
from typing import Any

NUM_PROBABILITIES = 256
"""Most probable next tokens that are asked for; labels that begin otherwise are less probable."""

END_BIAS = 1000
"""Added to the end token's score, so that the server always writes that token: after one that ends
within a character it leaves the probabilities out. Those that it gives are from before the bias."""


class Client:
    """A classifier behind llama.cpp's server."""

    def __init__(self, url: str, answers: dict[str, list[int]]) -> None:
        """Take the server's address and the token ids of each label, its end token last."""
        self._url = url.rstrip("/")
        self._labels = {tuple(ids): label for label, ids in answers.items()}
        self._end = next(iter(self._labels))[-1]
        self._nexts: dict[tuple[int, ...], set[int]] = {}
        for ids in self._labels:
            for end in range(len(ids)):
                self._nexts.setdefault(ids[:end], set()).add(ids[end])

    def prompt_ids(self, message: str) -> list[int]:
        """Return the token ids of the prompt for a message, by the template in the GGUF file."""
        conversation = {"messages": [{"role": "user", "content": message}]}
        text = self._post("/apply-template", conversation, "prompt")
        asked = {"content": text, "add_special": True, "parse_special": True}
        return [int(token) for token in self._post("/tokenize", asked, "tokens")]

    def labels(self, prompt_ids: list[int], slot: int = -1) -> tuple[str, str]:
        """Return the most probable label, and that of the most probable token after the other."""
        beginning: tuple[int, ...] = ()
        known = {beginning: self._next_logs(prompt_ids, beginning, slot)}
        while beginning not in self._labels:
            token = max(known[beginning], key=known[beginning].__getitem__)
            beginning = (*beginning, token)
            if beginning not in self._labels:
                known[beginning] = self._next_logs(prompt_ids, beginning, slot)
        greedy = self._labels[beginning]
        waiting: list[tuple[float, tuple[int, ...]]] = [(0.0, ())]  # minus the log-probability
        while True:
            cost, beginning = heapq.heappop(waiting)
            if beginning in self._labels:
                return self._labels[beginning], greedy
            if beginning not in known:
                known[beginning] = self._next_logs(prompt_ids, beginning, slot)
            for token, log in known[beginning].items():
                heapq.heappush(waiting, (cost - log, (*beginning, token)))

    def _next_logs(
        self, prompt_ids: list[int], beginning: tuple[int, ...], slot: int
    ) -> dict[int, float]:
        """Return the log-probabilities of the tokens that continue a beginning to a label."""
        (step,) = self._post(
            "/completion",
            {
                "prompt": [*prompt_ids, *beginning],
                "n_predict": 1,
                "n_probs": NUM_PROBABILITIES,
                "temperature": 0,
                "logit_bias": [[self._end, END_BIAS]],
                "cache_prompt": True,
                "id_slot": slot,
            },
            "completion_probabilities",
        )
        logs = {each["id"]: each["logprob"] for each in step["top_logprobs"]}
        least = min(logs.values())
        return {token: logs.get(token, least) for token in self._nexts[beginning]}

    def _post(self, route: str, body: dict[str, Any], wanted: str) -> Any:
        """Return what is wanted of the server's answer; raises ValueError if it is not there."""
        request = urllib.request.Request(
            self._url + route, json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request) as response:
            answer = json.load(response)
        if not answer.get(wanted):
            raise ValueError(f"the server's answer to {route} has no {wanted}")
        return answer[wanted]


if __name__ == "__main__":
    answers = json.loads(Path(__file__).with_name("labels.json").read_text(encoding="utf-8"))
    client = Client(sys.argv[1], answers)
    for message in sys.argv[2:]:
        label, _ = client.labels(client.prompt_ids(message))
        sys.stdout.write(f"{label}\n")
