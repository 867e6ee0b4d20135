"""The notebooks run from top to bottom on a small model, and their scripts are the same notebooks."""

import ast
from pathlib import Path

import jupytext
import nbclient
import nbformat
import pytest

from tests import tiny

FOLDER = Path(__file__).parents[1] / "notebooks"
SCRIPTS = sorted(FOLDER.glob("*.py"))
SHOWN = {"print", "plot", "head", "to_pandas", "sites", "summary", "show"}


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> dict[str, str]:
    """A small model and a text folder on disk, as the variables that the notebooks read."""
    folder = tmp_path_factory.mktemp("notebook")
    tiny.llama_model().save_pretrained(folder / "model")
    tiny.byte_tokenizer().save_pretrained(folder / "model")
    (folder / "text").mkdir()
    for number in range(40):
        (folder / "text" / f"{number:02}.txt").write_text("\n".join(f"{number}. {text}" * 5 for text in tiny.TEXTS))
    return {
        "SAELAB_NOTEBOOK_MODEL": str(folder / "model"),
        "SAELAB_NOTEBOOK_CORPUS": str(folder / "text"),
        "SAELAB_CACHE": str(folder / "cache"),
    }


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_script_and_notebook_are_in_sync(script):
    ours, theirs = jupytext.read(script), nbformat.read(script.with_suffix(".ipynb"), as_version=4)
    assert [(c.cell_type, c.source) for c in ours.cells] == [(c.cell_type, c.source) for c in theirs.cells], (
        f"run: jupytext --to ipynb notebooks/{script.name}"
    )


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_a_notebook_that_was_executed_has_its_output(script):
    """Cells in order, none with an error, what ends in a value shows it. One that was never executed has no output at all."""
    cells = [c for c in nbformat.read(script.with_suffix(".ipynb"), as_version=4).cells if c.cell_type == "code"]
    if not any(cell.outputs for cell in cells):
        pytest.skip("not executed")
    counts = [cell.execution_count for cell in cells if cell.source.strip()]
    assert None not in counts and counts == sorted(counts)
    for cell in cells:
        assert not [output for output in cell.outputs if output.output_type == "error"]
        assert cell.outputs or not shows(cell.source), f"no output: {cell.source}"


def shows(source: str) -> bool:
    """Whether a cell ends in a value that a notebook shows: no call, or a call of one that always gives something to see."""
    lines = "\n".join(line for line in source.splitlines() if not line.startswith(("%", "!")))
    last = ast.parse(lines).body[-1:]
    if not last or not isinstance(last[0], ast.Expr) or source.rstrip().endswith(";"):
        return False
    value = last[0].value
    return not isinstance(value, ast.Call) or ast.unparse(value.func).rpartition(".")[2] in SHOWN


@pytest.mark.slow
@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_notebook_runs(script, small, tmp_path, monkeypatch):
    for name, value in small.items():
        monkeypatch.setenv(name, value)
    notebook = nbformat.read(script.with_suffix(".ipynb"), as_version=4)
    nbclient.NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(tmp_path)}}).execute()
