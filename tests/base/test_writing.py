"""What is written: nothing of the user's is removed, links are written through, and nothing killed is in the way."""

import errno
import fcntl
import json
import os
import shutil
import signal

import pytest
import torch
from safetensors.torch import save_file

import saelab
from saelab import CheckpointError, SaelabError
from saelab.base import files
from saelab.base.tensors import DTYPES, save_tensors
from saelab.dashboards.writing import bundle
from saelab.training import checkpoint
from tests import toy_hspace
from tests.toy_writing import build, harvest, refused, saved, select, steer, sweep, theirs, train, tree

pytestmark = pytest.mark.filterwarnings("ignore:no output score")  # of an SAE that has seen no data


# What we did not write we never remove


def test_an_sae_saved_again_leaves_the_users_files(tmp_path):
    saved().save(tmp_path / "s")
    mine = theirs(tmp_path / "s", "labels.json", ".git/HEAD", "figures/one.png", ".hidden")
    (tmp_path / "s" / "empty").mkdir()
    again = saved(seed=1)
    again.save(tmp_path / "s")
    found = tree(tmp_path / "s")
    assert mine.items() <= found.items() and "empty" in found
    assert torch.equal(saelab.SAE.load(tmp_path / "s").W_dec, again.W_dec)
    assert [path.name for path in tmp_path.iterdir()] == ["s"]


def test_a_file_of_ours_that_is_no_longer_written_goes(tmp_path):
    train(tmp_path / "r").sae.save(tmp_path / "s")
    assert (tmp_path / "s" / "sparsity.safetensors").exists()
    saved().save(tmp_path / "s")
    assert sorted(os.listdir(tmp_path / "s")) == ["cfg.json", "sae_weights.safetensors", "saelab.safetensors"]


@pytest.mark.parametrize("foreign", ["cfg.json", "sparsity.safetensors", "sae_weights.safetensors", "thesis.tex"])
def test_what_another_has_written_is_refused(tmp_path, foreign):
    folder = tmp_path / "s"
    if foreign == "sparsity.safetensors":
        saved().save(folder)
    theirs(folder, foreign, "cfg.json") if foreign != "sparsity.safetensors" else theirs(folder, foreign)
    if foreign == "cfg.json":
        (folder / foreign).write_text('{"architecture": "topk", "metadata": {}}')
    before = tree(folder)
    sae = train(tmp_path / "r").sae  # has a sparsity to write
    with pytest.raises(CheckpointError, match=r"not an SAE folder|would write but did not \(sparsity"):
        sae.save(folder)
    assert tree(folder) == before


def test_a_bundle_rebuilt_leaves_the_users_files(tiny_llama, tmp_path):
    build(tiny_llama, tmp_path / "page", parquet=True)
    mine = theirs(tmp_path / "page", ".git/HEAD", "CNAME", "data/notes.txt", "parquet/mine.csv", "README.md")
    page = build(tiny_llama, tmp_path / "page", latents=3)
    found = tree(tmp_path / "page")
    assert mine.items() <= found.items() and len(page.data.containers) > 3
    assert sorted(os.listdir(tmp_path / "page" / "parquet")) == [
        "mine.csv"
    ]  # of the tables that were not asked for again
    assert bundle.listed(tmp_path / "page") and set(bundle.listed(tmp_path / "page")) <= set(found)


def test_tables_that_we_did_not_write_are_refused_before_anything_is_read(tiny_llama, tmp_path, monkeypatch):
    build(tiny_llama, tmp_path / "page")
    theirs(tmp_path / "page", "parquet/features.parquet")
    theirs(tmp_path, "f.parquet/mine.csv", "index/index.html")
    before = tree(tmp_path)
    monkeypatch.setattr(
        "saelab.dashboards.assembly.collect", lambda *arguments, **others: pytest.fail("the corpus was read")
    )
    for out in ("page", "f.html"):
        with pytest.raises(CheckpointError, match="nothing in it was changed"):
            build(tiny_llama, tmp_path / out, parquet=True)
    with pytest.raises(SaelabError, match="is no dashboard"):
        build(tiny_llama, tmp_path / "index")
    assert tree(tmp_path) == before


def test_tables_beside_a_page_are_replaced(tiny_llama, tmp_path):
    for latents in (2, 3):
        page = build(tiny_llama, tmp_path / "f.html", parquet=True, latents=latents)
        theirs(tmp_path / "f.parquet", "mine.csv")
    assert "features.parquet" in os.listdir(tmp_path / "f.parquet") and (tmp_path / "f.parquet" / "mine.csv").exists()
    page.to_parquet(tmp_path / "f.parquet")
    theirs(tmp_path / "other", "features.parquet")
    with pytest.raises(CheckpointError, match="not a folder that saelab wrote"):
        page.to_parquet(tmp_path / "other")


