"""Runs that answer by classes, through everything: trained, resumed, served, merged, refused."""

from __future__ import annotations

import hashlib
import json
import shutil
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
from numpy.typing import NDArray

from conftest import WAYS, WORDS, call, write_table
from remora import TextClassifier
from remora.config import PlanConfig, TrainConfig
from remora.data.dataset import load_data
from remora.errors import ConfigError, ModelError, Stopped
from remora.models import class_head, model_card, quantize, saved
from remora.models.saved import open_trained
from remora.planning.planner import make_plan
from remora.runtime.device import choose_precision
from remora.runtime.reporter import Reporter, Step
from remora.runtime.stop import Stop
from remora.serving.engine import Engine
from remora.training.run import train, train_until
from remora.training.session import open_session
from remora.tree import layouts

MESSAGES = [way.format(word) for way in WAYS[:3] for word in WORDS.values()]
LABELS = sorted(WORDS)
CPU = torch.device("cpu")


def settings(place: Path, **more: Any) -> TrainConfig:
    return TrainConfig(
        str(place / "data.csv"),
        **{
            "model": str(place / "base"),
            "output": place,
            "name": "run",
            "answer": "classes",
            "learning_rate": 1e-2,
            "max_steps": 50,
            "patience": 0,
            "batch_size": 16,
            "micro_batch_tokens": 256,
            "rank": 16,
            "precision": "float32",
            "device": "cpu",
            "baselines": ("auto", "probe"),
            **more,
        },
    )


