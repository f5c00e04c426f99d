from .check import check_rows, check_tree
from .forward import answer_logits
from .loss import loss_sum
from .packing import TokenTree, build, split
from .scoring import Scorer

__all__ = [
    "Scorer",
    "TokenTree",
    "answer_logits",
    "build",
    "check_rows",
    "check_tree",
    "loss_sum",
    "split",
]
