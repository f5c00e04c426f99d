from .export import export_run
from .push import push_run

__all__ = [
    "export_run",
    "push_run",
]
