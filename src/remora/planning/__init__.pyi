from .plan import Plan
from .planner import Planner, make_plan

__all__ = [
    "Plan",
    "Planner",
    "make_plan",
]
