"""A run moves between devices, and is trained in fp32 whatever its precision is."""

import json
import subprocess
import sys
from pathlib import Path

import torch

import saelab
from saelab.training.schedule import Schedule
from saelab.training.step import Trainer
from tests.training.test_train import interrupting, planted, run_on


def trainer(device, dtype=torch.float32):
    return Trainer(saelab.SAE(saelab.TopK(k=4, d_sae=64), 16).to(device, dtype), Schedule(64 * 20, 64))


def test_what_is_checked_on_the_stand_in_device():
    checks = Path(__file__).with_name("on_standin.py")
    found = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", checks], capture_output=True, text=True
    )
    assert found.returncode == 0, found.stdout[-3000:]


def test_the_device_is_no_part_of_what_a_run_is(tmp_path):
    """Also for the runs of older versions, which wrote it down."""
    whole = run_on(planted(1000), tokens=2000)
    out = {"out": tmp_path / "run", "checkpoint_every": 256}
    run_on(planted(1000), tokens=2000, loggers=interrupting(3), **out)
    path = tmp_path / "run" / "run.json"
    record = json.loads(path.read_text())
    assert "device" not in record["fingerprint"]
    record["fingerprint"]["device"] = "cuda:1"
    path.write_text(json.dumps(record))
    assert torch.equal(run_on(planted(1000), tokens=2000, **out).sae.W_dec, whole.sae.W_dec)


def low(**arguments):
    return run_on(planted(1000), tokens=4000, dtype="bfloat16", **arguments)


def test_a_run_in_bf16_is_one_in_fp32_that_is_rounded_in_the_end(tmp_path):
    """Masters and moments are in fp32; no step is lost to the rounding of the weights."""
    whole, full = low(), run_on(planted(1000), tokens=4000)
    assert whole.sae.dtype == torch.bfloat16
    for name, tensor in full.sae.state_dict().items():
        assert torch.equal(whole.sae.state_dict()[name], tensor.to(whole.sae.state_dict()[name].dtype)), name
    assert whole.history.loss.tolist() == full.history.loss.tolist()


def test_it_goes_on_from_its_masters_to_the_same_bits(tmp_path):
    whole, out = low(), {"out": tmp_path / "run", "checkpoint_every": 256}
    part = low(loggers=interrupting(3), **out)
    assert part.interrupted and part.sae.dtype == torch.bfloat16
    rest = low(**out)
    assert not rest.interrupted and rest.history.loss.tolist() == whole.history.loss.tolist()
    assert torch.equal(rest.sae.W_dec, whole.sae.W_dec)
    assert saelab.load_run(tmp_path / "run").sae.dtype == torch.bfloat16 and low(**out).rows == rest.rows


def test_moments_and_masters_of_older_checkpoints_come_back_in_fp32():
    old = trainer("cpu")
    old.step({"x": torch.randn(64, 16)})
    tensors = old.state_dict()
    half = {name: t.bfloat16() if t.ndim == 2 and t.is_floating_point() else t for name, t in tensors.items()}
    new = trainer("cpu", torch.bfloat16)
    new.load_state_dict(half)
    kept = [*new.parameters, *(t for state in new.optimizer.state.values() for t in state.values())]
    assert {tensor.dtype for tensor in kept} == {torch.float32}
    new.step({"x": torch.randn(64, 16)})
