"""The model card of a run, README.md, as the Hugging Face hub shows it."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

from remora.errors import DataError
from remora.evaluation import results
from remora.evaluation.results import Results
from remora.evaluation.rivals import of_figures, seconds_of, verdict
from remora.formatting import spoken_time
from remora.models import gguf, hub, metadata
from remora.runtime import files

NUM_CONFUSIONS = 5


def write(directory: Path) -> None:
    """Write README.md of a finished run.

    Raises:
        DataError: If the run is not finished, or its files are broken.
        ResourceError: If it cannot be written.
    """
    files.write_text(directory / "README.md", card(directory))


def card(directory: Path) -> str:
    """Return a model card with the run's results.

    https://huggingface.co/docs/hub/model-cards. The card is meant to be published: local files and
    folders appear by their last name only, and the metadata link a base model or a data set only if
    it is on the hub.

    Raises:
        DataError: If the run is not finished, or its files are broken.
    """
    from huggingface_hub import EvalResult, ModelCard, ModelCardData

    run = results.read(directory)
    metrics = run.figures["metrics"]
    trained = results.read_json(metadata.adapter_folder(directory) / "remora.json")
    if trained is None:
        raise DataError(f"{directory} has no trained model; give the directory of a finished run")
    is_full = trained.get("method") == "full"
    # What may be named in public.
    base = trained["base_model"]  # an absolute path or a hub id
    source = results.read_settings(directory)["data"]
    hub_data = source.removeprefix("hf:").split(":")[0] if source.startswith("hf:") else None
    data_name = hub_data or Path(source).name
    measured: dict[str, Any] = {
        "task_type": "text-classification",
        "dataset_type": data_name,
        "dataset_name": data_name,
        "dataset_split": run.figures["measured_on"],
    }
    # The metadata, then the text.
    about = ModelCardData(
        base_model=base if hub.HUB_ID.fullmatch(base) else None,
        datasets=hub_data,
        library_name="transformers" if is_full else "peft",
        pipeline_tag="text-classification",
        tags=["remora"] if is_full else ["lora", "remora"],
        model_name=directory.resolve().name,
        eval_results=[
            EvalResult(
                metric_type="accuracy",
                metric_name="Accuracy",
                metric_value=metrics["accuracy"],
                **measured,
            ),
            EvalResult(
                metric_type="f1",
                metric_name="Macro-F1",
                metric_value=metrics["macro_f1"],
                metric_args={"average": "macro"},
                **measured,
            ),
        ],
    )
    base_name = Path(base).name if Path(base).is_absolute() else base
    stored = trained.get("gguf_quantization")
    of = f"{_code(base_name)} ({gguf.described(stored)})" if stored else _code(base_name)
    named = {"full": "All weights of", "qlora": "A LoRA adapter (PEFT) on 4-bit weights of"}
    what = named.get(trained.get("method", ""), "A LoRA adapter (PEFT) for")
    text = _text(run, f"{what} {of}", data_name)
    if trained.get("answer") == "classes":
        text += _stock_usage(base_name, is_full, run.multi_label)
    return str(ModelCard(f"---\n{about.to_yaml()}\n---\n\n{text}"))


def _text(run: Results, trained: str, data: str) -> str:
    """Return the card's text: model, accuracy beside the baseline's, usage and labels."""
    figures, metrics = run.figures, run.figures["metrics"]
    low, high = metrics["accuracy_interval"]
    confusions = [
        f"- {c['count']} of {_code(c['true'])} predicted as {_code(c['predicted'])} "
        f"({c['share']:.0%})"
        for c in metrics["confusions"][:NUM_CONFUSIONS]
    ]
    lines = [
        f"# {_code(run.directory.resolve().name)}",
        "",
        f"{trained}, trained by Remora on {_code(data)}.",
        "",
        f"{_micro_f1(metrics)}{'All labels right in' if run.multi_label else 'Accuracy'} "
        f"{metrics['accuracy']:.2%} (95% interval {low:.1%} to {high:.1%}), macro-F1 "
        f"{metrics['macro_f1']:.2%}, on {metrics['num_rows']:,} {figures['measured_on']} rows.",
        "",
        *_baselines(figures),
        *(["Largest confusions:", "", *confusions, ""] if confusions else []),
        "```sh",
        "remora predict . < messages.txt    # in this folder, or give its hub id",
        "```",
        "",
        f"Every message gets {'any' if run.multi_label else 'one'} of these {len(run.labels)} "
        f"labels{', or none' if run.multi_label else ''}: "
        f"{', '.join(_code(label) for label in run.labels)}.",
    ]
    return "\n".join(lines) + "\n"


def _micro_f1(metrics: dict[str, Any]) -> str:
    """Return a sentence where rows have several labels, else ""."""
    if "micro_f1" not in metrics:
        return ""
    low, high = metrics["micro_f1_interval"]
    return f"Micro-F1 {metrics['micro_f1']:.2%} (95% interval {low:.1%} to {high:.1%}). "


def _stock_usage(base: str, is_full: bool, multi_label: bool) -> str:
    """Return how transformers alone answers by the head of a model that scores classes."""
    folder = json.dumps("." if is_full else base)
    adapted = (
        "labels = dict(enumerate(card['labels']))",
        "model = AutoModelForSequenceClassification.from_pretrained(",
        f"    {folder}, id2label=labels, label2id={{label: i for i, label in labels.items()}}",
        ")",
        'model = PeftModel.from_pretrained(model, ".")',
    )
    whole = (f"model = AutoModelForSequenceClassification.from_pretrained({folder})",)
    lines = [
        "",
        "A linear head at the last token of the prompt scores the labels, so "
        f"{'transformers alone answers' if is_full else 'transformers and PEFT alone answer'} too, "
        "given the rendered prompt, one at a time or padded on the right:",
        "",
        "```python",
        "import json",
        *(() if is_full else ("from peft import PeftModel",)),
        "from transformers import AutoModelForSequenceClassification, AutoTokenizer",
        "",
        "card = json.load(open('remora.json', encoding='utf-8'))",
        *(whole if is_full else adapted),
        f"tokenizer = AutoTokenizer.from_pretrained({folder})",
        "prompt = card['rendered']['head'] + 'Where is my order?' + card['rendered']['tail']",
        "inputs = tokenizer(prompt, add_special_tokens=False, return_tensors='pt')",
        *(
            (
                "probabilities = model.eval()(**inputs).logits.sigmoid()[0].tolist()",
                "rows = zip(card['labels'], probabilities, card['thresholds'])",
                "print([label for label, p, threshold in rows if p >= threshold])",
            )
            if multi_label
            else ("print(model.eval().config.id2label[int(model(**inputs).logits.argmax())])",)
        ),
        "```",
    ]
    return "\n".join(lines) + "\n"


def _baselines(figures: dict[str, Any]) -> list[str]:
    """Return a table of the baselines and the verdict on the best, [] without baselines."""
    rivals = [replace(each, description=_code(each.description)) for each in of_figures(figures)]
    if not rivals:
        return []
    trained = "model" if figures.get("method") == "full" else "adapter"
    rows = []
    for each in rivals:
        low, high = each.accuracy_interval
        name = each.description.replace("|", r"\|") + (each.rows and f", {each.rows}")
        rows.append(
            f"| {name} | {each.accuracy:.2%} | {low:.1%} to {high:.1%} | {each.macro_f1:.2%} | "
            f"{spoken_time(each.seconds)} | {each.p_value:.2g} |"
        )
    return [
        "| baseline | accuracy | 95% interval | macro-F1 | time | p |",
        "|---|---|---|---|---|---|",
        *rows,
        "",
        f"{verdict(rivals, trained, seconds_of(figures))}.",
        "",
    ]


def _code(text: str) -> str:
    """Return a text as one line of Markdown code, in which no character is markup."""
    line = " ".join(text.split())
    longest = max((len(ticks) for ticks in re.findall("`+", line)), default=0)
    space = " " if longest else ""
    return f"{'`' * (longest + 1)}{space}{line}{space}{'`' * (longest + 1)}"
