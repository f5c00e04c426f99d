"""What a run needs and takes before it begins: memory, time, and the settings that fit."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
