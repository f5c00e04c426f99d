"""Remora turns a large language model into a text classifier by training a small LoRA adapter."""

__version__ = "0.1.0"
