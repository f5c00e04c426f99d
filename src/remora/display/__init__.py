"""All terminal output: progress to standard error, results to standard output.

Nothing else imports rich.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
