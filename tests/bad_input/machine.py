"""What a machine lacks, and training that fails."""

from __future__ import annotations

from bad_input.workshop import Case, Workshop, of_gguf, train
from remora.runtime import memory


def in_little_memory(shop: Workshop) -> list[str]:
    command = of_gguf(shop)
    shop.patch().setattr(memory, "free_bytes", lambda *_, **__: 400_000_000)
    return command


CASES: list[Case] = [
    # memory and disk
    ("a GGUF file that memory does not suffice to convert", 5, in_little_memory),
    (
        "an output folder that cannot be created",
        5,
        lambda s: train("good.csv", "--output", "good.csv/runs"),
    ),
    # training
    (
        "a run that diverges",
        6,
        lambda s: [
            "train",
            "good.csv",
            "--model",
            "base",
            "--device",
            "cpu",
            "--precision",
            "float32",
            "--learning-rate",
            "1",
            "--max-grad-norm",
            "1e30",
            "--alpha",
            "1e37",
            "--epochs",
            "20",
            "--schedule",
            "constant",
            "--patience",
            "0",
            "--name",
            "wild",
        ],
    ),
    (
        "a time limit that is reached",
        75,
        lambda s: train("good.csv", "--name", "late", "--max-time", "0s"),
    ),
]
