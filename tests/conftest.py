"""Shared fixtures: tiny random models of every supported attention, and a real small tokenizer."""

from __future__ import annotations

import csv
import gc
import os
import shutil
import subprocess
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import numpy as np
import pytest
import torch
from filelock import FileLock

from remora import cli
from remora.config import TrainConfig
from remora.models import loading
from remora.tree import attention, kernels

SHARED = Path(__file__).parents[2] / "shared"

ARCHITECTURES = ("qwen2", "llama", "gemma2", "gemma3", "opt", "gpt2", "mistral")

VOCABULARY = 97


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the longest test, so that no worker ends with it alone."""
    items.sort(key=lambda item: "test_notebook" not in item.nodeid)


def pytest_collection() -> None:
    """What is imported stays: the collector need not look through it, now or in any test."""
    gc.disable()


def pytest_collection_finish() -> None:
    gc.freeze()
    gc.enable()


def call(*arguments: object) -> int:
    """Run the command line in this process; return its exit code."""
    try:
        return cli.main([str(each) for each in arguments])
    except SystemExit as end:
        return int(end.code or 0)


def tiny_config(architecture: str, vocabulary: int = VOCABULARY, context: int = 256) -> Any:
    """Return the configuration of a two-layer model that differs where architectures differ."""
    import transformers

    common: dict[str, Any] = {
        "vocab_size": vocabulary,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": context,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    gated = {**common, "intermediate_size": 48, "num_key_value_heads": 2}
    match architecture:
        case "qwen2":
            return transformers.Qwen2Config(**gated)
        case "llama":
            return transformers.LlamaConfig(**gated)
        case "mistral":
            return transformers.MistralConfig(**gated, head_dim=8, sliding_window=6)
        case "gemma2":  # caps its attention scores, and so has no fused attention
            return transformers.Gemma2Config(
                **gated,
                head_dim=8,
                sliding_window=9,
                layer_types=["sliding_attention", "full_attention"],
                attn_logit_softcapping=5.0,
            )
        case "gemma3":
            return transformers.Gemma3TextConfig(
                **gated,
                head_dim=8,
                sliding_window=6,
                layer_types=["sliding_attention", "full_attention"],
            )
        case "opt":
            return transformers.OPTConfig(
                **common,
                ffn_dim=48,
                word_embed_proj_dim=32,
                dropout=0.0,
                activation_function="relu",
            )
        case "gpt2":
            return transformers.GPT2Config(
                vocab_size=vocabulary,
                n_embd=32,
                n_layer=2,
                n_head=4,
                n_positions=context,
                attn_pdrop=0.0,
                embd_pdrop=0.0,
                resid_pdrop=0.0,
                pad_token_id=0,
                bos_token_id=1,
                eos_token_id=2,
            )
    raise ValueError(architecture)


def tiny_model(
    architecture: str, dtype: torch.dtype = torch.float64, scale: float = 8, **kwargs: Any
) -> Any:
    """Return a random model; its weights are larger than usual, so that attention is not flat."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    config = tiny_config(architecture, **kwargs)
    config._attn_implementation = loading._attention(config)
    model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(scale)
    attention.install(model)
    return model


def randomize_adapter(model: Any, seed: int = 1) -> None:
    """Give B random values, since at zero half of the gradients would be zero."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
                parameter.copy_(0.05 * noise)


@pytest.fixture(params=["dense", "blocks", "kernel"])
def pairs(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Compute attention over all pairs of tokens, or in blocks small enough for tiny rows."""
    if request.param == "kernel":
        monkeypatch.setattr(kernels, "has_slow_kernel", lambda device: False)
    if request.param != "dense":
        monkeypatch.setattr(attention, "BLOCK_SIZES", (4,))
        monkeypatch.setattr(attention, "BLOCK_COST", -10_000)
    return str(request.param)


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of data and models beside the repository; tests that need it skip without."""
    if not SHARED.is_dir():
        pytest.skip("needs ../shared (data sets and models), which is not here")
    return SHARED


CHAT_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

CORPUS = """
Where is my card? My refund has not arrived, and the top up failed. Why was I charged a fee twice?
The payment is still pending after two days. I would like to order a new card, the old one is lost.
Sort this message. Answer with one label. Labels: card arrival, refund not showing up.
How do I change my PIN or my address? Cash withdrawal was declined at the machine. Please help me.
"""


def build_tokenizer() -> Any:
    """Train a small byte-level BPE tokenizer in the form of Qwen's."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        show_progress=False,
    )
    bpe.train_from_iterator(CORPUS.splitlines(), trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe, eos_token="<|im_end|>", pad_token="<|endoftext|>"
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


@pytest.fixture(scope="session")
def tokenizer() -> Any:
    return build_tokenizer()


WORDS = {"card arrival": "card", "refund": "refund", "top up failed": "top up"}
WAYS = ("Where is my {}?", "the {} again", "{} please, day {{}}", "Still no {}!", "why {} why")


def write_table(path: Path, repeats: int = 6) -> Path:
    """Write a table of texts that a tiny model learns to tell apart, 15 rows for each repeat."""
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["text", "label"])
        for i in range(repeats):
            for label, word in WORDS.items():
                writer.writerows([f"{way.format(word)} {i}", label] for way in WAYS)
    return path