def test_what_the_user_keeps_beside_checkpoints_stays(tmp_path):
    tensors = {"a": torch.zeros(2)}
    checkpoint.save(tmp_path, 1, tensors, [])
    mine = theirs(tmp_path / "checkpoints", "notes.txt", "step_best/x", "step_00000001/plot.png")
    shutil.copytree(tmp_path / "checkpoints" / "step_00000001", tmp_path / "checkpoints" / "step_00000001_kept")
    for step in (2, 3, 4):
        checkpoint.save(tmp_path, step, tensors, [])
    checkpoint.remove_all(tmp_path)
    found = tree(tmp_path / "checkpoints")
    assert mine.items() <= found.items() and "step_00000001_kept/tensors.safetensors" in found
    assert not [name for name in found if name.startswith(("step_00000002", "step_00000003", "step_00000004"))]


def test_names_in_a_manifest_that_lead_elsewhere_are_not_followed(tmp_path):
    mine = theirs(tmp_path, "thesis.tex")
    with files.whole_folder(tmp_path / "a", manifest={}) as folder:
        (folder / "x").write_text("x")
    manifest = tmp_path / "a" / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"x"', f'"../thesis.tex": 1, "{tmp_path}/thesis.tex": 1, "x"'))
    with files.whole_folder(tmp_path / "a", manifest={}) as folder:
        (folder / "y").write_text("y")
    assert mine.items() <= tree(tmp_path).items() and sorted(os.listdir(tmp_path / "a")) == ["manifest.json", "y"]


# Links and modes


def test_a_save_through_a_link_reaches_what_it_stands_for(tmp_path):
    (tmp_path / "disk").mkdir()
    for name in ("page.html", "sae", "run"):
        (tmp_path / name).symlink_to(tmp_path / "disk" / name)
    for _ in range(2):
        with files.whole_file(tmp_path / "page.html") as temporary:
            temporary.write_text("page")
        saved().save(tmp_path / "sae")
    train(tmp_path / "run")
    assert all(path.is_symlink() for path in tmp_path.iterdir() if path.name != "disk")
    assert sorted(os.listdir(tmp_path / "disk")) == ["page.html", "run", "sae"]
    assert saelab.load_run(tmp_path / "run").sae.d_in == 8 and saelab.SAE.load(tmp_path / "disk" / "sae").d_in == 8


@pytest.mark.parametrize("mask", [0o022, 0o027, 0o002])
def test_every_file_follows_the_umask(tiny_llama, tmp_path, mask):
    before = os.umask(mask)
    try:
        train(tmp_path / "run")
        checkpoint.save(tmp_path / "run", 1, {"a": torch.zeros(2)}, [])
        saved().save(tmp_path / "sae")
        harvest(tiny_llama, tmp_path / "store")
        build(tiny_llama, tmp_path / "page", parquet=True)
        build(tiny_llama, tmp_path / "page.html", parquet=True)
        toy_hspace.planted(torch.randn(2, 3, *toy_hspace.SHAPE)).save(tmp_path / "trajectory")
        steer(tiny_llama, tmp_path / "sweep")
        select(tmp_path / "selection")
    finally:
        os.umask(before)
    modes = {path: path.stat().st_mode & 0o777 for path in tmp_path.rglob("*")}
    wrong = {
        str(path): oct(mode) for path, mode in modes.items() if mode != (0o777 if path.is_dir() else 0o666) & ~mask
    }
    assert not wrong and len(modes) > 40


def test_tensors_are_written_as_by_the_formats_own_library(tmp_path):
    tensors = {f"{name}.{i}": (9 * torch.randn(3, 5)).to(dtype) for i in range(2) for dtype, name in DTYPES.items()}
    tensors |= {"none": torch.zeros(0, 4), "one": torch.tensor(3), 'ü"\n\x01': torch.ones(2), "t": torch.randn(4, 3).T}
    for strings in (None, {"a": 'ü"x\n\x1f\x7f </'}):
        save_tensors(tmp_path / "ours", tensors, strings)
        save_file(
            {name: tensor.contiguous() for name, tensor in tensors.items()}, tmp_path / "theirs", metadata=strings
        )
        assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()


# Killed writers


def killed(call) -> None:
    """Call in a child process that dies when it first brings a file to disk."""
    child = os.fork()
    if not child:
        try:
            torch.set_num_threads(1)
            files._fsync = lambda path: os.kill(os.getpid(), signal.SIGKILL)
            call()
        finally:
            os._exit(1)
    assert os.waitpid(child, 0)[1] == signal.SIGKILL


