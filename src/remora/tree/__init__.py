"""The token tree: a batch as one trie that computes every shared token once."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
