"""The tutorials run from first to last cell and assert their claims; what is committed is small and complete."""

import ast
import re
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError

FOLDER = Path(__file__).resolve().parents[2] / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))
LARGEST = 300 * 1024  # bytes, outputs included
MOST_CELLS = 30
ANSWERS = {  # to the exercises, as their solutions give them
    "01": "16",
    "02": "0",
    "03": "1 / 9",
    "04": "424",
    "05": "(False, True)",
    "06": "[0, 50, 10]",
    "07": "True",
    "08": "158",
    "09": "4",
    "10": "8",
}

each_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=[path.stem for path in NOTEBOOKS])


@pytest.fixture
def execute(tmp_path, monkeypatch):
    """Runs a notebook without its outputs in a folder of its own; returns it with new ones."""
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    monkeypatch.setenv("JUPYTER_RUNTIME_DIR", str(tmp_path / "runtime"))

    def run(notebook):
        for cell in code_cells(notebook):
            cell.outputs, cell.execution_count = [], None
        client = NotebookClient(
            notebook, timeout=500, kernel_name="python3", resources={"metadata": {"path": str(tmp_path)}}
        )
        return client.execute()

    return run


def read(path):
    return nbformat.read(path, as_version=4)


def code_cells(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def images(notebook):
    outputs = [output for cell in code_cells(notebook) for output in cell.outputs]
    return [output.data["image/png"] for output in outputs if "image/png" in output.get("data", {})]


def n_assertions(notebook):
    trees = [ast.parse(cell.source) for cell in code_cells(notebook)]
    return sum(isinstance(node, ast.Assert) for tree in trees for node in ast.walk(tree))


def errors(notebook):
    outputs = [output for cell in code_cells(notebook) for output in cell.outputs]
    return [output for output in outputs if output.output_type == "error" or output.get("name") == "stderr"]


def test_there_are_notebooks():
    assert [path.name[:2] for path in NOTEBOOKS] == [f"{number:02}" for number in range(1, 11)]


@each_notebook
def test_committed_notebook_is_small_complete_and_opens_as_agreed(path):
    notebook = read(path)
    nbformat.validate(notebook)
    assert path.stat().st_size < LARGEST
    assert len(notebook.cells) <= MOST_CELLS
    first = notebook.cells[0].source
    assert re.match(r"# \w", first), "no title"
    assert all(part in first for part in ("**You will do:**", "**You will learn:**", "**You need:**"))
    sources = [cell.source for cell in notebook.cells]
    assert sum("## Exercise" in source for source in sources) == 1
    assert any("<summary>Solution</summary>" in source for source in sources)
    numbers = [cell.execution_count for cell in code_cells(notebook)]
    assert numbers == list(range(1, len(numbers) + 1)), "not run from top to bottom"
    assert images(notebook)
    assert not errors(notebook)
    assert n_assertions(notebook) >= 5
    assert len({cell.id for cell in notebook.cells}) == len(notebook.cells)
    assert not any(cell.metadata for cell in notebook.cells)


@each_notebook
def test_links_of_a_notebook_lead_somewhere(path):
    text = "\n".join(cell.source for cell in read(path).cells if cell.cell_type == "markdown")
    links = [link for link in re.findall(r"\]\(([^)]+)\)", text) if not link.startswith("https://")]
    assert links
    assert [link for link in links if not (path.parent / link).exists()] == []


@pytest.mark.slow
@each_notebook
def test_notebook_runs_its_assertions_hold_and_its_solution_is_right(path, execute):
    notebook = read(path)
    (exercise,) = [cell for cell in code_cells(notebook) if re.match(r"your_\w+ = None", cell.source)]
    exercise.source = exercise.source.replace("None", ANSWERS[path.name[:2]])
    check = notebook.cells[notebook.cells.index(exercise) + 1]
    assert "".join(output.text for output in check.outputs) == "Not answered yet.\n"
    execute(notebook)
    assert "".join(output.text for output in check.outputs) == "Right.\n"
    assert images(notebook)
    assert not errors(notebook)


@pytest.mark.slow
def test_a_notebook_with_a_broken_assertion_fails(execute):
    notebook = read(FOLDER / "02-match-and-merge-a-chunk-by-hand.ipynb")
    (cell,) = [cell for cell in notebook.cells if "== 0.9216" in cell.source]
    cell.source = cell.source.replace("== 0.9216", "== 0.9217")
    with pytest.raises(CellExecutionError, match="AssertionError"):
        execute(notebook)
