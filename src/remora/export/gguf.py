"""A run as GGUF files for llama.cpp and Ollama, written only if llama.cpp gives the same labels.

The files are written by llama.cpp's own converter. The chat template in them is the prompt that the
adapter was trained with, so that a client sends the message alone.
"""

from __future__ import annotations

import contextlib
import gc
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from remora.config import ExportConfig
from remora.config.export import CONVERTED
from remora.data.prompt import Prompt
from remora.errors import ConfigError, ModelError, ResourceError
from remora.evaluation.results import Results
from remora.export import llama_cpp, llama_cpp_client
from remora.export.merge import write_merged
from remora.formatting import quote
from remora.models import metadata
from remora.models.saved import open_trained
from remora.runtime import files
from remora.runtime.reporter import Reporter
from remora.tree import scoring

DIFFERING = {**dict.fromkeys(("f32", "f16", "bf16"), 1.0), "q8_0": 2.0}
"""Percentage of rows that may get another label, by type."""

DIFFERING_QUANTIZED = 10.0
"""The same for fewer bits."""

PRE_TOKENIZERS = {
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+": "qwen2",
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+": "llama-bpe",
    "": "gpt-2",
}
"""llama.cpp's names of the patterns by which a byte-level tokenizer splits text. Its converter
knows tokenizers by a hash of what they make of one text, so not those that somebody trained."""


@dataclass(frozen=True, kw_only=True)
class GgufFile:
    """A GGUF file, and what llama.cpp answers with it on the run's rows."""

    name: str
    type: str
    num_bytes: int
    accuracy: float
    num_differing: int  # rows with another most probable label than by the adapter
    greedy_accuracy: float  # taking the most probable token after the other
    num_greedy_differing: int
    rows_per_second: float


@dataclass(frozen=True, kw_only=True)
class Gguf:
    """The GGUF files of a run."""

    num_rows: int
    adapter_accuracy: float  # of its labels in float32
    files: tuple[GgufFile, ...]


@dataclass(frozen=True)
class _Tools:
    folder: Path
    quantize: Path | None

    def script(self, name: str) -> Path:
        return self.folder / name


def write_gguf(config: ExportConfig, folder: Path, results: Results, reporter: Reporter) -> Gguf:
    """Write a run's GGUF files, with what is needed to serve them, into an empty folder.

    Args:
        config: The settings.
        folder: Where to write.
        results: The run's rows.
        reporter: Shows the progress.

    Raises:
        ConfigError: If llama.cpp or its converter is missing.
        ModelError: If the converter does not know the architecture, or llama.cpp answers otherwise.
        ResourceError: If the disk fails.
    """
    llama_cpp.require()
    tools = _find_tools(config)
    wanted = _adapter_labels(config, results, reporter)
    model = folder / "model"  # removed at the end
    model.mkdir()
    if config.gguf_lora:
        prompt, made = _convert_adapter(config, model, folder, tools, reporter)
    else:
        prompt, made = _convert_model(config, model, folder, tools, reporter)
    measured = []
    for kind, loaded in made.items():
        reporter.say(f"asking llama.cpp with {(loaded.lora or loaded.path).name}")
        measured.append(_measure(kind, loaded, prompt, results, wanted, config, reporter))
    shutil.rmtree(model)
    num_rows = len(wanted)
    accuracy = _count(wanted, results.true) / num_rows
    written = Gguf(num_rows=num_rows, adapter_accuracy=accuracy, files=tuple(measured))
    with files.disk_errors(folder):
        _write_beside(folder, prompt, written, is_adapter=config.gguf_lora)
    return written


def _adapter_labels(config: ExportConfig, results: Results, reporter: Reporter) -> list[str]:
    """Return the adapter's labels of the run's rows in float32.

    The run may have predicted them in 16 bits, which gives near ties another label by itself.
    """
    trained = open_trained(config.run, base=config.model, device=config.device, precision="float32")
    scorer = trained.scorer(max_tokens=config.micro_batch_tokens, tolerance=1.0)  # the exact argmax
    probabilities = scoring.score_table(scorer, results.texts, "adapter", reporter)
    labels = trained.prompt.labels
    del trained, scorer
    gc.collect()  # the layers hold references to themselves
    return [labels[index] for index in probabilities.argmax(1)]


