"""What vLLM's and OpenAI's clients send is answered as `predict` answers."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest

from conftest import WORDS
from remora.serving.server import Service
from service import call, predicted, running, write_adapters

TEXTS = ["Where is my card?", "the refund again", "Still no top up!"]
ALL = len(WORDS)


@pytest.fixture(scope="module")
def folders(base: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return write_adapters(tmp_path_factory.mktemp("adapters"), base)


@pytest.fixture(scope="module")
def service(folders: dict[str, Path]) -> Iterator[Service]:
    with running(folders["bank"], f"post={folders['mail']}", max_text_length=500) as made:
        yield made


def client(service: Service, token: str = "none") -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{service.url}/v1", api_key=token, max_retries=0)


def test_the_openai_client_gets_the_label_and_its_probability(
    service: Service, folders: dict[str, Path]
) -> None:
    wanted = predicted(folders["bank"], TEXTS, top_k=ALL)
    with client(service) as asking:
        assert [model.id for model in asking.models.list()] == ["bank", "post"]
        for text, best in zip(TEXTS, wanted, strict=True):
            parts: list[Any] = [
                {"type": "text", "text": text[:4]},
                {"type": "text", "text": text[4:]},
            ]
            for content in (text, parts):
                answer = asking.chat.completions.create(
                    model="bank",
                    messages=[{"role": "user", "content": content}],
                    temperature=0,
                    max_tokens=20,
                    logprobs=True,
                    top_logprobs=ALL,
                )
                (choice,) = answer.choices
                assert choice.message.content == best[0][0]
                assert choice.finish_reason == "stop"
                assert choice.logprobs is not None
                (told,) = choice.logprobs.content or []
                assert told.token == best[0][0]
                assert bytes(told.bytes or []) == best[0][0].encode()
                found = [(each.token, math.exp(each.logprob)) for each in told.top_logprobs]
                assert [label for label, _ in found] == [label for label, _ in best]
                assert [p for _, p in found] == pytest.approx([p for _, p in best], abs=1e-5)
        plain = asking.chat.completions.create(
            model="post", messages=[{"role": "user", "content": TEXTS[0]}]
        )
    assert plain.choices[0].message.content == predicted(folders["mail"], TEXTS[:1], 1)[0][0][0]
    assert plain.choices[0].logprobs is None
    assert plain.usage is None  # nothing is counted, and no number is made up


def test_vllms_body_gets_its_answer(service: Service, folders: dict[str, Path]) -> None:
    listed = call(service.url, "/v1/labels?adapter=bank").json["labels"]
    answer = call(service.url, "/classify", {"model": "bank", "input": TEXTS}).json
    assert (answer["object"], answer["model"]) == ("list", "bank")
    for index, best in enumerate(predicted(folders["bank"], TEXTS, top_k=ALL)):
        row = answer["data"][index]
        assert (row["index"], row["label"], row["num_classes"]) == (index, best[0][0], ALL)
        expected = [dict(best)[label] for label in listed]
        assert row["probs"] == pytest.approx(expected, abs=1e-5)
    one = call(service.url, "/classify", {"model": "bank", "input": TEXTS[0], "priority": 1}).json
    (alone,), first = one["data"], answer["data"][0]
    assert {**alone, "probs": None} == {**first, "probs": None}
    assert alone["probs"] == pytest.approx(first["probs"], abs=2e-6)  # rounded to six digits


def chat(**changed: Any) -> dict[str, Any]:
    return {"model": "bank", "messages": [{"role": "user", "content": "x"}], **changed}


SYSTEM = {"role": "system", "content": "You are a classifier."}
IMAGE = {"type": "image_url", "image_url": {"url": "data:,"}}
BAD = {
    "a system message": (chat(messages=[SYSTEM, *chat()["messages"]]), 422, "one of the user's"),
    "no message": (chat(messages=[]), 422, "messages are of none"),
    "an assistant's message": (
        chat(messages=[{"role": "assistant", "content": "x"}]),
        422,
        "messages are of assistant",
    ),
    "an image": (chat(messages=[{"role": "user", "content": [IMAGE]}]), 422, "send text alone"),
    "a stream": (chat(stream=True), 422, "body.stream"),
    "two answers": (chat(n=2), 422, "body.n"),
    "too many probabilities": (chat(top_logprobs=21), 422, "body.top_logprobs"),
    "an unknown model": (chat(model="gpt"), 404, "there is no adapter 'gpt'"),
    "a long text": (
        chat(messages=[{"role": "user", "content": "x" * 501}]),
        413,
        "at most 500 are taken",
    ),
    "a blank input": ({"model": "bank", "input": " "}, 422, "text 0 is blank"),
    "no input": ({"model": "bank", "input": []}, 422, "input is empty"),
    "token ids": ({"model": "bank", "input": [1, 2]}, 422, "body.input"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_would_change_the_answer_is_refused(service: Service, name: str) -> None:
    body, status, words = BAD[name]
    answer = call(service.url, "/classify" if "input" in body else "/v1/chat/completions", body)
    assert answer.status == status
    assert list(answer.json) == ["error"]
    assert words in answer.json["error"]


def test_the_clients_key_is_the_token(
    folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("REMORA_TOKEN", "correct-horse")
    asked: Any = {"model": "bank", "messages": [{"role": "user", "content": TEXTS[0]}]}
    with running(folders["bank"]) as service:
        with client(service) as asking, pytest.raises(openai.AuthenticationError):
            asking.chat.completions.create(**asked)
        with client(service, "correct-horse") as asking:
            answer = asking.chat.completions.create(**asked)
        assert call(service.url, "/classify", {"input": "x"}).status == 401
    assert answer.choices[0].message.content in WORDS
