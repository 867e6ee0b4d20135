"""JumpReLU: its L0 on new rows from any start, its price for dead latents, its thresholds, and no dense scores."""

import math

import pytest
import torch

from saelab import SAE, ConfigError, JumpReLU, ReLU
from saelab.autoencoders.allocation import PreActivations
from saelab.autoencoders.architecture import Batch
from saelab.autoencoders.architectures import jumprelu
from saelab.kernels import selection
from saelab.training.schedule import Schedule
from saelab.training.step import Trainer
from tests.autoencoders.test_baselines import D, F, N, fvu, jittered, losses_of
from tests.training.test_train import planted, run_on


@pytest.mark.parametrize("target", [2, 4, 8])
@pytest.mark.parametrize("start_factor", [0.25, 4.0])
def test_jumprelu_reaches_its_target_on_new_rows(target, start_factor):
    x = planted(30_000)
    run = run_on(x[:20_000], sae=JumpReLU(target_l0=target, d_sae=64, start_factor=start_factor), tokens=60_000)
    assert run.history.l0.iloc[0] == pytest.approx(target * start_factor, rel=0.15)
    assert run.sae.encode_sparse(x[20_000:]).l0 == pytest.approx(target, rel=0.1)


def test_jumprelu_reconstructs_alike_from_any_start():
    x = planted(30_000)
    found = []
    for start_factor in (0.25, 1.0, 4.0):
        sae = run_on(x[:20_000], sae=JumpReLU(target_l0=4, d_sae=64, start_factor=start_factor), tokens=60_000).sae
        found.append(float(fvu(x[20_000:], sae(x[20_000:]))))
    assert max(found) < 1.1 * min(found), found


@pytest.mark.parametrize("steps", [2, 5, 30])
def test_jumprelu_reaches_it_in_very_short_runs_too(steps):
    x = planted(20_000)
    run = run_on(x, sae=JumpReLU(target_l0=4, d_sae=64), tokens=1024 * steps, batch_size=1024, lr=None)
    assert run.sae.encode_sparse(x).l0 == pytest.approx(4, rel=0.25 if steps < 30 else 0.1)


@pytest.mark.parametrize("part", [2, 512])
def test_dead_latents_pay_for_what_they_miss(part, monkeypatch):
    monkeypatch.setattr(jumprelu, "_PART", part)
    sae, x = jittered(JumpReLU(target_l0=3, d_sae=F, dead_coefficient=0.01)), torch.randn(N, D, dtype=torch.float64)
    sae.state.tokens_since_fired[4:9] = 10**8
    p, theta = sae.cfg.scores(sae.params(), Batch(x, x)).dense(), sae.extra["log_threshold"].exp()
    wanted = 0.01 * 0.8 * (theta - p)[:, 4:9].relu().sum(1).mean()
    found = losses_of(sae, x)[0]["dead_price"]
    torch.testing.assert_close(found, wanted, check_dtype=False)
    weights = [sae.encoder_weight, sae.extra["log_threshold"]]
    for one, other in zip(torch.autograd.grad(found, weights), torch.autograd.grad(wanted, weights), strict=True):
        torch.testing.assert_close(one, other)
    sae.state.tokens_since_fired.zero_()
    assert float(losses_of(sae, x)[0]["dead_price"].detach()) == 0


def test_thresholds_start_at_the_quantile():
    x = planted(3000, d=D)
    sae = SAE(JumpReLU(target_l0=5, d_sae=F), D)
    Trainer(sae, Schedule(1000, 100)).initialise({"x": x})
    fires = sae.encode(x) > 0
    torch.testing.assert_close(fires.float().mean(0), torch.full((F,), 5 / F), atol=1e-3, rtol=0)
    assert sae.extra["log_threshold"].dtype == torch.float32


def test_vectors_stay_in_fp32_and_matrices_do_not():
    x = planted()
    sae = run_on(x, sae=JumpReLU(target_l0=4, d_sae=64), tokens=30_000, dtype=torch.bfloat16).sae
    assert sae.W_dec.dtype == torch.bfloat16
    assert sae.extra["log_threshold"].dtype == sae.state.threshold.dtype == torch.float32
    assert sae.encode_sparse(x).l0 == pytest.approx(4, rel=0.25)


def test_the_shift_finds_the_target_in_a_histogram():
    cfg = JumpReLU(target_l0=2, d_sae=10)
    sae = SAE(cfg, D)
    p = torch.rand(5000, 10) * 3
    cfg._tally(PreActivations(p, torch.eye(10), torch.zeros(10)), sae.state, 1.0)
    shift = cfg._shift(sae.state)
    assert float((p > math.exp(shift)).sum()) / 5000 == pytest.approx(2, rel=0.01)


def test_jumprelu_needs_no_dense_scores(monkeypatch):
    """To the bits of a run whose batch is one part: here the dense scores would be refused, and come in parts of 128 rows."""
    arguments = {"sae": JumpReLU(target_l0=4, d_sae=64), "tokens": 30_000, "batch_size": 1000}
    whole = run_on(planted(), **arguments).sae
    monkeypatch.setattr("saelab.base.codes.DENSE_LIMIT", 4 * 1000 * 64 - 1)
    monkeypatch.setattr(selection, "_TILE_SCORES", 64 * 64)
    assert [len(part) for part in PreActivations(torch.ones(300, 2), torch.ones(64, 2), torch.ones(64)).parts()] == [
        100
    ] * 3
    for name, tensor in run_on(planted(), **arguments).sae.state_dict().items():
        assert torch.equal(tensor, whole.state_dict()[name]), name
    with pytest.raises(ConfigError, match="dense codes of 1,024 tokens by 64"):
        run_on(planted(), sae=ReLU(l1=1.0, d_sae=64), tokens=2000, batch_size=1000)