def modelfile(prompt: Prompt, name: str) -> str:
    """Return Ollama's description of a model; its template is written in Go's language."""
    head, tail = (
        text.replace("{{", '{{ "{{" }}').replace('"""', '{{ "\\"\\"\\"" }}')
        for text in (prompt.head, prompt.tail)
    )
    end = prompt.tokenizer.decode([prompt.answers[0][-1]])
    return (
        f'FROM ./{name}\nTEMPLATE """{head}{{{{ .Prompt }}}}{tail}"""\n'
        f"PARAMETER temperature 0\nPARAMETER num_predict {_most_tokens(prompt)}\n"
        f"PARAMETER stop {json.dumps(end, ensure_ascii=False)}\n"
    )


def _find_tools(config: ExportConfig) -> _Tools:
    """Find llama.cpp's converter, and llama-quantize if it is needed.

    Raises:
        ConfigError: If one of them is not there.
    """
    script = "convert_lora_to_gguf.py" if config.gguf_lora else "convert_hf_to_gguf.py"
    folder = config.llama_cpp
    if folder is None:
        raise ConfigError(
            "GGUF files are written by llama.cpp's converter; run git clone --depth 1 "
            "https://github.com/ggml-org/llama.cpp and give --llama-cpp llama.cpp"
        )
    if not (folder / script).is_file():
        raise ConfigError(
            f"{folder} has no {script}; give the folder of llama.cpp's source with --llama-cpp"
        )
    if importlib.util.find_spec("sentencepiece") is None:
        raise ConfigError(
            "llama.cpp's converter needs sentencepiece; run pip install 'remora[llama-cpp]'"
        )
    rest = [kind for kind in config.gguf if kind not in CONVERTED]
    if not rest:
        return _Tools(folder.absolute(), None)
    places = [folder / "build" / "bin", folder / "build" / "bin" / "Release", folder]
    path = os.pathsep.join([*map(str, places), os.environ.get("PATH", "")])
    if not (quantize := shutil.which("llama-quantize", path=path)):
        raise ConfigError(
            f"{rest[0]} needs llama-quantize, which is neither in {folder / 'build' / 'bin'} nor "
            "on the PATH; build it with cmake -B build && cmake --build build --target "
            f"llama-quantize, or take some of {', '.join(CONVERTED)}"
        )
    return _Tools(folder.absolute(), Path(quantize).absolute())


def _convert_model(
    config: ExportConfig, model: Path, folder: Path, tools: _Tools, reporter: Reporter
) -> tuple[Prompt, dict[str, llama_cpp.Model]]:
    """Write the merged model as GGUF; return its prompt, and the files by their types."""
    dtype = torch.float32 if "f32" in config.gguf else torch.float16
    if metadata.is_full(config.run):
        source = metadata.adapter_folder(config.run)
        prompt = open_trained(source, device="cpu", precision="float32").prompt
        for path in source.iterdir():
            (model / path.name).symlink_to(path.absolute())
    else:
        reporter.say(f"merging in float32, storing in {str(dtype).removeprefix('torch.')}")
        prompt = write_merged(config, dtype, model)
    pin_prompt(prompt, model)
    made: dict[str, llama_cpp.Model] = {}
    name = config.run.absolute().name
    for kind in config.gguf:
        path = folder / f"{name}-{kind}.gguf"
        reporter.say(f"writing {path.name}")
        if kind in CONVERTED:
            arguments = [str(model), "--outfile", str(path), "--outtype", kind]
            _convert(tools.script("convert_hf_to_gguf.py"), arguments, model)
        else:
            whole = model / "f16.gguf"
            if not whole.is_file():
                arguments = [str(model), "--outfile", str(whole), "--outtype", "f16"]
                _convert(tools.script("convert_hf_to_gguf.py"), arguments, model)
            assert tools.quantize is not None
            _run([str(tools.quantize), str(whole), str(path), kind.upper()])
        made[kind] = _loaded(path, prompt)
    return prompt, made


def _convert_adapter(
    config: ExportConfig, model: Path, folder: Path, tools: _Tools, reporter: Reporter
) -> tuple[Prompt, dict[str, llama_cpp.Model]]:
    """Write the adapter as GGUF, and its base for the comparison; return them with the prompt."""
    adapter = metadata.adapter_folder(config.run)
    card = metadata.read_card(adapter)
    trained = open_trained(config.run, base=config.model, device="cpu", precision="float32")
    prompt = trained.prompt
    del trained
    source = metadata.find_base(card, config.model, config.run)
    for path in source.iterdir():
        if path.is_file():
            (model / path.name).symlink_to(path.absolute())
    pin_prompt(prompt, model)
    base, path = model / "base.gguf", folder / f"{config.run.absolute().name}-lora.gguf"
    reporter.say("writing the base model as GGUF, for the comparison only")
    arguments = [str(model), "--outfile", str(base), "--outtype", "f16"]
    _convert(tools.script("convert_hf_to_gguf.py"), arguments, model)
    reporter.say(f"writing {path.name}")
    arguments = [str(adapter.absolute()), "--base", str(model), "--outfile", str(path)]
    _convert(tools.script("convert_lora_to_gguf.py"), [*arguments, "--outtype", "f16"], model)
    return prompt, {"f16": _loaded(base, prompt, lora=path)}


