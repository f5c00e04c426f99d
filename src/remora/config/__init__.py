"""The settings of each verb: the only place of a default and its help text.

The command line's flags and the keys of a TOML file are generated from these fields.
"""

from remora.config.checks import DeviceName, Method, PrecisionName
from remora.config.choose import ChooseConfig
from remora.config.compare import CompareConfig
from remora.config.diagnose import DiagnoseConfig
from remora.config.eval import EvalConfig
from remora.config.export import ExportConfig
from remora.config.plan import PlanConfig
from remora.config.predict import PredictConfig
from remora.config.push import PushConfig
from remora.config.report import ReportConfig
from remora.config.retrain import RetrainConfig
from remora.config.review import ReviewConfig
from remora.config.serve import ServeConfig
from remora.config.train import TrainConfig
from remora.config.tune import TuneConfig

__all__ = [
    "ChooseConfig",
    "CompareConfig",
    "DeviceName",
    "DiagnoseConfig",
    "EvalConfig",
    "ExportConfig",
    "Method",
    "PlanConfig",
    "PrecisionName",
    "PredictConfig",
    "PushConfig",
    "ReportConfig",
    "RetrainConfig",
    "ReviewConfig",
    "ServeConfig",
    "TrainConfig",
    "TuneConfig",
]
