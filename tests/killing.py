"""Long calls, made small, and processes that die in them: at a given file event or after a given time.

A call is made in a forked child. Its file events are counted: opening for writing, each write (half of it is done),
flushing, locking, renaming, making and removing. A child that is to die at one of them does so before that event is done.
"""

import builtins
import contextlib
import fcntl
import io
import json
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

import saelab
from saelab import QuickSelection, hspace, steering
from saelab.base.manifests import verify_file
from saelab.dashboards.result import Dashboard
from saelab.reading import writers
from tests import tiny, toy_hspace
from tests.toy_dashboard import SITE, make_sae

SECONDS = 120  # no call takes so long
THEIRS = {"labels.json": b"a month of labels", ".git/HEAD": b"ref", "CNAME": b"page", "data/notes.txt": b"mine"}


def _change(left: list[int], die: Callable[[], None]) -> Iterator[tuple[Any, str, Any]]:
    """(where, name, replacement) of each function that makes a file event."""

    def event() -> bool:
        left[0] -= 1
        return left[0] < 0

    def before(function: Any, when: Callable[..., bool] = lambda *arguments: True) -> Any:
        def called(*arguments: Any, **named: Any) -> Any:
            if when(*arguments) and event():
                die()
            return function(*arguments, **named)

        return called

    for name in ("replace", "rename", "mkdir", "unlink", "rmdir", "fsync"):
        yield os, name, before(getattr(os, name))
    yield os, "open", before(os.open, lambda path, flags, *more: bool(flags & (os.O_RDWR | os.O_WRONLY | os.O_CREAT)))
    yield fcntl, "flock", before(fcntl.flock)

    def opened(*arguments: Any, **named: Any) -> Any:
        file = real(*arguments, **named)
        mode = arguments[1] if len(arguments) > 1 else named.get("mode", "r")
        if isinstance(mode, str) and set(mode) & set("wax+"):
            if event():
                die()
            return _Writing(file, event, die)
        return file

    real = builtins.open
    yield builtins, "open", opened
    yield io, "open", opened


class _Writing:
    """A file of which a write may be the last thing that its process does, half done."""

    def __init__(self, file: Any, event: Callable[[], bool], die: Callable[[], None]) -> None:
        self._file, self._event, self._die = file, event, die

    def write(self, data: Any) -> Any:
        if self._event():
            self._file.write(data[: len(data) // 2])
            self._file.flush()
            self._die()
        return self._file.write(data)

    def writelines(self, lines: Any) -> None:
        for line in lines:
            self.write(line)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)

    def __enter__(self) -> "_Writing":
        return self

    def __exit__(self, *error: Any) -> None:
        self._file.close()

    def __iter__(self) -> Iterator[Any]:
        return iter(self._file)


def forked(call: Callable[[], Any], event: int | None = None, seconds: float | None = None) -> bool:
    """Make the call in a child that is killed at this file event, or after this time; whether it was. Its errors are raised."""
    sys.stdout.flush()
    reading, writing = os.pipe()
    child = os.fork()
    if not child:
        with contextlib.suppress(BaseException):
            os.close(reading)
            torch.set_num_threads(1)
            tqdm.set_lock(threading.RLock())  # its own is shared with the children before, who may have died holding it
            signal.alarm(SECONDS)
            try:
                for where, name, replacement in (
                    _change([event], lambda: os.kill(os.getpid(), signal.SIGKILL)) if event is not None else ()
                ):
                    setattr(where, name, replacement)
                call()
            except BaseException:
                os.write(writing, traceback.format_exc().encode()[-4000:])
                os._exit(1)
            os._exit(0)
        os._exit(2)
    os.close(writing)
    if seconds is not None:
        time.sleep(seconds)
        with contextlib.suppress(ProcessLookupError):
            os.kill(child, signal.SIGKILL)
    with os.fdopen(reading, "rb") as pipe:
        error = pipe.read().decode()
    status = os.waitpid(child, 0)[1]
    if status not in (0, signal.SIGKILL):
        raise AssertionError(f"the call failed: {error}")
    return status == signal.SIGKILL


def events_of(call: Callable[[], Any]) -> int:
    """How many file events a call has; it is made."""
    left = [10**9]
    with contextlib.ExitStack() as stack:
        for where, name, replacement in list(_change(left, lambda: None)):
            stack.callback(setattr, where, name, getattr(where, name))
            setattr(where, name, replacement)
        call()
    return 10**9 - left[0]


@dataclass
class Kind:
    """A long call: `prepare(folder)` makes what is there before, `call(folder)` the call; `check(folder)` raises unless what
    can be read at any moment can be."""

    prepare: Callable[[Path], Any]
    call: Callable[[Path], Any]
    check: Callable[[Path], Any] = lambda folder: None
    changing: tuple[str, ...] = ()  # files whose bytes tell the time
    theirs: str | None = None  # where the user keeps something


def tree(folder: Path, changing: tuple[str, ...] = ()) -> dict[str, bytes]:
    """What is below a folder: every file, temporaries too, but no lock."""
    paths = [path for path in folder.rglob("*") if path.is_file() and path.name != ".lock"]
    return {str(path.relative_to(folder)): b"" if path.name in changing else path.read_bytes() for path in paths}


def give(folder: Path) -> None:
    """The user's files."""
    for name, content in THEIRS.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)


