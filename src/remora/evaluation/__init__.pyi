from .baselines import Baseline, train_baseline
from .calibration import Reliability, assess
from .compare import Comparison, compare_runs
from .metrics import Metrics, measure
from .predictions import Scored
from .results import Results
from .significance import mcnemar

__all__ = [
    "Baseline",
    "Comparison",
    "Metrics",
    "Reliability",
    "Results",
    "Scored",
    "assess",
    "compare_runs",
    "mcnemar",
    "measure",
    "train_baseline",
]
