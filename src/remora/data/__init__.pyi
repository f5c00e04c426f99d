from .dataset import Dataset, dataset_from_lists, limit_rows, load_data, load_dataset
from .prompt import Prompt, TokenSequence
from .summary import DataSummary
from .table import Table, read_table, stream_texts

__all__ = [
    "DataSummary",
    "Dataset",
    "Prompt",
    "Table",
    "TokenSequence",
    "dataset_from_lists",
    "limit_rows",
    "load_data",
    "load_dataset",
    "read_table",
    "stream_texts",
]