def write_rows(path: Path, texts: Iterable[str], labels: Iterable[str]) -> Path:
    """Write texts and labels as they are."""
    with path.open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([("text", "label"), *zip(texts, labels, strict=True)])
    return path


@pytest.fixture(scope="session")
def table(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_table(tmp_path_factory.mktemp("data") / "support.csv")


@pytest.fixture
def config(base: Path, tmp_path: Path) -> TrainConfig:
    return two_epochs(base, tmp_path)


def two_epochs(base: Path, folder: Path) -> TrainConfig:
    """Two epochs of several steps: a partial last batch, several micro-batches, dropout."""
    (folder / "data").mkdir()
    return TrainConfig(
        str(write_table(folder / "data" / "support.csv", repeats=4)),
        model=str(base),
        output=folder / "runs",
        learning_rate=1e-2,
        epochs=2,
        batch_size=5,
        micro_batch_tokens=40,
        eval_steps=4,
        eval_rows=4,  # of 6
        precision="float32",
        device="cpu",
        rank=4,
        dropout=0.2,
    )


def made_once(factory: pytest.TempPathFactory, name: str, make: Callable[[Path], object]) -> Path:
    """Return a folder that the first worker to ask fills, for the tests of all workers to read."""
    root = factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        root = root.parent
    folder, done = root / name, root / f"{name}.done"
    with FileLock(root / f"{name}.lock"):
        if not done.exists():
            shutil.rmtree(folder, ignore_errors=True)  # of a worker that failed
            folder.mkdir()
            make(folder)
            done.touch()
    return folder


def can_make_hosts() -> bool:
    if shutil.which("ip") is None:
        return False
    made = subprocess.run(["ip", "netns", "add", "remora-try"], capture_output=True, check=False)
    subprocess.run(["ip", "netns", "del", "remora-try"], capture_output=True, check=False)
    return made.returncode == 0


@pytest.fixture
def hosts() -> Iterator[list[str]]:
    """Two network namespaces with a cable between them: 10.77.0.1 and 10.77.0.2."""
    if not can_make_hosts():
        pytest.skip("needs ip, allowed to make network namespaces")
    names = ["remora-0", "remora-1"]
    lines = [
        *(f"netns add {name}" for name in names),
        "link add name remora-0 netns remora-0 type veth peer name remora-1 netns remora-1",
    ]
    for rank, name in enumerate(names):
        lines += [f"-n {name} address add 10.77.0.{rank + 1}/24 dev {name}"]
        lines += [f"-n {name} link set {device} up" for device in (name, "lo")]
    try:
        for line in lines:
            subprocess.run(["ip", *line.split()], check=True)
        yield names
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "del", name], check=False)


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model that has learned the form of the task, with labels drawn at random."""
    return made_once(tmp_path_factory, "base", write_base)


def write_base(folder: Path) -> None:
    tokenizer = build_tokenizer()
    model = tiny_model("qwen2", torch.float32, scale=2, vocabulary=len(tokenizer))
    teach(model, tokenizer)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def teach(model: Any, tokenizer: Any) -> None:
    """Train a model to answer a message with a label, whichever."""
    from remora.data.prompt import Prompt
    from remora.tree import packing
    from remora.tree.forward import answer_logits
    from remora.tree.loss import loss_sum

    prompt = Prompt(tokenizer, list(WORDS), instruction="Classify the message.", max_length=200)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    generator = np.random.default_rng(0)
    for _ in range(60):
        messages = [
            WAYS[i % 5].format(w) for i, w in enumerate(generator.choice(list(WORDS.values()), 16))
        ]
        packed = packing.build(prompt.rows(messages, generator.choice(list(WORDS), 16).tolist()))
        loss = loss_sum(answer_logits(model, packed), packed)
        (loss / packed.num_supervised_tokens).backward()
        optimizer.step()
        optimizer.zero_grad()
