"""Rows in lanes: the same rows in the same order on one process and on several, that torchrun has started."""

import itertools
import os
import re
import signal
import socket
import subprocess
import sys
from collections import Counter

import pytest
import torch

import saelab
from saelab import ConfigError, TopK
from saelab.base import processes
from saelab.training.lanes import Lanes
from saelab.training.pieces import ItemPieces
from saelab.training.schedule import Schedule
from saelab.training.sources import RowSource, StreamSource
from tests.training import ranks

# Rounding decides which pair of token and latent is the last within such a budget, and Adam moves that latent by its whole
# rate, 1e-4. The same happens on one process when the rows of each batch come in another order.
CUT_THROUGH_BATCH = ("mutual", "zipf", "feature", "matryoshka", "transcoder")


def torchrun(n, *arguments):
    """The module `ranks` in n processes, or alone."""
    start = ["torch.distributed.run", "--nproc-per-node", str(n), "--standalone", "-m"] if n > 1 else []
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(["", *sys.path])}
    command = [sys.executable, "-m", *start, "tests.training.ranks", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)


# --- one process


def numbered(n=256, item=8):
    return list(torch.arange(1.0, n + 1).unsqueeze(1).split(item))


def lanes_of(items, count, total=256, max_norm=None):
    pieces = ItemPieces(items, seed=0)
    return Lanes(
        count, lambda i: StreamSource(pieces.lane(i, count), 4096, i, max_norm, total // count, say=lambda text: None)
    )


@pytest.mark.parametrize("size", [1, 2, 4])
def test_the_rows_of_each_batch_do_not_depend_on_the_number_of_processes(monkeypatch, size):
    expected, found = lanes_of(numbered(), 4), []
    for rank in range(size):
        monkeypatch.setattr(processes, "part", lambda n, rank=rank: slice(n * rank // size, n * (rank + 1) // size))
        found.append(lanes_of(numbered(), 4))
    monkeypatch.undo()
    seen = []
    for _ in range(8):
        rows = expected.next(32)["x"]
        assert torch.equal(torch.cat([each.next(32)["x"] for each in found]), rows)
        seen += rows.flatten().tolist()
    assert sorted(seen) == list(range(1, 257))


def test_rows_at_random_access_are_shared_out_in_the_order_of_one_process(monkeypatch):
    x = torch.arange(40.0).unsqueeze(1)
    expected, found = RowSource({"x": x}, 0, None, say=lambda text: None), []
    for rank in range(2):
        monkeypatch.setattr(processes, "part", lambda n, rank=rank: slice(n * rank // 2, n * (rank + 1) // 2))
        source = RowSource({"x": x}, 0, None, say=lambda text: None)
        found.append([source.sample(8)["x"]] + [source.next(16)["x"] for _ in range(4)])
    monkeypatch.undo()
    wanted = [expected.sample(8)["x"]] + [expected.next(16)["x"] for _ in range(4)]
    assert all(torch.equal(torch.cat(parts), whole) for *parts, whole in zip(*found, wanted, strict=True))


def test_lanes_know_of_the_norms_in_each_other():
    items = [torch.full((8, 1), value) for value in (1.0, 100.0)] * 8
    lanes = lanes_of(items, 2, max_norm=4.0)
    lanes.next(32)
    medians = {stream.norms.median for stream in lanes.streams.values()}
    assert medians == {lanes.norms.median} and 0.98 < lanes.norms.median < 1.02
    assert int(lanes.norms.histogram.sum()) == 128
    assert float(lanes.norms.moments[:, 0].sum()) == 128


def test_a_state_of_all_lanes_goes_on_in_those_of_a_process(monkeypatch):
    whole = lanes_of(numbered(), 4)
    whole.next(64)
    state = {name: tensor.clone() for name, tensor in whole.state_dict().items()}
    monkeypatch.setattr(processes, "part", lambda n: slice(n // 2, n))
    half = lanes_of(numbered(), 4)
    half.load_state_dict(state)
    monkeypatch.undo()
    assert torch.equal(half.next(64)["x"], whole.next(64)["x"][32:])


@pytest.mark.parametrize("tokens", [128, 96, 40])
def test_batches_hold_as_many_rows_of_each_lane(tokens):
    schedule = Schedule(tokens, batch_size=32, lanes=4)
    rows = [schedule.rows(step) for step in range(schedule.steps)]
    assert sum(rows) == tokens and all(n % 4 == 0 and n <= 32 for n in rows)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"lanes": 3}, r"batch_size=32 does not divide into 3 lanes: give 30"),
        ({"lanes": 4, "tokens": 258}, r"tokens=258 does not divide into 4 lanes: give 256"),
        ({"lanes": 0}, "lanes"),
        ({"lanes": 2, "source": iter(numbered())}, "read once, not by 2 lanes"),
        ({"lanes": 2, "buffer_tokens": 4000}, "in each of 2 lanes: raise `buffer_tokens` to 4,128"),
    ],
)
def test_what_lanes_cannot_be_is_refused(more, message):
    arguments = {"source": numbered(), "sae": TopK(k=1, d_sae=4), "tokens": 256, "batch_size": 32, "progress": False}
    with pytest.raises(ConfigError, match=message):
        saelab.train(**arguments | more)


def test_a_killed_run_in_lanes_goes_on_to_the_same_bits(tmp_path):
    class Stop(Exception):
        pass

    class Stopper:
        def log(self, row):
            if row["step"] == 5:
                raise Stop

        def close(self):
            pass

    arguments = dict(
        source=numbered(item=3), sae=TopK(k=1, d_sae=4), tokens=256, batch_size=32, lanes=2, checkpoint_every=32,
        log_every=32, buffer_tokens=8192, progress=False,
    )  # fmt: skip
    with pytest.raises(Stop):
        saelab.train(**arguments, out=tmp_path / "a", loggers=[Stopper()])
    found, expected = saelab.train(**arguments, out=tmp_path / "a"), saelab.train(**arguments)
    assert torch.equal(found.sae.W_dec, expected.sae.W_dec)
    more = saelab.train(**arguments | {"tokens": 512}, out=tmp_path / "a")
    assert more.history.tokens.iloc[-1] == 512


def test_a_run_is_of_its_lanes(tmp_path):
    arguments = dict(
        source=numbered(), sae=TopK(k=1, d_sae=4), tokens=64, batch_size=32, progress=False, out=tmp_path / "a"
    )
    saelab.train(**arguments, lanes=2, buffer_tokens=8192)
    with pytest.raises(saelab.CheckpointError, match="lanes: 2 there, 4 asked"):
        saelab.train(**arguments, lanes=4, buffer_tokens=16384)


# --- several processes


@pytest.mark.slow
@pytest.mark.parametrize("n", [2, 4])
def test_every_architecture_trains_as_on_one_process(tmp_path, alone, n):
    done = torchrun(n, "curves", tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    for name in ranks.SAES:
        found, expected = torch.load(tmp_path / f"{name}.pt"), torch.load(alone / f"{name}.pt")
        assert len(found["loss"]) == ranks.STEPS
        torch.testing.assert_close(
            found.pop("loss"), expected["loss"], rtol=1e-5, atol=0, msg=lambda m, at=name: f"{at}: {m}"
        )
        near = 1e-3 if name in CUT_THROUGH_BATCH else 1e-5
        for key in ("encoder_weight", "encoder_bias", "W_dec", "decoder_bias"):
            differ = float((found[key] - expected[key]).abs().max())
            assert differ < near, f"{name}: {key} differs by {differ:.1e}"


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    folder = tmp_path_factory.mktemp("alone")
    ranks.curves(folder)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize(("rank", "step", "then"), [(1, 9, 1), (0, 14, 2), (2, 23, 4)])
def test_a_killed_rank_ends_the_run_and_the_rest_of_the_rows_comes_once_on_any_number(tmp_path, rank, step, then):
    done = torchrun(4, "counted", tmp_path, rank, step)
    assert done.returncode != 0 and f"rank      : {rank}" in done.stderr and "SIGKILL" in done.stderr
    at = max(int(path.name.removeprefix("step_")) for path in (tmp_path / "run" / "checkpoints").glob("step_*"))
    kept = rows_of(tmp_path, before=at)
    done = torchrun(then, "counted", tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    assert kept + rows_of(tmp_path) == Counter(range(1, 1025))
    states = [torch.load(tmp_path / f"sae {i}.pt") for i in range(then)]
    assert all(torch.equal(states[0][name], state[name]) for state in states for name in ("W_dec", "encoder_weight"))


def rows_of(folder, before=None):
    """How often each row was in a step before this one; the files are removed."""
    seen = Counter()
    for path in folder.glob("rows *"):
        for line in path.read_text().splitlines():
            step, *numbers = map(int, line.split())
            seen.update(numbers if before is None or step < before else [])
        path.unlink()
    return seen


@pytest.mark.slow
def test_processes_that_ask_for_different_things_are_each_told_so(tmp_path):
    done = torchrun(2, "differing", tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    messages = [
        "ConfigError: process 1 of 2 trains something else .*0.seed: 0 in process 0, 1 there",
        "ConfigError: process 1 of 2 trains something else .*rows: ",
        "ConfigError: batch_size=33 does not divide into 2 lanes: give 32",
        "ConfigError: 3 lanes do not divide among 2 processes: give lanes=2 or a multiple",
        "DataError: .*2-D",
    ]
    for (number, message), rank in itertools.product(enumerate(messages), range(2)):
        assert re.match(message, (tmp_path / f"{number} {rank}").read_text(), re.DOTALL)


@pytest.mark.slow
def test_an_estimate_is_of_what_each_process_takes(tmp_path):
    assert torchrun(2, "estimated", tmp_path).returncode == 0
    memory = [torch.load(tmp_path / f"memory {rank}.pt") for rank in range(2)]
    assert memory[0] == memory[1] and memory[0]["buffer"] == 50_000 // 2 * 4 * 32


@pytest.mark.slow
def test_without_torchrun_too_a_killed_process_is_named_by_the_others(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    meeting = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": "1"}
    path = os.pathsep.join(["", *sys.path])
    command = [sys.executable, "-m", "tests.training.ranks", "counted", str(tmp_path), "1", "5"]
    both = [
        subprocess.Popen(
            command, stderr=subprocess.DEVNULL if rank else subprocess.PIPE, text=True,
            env={**os.environ, **meeting, "PYTHONPATH": path, "RANK": str(rank), "LOCAL_RANK": str(rank)},
        )
        for rank in range(2)
    ]  # fmt: skip
    said = both[0].communicate(timeout=120)[1]
    assert both[1].wait(timeout=10) == -signal.SIGKILL and both[0].returncode == 1
    assert re.search(rf"ProcessError: process 1 of 2 \(.*process {both[1].pid}\) is gone", said)