def _loaded(path: Path, prompt: Prompt, lora: Path | None = None) -> llama_cpp.Model:
    return llama_cpp.Model(
        path=path,
        lora=lora,
        context=prompt.max_length + 8,
        threads=torch.get_num_threads(),
    )


def pin_prompt(prompt: Prompt, model: Path) -> None:
    """Write a model's tokenizer with the trained prompt as its chat template, nothing added."""
    tokenizer = prompt.tokenizer
    before = tokenizer.chat_template
    tokenizer.chat_template = prompt.chat_template
    try:
        for path in model.iterdir():
            if path.is_symlink() and path.suffix != ".safetensors":
                target = path.resolve()
                path.unlink()
                shutil.copyfile(target, path)
        tokenizer.save_pretrained(model)
    finally:
        tokenizer.chat_template = before
    path = model / "tokenizer_config.json"
    described = json.loads(path.read_text(encoding="utf-8"))
    described |= {"add_bos_token": False, "add_eos_token": False}
    path.write_text(json.dumps(described), encoding="utf-8")


def _convert(script: Path, arguments: list[str], model: Path) -> None:
    """Run one of llama.cpp's converters.

    Raises:
        ModelError: If it fails.
    """
    code = [sys.executable, "-c", _CONVERT, str(script), _pre_tokenizer(model)]
    _run([*code, *arguments])


_CONVERT = """
import os, runpy, sys
_, script, pre, *arguments = sys.argv
folder = os.path.dirname(script)
sys.path[:0] = [folder, os.path.join(folder, "gguf-py")]
try:
    from conversion.base import TextModel
except ImportError:
    TextModel = None
if pre and TextModel is not None:
    by_hash = TextModel.get_vocab_base_pre
    def by_pattern(self, tokenizer):
        try:
            return by_hash(self, tokenizer)
        except NotImplementedError:
            return pre
    TextModel.get_vocab_base_pre = by_pattern
sys.argv = [script, *arguments]
runpy.run_path(script, run_name="__main__")
"""
"""Runs a converter with the pattern of a tokenizer that it does not know."""


def _pre_tokenizer(model: Path) -> str:
    """Return llama.cpp's name for how the model's tokenizer splits text, "" if it has none."""
    with contextlib.suppress(OSError, ValueError, AttributeError, TypeError):
        described = json.loads((model / "tokenizer.json").read_text(encoding="utf-8"))
        steps = described["pre_tokenizer"]
        steps = steps.get("pretokenizers", [steps])
        if any(step["type"] == "ByteLevel" for step in steps):
            patterns = [step["pattern"]["Regex"] for step in steps if step["type"] == "Split"]
            return PRE_TOKENIZERS.get("".join(patterns), "")
    return ""


def _run(command: list[str]) -> None:
    """Run a program of llama.cpp's.

    Raises:
        ModelError: If it fails, with its last line.
        ResourceError: If the disk is full.
    """
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    if done.returncode == 0:
        return
    lines = [line for line in done.stderr.splitlines() if line.strip()] or ["no message"]
    if "No space left" in done.stderr:
        raise ResourceError("no space left for the GGUF file; choose another --output")
    raise ModelError(
        f"llama.cpp's converter cannot write this model ({quote(lines[-1])}); take a newer "
        "llama.cpp, or use --merge"
    )


