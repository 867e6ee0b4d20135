"""A finished run goes on for more tokens in its own folder: from its SAE, behind the rows that it has read."""

import json
import subprocess
import sys
import time

import pytest
import torch

import saelab
from saelab.base.errors import CheckpointError

X = torch.relu(torch.randn(600, 8, generator=torch.Generator().manual_seed(0)))
RUN = {"batch_size": 64, "progress": False, "log_every": 64}
SAE = saelab.MutualChoice(k=2, d_sae=16)


def pieces():
    return list(X.split(50))


def test_more_tokens_go_on_from_the_saved_sae(tmp_path):
    first = saelab.train(X, sae=SAE, tokens=640, out=tmp_path / "run", **RUN)
    more = saelab.train(X, sae=SAE, tokens=1920, out=tmp_path / "run", **RUN)
    assert more.history.tokens.iloc[-1] == 1920 and more.history.step.iloc[-1] == 30
    assert more.history.tokens.tolist() == sorted(set(more.history.tokens.tolist()))
    assert more.history.iloc[: len(first.rows)].loss.tolist() == pytest.approx(first.history.loss.tolist())
    assert more.history.lr.iloc[len(first.rows)] > first.history.lr.iloc[-1]  # the rate begins anew
    # to the bits of training the SAE on for as many tokens, on the rows that come next
    place = json.loads((tmp_path / "run" / "run.json").read_text())["before"]["place"]
    assert place == [1, 40]
    assert not torch.equal(more.sae.W_dec, saelab.train(X, sae=first.sae, tokens=1280, **RUN).sae.W_dec)
    again = saelab.train(X, sae=SAE, tokens=1920, out=tmp_path / "run", **RUN)
    assert torch.equal(again.sae.W_dec, more.sae.W_dec) and len(again.rows) == len(more.rows)
    assert more.sae.metadata["tokens"] == 1920 and saelab.load_run(tmp_path / "run").sae.metadata["tokens"] == 1920
    longest = saelab.train(X, sae=SAE, tokens=2560, out=tmp_path / "run", **RUN)
    assert longest.history.step.iloc[-1] == 40 and longest.history.tokens.iloc[-1] == 2560


def test_the_rows_that_come_next_are_read(tmp_path, monkeypatch):
    seen = []
    step = saelab.training.step.Trainer.step

    def recording(self, rows, log=True):
        seen.append(rows["x"].clone())
        return step(self, rows, log)

    monkeypatch.setattr(saelab.training.step.Trainer, "step", recording)
    saelab.train(X, sae=SAE, tokens=1280, max_norm=None, **RUN)
    whole = torch.cat(seen)
    for source in (X, pieces()):
        seen.clear()
        options = {**RUN, "sae": SAE, "max_norm": None, "out": tmp_path / f"{type(source).__name__}"}
        saelab.train(source, tokens=320, buffer_tokens=2200, **options)
        saelab.train(source, tokens=600, buffer_tokens=2200, **options)
        read = torch.cat(seen)
        if source is X:
            assert torch.equal(read, whole[:600])
        assert len({tuple(row) for row in read[:550].tolist()}) >= 500  # no row twice, but those left in the buffer


def test_fewer_tokens_another_rate_and_never_are_refused(tmp_path):
    saelab.train(X, sae=SAE, tokens=640, out=tmp_path / "run", **RUN)
    for changes in ({"tokens": 320}, {"tokens": 1280, "lr": 0.5}, {"tokens": 1280, "seed": 1}):
        with pytest.raises(CheckpointError, match=list(changes)[-1]):
            saelab.train(X, sae=SAE, out=tmp_path / "run", **RUN, **changes)
    with pytest.raises(CheckpointError, match="holds a run already"):
        saelab.train(X, sae=SAE, tokens=1280, out=tmp_path / "run", resume="never", **RUN)
    assert saelab.load_run(tmp_path / "run").history.tokens.iloc[-1] == 640


def test_it_says_so(tmp_path, capsys):
    saelab.train(X, sae=SAE, tokens=640, out=tmp_path / "run", **RUN)
    saelab.train(X, sae=SAE, tokens=1280, out=tmp_path / "run", **{**RUN, "progress": True})
    assert "640 tokens, finished: it goes on from its SAE for 640 more" in capsys.readouterr().err


def test_a_sweep_goes_on(tmp_path):
    saes = [SAE, saelab.TopK(k=1, d_sae=16)]
    saelab.sweep(X, saes, tokens=640, out=tmp_path / "sweep", **RUN)
    runs = saelab.sweep(X, saes, tokens=1280, out=tmp_path / "sweep", **RUN)
    alone = saelab.train(X, sae=saes[1], tokens=640, out=tmp_path / "one", **RUN)
    alone = saelab.train(X, sae=saes[1], tokens=1280, out=tmp_path / "one", **RUN)
    assert torch.equal(runs[1].sae.W_dec, alone.sae.W_dec) and len(runs[1].rows) == len(alone.rows)


SCRIPT = """
import sys, torch, saelab
x = list(torch.relu(torch.randn(6000, 8, generator=torch.Generator().manual_seed(0))).split(500))
for tokens in map(int, sys.argv[2:]):
    saelab.train(x, sae=saelab.MutualChoice(k=2, d_sae=64), tokens=tokens, batch_size=64, buffer_tokens=4096, out=sys.argv[1],
                 checkpoint_every=2048, progress=False)
"""


@pytest.mark.slow
def test_a_run_that_goes_on_and_is_killed_ends_with_the_same_bits(tmp_path):
    def start(folder, *tokens):
        return subprocess.Popen([sys.executable, "-c", SCRIPT, str(tmp_path / folder), *map(str, tokens)])

    whole = start("whole", 6000, 40_000)
    assert whole.wait() == 0
    expected = saelab.load_run(tmp_path / "whole")
    assert start("killed", 6000).wait() == 0
    generator, content = torch.Generator().manual_seed(1), tmp_path / "killed" / "run.json"
    for _ in range(3):
        process = start("killed", 40_000)
        while '"before"' not in content.read_text():
            time.sleep(0.002)
        time.sleep(2 * float(torch.rand((), generator=generator)))
        process.kill()
        process.wait()
    assert start("killed", 40_000).wait() == 0
    found = saelab.load_run(tmp_path / "killed")
    assert torch.equal(found.sae.W_dec, expected.sae.W_dec) and torch.equal(found.sae.b_enc, expected.sae.b_enc)
    columns = [name for name in found.history.columns if name != "tokens_per_second"]
    assert found.history[columns].equals(expected.history[columns])
