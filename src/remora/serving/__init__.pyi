from .engine import Engine
from .predict import evaluate_adapter, write_predictions
from .server import Service

__all__ = [
    "Engine",
    "Service",
    "evaluate_adapter",
    "write_predictions",
]