def _measure(
    kind: str,
    loaded: llama_cpp.Model,
    prompt: Prompt,
    results: Results,
    wanted: Sequence[str],
    config: ExportConfig,
    reporter: Reporter,
) -> GgufFile:
    """Let llama.cpp answer the run's rows, and compare its labels with the adapter's, `wanted`.

    Raises:
        ModelError: If it reads other prompts or writes too many other labels.
    """
    path, messages = loaded.lora or loaded.path, results.texts
    stems, found, greedy = prompt.stems(messages), [], []
    began = time.monotonic()
    with llama_cpp.LlamaCpp(loaded) as engine:
        for index, answer in enumerate(engine.answers(messages, _answers(prompt))):
            if answer.prompt_ids != stems[index] and prompt.is_plain(messages[index]):
                read = quote(prompt.tokenizer.decode(answer.prompt_ids))
                raise ModelError(_other_prompt(path, messages[index], read))
            found.append(answer.label)
            greedy.append(answer.greedy)
            reporter.scoring(path.name, index + 1, len(stems))
    seconds = time.monotonic() - began
    differing = _count(found, wanted, equal=False)
    reporter.say(
        f"{path.name}: {differing:,} of {len(found):,} rows get another label than from the adapter"
    )
    share = config.differing
    if share is None:
        share = DIFFERING.get(kind, DIFFERING_QUANTIZED)
    if differing > share / 100 * len(found):
        raise ModelError(
            f"by llama.cpp, {path.name} gives another label than the adapter to {differing:,} of "
            f"{len(found):,} rows ({share:g} % allowed), so nothing was written; "
            "take a type with more bits, or allow more with --differing"
        )
    return GgufFile(
        name=path.name,
        type=kind,
        num_bytes=path.stat().st_size,
        accuracy=_count(found, results.true) / len(found),
        num_differing=differing,
        greedy_accuracy=_count(greedy, results.true) / len(found),
        num_greedy_differing=_count(greedy, wanted, equal=False),
        rows_per_second=len(found) / seconds,
    )


def _count(found: Sequence[str], wanted: Sequence[str], *, equal: bool = True) -> int:
    return sum((a == b) is equal for a, b in zip(found, wanted, strict=True))


def _answers(prompt: Prompt) -> dict[str, list[int]]:
    """Return the token ids of each label."""
    return {label: [*ids] for label, ids in zip(prompt.labels, prompt.answers, strict=True)}


def _other_prompt(path: Path, message: str, read: str) -> str:
    return (
        f"llama.cpp reads another prompt from {path.name} than the adapter was trained with, for "
        f"the message {quote(message)} {read}, so nothing was written; take a newer llama.cpp, or "
        "use --merge"
    )


def _most_tokens(prompt: Prompt) -> int:
    return max(map(len, prompt.answers)) + 1


def _write_beside(folder: Path, prompt: Prompt, written: Gguf, *, is_adapter: bool) -> None:
    """Write what a server needs beside the files: grammar, template, and how to start it."""
    texts = [prompt.label_texts.get(label, label) for label in prompt.labels]
    files.write_text(folder / "labels.gbnf", llama_cpp.grammar(texts))
    files.write_json(folder / "labels.json", _answers(prompt))
    shutil.copyfile(llama_cpp_client.__file__, folder / "client.py")
    first = written.files[0].name
    start = f"llama-server -m {first} --jinja"
    if is_adapter:
        files.write_text(folder / "chat_template.jinja", prompt.chat_template)
        start = (
            f"llama-server -m BASE.gguf --lora {first} --jinja "
            "--chat-template-file chat_template.jinja"
        )
    else:
        files.write_text(folder / "Modelfile", modelfile(prompt, first))
    files.write_text(folder / "README.md", _readme(start, written, is_adapter=is_adapter))


def _readme(start: str, written: Gguf, *, is_adapter: bool) -> str:
    rows = [
        f"| {each.name} | {each.num_bytes / 1e6:.1f} MB | {each.accuracy:.2%} | "
        f"{each.num_differing:,} | {each.greedy_accuracy:.2%} | {each.num_greedy_differing:,} |"
        for each in written.files
    ]
    return README.format(
        start=start,
        ollama="" if is_adapter else OLLAMA,
        accuracy=f"{written.adapter_accuracy:.2%}",
        num_rows=f"{written.num_rows:,}",
        rows="\n".join(rows),
    )


README = """# A classifier for llama.cpp

The prompt is inside: a request has the message alone, as the user's.

```
{start} --port 8080
python client.py http://127.0.0.1:8080 "a message"
```

`client.py` finds the most probable label. Any other client can ask for the most probable token
after the other, under the grammar of the labels:

```
jq -n --rawfile grammar labels.gbnf --arg message "a message" \\
  '{{temperature: 0, grammar: $grammar, messages: [{{role: "user", content: $message}}]}}' |
  curl --json @- http://127.0.0.1:8080/v1/chat/completions
```
{ollama}
Answered by llama.cpp on {num_rows} rows, on which the adapter has {accuracy}:

| file | size | accuracy | other labels | by token | other labels |
|---|---:|---:|---:|---:|---:|
{rows}
"""

OLLAMA = """
With Ollama, which knows no such grammar:

```
ollama create classifier -f Modelfile
ollama run classifier "a message"
```
"""
