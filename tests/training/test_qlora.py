"""Runs whose base is quantized to 4 bits: what they leave, and what becomes of it."""

from __future__ import annotations

import json
import re
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
from safetensors.torch import load_file

from conftest import build_tokenizer, call, teach
from models.test_fused_lora import IDS, relative_error
from models.test_quantize import wide_model
from remora.config import ExportConfig, TrainConfig
from remora.errors import ConfigError, ModelError, Stopped
from remora.export import export
from remora.models import fused_lora, loading, quantize, saved
from remora.runtime import files
from remora.runtime.device import choose_precision
from remora.serving.engine import Engine
from remora.training import checkpoint
from remora.training.run import train
from training.test_full import measured, measured_again

pytest.importorskip("bitsandbytes")

CPU = torch.device("cpu")


@pytest.fixture(scope="module", params=["qwen2", "gpt2"])
def wide(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base whose layers are wide enough for bitsandbytes' own kernel."""
    folder = tmp_path_factory.mktemp(f"wide-{request.param}")
    made, tokenizer = wide_model(request.param), build_tokenizer()
    teach(made, tokenizer)
    made.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def settings(base: Path, data: Path, output: Path, **others: Any) -> TrainConfig:
    return TrainConfig(
        str(data),
        model=str(base),
        output=output,
        **{"method": "qlora", "learning_rate": 1e-2, "batch_size": 8, "max_steps": 6}
        | {"precision": "float32", "device": "cpu"}
        | others,
    )


@pytest.fixture(scope="module")
def trained(wide: Path, table: Path, tmp_path_factory: pytest.TempPathFactory):
    return train(settings(wide, table, tmp_path_factory.mktemp("runs")))


def stock(base: Path, adapter: Path) -> Any:
    """What transformers and PEFT make of an adapter by themselves, in training mode.

    In evaluation bitsandbytes rounds on some processors; there is no dropout in the bases here.
    """
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    how = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
    )
    with loading.without_progress_bar():
        loaded = AutoModelForCausalLM.from_pretrained(base, quantization_config=how)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        found = peft.PeftModel.from_pretrained(loaded, adapter).train()
    for _, layer in fused_lora.lora_layers(found):
        layer.lora_dropout["default"] = torch.nn.Identity()
    return found


def test_the_adapter_is_a_plain_one_of_peft_and_its_base_is_quantized_again(
    trained, wide: Path
) -> None:
    folder = trained.directory / "adapter"
    assert sorted(path.name for path in folder.iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
        "remora.json",
    ]
    card = json.loads((folder / "remora.json").read_text())
    assert card["method"] == "qlora"
    assert card["base_sha256"] == files.weights_sha256(wide)  # of the files, as they lie there
    ours, _, _ = saved.load_adapter(folder, base=None, dtype=torch.float32, device=CPU)
    assert len(quantize.layers(ours)) == len(fused_lora.lora_layers(ours)) > 0
    with torch.no_grad():
        expected = stock(wide, folder)(input_ids=IDS).logits
        found = ours(input_ids=IDS).logits
    assert relative_error(found, expected) < 1e-5
    assert measured_again(trained.directory, "float32") == measured(trained.directory)


def test_a_run_that_was_stopped_ends_with_the_same_bits(
    trained,
    wide: Path,
    table: Path,
    tmp_path: Path,
) -> None:
    config = settings(wide, table, tmp_path, checkpoint_minutes=0, name="same")
    undisturbed = trained.directory
    for _ in range(2):
        with pytest.raises(Stopped):
            train(replace(config, max_time="0s"))
    assert list((tmp_path / "same" / "checkpoints").glob(f"*/{checkpoint.TENSORS}"))
    directory = train(config).directory
    name = "adapter/adapter_model.safetensors"
    assert (directory / name).read_bytes() == (undisturbed / name).read_bytes()
    assert measured(directory) == measured(undisturbed)


