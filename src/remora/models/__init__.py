"""Base models and adapters: found, loaded, made trainable, quantized, saved with their card."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
