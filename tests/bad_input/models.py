"""Bad models and adapters."""

from __future__ import annotations

import json
import shutil
from typing import Any

from transformers import AutoTokenizer

from bad_input.workshop import (
    Case,
    Workshop,
    broken_run,
    embeddings,
    of_gguf,
    of_unfinished,
    train,
    unfinished,
)
from hybrids import save_base


def broken_adapter(shop: Workshop, **changes: object) -> list[str]:
    path = shop.copy_of_run() / "adapter" / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    return ["eval", "copy", "good.csv"]


def broken_base(shop: Workshop, **changes: object) -> list[str]:
    path = shop.copy_of_base() / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    return train("good.csv", model="copy")


LAYERS = ("--target-modules", "q_proj,w_pack")


def longer_tokenizer(shop: Workshop) -> list[str]:
    folder = shop.copy_of_base()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens(["zebra"])
    tokenizer.save_pretrained(folder)
    return train("good.csv", model="copy")


def moved_base(shop: Workshop) -> list[str]:
    path = shop.copy_of_run() / "adapter" / "remora.json"
    card = json.loads(path.read_text())
    path.write_text(json.dumps({**card, "base_model": str(shop.folder / "gone")}))
    return ["eval", "copy", "good.csv"]


def merge_into_4_bits(shop: Workshop) -> list[str]:
    base, path = shop.copy_of_base(), shop.copy_of_run() / "adapter" / "remora.json"
    config = json.loads((base / "config.json").read_text())
    stored = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    (base / "config.json").write_text(json.dumps({**config, "quantization_config": stored}))
    card = json.loads(path.read_text())
    path.write_text(json.dumps({**card, "base_model": str(base)}))
    return ["export", "copy", "--merge"]


def hybrid(shop: Workshop, kind: str) -> str:
    save_base(kind, shop.folder / kind)
    return kind


def without_kernel(shop: Workshop) -> list[str]:
    from transformers.models.lfm2 import modeling_lfm2

    def forward(*_: Any, **__: Any) -> None:
        raise ImportError("causal_conv1d is not installed, please install it")

    shop.patch().setattr(modeling_lfm2.Lfm2ShortConv, "forward", forward)
    return train("good.csv", model=hybrid(shop, "lfm2"))


def windowed(shop: Workshop) -> list[str]:
    """A run that reads long messages in windows, exported for vLLM."""
    card = shop.copy_of_run() / "adapter" / "remora.json"
    card.write_text(json.dumps({**json.loads(card.read_text()), "truncate": "windows"}))
    return ["export", "copy", "--vllm", "--output", "out"]


def damaged(shop: Workshop, name: str, content: bytes) -> list[str]:
    (shop.copy_of_base() / name).write_bytes(content)
    return train("good.csv", model="copy")


def other_base(shop: Workshop, *command: str) -> list[str]:
    path = shop.copy_of_run() / "adapter" / "remora.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "base_sha256": "0" * 64}))
    return list(command)


def full(shop: Workshop, verb: str, *more: str) -> list[str]:
    run, whole = shop.copy_of_run(), shop.folder / "copy" / "model"
    shutil.copytree(shop.base, whole)
    card = json.loads((run / "adapter" / "remora.json").read_text())
    (whole / "remora.json").write_text(json.dumps({**card, "method": "full"}))
    shutil.rmtree(run / "adapter")
    return [verb, "copy", *more]


def of_classes(shop: Workshop, *more: str) -> list[str]:
    path = shop.copy_of_run() / "adapter" / "remora.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "answer": "classes"}))
    return [*more]


def cut_off_gguf(shop: Workshop) -> list[str]:
    command = of_gguf(shop)
    path = shop.folder / "small.gguf"
    path.write_bytes(path.read_bytes()[:5_000])
    return command


def several_gguf(shop: Workshop) -> list[str]:
    for name in ("several/q4.gguf", "several/q8.gguf"):
        shop.write(name, b"GGUF")
    return train("good.csv", model="several")


