"""Plans a run before it begins: its memory, its time, and the settings that fit."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
