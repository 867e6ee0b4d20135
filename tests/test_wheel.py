"""What ships: the wheel, installed in an empty environment, away from the checkout."""

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCE = ("saelab", "analysis", "dashboards", "pyproject.toml", "README.md", "LICENSE")


def files_of(package: Path) -> set[str]:
    """Every file of a package, through symbolic links, relative to it."""
    files = [
        (Path(folder) / name).relative_to(package)
        for folder, _, names in os.walk(package, followlinks=True)
        for name in names
    ]
    return {str(file) for file in files if "__pycache__" not in file.parts}


@pytest.fixture(scope="module")
def python(tmp_path_factory) -> Path:
    """The interpreter of an environment with the wheel, and our dependencies through a .pth file."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    source.mkdir()
    for name in SOURCE:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, source / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / name, source)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "-q"]
    build = ["wheel", "--no-deps", "--no-build-isolation", "--no-index", "-w", str(folder), str(source)]
    subprocess.run([*pip, *build], check=True)
    venv.create(folder / "env", with_pip=False)
    interpreter = folder / "env" / "bin" / "python"
    wheel = next(folder.glob("saelab-*.whl"))
    subprocess.run([*pip, "--python", str(interpreter), "install", "--no-deps", "--no-index", str(wheel)], check=True)
    # A path in a .pth file does not run the .pth files found there: an editable saelab stays out.
    site = Path(sysconfig.get_path("purelib", vars={"base": str(folder / "env")}))
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return interpreter


def run(python: Path, code: str) -> str:
    done = subprocess.run([python, "-c", code], cwd=python.parent, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_every_file_ships(python):
    installed = Path(run(python, "import saelab; print(saelab.__file__)").strip()).parent
    assert installed.is_relative_to(python.parents[1])
    assert files_of(installed) == files_of(ROOT / "saelab")


def test_every_module_imports(python):
    code = """
import importlib, json, pkgutil, saelab
names = [m.name for m in pkgutil.walk_packages(saelab.__path__, "saelab.")]
for name in names:
    importlib.import_module(name)
print(json.dumps(names))
"""
    names = set(json.loads(run(python, code)))
    assert {"saelab.cli", "saelab.analysis", "saelab.dashboards", "saelab.commands.doctor"} <= names


def test_the_package_is_typed(python):
    code = "from importlib.resources import files; assert (files('saelab') / 'py.typed').is_file()"
    run(python, code)


def test_the_console_script_runs(python):
    script = python.with_name("saelab")
    version = subprocess.run([script, "--version"], cwd=python.parent, capture_output=True, text=True, check=True)
    assert version.stdout.startswith("saelab ")
