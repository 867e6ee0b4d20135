"""What is written: nothing of the user's is removed, nobody's lock is in the way, and what cannot be written is found first."""

import errno
import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import saelab
from saelab import CheckpointError, QuickSelection, SaelabError, files, locks, steering
from saelab.dashboards import bundle
from saelab.tensors import DTYPES, save_tensors
from saelab.training import checkpoint
from tests import toy_hspace
from tests.toy_dashboard import SITE, make_sae

pytestmark = pytest.mark.filterwarnings("ignore:no output score")  # of an SAE that has seen no data
X = torch.randn(512, 8, generator=torch.Generator().manual_seed(0))
TEXTS = [f"the state of the union {i} " * 8 for i in range(20)]


def train(out, x=X, **more):
    arguments = dict(sae=saelab.TopK(k=2, d_sae=16), tokens=512, batch_size=64, progress=False)
    return saelab.train(x, **arguments | more, out=out)


def sweep(out, x=X):
    return saelab.sweep(x, [saelab.TopK(k=2, d_sae=16)], tokens=512, batch_size=64, progress=False, out=out)


def harvest(lm, out):
    return saelab.harvest(lm, saelab.load_corpus(TEXTS), site=SITE, tokens=64, out=out, progress=False)


def steer(lm, out):
    return steering.sweep(
        lm, make_sae(lm), [1], ["ablate"], [1.0], ["My fellow"], baselines=(), max_new_tokens=1, out=out, batch_size=1,
        progress=False,
    )  # fmt: skip


def build(lm, out, **more):
    page = dict(effects=None, evaluation=None, tokens=256, latents=2, parquet=False, progress=False)
    return saelab.dashboards.build(make_sae(lm), lm, saelab.load_corpus(TEXTS), out, **page | more)


def select(out):
    return QuickSelection(n_hidden=8, epochs=2, batch_size=16, random_state=0, out=out, progress=False).fit(
        np.arange(400.0).reshape(40, 10) % 7
    )


def saved(sae=None, seed=0):
    return sae or saelab.SAE(saelab.TopK(k=2, d_sae=16), 8, seed=seed)


def tree(folder: Path) -> dict[str, bytes]:
    """Every file below a folder, hidden ones and empty folders too."""
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else b"a folder"
        for path in folder.rglob("*")
        if path.is_file() or path.is_dir()
    }


def theirs(folder: Path, *names: str) -> dict[str, bytes]:
    """The user puts files of theirs into a folder of ours."""
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(f"a month of {name}")
    return {name: (folder / name).read_bytes() for name in names}


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


# Locks, and file systems that lack something


def refused(number: int):
    def refuse(*arguments):
        raise OSError(number, os.strerror(number))

    return refuse


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS])
def test_a_file_system_without_locks_is_named_once_and_used(tmp_path, monkeypatch, number):
    monkeypatch.setattr(fcntl, "flock", refused(number))
    monkeypatch.setattr(locks, "_said", set())
    with pytest.warns(UserWarning, match="has no locks") as said:
        train(tmp_path / "a")
        train(tmp_path / "b")
    assert len(said) == 1 and saelab.load_run(tmp_path / "b").sae.d_in == 8


def test_only_a_held_lock_is_waited_for(tmp_path, monkeypatch):
    monkeypatch.setattr(fcntl, "flock", refused(errno.EWOULDBLOCK))
    with pytest.raises(CheckpointError, match="another process is writing into .* wait for it"), locks.locked(tmp_path):
        pass


def test_of_two_harvests_the_second_waits(tiny_llama, tmp_path):
    with locks.locked(tmp_path / "h"), pytest.raises(CheckpointError, match="another process .* wait for it") as error:
        harvest(tiny_llama, tmp_path / "h")
    assert "remove" not in str(error.value)
    assert len(harvest(tiny_llama, tmp_path / "h")) == 64
    assert ".lock" not in os.listdir(tmp_path / "h")


def test_a_lock_whose_holder_removes_it_is_taken_anew(tmp_path, monkeypatch):
    flock = fcntl.flock

    def slow(handle, how):
        monkeypatch.setattr(fcntl, "flock", flock)
        os.unlink(tmp_path / ".lock")  # the one before us ended between our opening the file and our locking it
        flock(handle, how)

    monkeypatch.setattr(fcntl, "flock", slow)
    with locks.locked(tmp_path), pytest.raises(CheckpointError), locks.locked(tmp_path):
        pass


@pytest.mark.parametrize("number", [errno.EINVAL, errno.ENOTSUP, errno.EBADF])
def test_a_file_system_without_fsync_of_folders_is_used(tmp_path, monkeypatch, number):
    fsync = os.fsync

    def files_only(handle):
        if os.path.isdir(f"/proc/self/fd/{handle}"):
            refused(number)()
        fsync(handle)

    monkeypatch.setattr(os, "fsync", files_only)
    train(tmp_path / "r").sae.save(tmp_path / "s")
    assert saelab.SAE.load(tmp_path / "s").d_in == 8
    monkeypatch.setattr(os, "fsync", refused(errno.EIO))
    with pytest.raises(CheckpointError, match="cannot write .*Input/output error"):
        saved().save(tmp_path / "t")
    assert not (tmp_path / "t").exists()


