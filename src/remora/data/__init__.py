"""Tables and Hub datasets read into checked rows, splits of them, and prompts for them."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
