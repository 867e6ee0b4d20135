"""The examples of the documentation run."""

import re
import sys
import tomllib
import types
from pathlib import Path

import pytest

import saelab
from saelab.autoencoders.architecture import REGISTRY
from tests.training.test_train import planted, run_on

ROOT = Path(__file__).parents[1]


@pytest.fixture
def annealed(monkeypatch):
    """The example architecture with its test, and the one that learns, as a module."""
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "architectures.md").read_text(), re.S)
    code, test, learning = blocks
    assert len(code.splitlines()) <= 40 and len(test.splitlines()) <= 45 and len(learning.splitlines()) <= 25
    module = types.ModuleType(re.findall(r"from (\S+) import AnnealedTopK", test)[0])  # where the page says to put it
    monkeypatch.setitem(sys.modules, module.__name__, module)
    for block in blocks:
        exec(compile(block, "architectures.md", "exec"), module.__dict__)
    yield module
    for name in ("AnnealedTopK", "Averaged"):
        REGISTRY.pop(name)


def test_the_made_up_architecture_passes_its_test(annealed, tmp_path):
    annealed.test_the_budget_falls_to_k_and_the_sae_comes_back(tmp_path)
    for progress, k in [(0, 8), (0.25, 5), (0.5, 2), (1, 2)]:
        annealed.test_codes_and_gradients_are_those_of_a_dense_topk(progress, k)
    annealed.test_a_budget_above_d_sae_is_refused()


def test_the_one_that_learns_keeps_its_threshold(annealed):
    sae = run_on(planted(), sae=annealed.Averaged(k=2, d_sae=64), tokens=6000).sae
    cut = float(sae.state.cut)
    assert cut > 0 and 1 < sae.encode_sparse(planted(500)).l0 < 4 and float(sae.state.cut) == cut


@pytest.mark.parametrize(
    "page", ["README.md", "CONTRIBUTING.md", *(f"docs/{p.name}" for p in (ROOT / "docs").glob("*.md"))]
)
def test_the_paths_that_a_page_names_are_there(page):
    """Links, and names in backquotes that begin with a folder of ours; not the example's."""
    text = (ROOT / page).read_text()
    named = re.findall(r"`((?:saelab|analysis|dashboards|tests|docs|notebooks|benchmarks)/[\w./-]*)`", text)
    links = [link for link in re.findall(r"\]\(([^)#:]+)(?:#[\w-]+)?\)", text)]
    missing = [path for path in named if not (ROOT / path).exists() and "annealed" not in path]
    missing += [link for link in links if not (ROOT / page).parent.joinpath(link).exists()]
    assert not missing


def test_the_version_is_said_once_in_each_place():
    assert f"version: {saelab.__version__}\n" in (ROOT / "CITATION.cff").read_text()
    assert "version" in tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dynamic"]
