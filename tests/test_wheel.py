"""What ships: the wheel, installed in an empty environment, away from the checkout."""

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import venv
from pathlib import Path
from zipfile import ZipFile

import pytest

ROOT = Path(__file__).parents[1]
SOURCE = ("saelab", "analysis", "dashboards", "pyproject.toml", "README.md", "LICENSE")
LINKS = ("saelab/analysis", "saelab/dashboards")
AWAY = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}  # which may lead to the checkout
PIP = [sys.executable, "-m", "pip", "--disable-pip-version-check", "-q"]
WEB = "pages/web"  # in the package: scripts and styles of the pages


def files_of(package: Path) -> set[str]:
    """Every file of a package that is to ship, through symbolic links, relative to it: of the pages those that are built."""
    files = [
        (Path(folder) / name).relative_to(package)
        for folder, _, names in os.walk(package, followlinks=True)
        for name in names
    ]
    pages = {file for file in files if file.match(f"{WEB}/*.html") or file.match(f"{WEB}/dist/*")}
    code = {file for file in files if "__pycache__" not in file.parts and not file.is_relative_to(WEB)}
    return {str(file) for file in pages | code}


def built(folder: Path, links: bool) -> Path:
    """A wheel of a copy of the checkout, with its symbolic links or, as where they cannot be, without."""
    source = folder / "source"
    source.mkdir(parents=True)
    left_out = shutil.ignore_patterns("__pycache__", "node_modules")
    for name in SOURCE:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, source / name, symlinks=True, ignore=left_out)
        else:
            shutil.copy(ROOT / name, source)
    for link in LINKS:
        assert (source / link).is_symlink()
        if not links:
            (source / link).unlink()
    build = ["wheel", "--no-deps", "--no-build-isolation", "--no-index", "-w", str(folder), str(source)]
    subprocess.run([*PIP, *build], check=True)
    return next(folder.glob("saelab-*.whl"))


def test_the_source_distribution_has_the_denoisers_and_the_pages(wheel):
    code = "from setuptools import build_meta; print(build_meta.build_sdist('.'))"
    source = wheel.parent / "source"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=source, env=AWAY, capture_output=True, text=True, check=True
    )
    with tarfile.open(source / done.stdout.split()[-1]) as archive:
        held = {name.partition("/")[2] for name in archive.getnames()}
    assert {
        f"saelab/{file}" for file in files_of(ROOT / "saelab") if "models/denoisers/" in file or WEB in file
    } <= held


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    return built(tmp_path_factory.mktemp("wheel"), links=False)


@pytest.fixture(scope="module")
def python(wheel) -> Path:
    """The interpreter of an environment with the wheel, and our dependencies through a .pth file."""
    folder = wheel.parent
    venv.create(folder / "env", with_pip=False)
    interpreter = folder / "env" / "bin" / "python"
    install = ["--python", str(interpreter), "install", "--no-deps", "--no-index", str(wheel)]
    subprocess.run([*PIP, *install], check=True, env=AWAY)
    # A path in a .pth file does not run the .pth files found there: an editable saelab stays out.
    site = Path(sysconfig.get_path("purelib", vars={"base": str(folder / "env")}))
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return interpreter


def run(python: Path, code: str) -> str:
    done = subprocess.run(
        [python, "-c", code], cwd=python.parent, env=AWAY, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_wheel_is_the_same_without_symbolic_links(wheel, tmp_path):
    with ZipFile(wheel) as without, ZipFile(built(tmp_path, links=True)) as with_links:
        assert sorted(without.namelist()) == sorted(with_links.namelist())


def test_every_file_ships(python):
    installed = Path(run(python, "import saelab; print(saelab.__file__)").strip()).parent
    assert installed.is_relative_to(python.parents[1])
    assert files_of(installed) == files_of(ROOT / "saelab")


def test_every_module_imports(python):
    code = """
import importlib, json, pkgutil, saelab
names = [m.name for m in pkgutil.walk_packages(saelab.__path__, "saelab.")]
for name in names:
    if name != "saelab.__main__" and not name.startswith("saelab.kernels.gpu."):  # the command, and what needs Triton
        importlib.import_module(name)
print(json.dumps(names))
"""
    files = {file for file in files_of(ROOT / "saelab") if file.endswith(".py") and file != "__init__.py"}
    modules = {file.removesuffix(".py").removesuffix("/__init__").replace("/", ".") for file in files}
    assert set(json.loads(run(python, code))) == {f"saelab.{module}" for module in modules}


def test_a_page_has_its_scripts_and_styles(python):
    code = "from saelab.pages.shell import shell; print(len(''.join(shell())))"
    assert int(run(python, code)) > 100_000


def test_the_package_is_typed(python):
    code = "from importlib.resources import files; assert (files('saelab') / 'py.typed').is_file()"
    run(python, code)


def test_the_console_script_runs(python):
    script = python.with_name("saelab")
    version = subprocess.run(
        [script, "--version"], cwd=python.parent, env=AWAY, capture_output=True, text=True, check=True
    )
    assert version.stdout.startswith("saelab ")
