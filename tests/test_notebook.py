"""The notebook runs from its first cell to its last."""

from __future__ import annotations

from pathlib import Path

import nbformat
from nbclient import NotebookClient

FEW = "rows_per_class=10, test_fraction=0.03, validation_fraction=0.03"
PATH = Path(__file__).parents[1] / "notebooks" / "from_table_to_adapter.ipynb"


def test_it_runs_and_measures(tmp_path: Path) -> None:
    notebook = nbformat.read(PATH, as_version=4)
    settings = notebook.cells[1]
    assert "EPOCHS = 5 if" in settings.source
    settings.source += "\nEPOCHS = 1"
    (training,) = [cell for cell in notebook.cells if "train(TrainConfig(" in cell.source]
    training.source = training.source.replace("epochs=EPOCHS", f"epochs=EPOCHS, {FEW}")
    assert FEW in training.source  # a part of the table, which tests the same cells
    NotebookClient(notebook, timeout=600, resources={"metadata": {"path": tmp_path}}).execute()
    shown = "\n".join(
        output.text
        for cell in notebook.cells
        for output in cell.get("outputs", [])
        if "text" in output
    )
    for wanted in (
        "training, ",
        "parameters train",
        "token tree",
        "examples/s",
        "McNemar",
        "rows to look at",
        "wrong labels",
    ):
        assert wanted in shown
    assert list((tmp_path / "runs").iterdir())


def test_its_outputs_are_those_of_a_run() -> None:
    notebook = nbformat.read(PATH, as_version=4)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert all(cell.execution_count == index for index, cell in enumerate(code, 1))
    assert all("error" not in {o.output_type for o in cell.outputs} for cell in code)
