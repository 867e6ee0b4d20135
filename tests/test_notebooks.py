"""The notebooks run from top to bottom on a small model, their scripts are the same notebooks, and they are kept executed."""

import ast
import re
from pathlib import Path

import jupytext
import nbclient
import nbformat
import pytest

from tests import tiny

FOLDER = Path(__file__).parents[1] / "notebooks"
SCRIPTS = sorted(FOLDER.glob("[0-9]*.py"))
# What stands in the place of each notebook's parameters here: a small random model, few tokens.
SMALL = {
    "01": "K, D_SAE, TOKENS = 4, 128, 12_000; SITE = 'blocks.1.hook_resid_post'",
    "02": "K, D_SAE, TOKENS, GRADIENT_TOKENS = 4, 64, 12_000, 1_000",
    "03": "K, D_SAE, TOKENS, SCORED, DRAWS = 4, 64, 12_000, 16, 2; SITE = 'blocks.2.hook_resid_post'",
    "04": "K, D_SAE, TOKENS, READ = 4, 64, 12_000, 2_000",
    "05": "WIDTHS, KS = [16, 24, 32, 48, 64], [2]; TOKENS, HELDOUT, SOME, COST = 110_000, 4_000, 300, 128",
    "06": """
BLOCKS, STREAM, ROOT = [1, 2, 3], [3], 3
CONFIG = STREAM_CONFIG = saelab.TopK(k=4, d_sae=64)
TOKENS, TRAINING, HELDOUT, READ, PROMPTS = 5_000, 8_000, 1_000, 500, 8
""",
    "07": "EPOCHS, DRAWS, COUNTS = 12, 2, [8, 16, 32]",
    "08": "N, STEPS, EDITED, ROWS = 40, 5, 6, 3_000",
    "11": "RUNS, STEPS, LAGS = 2, 3, [1]; COUNTS, TRAINING, PLACES = [4, 8], 3, 3_000",
}


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> str:
    """The parameters of a small model and a text folder on disk."""
    folder = tmp_path_factory.mktemp("notebook")
    tiny.llama_model().save_pretrained(folder / "model")
    tiny.byte_tokenizer().save_pretrained(folder / "model")
    (folder / "text").mkdir()
    for number in range(60):
        (folder / "text" / f"{number:02}.txt").write_text("\n".join(f"{number}. {text}" * 5 for text in tiny.TEXTS))
    return f"MODEL, CORPUS = {str(folder / 'model')!r}, {str(folder / 'text')!r}"


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_script_and_notebook_are_in_sync(script):
    ours, theirs = jupytext.read(script), nbformat.read(script.with_suffix(".ipynb"), as_version=4)
    assert [(c.cell_type, c.source) for c in ours.cells] == [(c.cell_type, c.source) for c in theirs.cells], (
        f"run: python notebooks/execute.py {script.name[:2]}"
    )


def shows(source: str) -> bool:
    """Whether a cell ends in a value or prints."""
    last = (ast.parse(source).body or [None])[-1]
    return isinstance(last, ast.Expr) and not ast.unparse(last).startswith(("assert", "sae.save(", "receipt.save("))


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_the_notebook_is_kept_with_its_outputs(script):
    notebook = nbformat.read(script.with_suffix(".ipynb"), as_version=4)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    assert not [cell.source for cell in code if shows(cell.source) and not cell.outputs]
    assert "# %pip install" in code[0].source and notebook.cells[-1].source.startswith("## What was seen")
    assert not re.search(r"[\s'\"(](/tmp|/home|/root|/Users|/work|[A-Z]:\\)/", str([cell.outputs for cell in code]))
    outputs = [output for cell in code for output in cell.outputs]
    assert "error" not in {output.output_type for output in outputs}
    figures = [output.data for output in outputs if "application/vnd.plotly.v1+json" in output.get("data", {})]
    assert all("image/png" in data for data in figures)
    for cell in notebook.cells:
        for picture in re.findall(r"!\[[^]]+\]\(([^)]+)\)", cell.source):
            assert (FOLDER / picture).is_file()


@pytest.mark.slow
@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_notebook_runs(script, small, tmp_path, monkeypatch):
    monkeypatch.setenv("SAELAB_CACHE", str(tmp_path / "cache"))
    notebook = jupytext.read(script)
    [place] = [i for i, cell in enumerate(notebook.cells) if "parameters" in cell.metadata.get("tags", ())]
    notebook.cells.insert(place + 1, nbformat.v4.new_code_cell(f"{small}\n{SMALL[script.name[:2]]}"))
    nbclient.NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(tmp_path)}}).execute()
