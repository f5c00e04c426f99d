"""The machine under a run: device and precision, memory, processes, files, signals, progress."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
