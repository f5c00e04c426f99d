"""Bad settings."""

from __future__ import annotations

import platform
import socket
import sys
from pathlib import Path

from bad_input.workshop import Case, Workshop, embeddings, listed, several, train, unfinished
from remora.diagnosis import suspect_list
from remora.models import quantize


def taken_port(shop: Workshop) -> list[str]:
    listening = socket.create_server(("127.0.0.1", 0))
    shop.held.callback(listening.close)
    return ["serve", "runs/good", "--port", str(listening.getsockname()[1])]


def open_to_all(shop: Workshop) -> list[str]:
    shop.patch().delenv("REMORA_TOKEN", raising=False)
    return ["serve", "runs/good", "--host", "0.0.0.0", "--port", "0"]


def without(shop: Workshop, module: str, command: list[str]) -> list[str]:
    shop.patch().setitem(sys.modules, module, None)
    return command


def without_bitsandbytes(shop: Workshop) -> list[str]:
    shop.patch().setattr(quantize, "is_installed", lambda: False)
    return train("good.csv", "--method", "qlora")


def reviewed_already(shop: Workshop) -> list[str]:
    run = listed(shop)
    shop.patch().setattr(platform, "node", lambda: "this-machine")
    shop.held.enter_context(suspect_list.hold(Path(run)))
    return ["review", run]


def without_fastapi(shop: Workshop) -> list[str]:
    patch = shop.patch()
    for module in ("remora.review.session", "remora.review.app"):
        patch.delitem(sys.modules, module, raising=False)
        patch.delattr(f"{module.rpartition('.')[0]}.{module.rpartition('.')[2]}", raising=False)
    return without(shop, "fastapi", ["review", listed(shop)])


