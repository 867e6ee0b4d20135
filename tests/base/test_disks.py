"""Locks, file systems that lack something, folders that go away, are somebody's, or cannot be written."""

import errno
import fcntl
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import saelab
from saelab import CheckpointError, SaelabError, steering
from saelab.base import files, locks
from saelab.training import checkpoint
from tests import toy_hspace
from tests.toy_dashboard import SITE
from tests.toy_writing import TEXTS, build, harvest, refused, saved, select, steer, sweep, theirs, train, tree

pytestmark = pytest.mark.filterwarnings("ignore:no output score")  # of an SAE that has seen no data


# Locks, and file systems that lack something


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
    from saelab.reading import writers

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
        "harvest": "saelab.reading.reader.run_recording", "steer": "saelab.steering.observe.generate",
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
