"""A trained adapter at work: predictions over tables and streams, and the HTTP service."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