CASES: list[Case] = [
    ("a misspelt flag", 2, lambda s: train("good.csv", "--lerning-rate", "1e-3")),
    ("no table", 2, lambda s: ["train"]),
    ("no model", 2, lambda s: ["train", "good.csv"]),
    ("a name with a space, not quoted", 2, lambda s: train("good.csv", "table.csv")),
    (
        "a path that is no UTF-8",
        2,
        lambda s: train(b"caf\xe9.csv".decode("utf-8", "surrogateescape")),
    ),
    ("far more devices than there are", 2, lambda s: train("good.csv", "--devices", "99")),
    (
        "an output that is the input",
        2,
        lambda s: ["predict", "runs/good", "good.csv", "--output", "./good.csv"],
    ),
    (
        "predictions over the table",
        2,
        lambda s: ["eval", "runs/good", "good.csv", "--predictions", "good.csv"],
    ),
    (
        "predictions to a folder that is not there",
        5,
        lambda s: ["eval", "runs/good", "good.csv", "--predictions", "no/x.csv"],
    ),
    (
        "an output in a folder that is not there",
        5,
        lambda s: ["predict", "runs/good", "good.csv", "--output", "no/x.csv"],
    ),
    (
        "a rank of 0 and a dropout of 1",
        2,
        lambda s: train("good.csv", "--rank", "0", "--dropout", "1"),
    ),
    ("a negative learning rate", 2, lambda s: train("good.csv", "--learning-rate", "-1")),
    ("an absurd learning rate", 2, lambda s: train("good.csv", "--learning-rate", "1e9")),
    ("a batch of 0", 2, lambda s: train("good.csv", "--batch-size", "0")),
    (
        "an initialization that changes the base model",
        2,
        lambda s: train("good.csv", "--init-lora-weights", "pissa"),
    ),
    (
        "words for labels that classes stand for",
        2,
        lambda s: train("good.csv", "--answer", "classes", "--label-texts.refund", "money back"),
    ),
    (
        "a flag for a label with a dot",
        2,
        lambda s: train("good.csv", "--label-texts.v1.0", "version one"),
    ),
    ("a flag without its value", 2, lambda s: ["export", "runs/good", "--gguf"]),
    (
        "a zero-shot baseline of a head that is not trained yet",
        2,
        lambda s: train("good.csv", "--answer", "classes", "--baselines", "svm,zero-shot"),
    ),
    (
        "DoRA on a 4-bit base, and a LoRA+ ratio of 0",
        2,
        lambda s: train(
            *("good.csv", "--use-dora", "--method", "qlora", "--loraplus-lr-ratio", "0")
        ),
    ),
    (
        "rsLoRA without an adapter",
        2,
        lambda s: train("good.csv", "--use-rslora", "--method", "full"),
    ),
    ("qlora without bitsandbytes", 2, without_bitsandbytes),
    (
        "a GGUF file without the package gguf",
        2,
        lambda s: without(s, "gguf", train("good.csv", model=s.write("small.gguf", b"GGUF"))),
    ),
    ("a word for a number", 2, lambda s: train("good.csv", "--epochs", "many")),
    ("an unknown precision", 2, lambda s: train("good.csv", "--precision", "float8")),
    ("float16 on a CPU", 2, lambda s: train("good.csv", "--precision", "float16")),
    ("a device that this machine lacks", 2, lambda s: [*train("good.csv")[:5], "cuda"]),
    (
        "fractions that sum to 1",
        2,
        lambda s: train("good.csv", "--validation-fraction", "0.5", "--test-fraction", "0.5"),
    ),
    ("an invalid time limit", 2, lambda s: train("good.csv", "--max-time", "soon")),
    ("a name with a slash", 2, lambda s: train("good.csv", "--name", "../mine")),
    ("a name that is taken", 2, lambda s: train("good.csv", "--name", "good")),
    ("another seed for an unfinished run", 2, lambda s: unfinished(s, "--seed", "7")),
    ("a missing settings file", 2, lambda s: ["train", "--config", "none.toml"]),
    (
        "a settings file that is no TOML",
        2,
        lambda s: ["train", "good.csv", "--config", s.write("broken.toml", "epochs: 3\n")],
    ),
    ("an unknown baseline", 2, lambda s: train("good.csv", "--baselines", "svm,bert")),
    ("none beside another baseline", 2, lambda s: train("good.csv", "--baselines", "none,svm")),
    (
        "a learning curve without the SVM",
        2,
        lambda s: train("good.csv", "--learning-curve", "2,5", "--baselines", "probe"),
    ),
    ("embeddings without sentence-transformers", 2, lambda s: embeddings(s, "x", installed=False)),
    ("an unknown tracker", 2, lambda s: train("good.csv", "--trackers", "carrier-pigeon")),
    (
        "modules that the model lacks",
        2,
        lambda s: train("good.csv", "--target-modules", "nothing"),
    ),
    ("a number of devices of 0", 2, lambda s: train("good.csv", "--devices", "0")),
    ("a learning curve that falls", 2, lambda s: train("good.csv", "--learning-curve", "5,2")),
    ("a learning curve from 0", 2, lambda s: train("good.csv", "--learning-curve", "0,5")),
    ("a learning curve of words", 2, lambda s: train("good.csv", "--learning-curve", "few,all")),
    ("a learning curve of one size", 2, lambda s: train("good.csv", "--learning-curve", "all")),
    (
        "a learning curve beyond the data",
        2,
        lambda s: train("good.csv", "--learning-curve", "2,500,all"),
    ),
    (
        "a learning curve and rows per class",
        2,
        lambda s: train("good.csv", "--learning-curve", "2,5", "--rows-per-class", "2"),
    ),
    (
        "a learning curve on two devices",
        2,
        lambda s: train("good.csv", "--learning-curve", "2,5", "--devices", "2"),
    ),
    ("0 rows per class", 2, lambda s: train("good.csv", "--rows-per-class", "0")),
    ("an export of neither kind", 2, lambda s: ["export", "runs/good"]),
    (
        "an export of both kinds",
        2,
        lambda s: ["export", "runs/good", "--merge", "--compress"],
    ),
    ("GGUF files without a converter", 2, lambda s: ["export", "runs/good", "--gguf", "f16"]),
    ("an unknown type of GGUF files", 2, lambda s: ["export", "runs/good", "--gguf", "q9"]),
    (
        "llama.cpp in another folder",
        2,
        lambda s: ["export", "runs/good", "--gguf", "f16", "--llama-cpp", "base"],
    ),
    (
        "an export to a folder that is not empty",
        2,
        lambda s: ["export", "runs/good", "--merge", "--output", "base"],
    ),
    (
        "an invalid budget",
        2,
        lambda s: ["export", "runs/good", "--compress", "--budget", "small"],
    ),
    (
        "a budget too small for any adapter",
        2,
        lambda s: ["export", "runs/good", "--compress", "--budget", "1kB"],
    ),
    ("a cost without a volume", 2, lambda s: ["compare", "runs/good", "--cost-per-error", "2"]),
    ("more answers than labels", 2, lambda s: ["predict", "runs/good", "good.csv", "--top-k", "9"]),
    ("a comparison of nothing", 2, lambda s: ["compare"]),
    (
        "a comparison's report written to a folder",
        2,
        lambda s: ["compare", "runs/good", "--report", "runs"],
    ),
    ("a run compared with itself", 2, lambda s: ["compare", "runs/good", "runs/good/"]),
    (
        "a report written to a folder",
        2,
        lambda s: ["report", "runs/good", "--output", "runs"],
    ),
    ("a service of nothing", 2, lambda s: ["serve"]),
    ("a service on a port that is taken", 2, taken_port),
    ("a review on a port that is taken", 2, lambda s: ["review", listed(s), *taken_port(s)[2:]]),
    ("a review of a run that is being reviewed", 2, reviewed_already),
    ("a review without the serve extra", 2, without_fastapi),
    ("a service open to other machines without a token", 2, open_to_all),
    (
        "a missing token file",
        2,
        lambda s: ["serve", "runs/good", "--port", "0", "--token-file", "none"],
    ),
    (
        "two adapters with the same name",
        2,
        lambda s: ["serve", "runs/good", "runs/good/adapter", "--port", "0"],
    ),
    ("a repository without an owner", 2, lambda s: ["push", "runs/good", "bank"]),
    ("a push while HF_HUB_OFFLINE is set", 2, lambda s: ["push", "runs/good", "me/bank"]),
    # several labels a row
    (
        "several labels a row, written as words",
        2,
        lambda s: train(several(s), "--answer", "words"),
    ),
    (
        "class weights for several labels a row",
        2,
        lambda s: train(several(s), "--class-weights", "balanced"),
    ),
    (
        "label columns beside a label column",
        2,
        lambda s: train("good.csv", "--label-columns", "x,y", "--label-column", "label"),
    ),
    ("one label column of 0 and 1", 2, lambda s: train("good.csv", "--label-columns", "x")),
    ("labels split at nothing", 2, lambda s: train("good.csv", "--split-labels-at", "")),
    (
        "a search of answers for several labels a row",
        2,
        lambda s: ["tune", several(s), "--model", "base", "--search", "answer"],
    ),
    (
        "a hierarchy of several labels a row",
        2,
        lambda s: train(several(s, "x > y", "x > z"), "--label-separator", " > "),
    ),
]
