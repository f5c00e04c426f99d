"""Compressed adapters against the full matrices: stock torch decomposes them, stock PEFT loads."""

from __future__ import annotations

import copy
import itertools
import json

import numpy as np
import peft
import pytest
import torch
from safetensors.torch import load_file, save_file

from conftest import randomize_adapter, tiny_model
from remora.errors import ConfigError, ModelError
from remora.export import truncate
from remora.models import loading, lora

# PEFT still reads an attribute that transformers has renamed.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")

IDS = torch.tensor([[5, 6, 7, 8, 9]])
CARD = {"remora.json": b"{}"}


@pytest.fixture(params=["qwen2", "gpt2"])
def trained(request, tmp_path):
    """A base model, its adapter of rank 4 and alpha 10 on disk, and each module's full update."""
    base = tiny_model(request.param, torch.float32)
    adapted = lora.add_adapter(copy.deepcopy(base), rank=4, alpha=10, dropout=0.1)
    randomize_adapter(adapted)
    adapted.save_pretrained(tmp_path / "full", save_embedding_layers=False)
    tensors = load_file(tmp_path / "full" / "adapter_model.safetensors")
    updates = {
        name.removeprefix("base_model.model.").removesuffix(".lora_A.weight"): 2.5
        * tensors[name.replace("lora_A", "lora_B")].double()
        @ a.double()
        for name, a in tensors.items()
        if "lora_A" in name
    }
    return base, tmp_path / "full", updates


def write(artifact, folder):
    folder.mkdir()
    for name, content in artifact.files.items():
        (folder / name).write_bytes(content)
    return folder


def stock_logits(base, folder):
    adapted = peft.PeftModel.from_pretrained(copy.deepcopy(base), str(folder)).eval()
    return adapted(input_ids=IDS).logits


def logits_with(base, updates):
    """The logits of a base model to whose weights full matrices were added."""
    changed = copy.deepcopy(base).eval()
    with torch.no_grad():
        for module, update in updates.items():
            weight = changed.get_submodule(module).weight
            transposed = type(changed.get_submodule(module)).__name__ == "Conv1D"
            weight += (update.t() if transposed else update).float()
        return changed(input_ids=IDS).logits


def nearest(matrix, rank):
    left, values, right = torch.linalg.svd(matrix)
    return (left[:, :rank] * values[:rank]) @ right[:rank]


def test_the_decomposition_is_that_of_the_full_matrix():
    generator = torch.Generator().manual_seed(0)
    for out, into, rank in ((50, 30, 7), (3, 40, 8), (40, 3, 8)):
        b, a = (
            torch.randn(shape, generator=generator, dtype=torch.float64)
            for shape in ((out, rank), (rank, into))
        )
        found = truncate.decompose(a, b, 1.7)
        full = torch.linalg.svdvals(1.7 * b @ a)
        torch.testing.assert_close(found.values, full[: len(found.values)])
        for kept in range(1, min(rank, out, into) + 1):
            cut = (found.left[:, :kept] * found.values[:kept]) @ found.right[:kept]
            torch.testing.assert_close(cut, nearest(1.7 * b @ a, kept))


def test_the_full_matrix_is_never_formed():
    a, b = torch.randn(4, 1_000_000), torch.randn(1_000_000, 4)  # their product has 4 TB
    assert truncate.decompose(a, b, 1.0).left.shape == (1_000_000, 4)


@pytest.mark.parametrize("budget", [6_000, 9_000, 15_000, 100_000])
def test_stock_peft_computes_the_nearest_updates(trained, tmp_path, budget):
    base, folder, updates = trained
    artifact = truncate.fit(truncate.read(folder), budget, torch.float32, CARD)
    assert artifact.num_bytes <= budget
    cut = {name: nearest(update, artifact.ranks[name]) for name, update in updates.items()}
    small = write(artifact, tmp_path / "small")
    found = stock_logits(base, small)
    torch.testing.assert_close(found, logits_with(base, cut), rtol=1e-4, atol=1e-4)
    config = json.loads((small / "adapter_config.json").read_text())
    kept = {name for name, rank in artifact.ranks.items() if rank}
    assert set(config["target_modules"]) == kept
    if budget == 6_000:
        assert kept < set(updates)
        assert not torch.allclose(found, logits_with(base, updates), atol=1e-2)
    if budget == 100_000:
        assert set(artifact.ranks.values()) == {4}
        torch.testing.assert_close(found, stock_logits(base, folder), rtol=1e-4, atol=1e-4)


