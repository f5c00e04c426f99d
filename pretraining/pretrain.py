"""Pretrain a small base model.

    python pretraining/pretrain.py --teacher path/to/all-MiniLM-L6-v2 --minutes 60

A Qwen2 model of 5.8 million parameters learns from random weights, in each step from one task: a
label set drawn from people's or from clusters' labels, asked in Remora's own prompt. Losses are
summed: the next token of messages and labels; at the token that begins the answer, the sentence
embedding of a teacher (all-MiniLM-L6-v2) through a linear layer that is dropped later; how alike
the step's messages are; and which of the step's teacher embeddings is the message's (InfoNCE).
Half of the steps are about embeddings only, of texts that need no label.
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import json
import math
import random
import re
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

import corpus
import phrases
from remora.data.prompt import Prompt, TokenSequence, common_prefix_length
from remora.tree import attention, packing
from remora.tree.loss import loss_sum

VOCABULARY = 6_144
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--teacher", type=Path, required=True, help="folder of all-MiniLM-L6-v2")
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--rows", type=int, default=96, help="messages a step")
    parser.add_argument("--learning-rate", type=float, default=3e-3)
    parser.add_argument("--output", type=Path, default=Path("nano"))
    parser.add_argument("--cache", type=Path, default=Path("nano-cache"))
    parser.add_argument("--spliced", type=int, default=60_000, help="texts made of others")
    parser.add_argument("--written", type=int, default=100_000, help="texts made of phrases")
    parser.add_argument("--exchanged", type=int, default=80_000, help="texts with words exchanged")
    parser.add_argument("--init", type=Path, help="go on from the model in this folder")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.manual_seed(options.seed)
    texts, tasks, own = corpus.read()
    made = phrases.written(options.written, options.seed)
    sources = texts + own * 15 + made  # ours are few, and about what the others lack
    made += corpus.spliced(sources, options.spliced, options.seed)
    words = re.findall(r"^[a-z]{3,}$", (options.teacher / "vocab.txt").read_text("utf-8"), re.M)
    made += corpus.exchanged(sources, words, options.exchanged, options.seed)
    texts += corpus.unseen(made)
    targets = teacher_embeddings(texts, options.teacher, options.cache)
    tasks += corpus.clustered(texts, targets, (60, 150, 400, 1_000))
    options.output.mkdir(parents=True, exist_ok=True)
    if options.init:
        tokenizer, model = load(options.init, options.output)
    else:
        tokenizer = train_tokenizer(texts, tasks, options.output)
        model = new_model(tokenizer)
    project = nn.Linear(model.config.hidden_size, targets.shape[1])
    start_from_teacher(model, project, tokenizer, options.teacher, embed=not options.init)
    train(model, project, tokenizer, texts, tasks, torch.from_numpy(targets), options)


def teacher_embeddings(texts: list[str], folder: Path, cache: Path) -> NDArray[np.float32]:
    """Return the teacher's sentence embeddings, [texts, 384], of length 1."""
    from transformers import AutoModel, AutoTokenizer

    digest = hashlib.sha256("\n".join(texts).encode()).hexdigest()[:16]
    path = cache / f"embeddings-{digest}.npy"
    if path.is_file():
        return np.load(path, allow_pickle=False)
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModel.from_pretrained(folder)
    order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
    result = np.empty((len(texts), model.config.hidden_size), dtype=np.float32)
    for start in range(0, len(order), 128):
        chosen = order[start : start + 128]
        batch = tokenizer(
            [texts[i] for i in chosen],
            padding=True,
            truncation=True,
            max_length=128,
            return_tensors="pt",
        )
        with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
            hidden = model(**batch).last_hidden_state.float()
        mask = batch["attention_mask"][..., None]
        result[chosen] = functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1).numpy()
    cache.mkdir(parents=True, exist_ok=True)
    np.save(path, result, allow_pickle=False)
    return result