@pytest.fixture(scope="module")
def place(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run, its base and its table in one folder."""
    folder = tmp_path_factory.mktemp("classes")
    shutil.copytree(base, folder / "base")
    write_table(folder / "data.csv", repeats=8)
    result = train(settings(folder))
    assert result.metrics.accuracy > 0.9
    assert [rival.name for rival in result.rivals] == ["svm", "probe"]
    return folder


def adapter_hash(run: Path) -> str:
    content = (run / "adapter" / "adapter_model.safetensors").read_bytes()
    return hashlib.sha256(content).hexdigest()


def opened(path: Path) -> Any:
    return open_trained(path, device="cpu", precision="float32")


def stock_probabilities(model: Any, tokenizer: Any, rendered: Any) -> NDArray[np.float64]:
    """What transformers answers to each rendered message by itself."""
    found = []
    for message in MESSAGES:
        text = rendered["head"] + message + rendered["tail"]
        inputs = tokenizer(text, add_special_tokens=False, return_tensors="pt")
        with torch.no_grad():
            found.append(model.eval()(**inputs).logits[0].double().softmax(-1).numpy())
    return np.array(found)


def test_the_run_keeps_its_answer_as_peft_has_it(place: Path) -> None:
    card = json.loads((place / "run" / "adapter" / "remora.json").read_text())
    assert card["answer"] == "classes"
    config = json.loads((place / "run" / "adapter" / "adapter_config.json").read_text())
    assert (config["task_type"], config["modules_to_save"]) == ("SEQ_CLS", ["classifier", "score"])
    trained = opened(place / "run")
    assert layouts.of(trained.model) == "tree"
    assert trained.prompt.classes == tuple(LABELS)


@pytest.mark.parametrize("layout", ["tree", "rows"])
def test_stock_transformers_and_peft_give_the_same_probabilities(place: Path, layout: Any) -> None:
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    trained = opened(place / "run")
    layouts.assign(trained.model, layout)
    found = trained.scorer().probabilities(MESSAGES)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        stock = peft.PeftModel.from_pretrained(
            AutoModelForSequenceClassification.from_pretrained(place / "base", num_labels=3),
            place / "run" / "adapter",
        )
    tokenizer = AutoTokenizer.from_pretrained(place / "base")
    rendered = trained.card.rendered
    wanted = stock_probabilities(stock, tokenizer, rendered)
    np.testing.assert_allclose(found, wanted, atol=1e-5)
    assert found.max(1).min() > 0.5  # it has learned something to compare
    # Without the tail the last token is another one.
    assert abs(stock_probabilities(stock, tokenizer, {**rendered, "tail": ""}) - wanted).max() > 0.1


def test_the_stock_pipeline_gives_the_same_on_the_merged_model(place: Path, tmp_path: Path) -> None:
    from transformers import pipeline

    trained, merged = opened(place / "run"), tmp_path / "merged"
    assert call("export", place / "run", "--merge", "--dtype", "float32", "--output", merged) == 0
    wanted = trained.scorer().probabilities(MESSAGES)
    whole = opened(merged)
    np.testing.assert_allclose(whole.scorer().probabilities(MESSAGES), wanted, atol=1e-5)
    rendered = whole.card.rendered
    texts = [rendered["head"] + message + rendered["tail"] for message in MESSAGES]
    pipe = pipeline("text-classification", model=str(merged), dtype="float32", device="cpu")
    for batch_size in (1, 3):  # padded on the right by the padding token that it names
        answers = pipe(texts, add_special_tokens=False, top_k=None, batch_size=batch_size)
        found = [{each["label"]: each["score"] for each in answer} for answer in answers]
        table = [[scores[label] for label in LABELS] for scores in found]
        np.testing.assert_allclose(table, wanted, atol=1e-5)


def test_a_whole_model_without_its_head_is_refused(place: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    from remora.runtime import files

    merged = tmp_path / "merged"
    assert call("export", place / "run", "--merge", "--output", merged) == 0
    weights = load_file(merged / "model.safetensors")
    save_file(
        {name: w.clone() for name, w in weights.items() if name != "score.weight"},
        merged / "model.safetensors",
        metadata={"format": "pt"},
    )
    card = json.loads((merged / "remora.json").read_text())
    card["base_sha256"] = files.weights_sha256(merged)
    (merged / "remora.json").write_text(json.dumps(card))
    with pytest.raises(ModelError, match="lack the head over its labels"):
        opened(merged)


def test_a_run_that_is_stopped_resumes_to_the_same_bits(place: Path, tmp_path: Path) -> None:
    class Stopper(Reporter):
        def stepped(self, step: Step) -> None:
            if step.step == 5:
                stop._deadline = 0.0  # the time is over

    stop = Stop(1e6)
    config = settings(place, output=tmp_path)
    with pytest.raises(Stopped):
        train_until(config, stop, Stopper())
    assert adapter_hash(train(config).directory) == adapter_hash(place / "run")


def test_padded_rows_train_to_the_same(place: Path, tmp_path: Path) -> None:
    run = train(settings(place, output=tmp_path, layout="rows", dropout=0.0, max_steps=4)).directory
    tree = train(settings(place, output=tmp_path, name="tree", dropout=0.0, max_steps=4)).directory
    found, wanted = opened(run), opened(tree)
    assert (layouts.of(found.model), layouts.of(wanted.model)) == ("rows", "tree")
    np.testing.assert_allclose(
        found.scorer().probabilities(MESSAGES), wanted.scorer().probabilities(MESSAGES), atol=1e-4
    )


def test_all_weights_train_with_the_head(place: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    config = settings(
        place, output=tmp_path, method="full", baselines=("probe",), learning_rate=1e-3
    )
    directory = train(config).directory
    trained = opened(directory)
    assert trained.model.score.weight.dtype == torch.float32
    stock = AutoModelForSequenceClassification.from_pretrained(directory / "model")
    assert stock.config.id2label == dict(enumerate(LABELS))
    tokenizer = AutoTokenizer.from_pretrained(directory / "model")
    wanted = stock_probabilities(stock, tokenizer, trained.card.rendered)
    np.testing.assert_allclose(trained.scorer().probabilities(MESSAGES), wanted, atol=1e-5)


def test_a_4_bit_base_keeps_its_head_in_float32(place: Path, tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    directory = train(settings(place, output=tmp_path, method="qlora", max_steps=2)).directory
    trained = opened(directory)
    head = class_head.head_of(trained.model)
    assert head.weight.dtype == torch.float32
    assert not quantize.is_quantized(head.original_module)
    assert len(quantize.layers(trained.model)) == 2 * 7
    assert call("export", directory, "--merge", "--output", tmp_path / "merged") == 0


def test_a_run_begins_with_the_head_of_another(place: Path, tmp_path: Path) -> None:
    """Labels take their rows with them, whatever their order, and new ones begin anew."""
    rows = (place / "data.csv").read_text(encoding="utf-8").splitlines()
    more = [row.replace("refund", "abroad") for row in rows if "refund" in row]
    (tmp_path / "more.csv").write_text("\n".join([rows[0], *more, *rows[1:]]), encoding="utf-8")
    config = settings(place, output=tmp_path, start_from=str(place / "run"))
    config = replace(config, data=str(tmp_path / "more.csv"), name="more")
    with open_session(config, load_data(config)) as session:
        assert session.prompt.labels == ("abroad", *LABELS)
        assert session.prompt.answers == ((0,), (1,), (2,), (3,))
        head = class_head.head_of(session.model).weight.detach()
    before = class_head.head_of(opened(place / "run").model).weight.detach()
    torch.testing.assert_close(head[1:], before)
    assert head[0].norm() > 0
    words = replace(config, answer="words")
    with pytest.raises(ConfigError, match="trained with --answer 'classes'; give the same"):
        open_session(words, load_data(words)).__enter__()


def engine(folders: dict[str, Path]) -> Engine:
    return Engine(
        folders,
        base=None,
        precision=choose_precision(CPU, "float32"),
        device=CPU,
        micro_batch_tokens=2048,
        tolerance=0.01,
        max_queue=1024,
    )


def test_a_service_has_adapters_with_other_numbers_of_labels(place: Path, tmp_path: Path) -> None:
    rows = (place / "data.csv").read_text(encoding="utf-8").splitlines()
    (tmp_path / "data.csv").write_text("\n".join(r for r in rows if "refund" not in r))
    shutil.copytree(place / "base", tmp_path / "base")
    two = train(replace(settings(tmp_path), max_steps=2)).directory
    service = engine({"three": place / "run", "two": two})
    try:
        for name, run in (("three", place / "run"), ("two", two)):
            answers = service.classify(name, MESSAGES).result(timeout=60)
            np.testing.assert_allclose(
                answers.probabilities, opened(run).scorer().probabilities(MESSAGES), atol=1e-5
            )
    finally:
        service.stop()


def test_a_service_does_not_mix_words_and_classes(place: Path, tmp_path: Path) -> None:
    words = train(settings(place, output=tmp_path, answer="words", max_steps=1)).directory
    with pytest.raises(ModelError, match=r"answers by words and .* by classes.*serve it by itself"):
        engine({"classes": place / "run", "words": words})


def test_predict_eval_and_diagnose_answer(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    texts = tmp_path / "texts.txt"
    texts.write_text("\n".join(MESSAGES) + "\n")
    run = shutil.copytree(place / "run", tmp_path / "run")
    asked = ("--json", "--top-k", 3, "--device", "cpu")
    assert call("predict", run, texts, *asked, "--precision", "float32") == 0
    lines = [json.loads(line)["labels"] for line in capsys.readouterr().out.splitlines()]
    wanted = opened(run).scorer().probabilities(MESSAGES)
    for found, row in zip(lines, wanted, strict=True):
        assert [each["label"] for each in found] == [LABELS[i] for i in (-row).argsort()]
        assert sum(each["probability"] for each in found) == pytest.approx(1, abs=1e-4)
    assert call("eval", run, place / "data.csv", "--json", "--device", "cpu") == 0
    assert json.loads(capsys.readouterr().out)["accuracy"] > 0.9
    assert call("diagnose", run, "--folds", 2) == 0


def test_the_plan_counts_the_head_and_no_answers(place: Path) -> None:
    plans = {
        answer: make_plan(PlanConfig(**vars(settings(place, answer=answer))))
        for answer in ("classes", "words")
    }
    assert plans["classes"].answer_tokens == 0
    assert plans["classes"].tree_tokens < plans["words"].tree_tokens
    trained = plans["classes"].trainable - plans["words"].trainable
    assert trained == 3 * 32
    vocabulary = json.loads((place / "base" / "config.json").read_text())["vocab_size"]
    fewer = plans["words"].parameters - plans["classes"].parameters
    assert fewer == (vocabulary - 3) * 32 - trained + 3 * 32


@pytest.mark.parametrize("way", ["compress", "gguf-lora", "vllm"])
def test_what_is_for_models_that_write_is_refused(
    place: Path, way: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call("export", place / "run", f"--{way}") == 4
    assert capsys.readouterr().err.splitlines()[-1] == (
        f"error: {place / 'run'} answers by classes, and --{way} is for models that write their "
        "labels; use --merge or --onnx, or train with --answer words"
    )


def test_the_model_card_shows_how_stock_loads_it(place: Path) -> None:
    text = model_card.card(place / "run")
    code = text.split("```python\n")[1].split("```")[0]
    compile(code, "README.md", "exec")
    assert "AutoModelForSequenceClassification" in code
    assert "PeftModel" in code
    assert "padded on the right" in text


@pytest.mark.parametrize("spoil", ["shape", "missing", "modules"])
def test_a_head_that_does_not_fit_is_refused(place: Path, tmp_path: Path, spoil: str) -> None:
    from safetensors.torch import load_file, save_file

    run = shutil.copytree(place / "run", tmp_path / "run")
    path = run / "adapter" / "adapter_model.safetensors"
    weights = load_file(path)
    (name,) = (each for each in weights if "score" in each)
    if spoil == "shape":
        weights[name] = torch.zeros(4, 32)
    elif spoil == "missing":
        del weights[name]
    else:
        config = run / "adapter" / "adapter_config.json"
        values = json.loads(config.read_text()) | {"modules_to_save": ["embed_tokens"]}
        config.write_text(json.dumps(values))
    save_file({each: weight.clone() for each, weight in weights.items()}, path)
    wanted = "modules_to_save to more" if spoil == "modules" else "no head for the labels"
    with pytest.raises(ModelError, match=wanted):
        opened(run)


def test_the_estimator_answers_by_classes(base: Path, tmp_path: Path) -> None:
    texts = ["my card is late", "my card never came", "refund please", "where is the refund"] * 6
    classifier = TextClassifier(
        str(base), answer="classes", epochs=12, patience=0, batch_size=8, rank=4,
        learning_rate=1e-2, precision="float32", device="cpu",
    )  # fmt: skip
    classifier.fit(texts, [0, 0, 1, 1] * 6)
    classifier.save(tmp_path / "saved")
    loaded = TextClassifier.load(tmp_path / "saved", precision="float32", device="cpu")
    assert loaded.get_params()["answer"] == "classes"
    np.testing.assert_allclose(
        loaded.predict_proba(texts[:4]), classifier.predict_proba(texts[:4]), atol=1e-6
    )
    assert classifier.predict(texts[:4]).tolist() == [0, 0, 1, 1]
    saved.save(loaded.model_, loaded.prompt_, loaded._trained.card, tmp_path / "again")
    assert TextClassifier.load(tmp_path / "again", device="cpu").classes_.tolist() == ["0", "1"]
