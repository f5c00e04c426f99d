"""A head over classes trains as PEFT's own sequence classification does, in both layouts.

Also covers remora.data.class_prompt, and the classes of remora.tree.packing and remora.tree.rows.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import peft
import pytest
import torch
from torch import Tensor

from conftest import randomize_adapter, tiny_config
from hybrids import hybrid_config
from remora.data.class_prompt import ClassPrompt
from remora.data.prompt import Prompt, TokenSequence
from remora.errors import ModelError
from remora.models import class_head, loading, lora, saved
from remora.planning.step_memory import Skeleton
from remora.tree import layouts, packing
from remora.tree.check import check_layout
from remora.tree.forward import answer_logits, is_narrow
from remora.tree.loss import loss_sum
from remora.tree.packing import MicroBatch, TokenTree
from stock import with_head

LABELS = [f"label {i}" for i in range(11)]  # more than some rows have, fewer than the vocabulary
PREFIX = list(range(3, 20))
STEMS = [[30, 31, 32, 33, 34, 40, 41], [30, 31, 7], [30, 31, 7], [50, 40], [30, 31, 7, 8, 9]]
CLASSES = [3, 10, 0, 3, 7]  # the second and the third text are the same and have other labels
BATCH = [
    TokenSequence([*PREFIX, *stem], len(PREFIX) + len(stem), class_index=index)
    for stem, index in zip(STEMS, CLASSES, strict=True)
]
SETTINGS: dict[str, Any] = {"r": 4, "lora_alpha": 8, "lora_dropout": 0.0}


def models(architecture: str, method: str) -> tuple[Any, Any]:
    """Return a model in float64 as it trains here, and the stock one with the same weights."""
    model, stock = with_head(architecture, LABELS)
    if method == "full":
        stock.load_state_dict(model.double().state_dict())
        return model.train(), stock.train()
    ours = lora.add_adapter(model, rank=4, alpha=8, dropout=0.0).double()
    randomize_adapter(ours)
    modules = ours.peft_config["default"].target_modules
    fan = ours.peft_config["default"].fan_in_fan_out
    wanted = peft.LoraConfig(
        **SETTINGS, task_type="SEQ_CLS", target_modules=modules, fan_in_fan_out=fan
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        stock = peft.get_peft_model(stock, wanted).double()
    stock.load_state_dict(ours.state_dict())
    return ours.train(), stock.train()


def gradients(model: Any) -> dict[str, Tensor]:
    found = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    model.zero_grad()
    return found


def stock_loss(stock: Any) -> Tensor:
    """The stock model's own mean loss of the padded batch, summed."""
    width = max(len(row.token_ids) for row in BATCH)
    ids = torch.tensor([[*row.token_ids, *[0] * (width - len(row.token_ids))] for row in BATCH])
    output = stock(input_ids=ids, attention_mask=(ids != 0).long(), labels=torch.tensor(CLASSES))
    loss: Tensor = output.loss * len(BATCH)
    return loss


def assert_same(ours: Any, stock: Any, batches: list[MicroBatch]) -> None:
    """Compare loss and all gradients, to 1e-6 of the largest number of each array."""
    wanted = stock_loss(stock)
    wanted.backward()
    expected = gradients(stock)
    found = torch.stack([loss_sum(answer_logits(ours, batch), batch) for batch in batches]).sum()
    found.backward()
    computed = gradients(ours)
    assert float(found.detach()) == pytest.approx(float(wanted.detach()), rel=1e-6)
    assert computed.keys() == expected.keys()
    assert any("score" in name for name in computed)
    for name, gradient in computed.items():
        if expected[name] is None:  # positions that no row has
            assert gradient is None
            continue
        scale = max(expected[name].abs().max(), torch.tensor(1e-9))
        assert (gradient - expected[name]).abs().max() / scale <= 1e-6, name


@pytest.mark.parametrize("layout", ["tree", "rows"])
@pytest.mark.parametrize("method", ["lora", "full"])
@pytest.mark.parametrize("architecture", ["qwen2", "gemma2", "mistral", "gpt2", "opt"])
def test_loss_and_every_gradient_equal_those_of_stock_peft(
    architecture: str, method: str, layout: Any
) -> None:
    ours, stock = models(architecture, method)
    layouts.assign(ours, layout)
    assert_same(ours, stock, layouts.split(layout, BATCH, 1000))
    assert_same(ours, stock, layouts.split(layout, BATCH, 30))  # in several micro-batches


def a_token_early(batch: MicroBatch) -> MicroBatch:
    return replace(batch, predictors=batch.predictors - 1)


def other_classes(batch: MicroBatch) -> MicroBatch:
    return replace(batch, edge_targets=batch.edge_targets.flip(0))


def all_that_went_before(batch: MicroBatch) -> MicroBatch:
    assert isinstance(batch, TokenTree)
    return replace(batch, subtree_end=torch.full_like(batch.subtree_end, batch.num_tokens))


@pytest.mark.parametrize(
    ("layout", "spoil"),
    [
        ("tree", a_token_early),
        ("tree", other_classes),
        ("tree", all_that_went_before),
        ("rows", a_token_early),
    ],
)
def test_another_place_another_class_or_another_mask_is_not_the_same(
    layout: Any, spoil: Callable[[MicroBatch], MicroBatch]
) -> None:
    ours, stock = models("qwen2", "lora")
    layouts.assign(ours, layout)
    with pytest.raises(AssertionError):
        assert_same(ours, stock, [spoil(batch) for batch in layouts.split(layout, BATCH, 1000)])


