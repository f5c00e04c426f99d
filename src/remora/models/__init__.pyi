from .hub import find
from .loading import load, load_tokenizer
from .lora import adapt
from .metadata import AdapterCard
from .saved import Trained, load_adapter, open_trained, save

__all__ = [
    "AdapterCard",
    "Trained",
    "adapt",
    "find",
    "load",
    "load_adapter",
    "load_tokenizer",
    "open_trained",
    "save",
]
