from .finish import TrainResult
from .loop import fit
from .run import train

__all__ = [
    "TrainResult",
    "fit",
    "train",
]