@pytest.mark.parametrize("layout", ["tree", "rows"])
def test_one_token_a_row_is_scored_and_no_label_is_computed(layout: Any) -> None:
    ours, _ = models("qwen2", "lora")
    layouts.assign(ours, layout)
    shapes = []
    head = class_head.head_of(ours)
    head.register_forward_hook(lambda _, __, output: shapes.append(tuple(output.shape)))
    batch = layouts.build(layout, BATCH)
    answer_logits(ours, batch)
    # In the tree rows of the same text share their last token too.
    assert shapes == [(1, 4 if layout == "tree" else 5, len(LABELS))]
    nodes = {tuple(row.token_ids[:end]) for row in BATCH for end in range(1, 25)}
    assert batch.num_tokens == (len(nodes) if layout == "tree" else 5 * 24)
    assert batch.num_supervised_tokens == 5
    check_layout(ours.float(), BATCH)


def test_a_plan_counts_logits_over_classes_only() -> None:
    config = tiny_config("qwen2", vocabulary=20_000)
    counts = []
    for classes in (LABELS, ()):
        class_head.describe(config, classes)
        empty = loading.load_empty(config, torch.float32)
        adapted = lora.add_adapter(empty, rank=4, alpha=8, dropout=0.0)
        counts.append(Skeleton(adapted, autocast=None, device="cpu").count(packing.build(BATCH)))
    assert counts[1].logits >= 4 * 4 * 20_000  # 4 places in 32 bits
    assert counts[0].peak < counts[1].peak - counts[1].logits // 2


def test_rows_of_a_tree_have_their_weights() -> None:
    weighted = [row._replace(weight=1.0 + i) for i, row in enumerate([*BATCH, BATCH[0]])]
    tree = packing.build(weighted)
    assert sorted(tree.edge_weights.tolist()) == [2.0, 3.0, 4.0, 5.0, 7.0]
    assert int(tree.edge_weights.sum()) == 21


def test_the_head_is_float32_whatever_the_base_is() -> None:
    from transformers import AutoModelForSequenceClassification

    config = tiny_config("qwen2")
    class_head.describe(config, LABELS)
    model = AutoModelForSequenceClassification.from_config(config, dtype=torch.bfloat16)
    layouts.assign(model, "tree")
    class_head.install(model)
    adapted = lora.add_adapter(model, rank=4, alpha=8, dropout=0.0)
    head = class_head.head_of(adapted)
    assert head.weight.dtype == torch.float32
    assert head.original_module.weight.dtype == torch.bfloat16  # frozen beside it
    with torch.autocast("cpu", torch.bfloat16):
        assert answer_logits(adapted, packing.build(BATCH)).dtype == torch.float32
    assert is_narrow(adapted)
    check_layout(adapted, BATCH)  # by what 16 bits can tell apart, though logits have 32
    counts = lora.count_parameters(adapted)
    assert counts.modules["head"] == 11 * 32
    assert counts.trainable == sum(counts.modules.values())


def test_rows_begin_as_the_words_of_their_labels(tokenizer: Any) -> None:
    from transformers import AutoModelForSequenceClassification

    labels = ["card_arrival", "top up", "?"]
    config = tiny_config("qwen2", vocabulary=len(tokenizer))
    class_head.describe(config, labels)
    model = AutoModelForSequenceClassification.from_config(config, dtype=torch.float32)
    class_head.install(model)
    prompt = ClassPrompt(tokenizer, labels, instruction="", max_length=64)
    class_head.begin(model, prompt)
    embedding = model.get_input_embeddings().weight
    words = tokenizer("card arrival", add_special_tokens=False)["input_ids"]
    torch.testing.assert_close(model.score.weight[0], embedding[words].mean(0))
    assert model.score.weight[2].abs().max() == 0  # no words


def test_a_class_prompt_is_the_prompt_without_an_answer(tokenizer: Any) -> None:
    words = Prompt(tokenizer, ["a", "b"], instruction="Sort.", max_length=40)
    classes = ClassPrompt(tokenizer, ["a", "b"], instruction="Sort.", max_length=40)
    assert classes.classes == ("a", "b")
    assert words.classes == ()
    (row,) = classes.rows(["Where is it?"], ["b"])
    (other,) = words.rows(["Where is it?"], ["b"])
    assert row.token_ids == other.token_ids[: other.answer_start]
    assert (row.targets, row.predictors) == ([1], range(len(row.token_ids) - 1, len(row.token_ids)))
    # The answer leaves its room to the message.
    long = "where is my card " * 20
    assert len(classes.stems([long])[0]) == 40
    assert len(words.stems([long])[0]) == 40 - len(words.answers[0])
    assert type(classes.pinned(classes.rendered)) is ClassPrompt
    assert classes.pinned(classes.rendered).changed == ""


@pytest.mark.parametrize("pad", [None, 0, "last"])
def test_a_merged_model_names_padding_that_is_not_the_end_of_the_prompt(
    tokenizer: Any, pad: Any
) -> None:
    prompt = ClassPrompt(tokenizer, ["a", "b"], instruction="", max_length=64)
    last = prompt.stems([""])[0][-1]
    config = tiny_config("qwen2", vocabulary=len(tokenizer))
    config.pad_token_id = last if pad == "last" else pad
    saved.let_stock_pool(config, prompt)
    assert config.pad_token_id == (0 if pad == 0 else tokenizer.pad_token_id)
    assert config.pad_token_id != last


def test_an_architecture_without_such_a_head_is_refused() -> None:
    with pytest.raises(ModelError, match=r"no lfm2 for sequence classification.*--answer words"):
        class_head.describe(hybrid_config("lfm2", 97), LABELS)
