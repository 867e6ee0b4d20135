"""What test_devices.py runs in a process of its own: to have a device named is to have it until the process ends."""

import pytest
import torch

import saelab
from saelab.autoencoders.allocation import PreActivations
from saelab.base.errors import DataError
from saelab.kernels.sparse import decode
from saelab.training.schedule import Schedule
from saelab.training.step import Trainer
from tests import standin
from tests.standin import DEVICE, StandIn
from tests.training.test_devices import trainer


@pytest.mark.parametrize("there, here", [(DEVICE, DEVICE), (DEVICE, "cpu"), ("cpu", DEVICE)])
def test_a_checkpoint_goes_on_where_the_sae_is_now(there, here):
    with StandIn():
        one, other = trainer(there), trainer(here)
        x = torch.randn(64, 16)
        one.initialise({"x": x.to(there)})
        one.step({"x": x.to(there)})
        other.load_state_dict({name: tensor.to("cpu") for name, tensor in one.state_dict().items()})  # as a file has it
        found = [float(t.step({"x": x.to(d)})["loss"]) for t, d in ((one, there), (other, here))]
        assert found[0] == found[1]
        assert torch.equal(one.sae.W_dec.to("cpu"), other.sae.W_dec.to("cpu"))


def test_the_stand_in_refuses_to_mix():
    with StandIn(), pytest.raises(RuntimeError, match="same device"):
        torch.ones(2).to(DEVICE) + torch.ones(2)


ARCHITECTURES = {
    "TopK": saelab.TopK(k=4, d_sae=256),
    "MultiTopK": saelab.MultiTopK(k=4, d_sae=256),
    "Transcoder": saelab.Transcoder(of=saelab.TopK(k=4, d_sae=256), skip=True),
    "MutualChoice": saelab.MutualChoice(k=4, d_sae=256),
    "FeatureChoice": saelab.FeatureChoice(
        k=4, d_sae=256, budgets="uniform"
    ),  # those that are learnt are renewed at times
    "Matryoshka": saelab.Matryoshka(k=4, d_sae=256),
    "GradientTopK": saelab.GradientTopK(k=4, d_sae=256),
    "JumpReLU": saelab.JumpReLU(target_l0=4, d_sae=256, dead_coefficient=0),  # its checkpoints abort on this device
    "ReLU": saelab.ReLU(l1=1.0, d_sae=256),
    "Gated": saelab.Gated(l1=1.0, d_sae=256),
}
WAITS = dict.fromkeys(ARCHITECTURES, 1) | {  # of a steady step: only ever less
    "TopK": 0, "MultiTopK": 0, "Transcoder": 0, "Matryoshka": 2, "JumpReLU": 2, "FeatureChoice": 3,
}  # fmt: skip


def steady(cfg, steps=12, at=10, n=64):
    """What is counted in one step, of which a part of the latents is dead, late in a run."""
    torch.manual_seed(0)
    t = Trainer(saelab.SAE(cfg, 16).to(DEVICE), Schedule(n * steps, n))
    for step in range(at + 1):
        rows = {name: torch.randn(n, 16).to(DEVICE) for name in ("x", "target", "gradient")}
        del rows["target" if cfg.centres_input else "gradient"]
        if step == 0:
            t.initialise(rows)
        t.sae.state.tokens_since_fired[::8] = 10**9
        standin.counts = standin.Counts()
        t.step(rows, log=False)
    counts, standin.counts = standin.counts, standin.Counts()
    return counts


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_steady_step_hardly_waits(name):
    with StandIn():
        counts = steady(ARCHITECTURES[name])
    assert counts.waits.total() <= WAITS[name], counts.waits


def test_operations_of_a_step_do_not_grow_with_the_dictionary():
    with StandIn():
        small, large = (steady(saelab.TopK(k=4, d_sae=d_sae), steps=8, at=5).operations for d_sae in (1024, 16_384))
    assert small == large and small.total() <= 168, small


def test_codes_of_a_device_are_those_of_the_cpu():
    """With ties, tokens on which fewer than k fire, and through every gradient."""
    torch.manual_seed(0)
    x, W, b = torch.randint(-2, 3, (64, 8)).float(), torch.randint(-1, 2, (96, 8)).float(), torch.zeros(96)
    x[:4], W_dec, found = 0, torch.randn(96, 8), []
    x[4:6] = torch.eye(8)[:2] / 64
    b[8:] = -1 / 32
    with StandIn():
        for device in ("cpu", DEVICE):
            leaves = [t.clone().to(device).requires_grad_() for t in (x, W, b, W_dec)]
            codes = PreActivations(*leaves[:3]).per_token(12)
            decode(codes, leaves[3]).square().sum().backward()
            codes = codes.compact()
            found.append(
                [t.detach().to("cpu") for t in (codes.values, codes.indices, codes.offsets, *(t.grad for t in leaves))]
            )
    assert len(found[0][0]) < 64 * 12
    for wanted, got in zip(*found, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)
    assert all(torch.equal(*pair) for pair in zip(found[0][1:3], found[1][1:3], strict=True))


def test_a_loss_that_is_not_finite_stops_all_weights_and_is_raised_when_figures_are_read():
    with StandIn():
        t = trainer(DEVICE)
        t.initialise({"x": torch.randn(64, 16).to(DEVICE)})
        t.step({"x": torch.randn(64, 16).to(DEVICE)})
        before = {name: p.detach().to("cpu").clone() for name, p in t.sae.named_parameters()}
        bad = torch.randn(64, 16)
        bad[3, 2] = torch.nan
        t.step({"x": bad.to(DEVICE)}, log=False)
        t.step({"x": torch.randn(64, 16).to(DEVICE)}, log=False)
        with pytest.raises(DataError, match="loss of step 1 is nan"):
            t.step({"x": torch.randn(64, 16).to(DEVICE)}, log=True)
        with pytest.raises(DataError, match="loss of step 1 is nan"):
            t.state_dict()
        for name, parameter in t.sae.named_parameters():
            assert torch.equal(parameter.detach().to("cpu"), before[name]), name
