"""Remora turns a large language model into a text classifier by training a small LoRA adapter."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from remora.classifier import TextClassifier
    from remora.serving.predictor import Predictor

__all__ = ["Predictor", "TextClassifier", "__version__"]
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    """Import what is heavy when it is asked for, so that `remora --help` is instant."""
    if name == "TextClassifier":
        from remora.classifier import TextClassifier

        return TextClassifier
    if name == "Predictor":
        from remora.serving.predictor import Predictor

        return Predictor
    raise AttributeError(f"module 'remora' has no attribute {name!r}")