@pytest.mark.parametrize(
    "what", ["train", "sweep", "harvest", "steer", "bundle", "page", "save", "save again", "select"]
)
def test_killed_in_its_first_write_a_call_can_be_made_again(tiny_llama, tmp_path, what):
    out = tmp_path / "out"
    if what == "save again":
        saved().save(out)
        theirs(out, "labels.json")
    calls = {
        "train": lambda: train(out), "sweep": lambda: sweep(out), "harvest": lambda: harvest(tiny_llama, out),
        "steer": lambda: steer(tiny_llama, out), "bundle": lambda: build(tiny_llama, out, work=tmp_path / "work"),
        "page": lambda: build(tiny_llama, tmp_path / "out.html", work=tmp_path / "work"), "save": lambda: saved().save(out),
        "save again": lambda: saved(seed=1).save(out), "select": lambda: select(out),
    }  # fmt: skip
    killed(calls[what])
    assert [path for path in tmp_path.rglob(".*.tmp-*")]  # what the killed one leaves
    calls[what]()
    assert not [path for path in tmp_path.rglob(".*.tmp-*")]
    assert what != "save again" or (out / "labels.json").exists()


def test_a_killed_checkpoint_is_cleaned_away_when_the_run_ends(tmp_path):
    train(tmp_path / "whole")
    killed(lambda: checkpoint.save(tmp_path / "r", 7, {"a": torch.zeros(2)}, []))
    assert list((tmp_path / "r" / "checkpoints").iterdir())
    checkpoint.remove_all(tmp_path / "r")
    assert not (tmp_path / "r" / "checkpoints").exists()


@pytest.mark.parametrize("what", ["train", "harvest", "bundle", "page"])
def test_what_a_killed_trial_left_is_cleaned_away_by_the_next(tiny_llama, tmp_path, what):
    (tmp_path / ".saelab.tmp-1-deadbeef").touch()
    calls = {
        "train": lambda: train(tmp_path / "out"), "harvest": lambda: harvest(tiny_llama, tmp_path / "out"),
        "bundle": lambda: build(tiny_llama, tmp_path / "out"),
        "page": lambda: build(tiny_llama, tmp_path / "out", bundle=False),
    }  # fmt: skip
    calls[what]()
    assert os.listdir(tmp_path) == ["out"]


def test_checkpoints_that_a_kill_left_behind_a_finished_run_go_when_it_is_asked_for(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "remove_all", lambda folder: None)  # killed just before
        train(tmp_path / "r", checkpoint_every=64)
    assert (tmp_path / "r" / "checkpoints").exists()
    train(tmp_path / "r", checkpoint_every=64)
    assert not (tmp_path / "r" / "checkpoints").exists()


def test_a_sweep_is_the_same_by_whatever_path_its_folder_is_named(tmp_path, monkeypatch):
    first = sweep(tmp_path / "s")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "s").rename(tmp_path / "moved")
    assert torch.equal(sweep("moved")[0].sae.W_dec, first[0].sae.W_dec)
    record = json.loads((tmp_path / "moved" / "run.json").read_text())  # as it was before: by whole paths
    record["fingerprint"] = {f"/old/place/{name}": value for name, value in record["fingerprint"].items()}
    (tmp_path / "moved" / "run.json").write_text(json.dumps(record))
    assert torch.equal(sweep("moved")[0].sae.W_dec, first[0].sae.W_dec)


def test_what_a_living_writer_has_begun_is_left_alone(tmp_path):
    with files.whole_file(tmp_path / "f") as one, files.whole_folder(tmp_path / "d", manifest={}) as folder:
        one.write_text("slow")
        (folder / "x").write_text("slow")
        with files.whole_file(tmp_path / "f") as other:
            other.write_text("quick")
        with files.whole_folder(tmp_path / "d", manifest={}) as quick:
            (quick / "x").write_text("quick")
        files.remove_left_over(tmp_path)
        assert (tmp_path / "f").read_text() == "quick" == (tmp_path / "d" / "x").read_text()
    assert (tmp_path / "f").read_text() == "slow" == (tmp_path / "d" / "x").read_text()
    assert sorted(os.listdir(tmp_path)) == ["d", "f"]


def test_where_there_are_no_locks_nobodys_temporaries_are_removed(tmp_path, monkeypatch):
    killed(lambda: saved().save(tmp_path / "s"))
    left = os.listdir(tmp_path)
    monkeypatch.setattr(fcntl, "flock", refused(errno.ENOLCK))
    saved().save(tmp_path / "s")
    assert sorted(os.listdir(tmp_path)) == sorted([*left, "s"])