def test_a_compressed_adapter_can_be_compressed_again(trained, tmp_path):
    _, folder, updates = trained
    once = truncate.fit(truncate.read(folder), 15_000, torch.float32, CARD)
    again = truncate.read(write(once, tmp_path / "once"))
    for name, update in again.updates.items():
        full = torch.linalg.svdvals(updates[name])[: once.ranks[name]]
        torch.testing.assert_close(update.values, full, rtol=1e-5, atol=1e-6)
    once = truncate.fit(truncate.read(folder), 15_000, torch.float8_e4m3fn, CARD)
    again = truncate.read(write(once, tmp_path / "in 8 bits"))
    for name, update in again.updates.items():
        full = torch.linalg.svdvals(updates[name])[: once.ranks[name]]
        torch.testing.assert_close(update.values, full, rtol=0.1, atol=0.1 * float(full[0]))


def test_the_ranks_keep_as_much_as_any_others_of_the_same_bytes():
    """All choices of ranks are tried, of modules with unlike shapes."""
    generator = np.random.default_rng(3)
    shapes = {"a": (8, 8), "b": (8, 24), "c": (40, 8)}
    updates = {
        name: truncate.Update(
            torch.zeros(out, 3),
            torch.from_numpy(np.sort(generator.exponential(size=3))[::-1].copy()),
            torch.zeros(3, into),
        )
        for name, (out, into) in shapes.items()
    }
    squares = {name: update.values.numpy() ** 2 for name, update in updates.items()}
    cost = {name: 2 * sum(shape) for name, shape in shapes.items()}

    def kept(ranks):
        return sum(squares[name][:rank].sum() for name, rank in ranks.items())

    for budget in range(0, 500, 16):
        found = truncate.allocate(updates, budget, torch.bfloat16)
        spent = sum(cost[name] * rank for name, rank in found.items())
        assert spent <= budget
        rivals = (dict(zip("abc", r, strict=True)) for r in itertools.product(range(4), repeat=3))
        best = max(
            kept(rival)
            for rival in rivals
            if sum(cost[name] * rank for name, rank in rival.items()) <= spent
        )
        assert kept(found) >= 0.9 * best  # greedy; the whole knapsack is not searched
        # No rank that would still fit was left.
        assert all(rank == 3 or cost[n] > budget - spent for n, rank in found.items())


def test_of_equal_values_the_cheaper_is_kept() -> None:
    values = torch.tensor([1.0])
    updates = {
        "dear": truncate.Update(torch.zeros(30, 1), values, torch.zeros(1, 30)),
        "cheap": truncate.Update(torch.zeros(10, 1), values, torch.zeros(1, 10)),
        "strong": truncate.Update(torch.zeros(30, 1), 2 * values, torch.zeros(1, 30)),
    }
    found = truncate.allocate(updates, 240, torch.float16)
    assert found == {"dear": 0, "cheap": 1, "strong": 1}  # 20 and 60 numbers of 2 bytes


def test_a_lower_power_spreads_the_ranks() -> None:
    updates = {
        "wide": truncate.Update(torch.zeros(20, 2), torch.tensor([4.0, 3.0]), torch.zeros(2, 20)),
        "narrow": truncate.Update(torch.zeros(5, 2), torch.tensor([1.2, 1.1]), torch.zeros(2, 5)),
    }
    for budget, narrow in ((80, 0), (100, 1)):  # a rank takes 80 bytes, or 20
        assert truncate.allocate(updates, budget, torch.float16) == {"wide": 1, "narrow": narrow}
        spread = truncate.allocate(updates, budget, torch.float16, power=1)
        assert spread == {"wide": 0, "narrow": 2}


def test_modules_without_an_update_get_no_rank(trained, tmp_path):
    _, folder, updates = trained
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    first = sorted(name for name in tensors if "lora_B" in name)[0]
    tensors[first].zero_()
    save_file(tensors, path)
    ranks = truncate.fit(truncate.read(folder), 10**6, torch.float16, CARD).ranks
    assert sorted(ranks.values()) == [0, *[4] * (len(updates) - 1)]


@pytest.mark.parametrize(
    ("dtype", "most"),
    [(torch.float16, 0.001), (torch.bfloat16, 0.006), (torch.float8_e4m3fn, 0.06)],
)
@pytest.mark.parametrize("size", [1e-5, 1.0, 1e3])
def test_weights_are_stored_as_asked_and_16_bits_round_less(trained, tmp_path, dtype, most, size):
    """Adapters whose updates are small or large are stored as well as others."""
    base, folder, updates = trained
    if dtype == torch.float16 and size < 1:
        pytest.skip("float16 has few numbers so small")
    path = folder / "adapter_model.safetensors"
    save_file({n: x * (size if "lora_B" in n else 1) for n, x in load_file(path).items()}, path)
    artifact = truncate.fit(truncate.read(folder), 10**6, dtype, CARD)
    small = write(artifact, tmp_path / "small")
    stored = load_file(small / "adapter_model.safetensors")
    assert {tensor.dtype for tensor in stored.values()} == {dtype}
    adapted = peft.PeftModel.from_pretrained(copy.deepcopy(base), str(small))
    for name, update in updates.items():
        layer = adapted.base_model.model.get_submodule(name)
        found = layer.get_delta_weight("default").double()
        if type(layer.base_layer).__name__ == "Conv1D":
            found = found.t()
        error = torch.linalg.norm(found - size * update) / torch.linalg.norm(size * update)
        assert error < most
        a, b = (stored[f"base_model.model.{name}.lora_{end}.weight"].double() for end in ("A", "B"))
        assert torch.linalg.norm(a) == pytest.approx(float(torch.linalg.norm(b)), rel=0.02)


