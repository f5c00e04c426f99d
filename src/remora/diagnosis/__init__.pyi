from .curve_answer import LearningCurve
from .diagnose import Diagnosis, apply_corrections, diagnose_run
from .learning_curve import learn

__all__ = [
    "Diagnosis",
    "LearningCurve",
    "apply_corrections",
    "diagnose_run",
    "learn",
]
