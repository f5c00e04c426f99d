"""The pages of a run and of a comparison: report.html, its sections, charts and template code."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