def train_tokenizer(texts: list[str], tasks: list[corpus.Task], folder: Path) -> Any:
    """Learn a byte-level BPE of the corpus, digits one by one, and save it with its template."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    pattern = Regex(r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}|[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(pattern, behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    names = [
        corpus.respelled(label, style)
        for task in tasks
        for label in task.members
        for style in (0, 1)
    ]
    lower = [text.lower() for text in texts]
    frame = ["user\n", "assistant\n", "\n\n", *corpus.INSTRUCTIONS] * 50
    tokenizer.train_from_iterator([*texts, *lower, *names, *frame], trainer)
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=["<|im_start|>"],
        model_max_length=2_048,
    )
    wrapped.chat_template = CHAT_TEMPLATE
    wrapped.save_pretrained(folder)
    return wrapped


def new_model(tokenizer: Any) -> Any:
    from transformers import AutoModelForCausalLM, Qwen2Config

    config = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=256,
        intermediate_size=768,
        num_hidden_layers=5,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=2_048,
        rms_norm_eps=1e-6,
        rope_parameters={"rope_type": "default", "rope_theta": 10_000.0},
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    config._attn_implementation = "sdpa"
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    attention.install(model)
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters")
    return model


@torch.no_grad()
def start_from_teacher(
    model: Any, project: nn.Linear, tokenizer: Any, folder: Path, *, embed: bool
) -> None:
    """Set the token embeddings to what the teacher says of each token alone, and `project` to fit.

    The teacher's vectors, [vocabulary, 384], are cut to their principal components, as Model2Vec
    does it: their mean over a message is already a fair embedding of the message.
    """
    from transformers import AutoModel, AutoTokenizer

    teacher_tokenizer = AutoTokenizer.from_pretrained(folder)
    teacher = AutoModel.from_pretrained(folder).eval()
    words = [tokenizer.decode([i]).strip() or "." for i in range(len(tokenizer))]
    batch = teacher_tokenizer(words, padding=True, return_tensors="pt")
    hidden = teacher(**batch).last_hidden_state
    mask = batch["attention_mask"][..., None]
    vectors = (hidden * mask).sum(1) / mask.sum(1)
    mean = vectors.mean(0)
    basis = torch.linalg.svd(vectors - mean, full_matrices=False).Vh[: project.in_features].T
    project.weight.copy_(basis / project.in_features**0.5)
    project.bias.copy_(mean / vectors.norm(dim=1).mean())
    if embed:
        reduced = (vectors - mean) @ basis
        model.get_input_embeddings().weight.copy_(reduced * 0.04 / reduced.std())


def load(folder: Path, output: Path) -> tuple[Any, Any]:
    """Return the tokenizer and the model of an earlier run, in float32, to go on from."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.save_pretrained(output)
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="sdpa"
    )
    attention.install(model)
    return tokenizer, model


class Episodes:
    """Draws the steps: a task, some of its labels, a way to ask, and messages."""

    def __init__(
        self, tokenizer: Any, texts: list[str], tasks: list[corpus.Task], seed: int
    ) -> None:
        self.tokenizer, self.texts, self.tasks = tokenizer, texts, tasks
        self.rng = random.Random(seed)
        # People's labels are better than clusters', and clusters use all texts.
        self.shares = [
            4.0 if task.name == "clinc150" else 0.5 if task.name == "snips" else 1.5
            for task in tasks
        ]

    def draw(self, rows: int) -> tuple[list[TokenSequence], list[int], int]:
        """Return token sequences, their texts' indices, and the length of what all begin with."""
        rng = self.rng
        (task,) = rng.choices(self.tasks, self.shares)
        labels = sorted(task.members)
        if len(labels) > 4 and rng.random() < 0.7:
            labels = rng.sample(labels, rng.randint(2, min(len(labels), 100)))
        style = rng.choice((0, 0, 0, 1, 1, 2, 3, 4, 5))
        names = {label: corpus.respelled(label, style) for label in labels}
        rng.shuffle(labels)
        labels = list({names[label]: label for label in labels}.values())
        instruction = (
            corpus.INSTRUCTIONS[0] if rng.random() < 0.5 else rng.choice(corpus.INSTRUCTIONS)
        )
        listed = len(labels) <= 40 and rng.random() < 0.35
        prompt = Prompt(
            self.tokenizer,
            [names[label] for label in labels],
            instruction=instruction,
            list_labels=listed,
            max_length=2_048,
        )
        chosen = rng.choices(labels, k=rows)
        members = [rng.choice(task.members[label]) for label in chosen]
        messages = [corpus.roughened(self.texts[i], rng) for i in members]
        sequences = prompt.rows(messages, [names[label] for label in chosen])
        return sequences, members, len(prompt.prefix)

    def draw_unlabelled(self, rows: int) -> tuple[list[TokenSequence], list[int], int]:
        """Return the same for any texts, with an answer of one token that is not learned."""
        rng = self.rng
        instruction = (
            corpus.INSTRUCTIONS[0] if rng.random() < 0.7 else rng.choice(corpus.INSTRUCTIONS)
        )
        prompt = Prompt(self.tokenizer, ["a"], instruction=instruction, max_length=2_048)
        members = rng.sample(range(len(self.texts)), rows)
        messages = [corpus.roughened(self.texts[i], rng) for i in members]
        stems = prompt.stems(messages)
        end = self.tokenizer.eos_token_id
        return [TokenSequence([*s, end], len(s)) for s in stems], members, len(prompt.prefix)