def test_merging_dequantizes_first(trained, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    export.export_run(ExportConfig(trained.directory, merge=True, output=tmp_path / "whole"))
    assert "quantization_config" not in json.loads((tmp_path / "whole/config.json").read_text())
    weights = load_file(tmp_path / "whole" / "model.safetensors")
    assert {weight.dtype for weight in weights.values()} == {torch.float32}
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "whole").eval()
    ours, _, _ = saved.load_adapter(trained.directory, base=None, dtype=torch.float32, device=CPU)
    with torch.no_grad():
        expected, found = ours(input_ids=IDS).logits, merged(input_ids=IDS).logits
        with ours.disable_adapter():
            base = ours(input_ids=IDS).logits
    assert relative_error(found, expected) < 1e-5
    assert relative_error(base, expected) > 1e-2
    assert not quantize.layers(merged)


def test_without_bitsandbytes_it_is_one_line(
    trained,
    wide: Path,
    table: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(quantize, "is_installed", lambda: False)
    wanted = ["train", table, "--model", wide, "--method", "qlora", "--output", tmp_path / "runs"]
    for command in (wanted, ["eval", trained.directory, table]):
        capsys.readouterr()
        assert call(*command) == 2
        *_, line = capsys.readouterr().err.strip().splitlines()
        assert line == (
            "error: qlora needs bitsandbytes, which is not installed; "
            "run pip install 'remora[qlora]'"
        )
    assert not (tmp_path / "runs").exists()
    monkeypatch.undo()
    with pytest.raises(ConfigError, match="does not support mps"):
        quantize.require(torch.device("mps"))


def test_a_base_that_is_quantized_already_is_refused(wide: Path, tmp_path: Path) -> None:
    for path in wide.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    config = json.loads((tmp_path / "config.json").read_text())
    how = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    (tmp_path / "config.json").write_text(json.dumps({**config, "quantization_config": how}))
    with pytest.raises(ModelError, match="are quantized already; give the original model"):
        loading.load(tmp_path, torch.float32, quantize_on=CPU)


def test_one_service_does_not_serve_both_kinds(
    trained,
    wide: Path,
    table: Path,
    tmp_path: Path,
) -> None:
    plain = train(settings(wide, table, tmp_path, method="lora", max_steps=1))
    folders = {"packed": trained.directory, "plain": plain.directory}

    def serve(**chosen: Path) -> Engine:
        precision = choose_precision(CPU, "float32")
        return Engine(
            chosen,
            base=None,
            precision=precision,
            device=CPU,
            micro_batch_tokens=512,
            tolerance=0.0,
            max_queue=100,
        )

    with pytest.raises(
        ModelError, match="the adapter plain was trained by lora and those that are"
    ):
        serve(**folders)
    engine = serve(packed=trained.directory)
    texts = [text for text, _ in measured(trained.directory)]
    answered = engine.classify("packed", texts).result()
    engine.stop()
    scorer_probabilities = [float(p) for _, p in measured(trained.directory)]
    np.testing.assert_allclose(answered.probabilities.max(1), scorer_probabilities, atol=0.02)


def test_the_command_line_says_that_the_base_is_in_4_bits(
    base: Path,
    table: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    given = ["--model", base, "--output", tmp_path, "--device", "cpu", "--max-steps", "1"]
    given += ["--baselines", "svm,zero-shot"]
    assert call("train", table, *given, "--method", "qlora") == 0
    shown = capsys.readouterr()
    assert re.search(r"r=16: .*; the base model is quantized to 4 bits$", shown.err, re.M)
    assert re.search("^adapter    .*, the base model is", shown.out, re.M)
    (card,) = tmp_path.glob("*/README.md")
    assert "A LoRA adapter (PEFT) on 4-bit weights of" in card.read_text("utf-8")
    rivals = json.loads((card.parent / "evaluation.json").read_text("utf-8"))["rivals"]
    assert f"{base.name} in 4 bits, zero-shot" in [each["description"] for each in rivals]
