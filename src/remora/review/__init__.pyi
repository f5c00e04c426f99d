from .queue import Queue, Summary
from .session import Review

__all__ = [
    "Queue",
    "Review",
    "Summary",
]