def test_numbers_too_large_for_float16_are_refused(trained):
    _, folder, _ = trained
    path = folder / "adapter_model.safetensors"
    save_file({name: 1e6 * tensor for name, tensor in load_file(path).items()}, path)
    with pytest.raises(ConfigError, match=r"too large for torch.float16; use --dtype bfloat16"):
        truncate.fit(truncate.read(folder), 10**6, torch.float16, CARD)
    truncate.fit(truncate.read(folder), 10**6, torch.bfloat16, CARD)


def test_the_smallest_budget_is_told_and_is_enough(trained):
    _, folder, _ = trained
    adapter = truncate.read(folder)
    with pytest.raises(ConfigError) as caught:
        truncate.fit(adapter, 100, torch.float16, CARD)
    smallest = int(str(caught.value).split("takes ")[1].split(";")[0].replace(",", ""))
    found = truncate.fit(adapter, smallest, torch.float16, CARD)
    assert found.num_bytes == smallest
    assert sum(found.ranks.values()) == 1
    with pytest.raises(ConfigError):
        truncate.fit(adapter, smallest - 1, torch.float16, CARD)


def test_other_files_count(trained):
    _, folder, _ = trained
    adapter = truncate.read(folder)
    bare = truncate.fit(adapter, 12_000, torch.float16, {})
    laden = truncate.fit(adapter, 12_000, torch.float16, {"remora.json": bytes(4_000)})
    assert laden.num_bytes <= 12_000
    assert laden.mean_rank < bare.mean_rank


def test_what_is_no_plain_lora_is_refused(trained, tmp_path):
    _, folder, _ = trained
    for name in ("use_dora", "use_rslora"):
        config = peft.LoraConfig(target_modules=["q_proj"], **{name: True})
        other = peft.get_peft_model(tiny_model("qwen2", torch.float32), config)
        other.save_pretrained(tmp_path / name, save_embedding_layers=False)
        with pytest.raises(ModelError, match="not plain LoRA"):
            truncate.read(tmp_path / name)
    path = folder / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:500])
    with pytest.raises(ModelError, match=r"cannot be read \(.*\); train it again or restore it"):
        truncate.read(folder)


def test_qwen_1_5b_at_a_thousandth(shared, tmp_path):
    """The shapes of Qwen2.5-1.5B, the default adapter with random values, no base weights."""
    config = loading.load_config(shared / "models" / "qwen2.5-1.5b-instruct-config")
    empty = loading.load_empty(config, torch.bfloat16)
    base_bytes = 2 * sum(parameter.numel() for parameter in empty.parameters())
    assert base_bytes == pytest.approx(3.09e9, rel=0.01)  # 1.54 billion parameters, as published
    generator = torch.Generator().manual_seed(0)
    names = lora.target_modules(empty)
    tensors = {}
    for path, module in empty.named_modules():
        if path.rsplit(".", 1)[-1] in names:
            into, out = module.in_features, module.out_features
            for end, shape in (("A", (16, into)), ("B", (out, 16))):
                name = f"base_model.model.{path}.lora_{end}.weight"
                tensors[name] = torch.randn(shape, generator=generator)
    assert len(tensors) == 2 * 28 * 7
    full = tmp_path / "full"
    full.mkdir()
    save_file(tensors, full / "adapter_model.safetensors")
    peft.LoraConfig(r=16, lora_alpha=32, target_modules=names).save_pretrained(full)

    artifact = truncate.fit(truncate.read(full), base_bytes // 1000, torch.float16, CARD)
    assert artifact.num_bytes <= 3.1e6
    assert artifact.num_bytes > 0.98 * base_bytes / 1000
    small = write(artifact, tmp_path / "small")
    loaded = peft.PeftModel.from_pretrained(empty, str(small), low_cpu_mem_usage=True)
    ranks = {
        name.removeprefix("base_model.model."): layer.r["default"]
        for name, layer in loaded.named_modules()
        if isinstance(layer, peft.tuners.lora.LoraLayer)
    }
    assert ranks == {name: rank for name, rank in artifact.ranks.items() if rank}
    stored = load_file(small / "adapter_model.safetensors")
    found = peft.get_peft_model_state_dict(loaded, save_embedding_layers=False)
    assert {name: tensor.shape for name, tensor in found.items()} == {
        name: tensor.shape for name, tensor in stored.items()
    }
