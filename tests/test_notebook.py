"""The notebook runs from its first cell to its last."""

from __future__ import annotations

from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

from data.test_table import write_csv
from remora.data.dataset import load_dataset

FEW = "rows_per_class=10, validation_fraction=0.03, test='test.csv'"
PATH = Path(__file__).parents[1] / "notebooks" / "from_table_to_adapter.ipynb"


def read() -> nbformat.NotebookNode:
    return nbformat.read(PATH, as_version=4)


def test_it_runs_and_measures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its cells, in this process, whose libraries are imported, and on a part of the table."""
    first, *cells = [cell.source for cell in read().cells if cell.cell_type == "code"]
    assert "EPOCHS = 5 if" in first
    (training,) = [number for number, cell in enumerate(cells) if "train(TrainConfig(" in cell]
    cells[training] = cells[training].replace("epochs=EPOCHS", f"epochs=EPOCHS, {FEW}")
    assert FEW in cells[training]
    monkeypatch.chdir(tmp_path)
    test = load_dataset("sample:support").test
    rows = sorted(zip(test.texts, test.labels, strict=True), key=lambda row: row[1])
    write_csv(tmp_path / "test.csv", rows[::8])
    names: dict[str, object] = {}
    for cell in (first, "EPOCHS = 1", *cells):
        exec(cell, names)
    shown = capsys.readouterr().out
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


@pytest.mark.durability
def test_it_runs_in_jupyter_as_it_is_published(tmp_path: Path) -> None:
    notebook = read()
    NotebookClient(notebook, timeout=1200, resources={"metadata": {"path": tmp_path}}).execute()
    assert all(cell.get("outputs") for cell in notebook.cells if cell.cell_type == "code")


def test_its_outputs_are_those_of_a_run() -> None:
    code = [cell for cell in read().cells if cell.cell_type == "code"]
    assert all(cell.execution_count == index for index, cell in enumerate(code, 1))
    assert all("error" not in {o.output_type for o in cell.outputs} for cell in code)
