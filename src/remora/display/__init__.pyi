from .choice_results import show_choice, show_tuned
from .console import show_line
from .diagnosis_results import show_diagnosis
from .evaluation_results import show_comparison, show_levels, show_metrics, show_reliability
from .export_results import show_export, show_push
from .next_steps_results import show_next_steps
from .plan_results import show_plan
from .progress import TerminalReporter
from .review_results import show_change, show_review
from .training_results import show_learning_curve, show_result

__all__ = [
    "TerminalReporter",
    "show_change",
    "show_choice",
    "show_comparison",
    "show_diagnosis",
    "show_export",
    "show_learning_curve",
    "show_levels",
    "show_line",
    "show_metrics",
    "show_next_steps",
    "show_plan",
    "show_push",
    "show_reliability",
    "show_result",
    "show_review",
    "show_tuned",
]