# Folders that go away, that cannot be written, that are somebody's


class Removing:
    """A logger that removes the run's folder at some step."""

    def __init__(self, folder: Path, step: int) -> None:
        self.folder, self.step = folder, step

    def log(self, row):
        if row["step"] == self.step:
            shutil.rmtree(self.folder)

    def close(self):
        pass


def test_a_run_whose_folder_is_removed_goes_on_in_a_new_one(tmp_path, monkeypatch):
    every = dict(checkpoint_every=64, log_every=64)
    train(tmp_path / "r", loggers=[Removing(tmp_path / "r", 3)], **every)
    assert torch.equal(saelab.load_run(tmp_path / "r").sae.W_dec, train(None).sae.W_dec)

    def die(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(checkpoint, "remove_all", die)
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "s", loggers=[Removing(tmp_path / "s", 3)], **every)
    monkeypatch.undo()
    assert torch.equal(train(tmp_path / "s", **every).sae.W_dec, train(None).sae.W_dec)


def test_a_killed_run_whose_folder_was_removed_can_be_continued(tmp_path, monkeypatch):
    class Killed(Removing):
        def log(self, row):
            super().log(row)
            if row["step"] == 6:
                raise MemoryError

    every = dict(checkpoint_every=64, log_every=64)
    with pytest.raises(MemoryError):
        train(tmp_path / "r", loggers=[Killed(tmp_path / "r", 3)], **every)
    assert (tmp_path / "r" / "run.json").exists()
    assert torch.equal(train(tmp_path / "r", **every).sae.W_dec, train(None).sae.W_dec)


def test_a_harvest_whose_folder_is_removed_says_so_and_can_be_made_again(tiny_llama, tmp_path, monkeypatch):
    from saelab.activations import writers

    monkeypatch.setattr(writers, "SHARD_BYTES", 1024)
    flush, shards = writers.FolderWriter._flush, []

    def removing(self):
        flush(self)
        shards.append(self)
        if len(shards) == 1:
            shutil.rmtree(tmp_path / "h")

    monkeypatch.setattr(writers.FolderWriter, "_flush", removing)
    monkeypatch.setattr(writers.Block, "capacity", property(lambda self: 16, lambda self, value: None), raising=False)
    with pytest.raises(CheckpointError, match="was removed while the harvest wrote into it"):
        harvest_small(tiny_llama, tmp_path / "h")
    assert len(harvest_small(tiny_llama, tmp_path / "h")) == 64


def harvest_small(lm, out):
    corpus = saelab.load_corpus(TEXTS)
    return saelab.harvest(
        lm, corpus, site=SITE, tokens=64, out=out, progress=False, context_length=16, batch_size=1
    )  # fmt: skip


def test_a_steering_sweep_whose_folder_is_removed_keeps_its_rows(tiny_llama, tmp_path, monkeypatch):
    from saelab.steering import records

    add = records.Records.add

    def removing(self, rows):
        shutil.rmtree(tmp_path / "s") if len(self.rows) == 1 else None
        add(self, rows)

    monkeypatch.setattr(records.Records, "add", removing)
    found = steer(tiny_llama, tmp_path / "s")
    again = steering.load_sweep(tmp_path / "s")
    assert len(again) == len(found) == 2 and again.scores.keys() == found.scores.keys()


@pytest.fixture
def read_only(tmp_path, monkeypatch):
    """Makes a folder read-only, also for root."""

    def freeze(folder: Path) -> None:
        opened, mkdir = os.open, os.mkdir

        def within(path):
            return isinstance(path, str | os.PathLike) and Path(path).is_relative_to(folder)

        def reading(path, flags, *more, **others):
            if within(path) and flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
                refused(errno.EROFS)()
            return opened(path, flags, *more, **others)

        def never(path, *more, **others):
            return refused(errno.EROFS)() if within(path) and not Path(path).exists() else mkdir(path, *more, **others)

        monkeypatch.setattr(os, "open", reading)
        monkeypatch.setattr(os, "mkdir", never)

    return freeze


def test_what_is_finished_is_read_from_a_folder_that_cannot_be_written(tiny_llama, tmp_path, read_only):
    run, runs, store = train(tmp_path / "run"), sweep(tmp_path / "runs"), harvest(tiny_llama, tmp_path / "store")
    table, chosen = steer(tiny_llama, tmp_path / "sweep"), select(tmp_path / "selection")
    for lock in tmp_path.rglob(".lock"):
        lock.unlink()
    before = tree(tmp_path)
    read_only(tmp_path)
    assert torch.equal(train(tmp_path / "run").sae.W_dec, run.sae.W_dec)
    assert torch.equal(saelab.load_run(tmp_path / "run").sae.W_dec, run.sae.W_dec)
    assert torch.equal(sweep(tmp_path / "runs")[0].sae.W_dec, runs[0].sae.W_dec)
    assert torch.equal(harvest(tiny_llama, tmp_path / "store")[:], store[:])
    assert torch.equal(saelab.ActivationStore.open(tmp_path / "store")[:], store[:])
    assert len(steer(tiny_llama, tmp_path / "sweep")) == len(steering.load_sweep(tmp_path / "sweep")) == len(table)
    assert (select(tmp_path / "selection").ranking_ == chosen.ranking_).all()
    assert tree(tmp_path) == before