def damaged_checkpoint(shop: Workshop) -> list[str]:
    command = unfinished(shop)
    (path,) = (shop.folder / "runs" / "mine" / "checkpoints").glob("*/tensors.safetensors")
    path.write_bytes(path.read_bytes()[:-1])
    return command


CASES: list[Case] = [
    ("an empty model", 4, lambda s: ["train", "good.csv", "--model", ""]),
    ("no such model folder", 4, lambda s: train("good.csv", model="nothing")),
    ("a folder that holds no model", 4, lambda s: train("good.csv", model="runs")),
    ("a file for a model", 4, lambda s: train("good.csv", model="good.csv")),
    ("a configuration that is not JSON", 4, lambda s: damaged(s, "config.json", b"{")),
    (
        "a token tree of a model whose rows cannot branch",
        4,
        lambda s: train("good.csv", "--layout", "tree", model=hybrid(s, "lfm2")),
    ),
    (
        "classes with a model that has no head for them",
        4,
        lambda s: train("good.csv", "--answer", "classes", model=hybrid(s, "lfm2")),
    ),
    (
        "an adapter on a layer that is never called",
        2,
        lambda s: train("good.csv", "--target-modules", "dt_proj", model=hybrid(s, "mamba")),
    ),
    ("an unknown architecture", 4, lambda s: broken_base(s, model_type="unheard-of")),
    (
        "an encoder",
        4,
        lambda s: broken_base(s, model_type="bert", architectures=["BertForMaskedLM"]),
    ),
    ("an encoder-decoder", 4, lambda s: broken_base(s, model_type="t5")),
    ("a vision model", 4, lambda s: broken_base(s, model_type="vit")),
    (
        "a model that brings its own code",
        4,
        lambda s: broken_base(s, model_type="own", auto_map={"AutoConfig": "own.Config"}),
    ),
    ("a tokenizer longer than the embedding", 4, longer_tokenizer),
    ("an adapter whose base model has moved", 4, moved_base),
    (
        "a list of labels that fills the context",
        4,
        lambda s: train("good.csv", "--list-labels", "--max-length", "20"),
    ),
    ("merging into a base that is stored in 4 bits", 4, merge_into_4_bits),
    ("a layer that the model does not have", 2, lambda s: train("good.csv", *LAYERS)),
    ("a configuration of a billion layers", 4, lambda s: broken_base(s, num_hidden_layers=10**9)),
    (
        "a configuration wider than its weights",
        4,
        lambda s: broken_base(s, intermediate_size=60_000),
    ),
    (
        "truncated weights",
        4,
        lambda s: damaged(
            s, "model.safetensors", (s.base / "model.safetensors").read_bytes()[:5_000]
        ),
    ),
    (
        "no tokenizer",
        4,
        lambda s: ((s.copy_of_base() / "tokenizer.json").unlink(), train("good.csv", model="copy"))[
            1
        ],
    ),
    ("no such folder of a sentence encoder", 4, lambda s: embeddings(s, "nothing")),
    ("a language model for a sentence encoder", 4, lambda s: embeddings(s, "base")),
    ("a GGUF file that is not there", 4, lambda s: train("good.csv", model="none.gguf")),
    (
        "a GGUF file that is another file",
        4,
        lambda s: train("good.csv", model=s.write("small.gguf", "text,label")),
    ),
    ("a GGUF file that is cut off", 4, cut_off_gguf),
    (
        "a GGUF file that counts too much",
        4,
        lambda s: train("good.csv", model=s.write("small.gguf", b"GGUF\3\0\0\0" + b"\xff" * 16)),
    ),
    (
        "a GGUF file of a billion layers",
        4,
        lambda s: of_gguf(s, metadata={"qwen2.block_count": 10**9}),
    ),
    ("a part of a split GGUF file", 4, lambda s: of_gguf(s, "small-00001-of-00002.gguf")),
    (
        "a LoRA adapter as a GGUF file",
        4,
        lambda s: of_gguf(s, metadata={"general.type": "adapter"}),
    ),
    (
        "an image encoder as a GGUF file",
        4,
        lambda s: of_gguf(s, metadata={"general.type": "mmproj"}),
    ),
    (
        "a GGUF file without a tokenizer",
        4,
        lambda s: of_gguf(s, without=("tokenizer.ggml.tokens",)),
    ),
    (
        "a GGUF file of an unknown architecture",
        4,
        lambda s: of_gguf(s, metadata={"general.architecture": "unheard-of"}),
    ),
    (
        "a GGUF file with positions that transformers does not read",
        4,
        lambda s: of_gguf(s, metadata={"qwen2.rope.scaling.type": "yarn"}),
    ),
    (
        "a GGUF file without some weights",
        4,
        lambda s: of_gguf(s, without=("blk.0.attn_q.weight",)),
    ),
    ("a folder of several GGUF files", 4, several_gguf),
    ("an adapter that was never fetched, offline", 4, lambda s: ["eval", "me/none", "good.csv"]),
    ("a folder that is not an adapter", 4, lambda s: ["eval", "base", "good.csv"]),
    (
        "an adapter with a pattern instead of names",
        4,
        lambda s: broken_adapter(s, target_modules="(a+)+$"),
    ),
    ("an adapter with another rank than its weights", 4, lambda s: broken_adapter(s, r=10**9)),
    (
        "an adapter with fully trained layers",
        4,
        lambda s: broken_adapter(s, modules_to_save=["lm_head"]),
    ),
    ("an evaluation of no run", 4, lambda s: ["eval", "runs/none", "good.csv"]),
    ("an evaluation of an unfinished run", 4, lambda s: [*of_unfinished(s, "eval"), "good.csv"]),
    ("a prediction of no run", 4, lambda s: ["predict", "runs/none", "good.csv"]),
    (
        "an adapter whose card is broken",
        4,
        lambda s: broken_run(s, "adapter/remora.json", "{", "predict", "copy", "good.csv"),
    ),
    (
        "an adapter whose card lacks its labels",
        4,
        lambda s: broken_run(s, "adapter/remora.json", "{}", "predict", "copy", "good.csv"),
    ),
    (
        "an adapter with truncated weights",
        4,
        lambda s: broken_run(
            s, "adapter/adapter_model.safetensors", "cut", "predict", "copy", "good.csv"
        ),
    ),
    (
        "an export for vLLM of a model that answers by classes",
        4,
        lambda s: of_classes(s, "export", "copy", "--vllm"),
    ),
    (
        "an adapter whose card names a head that it lacks",
        4,
        lambda s: of_classes(s, "predict", "copy", "good.csv"),
    ),
    (
        "an export of a fully fine-tuned model",
        4,
        lambda s: full(s, "export", "--merge"),
    ),
    ("a service of no run", 4, lambda s: ["serve", "runs/none", "--port", "0"]),
    (
        "a service of an adapter of another base model",
        4,
        lambda s: other_base(s, "serve", "runs/good", "copy", "--port", "0"),
    ),
    ("an adapter of another base model", 4, lambda s: other_base(s, "eval", "copy", "good.csv")),
    (
        "a fully fine-tuned model served beside an adapter",
        4,
        lambda s: full(s, "serve", "runs/good", "--port", "0"),
    ),
    ("a damaged checkpoint, and no other", 4, damaged_checkpoint),
    ("a model whose kernels are not installed", 4, without_kernel),
    (
        "weights in 4 bits of another kind, whose kernels are not installed",
        4,
        lambda s: broken_base(s, quantization_config={"quant_method": "awq", "bits": 4}),
    ),
    ("an export of a run in windows for an engine that has none", 4, windowed),
    (
        "an ONNX model of a run that writes its labels",
        4,
        lambda s: ["export", "runs/good", "--onnx", "--output", "out"],
    ),
]
