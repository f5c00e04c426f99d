"""A real llama.cpp in a process of its own, asked by the client that is exported with a model.

In a process of its own, since a failed assertion of llama.cpp ends the process that it is in.
"""

from __future__ import annotations

import concurrent.futures
import importlib.util
import json
import multiprocessing
import os
import signal
from collections.abc import Iterator, Sequence
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

from remora.errors import ConfigError, ModelError
from remora.export.llama_cpp_client import Client
from remora.formatting import first_line

SLOTS = 4
"""Messages that llama.cpp computes side by side."""

BATCH = 32
"""Messages that are answered before progress is reported."""


class Answer(NamedTuple):
    """What llama.cpp made of one message."""

    prompt_ids: list[int]
    label: str  # the most probable one
    greedy: str  # of the most probable token after the other


@dataclass(frozen=True, kw_only=True)
class Model:
    """A model for llama.cpp.

    Attributes:
        path: The GGUF file.
        lora: GGUF file of an adapter, if it is not merged.
        template: Chat template in place of the file's own.
        context: Most tokens of a prompt and its answer.
        threads: Threads to compute on.
    """

    path: Path
    lora: Path | None = None
    template: str | None = None
    context: int
    threads: int


def require() -> None:
    """Make sure that llama.cpp is installed.

    Raises:
        ConfigError: If it is not.
    """
    if importlib.util.find_spec("xllamacpp") is None:
        raise ConfigError(
            "GGUF files are compared with the adapter by llama.cpp, which is not installed; "
            "run pip install 'remora[llama-cpp]'"
        )


def grammar(texts: Sequence[str]) -> str:
    """Return the GBNF grammar of the texts of a closed label set.

    Source: grammars/README.md of llama.cpp.
    """
    return "root ::= " + " | ".join(json.dumps(text, ensure_ascii=False) for text in texts) + "\n"


class LlamaCpp:
    """A model in llama.cpp, in a process that ends with the `with` block."""

    def __init__(self, model: Model) -> None:
        self._model = model

    def __enter__(self) -> LlamaCpp:
        """Start the process and load the model.

        Raises:
            ModelError: If llama.cpp cannot load it.
        """
        self._pool = concurrent.futures.ProcessPoolExecutor(
            1, mp_context=multiprocessing.get_context("spawn"), initializer=_begin
        )
        try:
            self._url = self._pool.submit(_load, self._model).result()
        except BaseException as error:
            self.__exit__(None, None, None)
            if isinstance(error, (BrokenProcessPool, RuntimeError, ValueError)):
                raise self._failed(error) from error
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """End the process, without waiting for what it computes."""
        for process in list((self._pool._processes or {}).values()):
            process.kill()
        self._pool.shutdown(cancel_futures=True)

    def answers(self, messages: Sequence[str], answers: dict[str, list[int]]) -> Iterator[Answer]:
        """Yield what llama.cpp makes of messages, in order.

        Args:
            messages: The messages, each the only one of its conversation.
            answers: The token ids of each label, its end token last.

        Raises:
            ModelError: If llama.cpp ends, or reports an error.
        """
        client = Client(self._url, answers)

        def answer(numbered: tuple[int, str]) -> Answer:
            number, message = numbered
            ids = client.prompt_ids(message)
            return Answer(ids, *client.labels(ids, slot=number % SLOTS))

        with concurrent.futures.ThreadPoolExecutor(SLOTS) as threads:
            for begin in range(0, len(messages), BATCH):
                batch = enumerate(messages[begin : begin + BATCH])
                try:
                    yield from threads.map(answer, batch)
                except (OSError, KeyError, ValueError) as error:
                    raise self._failed(error) from error

    def _failed(self, error: Exception) -> ModelError:
        return ModelError(
            f"llama.cpp cannot use {(self._model.lora or self._model.path).name} "
            f"({first_line(error)}); pip install -U xllamacpp, or use --merge"
        )


def _begin() -> None:
    """Leave Ctrl-C to the process that waits, and keep llama.cpp's log off the terminal."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    os.dup2(nowhere, 2)


_server: Any = None
"""The server of this process, which ends when nothing names it."""


def _load(model: Model) -> str:
    """Start a server and return its address."""
    global _server  # noqa: PLW0603
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path = str(model.path)
    params.n_parallel = SLOTS
    params.n_ctx = SLOTS * model.context
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = model.threads
    params.n_gpu_layers = 0
    params.use_jinja = True
    params.ui = False
    if model.template is not None:
        params.chat_template = model.template
    if model.lora is not None:
        params.lora_adapters = [xllamacpp.CommonAdapterLoraInfo(str(model.lora), 1.0)]
    _server = xllamacpp.Server(params)
    return str(_server.listening_address)
