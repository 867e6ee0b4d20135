"""A path that a user gives means the same everywhere: `~` is home, what is no path is refused before anything is done."""

import errno
import os
from pathlib import Path

import pytest
import torch

import saelab
from saelab import ConfigError, hspace, steering
from saelab.base.files import cache_folder, user_path
from saelab.base.manifests import FLOATS, read_tensors
from saelab.base.tensors import write_tensors
from saelab.dashboards.result import Dashboard
from saelab.steering import replaying
from tests import toy_hspace
from tests.toy_dashboard import SITE, make_sae

pytestmark = pytest.mark.filterwarnings("ignore:no output score")  # of an SAE that has seen no data

NO_PATHS = (None, 3, object(), ["a"], b"a", "", "a\0b", "\ud800", "~nobody-of-that-name/a")
WRITTEN = ("train", "sweep", "harvest", "sae.save", "steering.sweep", "build", "bundle", "trajectory", "tensors")


class Named(os.PathLike):
    """A path of another library."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __fspath__(self) -> str:
        return self.name


@pytest.fixture
def home(tmp_path, monkeypatch):
    """A home folder and, beside it, the working folder."""
    (tmp_path / "home").mkdir()
    (tmp_path / "work").mkdir()
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path / "work")
    return tmp_path / "home"


@pytest.fixture
def written(tiny_llama):
    """What writes, by name: each a call with a path."""
    x = torch.randn(512, 8)
    corpus = saelab.load_corpus([f"the state of the union {i} " * 8 for i in range(20)])
    sae = make_sae(tiny_llama)
    run = dict(tokens=512, batch_size=128, progress=False)
    page = dict(effects=None, evaluation=None, tokens=256, latents=2, parquet=False, progress=False)
    trajectory = toy_hspace.planted(torch.randn(2, 3, *toy_hspace.SHAPE), samples=torch.ones(2, 1, 4, 4))
    one = saelab.TopK(k=2, d_sae=16)
    return {
        "train": lambda out: saelab.train(x, sae=one, **run, out=out),
        "sweep": lambda out: saelab.sweep(x, [one], **run, out=out),
        "harvest": lambda out: saelab.harvest(tiny_llama, corpus, site=SITE, tokens=64, out=out, progress=False),
        "sae.save": lambda out: sae.save(out),
        "steering.sweep": lambda out: steering.sweep(
            tiny_llama, sae, [1], ["ablate"], [1.0], ["My fellow"], baselines=(), max_new_tokens=1, draws=2, out=out,
            progress=False,
        ),
        "build": lambda out: saelab.dashboards.build(sae, tiny_llama, corpus, out, bundle=False, **page),
        "bundle": lambda out: saelab.dashboards.build(sae, tiny_llama, corpus, out, bundle=True, **page),
        "trajectory": lambda out: trajectory.save(out),
        "tensors": lambda out: write_tensors(out, {"x": x}, {"format": "test"}),
    }  # fmt: skip


@pytest.mark.parametrize("name", WRITTEN)
def test_home_is_home(home, written, name):
    written[name]("~/deep/result")
    assert os.listdir(home / "deep") == ["result"]
    assert os.listdir() == []


@pytest.mark.parametrize("name", WRITTEN)
@pytest.mark.parametrize("path", NO_PATHS[1:3])
def test_what_is_no_path_is_refused(home, written, name, path):
    with pytest.raises(ConfigError, match="is not a path"):
        written[name](path)
    assert os.listdir() == [] and os.listdir(home) == []


def test_what_is_written_at_home_is_found_there(home, written):
    for name in ("train", "harvest", "sae.save", "steering.sweep", "build", "trajectory", "tensors"):
        written[name](f"~/{name}")
    assert saelab.load_run("~/train").path == home / "train"
    assert len(saelab.ActivationStore.open("~/harvest")) == 64
    assert saelab.SAE.load("~/sae.save").path == home / "sae.save"
    assert len(steering.load_sweep("~/steering.sweep")) == 2
    assert Dashboard("~/build").data.manifest["format"] == "saelab-dashboard"
    assert len(hspace.Trajectory.load("~/trajectory")) == 2
    assert list(read_tensors("~/tensors", {"x": (FLOATS, "n 8")}, "test")[0]) == ["x"]
    (home / "text.txt").write_text("My fellow citizens")
    assert saelab.load_corpus("~/text.txt").documents == ["My fellow citizens"]


def test_the_finished_run_at_home_is_returned(home, written):
    first, again = written["train"]("~/runs/x"), written["train"]("~/runs/x")
    assert torch.equal(first.sae.W_dec, again.sae.W_dec) and again.path == home / "runs" / "x"


@pytest.mark.parametrize(
    "read",
    [
        saelab.load_run, saelab.SAE.load, saelab.ActivationStore.open, steering.load_sweep, Dashboard,
        hspace.Trajectory.load, hspace.Directions.load, replaying.read, saelab.load_sae,
    ],
)  # fmt: skip
@pytest.mark.parametrize("path", NO_PATHS)
def test_nothing_is_read_from_what_is_no_path(read, path):
    with pytest.raises(ConfigError):
        read(path)


def test_a_path(home, monkeypatch):
    assert user_path("runs/demo") == Path("runs/demo") == user_path(Path("runs/demo")) == user_path(Named("runs/demo"))
    assert user_path("~/runs") == home / "runs" == user_path(Path("~/runs"))
    monkeypatch.setenv("SAELAB_CACHE", "~/elsewhere")
    assert cache_folder() == home / "elsewhere"


@pytest.mark.parametrize("kind", ["closed", "in a closed folder", "too long"])
def test_what_cannot_be_looked_up_is_refused_by_name(tmp_path, monkeypatch, kind):
    """Where nobody but its owner may enter a folder, or a name is too long, `Path.exists` itself raises."""
    path = tmp_path / ("a" * 300 if kind == "too long" else "closed/x")
    if kind != "too long":
        shut, stat = (
            tmp_path / ("closed/x" if kind == "closed" else "closed"),
            os.stat,
        )  # root may enter: as for another user
        shut.mkdir(parents=True)

        def refusing(name, *args, **kwargs):
            if not isinstance(name, int) and str(name).startswith(f"{shut}/"):
                raise PermissionError(errno.EACCES, "Permission denied", str(name))
            return stat(name, *args, **kwargs)

        monkeypatch.setattr(os, "stat", refusing)
    x, one = torch.randn(64, 8), saelab.TopK(k=2, d_sae=16)
    run = dict(tokens=64, batch_size=32, progress=False)
    for call in (
        saelab.SAE.load,
        saelab.load_run,
        saelab.load_model,
        saelab.ActivationStore.open,
        saelab.SAE(one, 8).save,
        lambda out: saelab.train(x, sae=one, out=out, **run),
        lambda out: saelab.sweep(x, [one], out=out, **run),
    ):
        with pytest.raises(saelab.SaelabError, match="cannot be looked up"):
            call(path)
