"""How `remora VERB --help` shows a verb: its settings in groups, and examples below them."""

# Annotations are not postponed here, as in remora.config.train.

from collections.abc import Callable
from typing import Annotated, TypeVar

from cyclopts import Group, Parameter

Settings = TypeVar("Settings", bound=type)

_TITLES = (
    "Choice",
    "Data",
    "Model",
    "Prompt",
    "Training",
    "Measuring",
    "Speed and memory",
    "Output",
)
GROUPS = {title: Group(title, sort_key=place) for place, title in enumerate(_TITLES)}
"""Groups of settings in the order of the help, by their titles."""

REST = Group("Other", sort_key=len(_TITLES))
"""What all verbs share."""

EXAMPLES = {
    "plan": (
        "remora plan data.csv --model Qwen/Qwen3-4B",
        "remora plan data.csv --model Qwen/Qwen3-8B --device t4",
        "remora plan data.csv --model Qwen/Qwen3-4B --json",
    ),
    "train": (
        "remora train sample:support --model nano",
        "remora train data.csv --model Qwen/Qwen3-4B --epochs 5",
        "remora train data.csv --model Qwen/Qwen3-8B --method qlora",
    ),
    "tune": (
        "remora tune data.csv --model nano",
        "remora tune data.csv --model nano --search learning_rate",
        "remora tune data.csv --model nano --trials 9 --max-time 2h",
    ),
    "choose": (
        "remora choose data.csv --models nano,base --bar 0.93",
        "remora choose data.csv --models a,b --bar 0.9 --budget 2h",
        "remora choose data.csv --models nano --bar 0.9 --json",
    ),
    "diagnose": (
        "remora diagnose runs/data-nano",
        "remora diagnose runs/data-nano --method adapters",
        "remora diagnose runs/data-nano --json",
    ),
    "review": (
        "remora review runs/data-nano",
        "remora review runs/data-nano --no-browser --port 8001",
        "remora review runs/data-nano --json",
    ),
    "retrain": (
        "remora retrain runs/data-nano",
        "remora retrain runs/data-nano --name cleaned",
        "remora retrain runs/data-nano --corrections relabel.csv",
    ),
    "compare": (
        "remora compare runs/data-nano runs/data-qwen",
        "remora compare runs/data-nano runs/data-qwen --bar 0.93",
        "remora compare runs/* --report comparison.html",
    ),
    "predict": (
        "echo 'where is my card?' | remora predict runs/data-nano",
        "remora predict runs/data-nano new.csv --output labels.csv",
        "remora predict runs/data-nano new.csv --threshold 0.9",
    ),
    "eval": (
        "remora eval runs/data-nano test.csv",
        "remora eval runs/data-nano test.csv --label-column team",
        "remora eval runs/data-nano test.csv --json",
    ),
    "export": (
        "remora export runs/data-nano --merge",
        "remora export runs/data-nano --compress --budget 1MB",
        "remora export runs/data --gguf q8_0 --llama-cpp llama.cpp",
    ),
    "serve": (
        "remora serve runs/data-nano",
        "remora serve intent=runs/data-nano team=runs/teams-nano",
        "remora serve runs/data-nano --port 9000",
    ),
    "push": (
        "remora push runs/data-nano me/support-intents",
        "remora push runs/data-nano me/support-intents --public",
        "remora push runs/data-nano me/support-intents --json",
    ),
    "report": (
        "remora report runs/data-nano",
        "remora report runs/data-nano --output report.html",
    ),
}
"""Commands that one would type, by their verb; the verbs in the order of use."""


def grouped(**titles: str) -> Callable[[Settings], Settings]:
    """Show the settings of a dataclass in groups: from each field that is named on, in its group.

    Args:
        titles: Title of the group that begins with a field, by the field's name.
    """

    def annotate(settings: Settings) -> Settings:
        parameter = None
        for name, hint in settings.__annotations__.items():
            if name in titles:
                parameter = Parameter(group=GROUPS[titles[name]])
            if parameter:
                settings.__annotations__[name] = Annotated[hint, parameter]
        return settings

    return annotate


def examples(verb: str) -> str:
    """Return the end of a verb's help, in Markdown: commands that one would type."""
    return "\n".join(["Examples:", "", "```sh", *EXAMPLES[verb], "```"])