def kept(folder: Path) -> bool:
    return all((folder / name).read_bytes() == content for name, content in THEIRS.items())


def kinds() -> dict[str, Kind]:
    """The long calls by name. Each writes `out` in the folder, and its cache beside."""
    torch.set_num_threads(1)
    writers.SHARD_BYTES = 2048
    lm = saelab.load_model(tiny.llama_model(), tokenizer=tiny.byte_tokenizer(), device="cpu")
    corpus = saelab.load_corpus([f"the state of the union {i} " * 8 for i in range(20)])
    x = torch.randn(512, 8, generator=torch.Generator().manual_seed(0))
    short = dict(buffer_tokens=256, context_length=16)
    old, new = (saelab.SAE(saelab.TopK(k=2, d_sae=16), 8, seed=seed) for seed in (0, 1))
    sae = make_sae(lm)
    trajectories = [toy_hspace.planted(torch.full((2, 3, *toy_hspace.SHAPE), value)) for value in (1.0, 2.0)]
    features = (torch.arange(400.0).reshape(40, 10) % 7).numpy()
    one = saelab.TopK(k=2, d_sae=16)
    often = dict(tokens=512, batch_size=64, checkpoint_every=64, log_every=64, progress=False)
    page = dict(effects=None, evaluation=None, tokens=256, progress=False, shards=2)
    timed = ("history.csv",)

    def nothing(folder: Path) -> None:
        pass

    def build(folder: Path, name: str, latents: int) -> None:
        saelab.dashboards.build(sae, lm, corpus, folder / name, latents=latents, work=folder / "cache", **page)

    def saved(folder: Path) -> None:
        old.save(folder / "out")
        give(folder / "out")

    def built(name: str) -> Callable[[Path], None]:
        def make(folder: Path) -> None:
            build(folder, name, 2)
            give(folder / "out")

        return make

    def whole_sae(folder: Path) -> None:
        if (config := folder / "out" / "cfg.json").exists():  # who reads without us finds one SAE, or none
            for name, file in json.loads(config.read_text())["metadata"]["saelab"]["files"].items():
                verify_file(folder / "out" / name, file["bytes"], file["sha256"])
        found = saelab.SAE.load(folder / "out").W_dec
        assert torch.equal(found, old.W_dec) or torch.equal(found, new.W_dec)

    def whole_page(name: str) -> Callable[[Path], None]:
        return lambda folder: Dashboard(folder / name).data.manifest["saes"][0]["pages"] in (2, 3) or 1 / 0

    def whole_trajectory(folder: Path) -> None:
        assert float(hspace.Trajectory.load(folder / "out").h.mean()) in (1.0, 2.0)

    return {
        "train": Kind(nothing, lambda f: saelab.train(x, sae=one, **often, out=f / "out"), changing=timed),
        "train on a model": Kind(
            nothing,
            lambda f: saelab.train(lm, corpus, site=SITE, sae=one, **short, **often, out=f / "out"),
            changing=timed,
        ),
        "sweep": Kind(
            nothing, lambda f: saelab.sweep(x, [one, saelab.TopK(k=1, d_sae=16)], **often, out=f / "out"), changing=timed
        ),
        "harvest": Kind(
            nothing,
            lambda f: saelab.harvest(
                lm, corpus, site=SITE, tokens=96, context_length=16, batch_size=1, gradients=True, progress=False,
                out=f / "out",
            ),
        ),
        "steering.sweep": Kind(
            nothing,
            lambda f: steering.sweep(
                lm, sae, [1], ["ablate"], [1.0], ["My fellow", "We"], baselines=(), max_new_tokens=1, batch_size=1,
                progress=False, out=f / "out",
            ),
        ),
        "bundle": Kind(built("out"), lambda f: build(f, "out", 3), whole_page("out"), theirs="out"),
        "page": Kind(built("page.html"), lambda f: build(f, "page.html", 3), whole_page("page.html"), theirs="out"),
        "SAE.save": Kind(saved, lambda f: new.save(f / "out"), whole_sae, theirs="out"),
        "Trajectory.save": Kind(
            lambda f: trajectories[0].save(f / "out"), lambda f: trajectories[1].save(f / "out"), whole_trajectory
        ),
        "QuickSelection": Kind(
            nothing,
            lambda f: QuickSelection(
                n_hidden=8, epochs=3, batch_size=16, random_state=0, progress=False, out=f / "out"
            ).fit(features),
        ),
    }  # fmt: skip


def survives(kind: Kind, folder: Path, whole: dict[str, bytes], kills: list[dict[str, Any]]) -> int:
    """Kill the call so often, then make it to its end; raises unless everything is as without a kill. How many died."""
    folder.mkdir()
    kind.prepare(folder)
    died = 0
    for how in kills:
        died += forked(lambda: kind.call(folder), **how)
        kind.check(folder)
        assert kind.theirs is None or kept(folder / kind.theirs), "something of the user's is gone"
    forked(lambda: kind.call(folder))
    found = tree(folder, kind.changing)
    differing = sorted(name for name in whole.keys() | found.keys() if whole.get(name) != found.get(name))
    assert not differing, f"other than without a kill: {differing}"
    return died
