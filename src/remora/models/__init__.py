"""Base models and adapters: find, load, make trainable, quantize, save with their card."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
