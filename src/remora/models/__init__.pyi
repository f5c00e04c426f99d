from .adapter_card import AdapterCard
from .hub import find
from .loading import load, load_tokenizer
from .lora import adapt
from .saved import load_adapter, save

__all__ = [
    "AdapterCard",
    "adapt",
    "find",
    "load",
    "load_adapter",
    "load_tokenizer",
    "save",
]
