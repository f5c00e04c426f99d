"""The settings: what is refused, what is written to TOML, and the published recipe."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path

import numpy as np
import pytest

from remora.config import (
    ChooseConfig,
    CompareConfig,
    DiagnoseConfig,
    EvalConfig,
    ExportConfig,
    PlanConfig,
    PredictConfig,
    PushConfig,
    ReportConfig,
    ServeConfig,
    TrainConfig,
    TuneConfig,
)
from remora.config.schedule import default_learning_rate
from remora.errors import ConfigError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


def config(**settings):
    return TrainConfig("data.csv", model="a/b", **settings)


def test_the_defaults_are_the_published_recipe():
    defaults = config()
    assert (defaults.rank, defaults.alpha, defaults.dropout) == (16, 32, 0.05)
    assert defaults.batch_size == 32
    assert (defaults.weight_decay, defaults.max_grad_norm) == (0.0, 1.0)


@pytest.mark.parametrize(
    ("width", "method", "rate"),
    [
        *((4096, "lora", 2e-4), (192, "lora", 6.4e-3), (48, "lora", 6.4e-3)),
        *((1536, "full", 2e-5), (8192, "full", 2e-5), (768, "full", 8e-5), (48, "full", 1.28e-3)),
    ],
)
def test_all_weights_learn_slower_than_an_adapter(width, method, rate):
    assert default_learning_rate(width, method) == pytest.approx(rate)


def test_a_linear_head_of_a_narrow_model_learns_slower_than_words() -> None:
    words, classes = config(answer="words"), config(answer="classes")
    assert classes.rate(256) == 2e-3 < words.rate(256)
    assert classes.rate(576) == words.rate(576) == pytest.approx(1.03e-3, rel=0.01)
    assert config(answer="classes", start_from="run").rate(256) == 1e-3
    several = config(answer="classes", multi_label="on")
    assert several.rate(256) == words.rate(256)
    all_weights = config(answer="classes", method="full")
    assert all_weights.rate(256) == config(method="full").rate(256)
    assert config(answer="classes", learning_rate=1e-3).rate(256) == 1e-3


WRONG = {
    "rank": 0,
    "alpha": 0.0,
    "dropout": 1.0,
    "learning_rate": 1.5,
    "epochs": 0.0,
    "max_steps": 0,
    "max_length": 0,
    "eval_steps": 0,
    "eval_rows": 0,
    "batch_size": 0,
    "micro_batch_tokens": 0,
    "warmup_fraction": 1.1,
    "weight_decay": -0.1,
    "max_grad_norm": 0.0,
    "patience": -1,
    "seed": -1,
    "validation_fraction": 1.0,
    "test_fraction": -0.1,
    "name": "a/b",
}


@pytest.mark.parametrize(
    ("settings", "num_rows", "num_validation", "expected"),
    [
        ({}, 9_003, 1_000, 1_000),  # 3,001 would be allowed
        ({}, 770, 1_000, 256),  # an epoch of 770 rows
        ({}, 770, 200, 200),
        ({"eval_steps": 10}, 9_003, 1_000, 106),  # 10 steps of 32 rows, but for the last batch
        ({"max_steps": 10}, 9_003, 1_000, 106),  # the only evaluation is after these
        ({"eval_steps": 1}, 9_003, 1_000, 100),
        ({"eval_steps": 1}, 9_003, 40, 40),
        ({"eval_rows": 500}, 770, 1_000, 500),
        ({"eval_rows": 5_000}, 770, 1_000, 1_000),
    ],
)
def test_an_evaluation_has_as_many_rows_as_its_training_pays_for(
    settings, num_rows, num_validation, expected
):
    assert config(**settings).num_eval_rows(num_rows, num_validation) == expected


def test_every_problem_is_reported_at_once():
    with pytest.raises(ConfigError) as caught:
        config(**WRONG)
    told = str(caught.value)
    assert "\n" not in told
    assert {part.split(" is ")[0] for part in told.split("; ") if " is " in part} == set(WRONG)
    for name, value in WRONG.items():
        assert f"{name} is {value!r}; give " in told


@pytest.mark.parametrize("name", WRONG)
def test_each_wrong_value_is_refused_by_itself(name):
    with pytest.raises(ConfigError, match=f"^{name} is [^;]+; give [^;]+$"):
        config(**{name: WRONG[name]})


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("alpha", float("nan")),
        ("alpha", float("inf")),
        ("dropout", -0.1),
        ("learning_rate", 0.0),
        ("learning_rate", float("nan")),
        ("epochs", float("inf")),
        ("epochs", float("nan")),
        ("weight_decay", float("inf")),
        ("weight_decay", float("nan")),
        ("max_grad_norm", float("nan")),
        ("name", ".."),
        ("name", "."),
        ("name", ""),
        ("name", "/tmp"),
    ],
)
def test_other_wrong_values_are_refused(name, value):
    with pytest.raises(ConfigError, match=f"^{name} is "):
        config(**{name: value})


@pytest.mark.parametrize(
    "settings",
    [
        {"rank": 1, "alpha": 0.5, "dropout": 0.0, "batch_size": 1, "micro_batch_tokens": 1},
        {"learning_rate": 1.0, "epochs": 0.1, "max_steps": 1, "patience": 0, "seed": 0},
        {"validation_fraction": 0.0, "test_fraction": 0.0, "warmup_fraction": 0.0},
        {"max_grad_norm": float("inf"), "warmup_fraction": 1.0, "name": "v1.0 a-b"},
    ],
)
def test_the_limits_themselves_are_allowed(settings):
    for name, value in settings.items():
        assert getattr(config(**settings), name) == value


def read_back(text):
    """A TrainConfig from TOML, with what TOML cannot hold converted."""
    settings = tomllib.loads(text)
    settings["output"] = Path(settings["output"])
    for name in ("target_modules", "trackers"):
        settings[name] = tuple(settings[name])
    return TrainConfig(settings.pop("data"), **settings)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {
            "name": "erste-Prüfung",
            "output": Path("some where/runs"),
            "validation": "v.csv",
            "text_column": 'a "quoted" column',
            "instruction": "Two\nlines, a \\ and a tab\t.",
            "list_labels": True,
            "rename_labels": {"a.b": "c", "d e": "c"},
            "label_texts": {"card arrival?": "Karte", "a.b": "=c", 'q"': ""},
            "max_length": 77,
            "alpha": 17.5,
            "target_modules": ("q_proj", "v_proj"),
            "learning_rate": 3e-5,
            "max_steps": 9,
            "schedule": "linear",
            "precision": "bfloat16",
            "device": "cpu",
            "trackers": ("tensorboard",),
        },
    ],
)
def test_toml_brings_back_the_same_settings(settings):
    original = config(**settings)
    assert read_back(original.to_toml()) == original


def test_toml_leaves_out_what_is_not_set():
    written = tomllib.loads(config().to_toml())
    unset = {f.name for f in dataclasses.fields(TrainConfig) if getattr(config(), f.name) is None}
    assert unset
    assert not unset & set(written)
    assert written["rank"] == 16


def test_settings_cannot_be_changed_later():
    with pytest.raises(dataclasses.FrozenInstanceError):
        config().rank = 8


@pytest.mark.parametrize("name", ["top_k", "micro_batch_tokens"])
def test_prediction_refuses_a_wrong_value(name):
    with pytest.raises(ConfigError, match=f"{name} is 0; give a whole number from 1"):
        PredictConfig(Path("run"), **{name: 0})


def test_prediction_reads_standard_input_by_default():
    assert PredictConfig(Path("run")).source == "-"
    assert EvalConfig(Path("run"), "test.csv").data == "test.csv"


@pytest.mark.parametrize("accuracy", [0.0, 1.5, -1.0])
def test_eval_refuses_an_accuracy_that_is_no_share(accuracy):
    with pytest.raises(ConfigError, match=f"abstain_at_accuracy is {accuracy}; give a share"):
        EvalConfig(Path("run"), "test.csv", abstain_at_accuracy=accuracy)


def test_problems_of_eval_are_reported_together() -> None:
    with pytest.raises(ConfigError, match=r"abstain_at_accuracy is 2.*; micro_batch_tokens is 0"):
        EvalConfig(Path("run"), "test.csv", abstain_at_accuracy=2.0, micro_batch_tokens=0)


OF_ANOTHER_TYPE = [
    ({"method": "x"}, "method is 'x'; give lora, qlora or full"),
    ({"truncate": "middle"}, "truncate is 'middle'; give head, tail, both or windows"),
    ({"answer": "class"}, "answer is 'class'; give words or classes"),
    ({"metric": "f1"}, "metric is 'f1'; give accuracy, micro_f1, macro_f1 or log_loss"),
    ({"layout": "flat"}, "layout is 'flat'; give auto, tree or rows"),
    ({"schedule": "exponential"}, "schedule is 'exponential'; give linear, cosine or constant"),
    ({"precision": "fp16"}, "precision is 'fp16'; give auto, float32, bfloat16 or float16"),
    ({"checkpointing": True}, "checkpointing is True; give auto, on or off"),
    ({"device": "gpu"}, "device is 'gpu'; give auto, cpu, cuda or mps"),
    ({"init_lora_weights": "pissa"}, "init_lora_weights is 'pissa'; give default or gaussian, the"),
    ({"list_labels": "no"}, "list_labels is 'no'; give True or False"),
    ({"use_dora": 1}, "use_dora is 1; give True or False"),
    ({"instruction": 5}, "instruction is 5; give a text"),
    ({"instruction": None}, "instruction is None; give a text"),
    (
        {"rank": "8", "epochs": "3"},
        "rank is '8'; give a whole number from 1; epochs is '3'; give a number above 0",
    ),
    ({"devices": "2"}, "devices is '2'; give a whole number from 1"),
    ({"rank": True}, "rank is True; give a whole number from 1"),
    ({"alpha": True}, "alpha is True; give a number above 0"),
    ({"alpha": np.arange(2)}, "alpha is array([0, 1]); give a number above 0"),
    ({"learning_rate": "auto"}, "learning_rate is 'auto'; give a number above 0 and at most 1"),
    ({"max_steps": 4.5}, "max_steps is 4.5; give a whole number from 1"),
    ({"seed": 1.5}, "seed is 1.5; give a whole number from 0"),
    ({"label_texts": ["a"]}, "label_texts is ['a']; give texts by labels, such as {'late': "),
    ({"label_texts": {"a": 5}}, "label_texts is {'a': 5}; give texts by labels, such as"),
    ({"class_weights": 5}, "class_weights is 5; give balanced, a table's path or weights by"),
    ({"target_modules": 5}, "target_modules is 5; give a list of names"),
    ({"baselines": ["svm", 5]}, "baselines is ['svm', 5]; give a list of names"),
    ({"output": 5}, "output is 5; give a path"),
    ({"instruction": ["a\n" * 99]}, "instruction is ['a\\na\\na"),
]


@pytest.mark.parametrize(
    ("settings", "message"), OF_ANOTHER_TYPE, ids=[message for _, message in OF_ANOTHER_TYPE]
)
def test_values_of_another_type_are_refused(settings, message):
    with pytest.raises(ConfigError) as caught:
        config(**settings)
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 150


def test_wrong_types_and_wrong_values_are_reported_together():
    with pytest.raises(ConfigError, match=r"^method is 'x'; give [^;]+; rank is 0; give [^;]+$"):
        config(method="x", rank=0)


@pytest.mark.parametrize(
    ("given", "taken"),
    [
        ({"rank": np.int64(8)}, {"rank": 8}),
        ({"alpha": np.float32(0.5)}, {"alpha": 0.5}),
        ({"alpha": np.int32(8), "dropout": np.float64(0.5)}, {"alpha": 8, "dropout": 0.5}),
        ({"use_dora": np.bool_(True), "method": np.str_("lora")}, {"use_dora": True}),
        ({"output": "some/where"}, {"output": Path("some/where")}),
        ({"validation": Path("v.csv")}, {"validation": str(Path("v.csv"))}),
        ({"trackers": "wandb", "text_column": "a,b"}, {"trackers": ("wandb",)}),
        ({"target_modules": "q_proj, v_proj,"}, {"target_modules": ("q_proj", "v_proj")}),
        ({"target_modules": ["q_proj"]}, {"target_modules": ("q_proj",)}),
        ({"baselines": "svm,probe"}, {"baselines": ("svm", "probe")}),
        (
            {"label_texts": {1: "one", np.int64(2): "two"}},
            {"label_texts": {"1": "one", "2": "two"}},
        ),
        ({"class_weights": {"refund": 2.0}}, {"class_weights": {"refund": 2.0}}),
    ],
)
def test_values_from_python_are_taken_and_written(given, taken):
    settings = config(**given)
    for name, value in taken.items():
        assert getattr(settings, name) == value
        assert type(getattr(settings, name)) is type(value)
    assert TrainConfig.from_toml(settings.to_toml(), RUN) == settings


RUN = Path("run")
REFUSED = [
    (lambda: ChooseConfig("t", models=5, bar=0.9), "models is 5; give a list of names"),
    (lambda: TuneConfig("t", model="m", search=5), "search is 5; give a list of names"),
    (lambda: CompareConfig("run"), "runs is 'run'; give a list of paths"),
    (lambda: DiagnoseConfig(RUN, method="slow"), "method is 'slow'; give fast, frozen, tfidf or"),
    (lambda: ExportConfig(RUN, gguf=5), "gguf is 5; give a list of names"),
    (lambda: PlanConfig("t.csv", model="m", device="gpu"), "device is 'gpu'; give auto, cpu, cuda"),
    (lambda: PredictConfig(RUN, engine="spark"), "engine is 'spark'; give local or ray"),
    (lambda: ReportConfig(5), "run is 5; give a path"),
    (lambda: ServeConfig("run", max_queue="9"), "max_queue is '9'; give a whole number"),
    (lambda: CompareConfig((RUN,), bar=93.0), "bar is 93.0; give a share"),
    (lambda: CompareConfig((RUN,), volume=0), "volume is 0; give a whole number from 1"),
    (lambda: CompareConfig(()), "no run is given; give one or more"),
    (lambda: CompareConfig((RUN,), cost_per_error=1.0), "is given without volume; give both"),
    (lambda: DiagnoseConfig(RUN, folds=1), "folds is 1; give a whole number from 2"),
    (lambda: DiagnoseConfig(RUN, output=RUN), "output is given without apply; give both"),
    (lambda: EvalConfig(RUN, "t.csv", micro_batch_tokens=0), "micro_batch_tokens is 0; give"),
    (lambda: ExportConfig(RUN), "nothing is to be written; give one of --merge"),
    (lambda: ExportConfig(RUN, merge=True, compress=True), "merge and compress are given together"),
    (lambda: ExportConfig(RUN, compress=True, budget="0MB"), "budget is '0MB'; give an amount"),
    (lambda: ExportConfig(RUN, compress=True, ratio=0.0), "ratio is 0.0; give a number above 0"),
    (lambda: ExportConfig(RUN, compress=True, tolerance=101), "tolerance is 101; give a number"),
    (lambda: ExportConfig(RUN, merge=True, ratio=2.0), "budget and ratio need compress"),
    (lambda: ExportConfig(RUN, merge=True, distill=True), "distill needs compress"),
    (lambda: ExportConfig(RUN, merge=True, dtype="float8"), "dtype float8 needs compress"),
    (lambda: PlanConfig("t.csv", model="m", device_memory="much"), "device_memory is 'much'; give"),
    (lambda: PlanConfig("t.csv", model="m", rank=0), "rank is 0; give a whole number from 1"),
    (lambda: PredictConfig(RUN, tolerance=1.1), "tolerance is 1.1; give a number from 0 to 1"),
    (lambda: PushConfig(RUN, "bank"), "repo_id is 'bank'; give it as owner/name"),
    (lambda: ServeConfig(("run",), port=65_536), "port is 65536; give a whole number from 0 to"),
    (lambda: ServeConfig(("run",), max_body="big"), "max_body is 'big'; give an amount"),
    (lambda: ServeConfig(("run",), max_queue=1), "max_queue is 1; give at least max_texts"),
    (lambda: ServeConfig(()), "no adapter is given; give one or more"),
]


@pytest.mark.parametrize(("make", "message"), REFUSED, ids=[message for _, message in REFUSED])
def test_the_other_verbs_check_their_settings_too(make, message):
    with pytest.raises(ConfigError) as caught:
        make()
    assert message in str(caught.value)


def test_wrong_values_and_conflicts_are_reported_together():
    with pytest.raises(ConfigError, match=r"^rank is 0; give [^;]+; use_dora does not work on a"):
        config(rank=0, use_dora=True, method="qlora")


@pytest.mark.parametrize(
    ("num_rows", "num_steps"),
    [(10_003, 3 * 313), (2_670, 3 * 84), (2_600, 250), (770, 250), (320, 200), (5, 20)],
)
def test_few_rows_are_passed_over_more_often(num_rows: int, num_steps: int) -> None:
    """Three times; to make 250 steps of 32 rows more often, and at most 20 times."""
    assert TrainConfig("data.csv", model="m").num_steps(num_rows) == num_steps
    assert TrainConfig("data.csv", model="m", epochs=2).num_steps(320) == 20