def train(
    model: Any,
    project: nn.Linear,
    tokenizer: Any,
    texts: list[str],
    tasks: list[corpus.Task],
    targets: Tensor,
    options: argparse.Namespace,
) -> None:
    parameters = [*model.parameters(), *project.parameters()]
    matrices = [p for p in model.model.layers.parameters() if p.dim() == 2]
    others = [p for p in parameters if all(p is not m for m in matrices)]
    optimizers: list[torch.optim.Optimizer] = [
        torch.optim.Muon(
            matrices,
            lr=options.learning_rate,
            weight_decay=0.05,
            adjust_lr_fn="match_rms_adamw",
        ),
        # Slower, so that what the teacher says of single tokens is kept.
        torch.optim.AdamW(
            others, lr=options.learning_rate / 3, betas=(0.9, 0.95), weight_decay=0.0
        ),
    ]
    rates = [group["lr"] for optimizer in optimizers for group in optimizer.param_groups]
    episodes = Episodes(tokenizer, texts, tasks, options.seed)
    began = saved = time.monotonic()
    step, tokens, means = 0, 0, np.zeros(4)
    while (passed := (time.monotonic() - began) / 60 / options.minutes) < 1:
        # Warm-up in steps, then constant, then down to zero over the last 40% of the time.
        rate = min(1.0, (step + 1) / 200, (1 - passed) / 0.4)
        groups = [group for optimizer in optimizers for group in optimizer.param_groups]
        for group, highest in zip(groups, rates, strict=True):
            group["lr"] = highest * rate
        labelled = step % 2 == 0
        draw = episodes.draw if labelled else episodes.draw_unlabelled
        sequences, members, prefix = draw(options.rows if labelled else 2 * options.rows)
        losses = step_losses(model, project, sequences, targets[members], prefix, labelled)
        sum(losses[:3]).backward()  # type: ignore[union-attr]
        nn.utils.clip_grad_norm_(parameters, 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        step, tokens = step + 1, tokens + int(losses[3])
        means = 0.98 * means + 0.02 * np.array([float(torch.as_tensor(x).detach()) for x in losses])
        if step % 50 == 0:
            shown = means / (1 - 0.98**step)
            print(
                f"step {step} {passed:.1%} tokens {tokens:,} next token {shown[0]:.3f} "
                f"embedding {shown[1]:.3f} which {shown[2]:.3f}",
                flush=True,
            )
        if time.monotonic() - saved > 240:
            save(model, options.output)
            saved = time.monotonic()
    save(model, options.output)
    figures = {"steps": step, "tokens": tokens, "minutes": options.minutes}
    (options.output / "pretraining.json").write_text(json.dumps(figures, indent=2) + "\n")


def step_losses(
    model: Any,
    project: nn.Module,
    sequences: list[TokenSequence],
    targets: Tensor,
    prefix: int,
    labelled: bool,
) -> tuple[Tensor, Tensor, Tensor, int]:
    """Return the losses of next token, embedding and choice, and the number of tokens computed."""
    # Everything after the common prefix is learned; where the answer begins is remembered.
    order = sorted(range(len(sequences)), key=lambda i: sequences[i].token_ids)
    learned = [TokenSequence(sequences[i].token_ids, prefix) for i in order]
    packed = packing.build(learned)
    with torch.autocast("cpu", torch.bfloat16):
        hidden = model.model(
            input_ids=packed.token_ids[None],
            position_ids=packed.position_ids[None],
            use_cache=False,
            **attention.inputs(
                model.config, functools.partial(attention.tree_mask, packed), torch.float32
            ),
        ).last_hidden_state[0]
        next_token = torch.zeros(())
        if labelled:
            logits = model.lm_head(hidden[packed.predictors])
            next_token = loss_sum(logits, packed) / packed.num_supervised_tokens
    # The last token of each stem: in a preorder, rows stand in the order of their tokens.
    ends: list[int] = []
    path: list[int] = []
    start, before = 0, []
    for i in order:
        ids, answer_start = sequences[i]
        shared = common_prefix_length(before, ids)
        path = [*path[:shared], *range(start, start + len(ids) - shared)]
        start += len(ids) - shared
        ends.append(path[answer_start - 1])
        before = ids
    found = functional.normalize(project(hidden[ends].float()), dim=-1)
    wanted = targets[order]
    embedding = (1 - (found * wanted).sum(-1)).mean() * 2
    alike = functional.mse_loss(found @ found.t(), wanted @ wanted.t())
    scores = found @ wanted.t() / 0.05
    twins = (wanted @ wanted.t() > 0.98) & ~torch.eye(len(order), dtype=torch.bool)
    which = functional.cross_entropy(scores.masked_fill(twins, -math.inf), torch.arange(len(order)))
    return next_token, embedding + 4 * alike, 0.5 * which, packed.num_tokens


def save(model: Any, folder: Path) -> None:
    import copy

    kept = copy.deepcopy(model).to(torch.bfloat16)
    kept.save_pretrained(folder)


if __name__ == "__main__":
    main()