def test_a_sweep_that_is_being_written_can_be_read(tiny_llama, tmp_path):
    steer(tiny_llama, tmp_path / "s")
    with locks.locked(tmp_path / "s"):
        assert len(steering.load_sweep(tmp_path / "s")) == 2


class Untouched:
    """Activations that may not be read."""

    def __iter__(self):
        raise AssertionError("the activations were read")


FOLDERS = ("train", "sweep", "harvest", "steer", "bundle")
ONE_FILE = ("page", "latents")  # and "select", a file in a folder that may hold others


@pytest.mark.parametrize(
    ("what", "how"),
    [(what, how) for how in ("a file above", "read-only") for what in (*FOLDERS, *ONE_FILE, "select")]
    + [(what, "a file") for what in (*FOLDERS, "select")]
    + [(what, "somebody's") for what in (*FOLDERS, *ONE_FILE)],
)
def test_what_cannot_be_written_is_found_before_the_work(tiny_llama, tmp_path, monkeypatch, read_only, what, how):
    out = tmp_path / "folder" / "out"
    if how == "a file":
        theirs(tmp_path, "folder/out")
    elif how == "a file above":
        theirs(tmp_path, "folder")
    elif how == "somebody's":
        theirs(tmp_path, "folder/out/thesis.tex")
    if how == "read-only":
        (tmp_path / "folder").mkdir()
        read_only(tmp_path / "folder")
    before = tree(tmp_path)
    work = {
        "harvest": "saelab.activations.harvest.run_recording", "steer": "saelab.steering.observe.generate",
        "bundle": "saelab.dashboards.assembly.collect", "page": "saelab.dashboards.assembly.collect",
        "latents": "saelab.hspace.latent_page.latent_codes", "select": "saelab.selection.runs.Run.train",
    }  # fmt: skip
    if what in work:
        monkeypatch.setattr(work[what], lambda *arguments, **others: pytest.fail("the work was begun"))
    trajectory = toy_hspace.planted(torch.randn(2, 3, *toy_hspace.SHAPE), x0=torch.zeros(2, 3, 1, 4, 4))
    calls = {
        "train": lambda: train(out, Untouched()), "sweep": lambda: sweep(out, Untouched()),
        "harvest": lambda: harvest(tiny_llama, out), "steer": lambda: steer(tiny_llama, out),
        "bundle": lambda: build(tiny_llama, out, work=tmp_path / "work"),
        "page": lambda: build(tiny_llama, out, bundle=False, work=tmp_path / "work"),
        "latents": lambda: saelab.hspace.latent_page.show_latents(saved(), trajectory, out), "select": lambda: select(out),
    }  # fmt: skip
    with pytest.raises(SaelabError, match=r"out|folder"):
        calls[what]()
    assert tree(tmp_path) == before


def test_the_command_line_tries_its_files_first(tmp_path, capsys):
    from saelab.cli import main

    theirs(tmp_path, "file")
    for arguments in (["evaluate", "x", "--csv"], ["analyze", "dark-matter", "x", "--csv"], ["steer", "--receipt"]):
        assert main([*arguments, str(tmp_path / "file" / "table.csv")]) == 2
        assert "cannot write" in capsys.readouterr().err


def test_a_device_is_no_file_to_replace(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(CheckpointError, match="it is a folder or a device"), files.whole_file(tmp_path / "pipe"):
        pass


def test_two_processes_that_save_to_one_folder_end_with_one_of_theirs(tmp_path):
    code = """
    import sys, saelab
    for seed in range(int(sys.argv[2]), 60, 2):
        saelab.SAE(saelab.TopK(k=2, d_sae=16), 8, {"name": str(seed)}, seed=seed).save(sys.argv[1])
    """
    saved().save(tmp_path / "s")
    mine = theirs(tmp_path / "s", "labels.json")
    command = [sys.executable, "-c", "\n".join(line[4:] for line in code.splitlines()), str(tmp_path / "s")]
    both = [
        subprocess.Popen([*command, str(i)], env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)})
        for i in (0, 1)
    ]
    assert [process.wait() for process in both] == [0, 0]
    found = saelab.SAE.load(tmp_path / "s")
    assert torch.equal(found.W_dec, saved(seed=int(found.metadata["name"])).W_dec)
    assert mine.items() <= tree(tmp_path / "s").items() and len(os.listdir(tmp_path / "s")) == 4
