"""Why a run errs: mislabelled rows, confused labels, ceilings, learning curves."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
