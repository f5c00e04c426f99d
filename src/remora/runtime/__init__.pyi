from .device import Hardware, Precision, choose_device, choose_precision
from .process_group import ProcessGroup
from .reporter import Reporter
from .stop import Stop

__all__ = [
    "Hardware",
    "Precision",
    "ProcessGroup",
    "Reporter",
    "Stop",
    "choose_device",
    "choose_precision",
]
