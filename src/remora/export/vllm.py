"""A merged model folder for vLLM, with the prompt inside, a script that serves it and a client.

vLLM needs a GPU that it supports, so it is not run here: the requests and the token ids that its
chat template makes are compared with those of training.
"""

from __future__ import annotations

import shutil
from pathlib import Path

from remora.config import ExportConfig
from remora.data.prompt import Prompt
from remora.errors import ModelError
from remora.evaluation.results import Results
from remora.export import gguf, vllm_client
from remora.export.merge import Parity, merge
from remora.formatting import quote
from remora.models import loading, metadata
from remora.runtime import files
from remora.runtime.reporter import Reporter


def write_vllm(config: ExportConfig, folder: Path, results: Results, reporter: Reporter) -> Parity:
    """Write a merged model for vLLM into an empty folder; the merge is checked as by `merge`.

    Args:
        config: The settings.
        folder: Where to write.
        results: The run's rows.
        reporter: Shows the progress.

    Raises:
        ModelError: If the merged model is not the same classifier, or its template renders another
            prompt.
        ResourceError: If the disk fails.
    """
    parity = merge(config, folder, results, reporter)
    prompt = metadata.parse_card(folder).prompt(loading.load_tokenizer(folder))
    with files.disk_errors(folder):
        gguf.pin_prompt(prompt, folder)
        written = {prompt.label_texts.get(label, label): label for label in prompt.labels}
        files.write_json(folder / "labels.json", written)
        shutil.copyfile(vllm_client.__file__, folder / "client.py")
        files.write_text(folder / "serve.sh", SERVE.format(context=prompt.max_length))
        (folder / "serve.sh").chmod(0o755)
    _compare_prompts(prompt, folder, results.texts)
    return parity


SERVE = """#!/bin/sh
# vLLM 0.12 or newer. Its own defaults of sampling, as the model's are for beam search.
exec vllm serve "$(dirname "$0")" --served-model-name classifier \\
  --max-model-len {context} --generation-config vllm "$@"
"""


def _compare_prompts(prompt: Prompt, folder: Path, messages: list[str]) -> None:
    """Compare what the folder's template makes of messages with the prompts of training."""
    tokenizer = loading.load_tokenizer(folder)
    plain = [message for message in messages if prompt.is_plain(message)]
    for message, wanted in zip(plain, prompt.stems(plain), strict=True):
        text = tokenizer.apply_chat_template(
            [{"role": "user", "content": message}], tokenize=False, add_generation_prompt=True
        )
        if tokenizer(text, add_special_tokens=False)["input_ids"] != wanted:
            raise ModelError(
                "the chat template of the merged model renders another prompt than the adapter was "
                f"trained with, for the message {quote(message)}; use --merge"
            )
