"""LowRank: its loss is the mean over truncations, its minimum the principal components in their order, its codes linear."""

import pytest
import torch
from torch import Tensor

import saelab
from saelab import ConfigError
from saelab.autoencoders.architecture import Batch, Params, State

D, RANK = 7, 4


def rows(n: int = 400) -> Tensor:
    """Gaussian rows off centre, with variances that fall by a third from axis to axis."""
    axes = torch.linalg.qr(torch.randn(D, D, dtype=torch.float64)).Q
    return (torch.randn(n, D, dtype=torch.float64) * torch.tensor([0.66**i for i in range(D)])) @ axes.T + 2


def params(x: Tensor) -> Params:
    W_enc, W_dec = (torch.randn(2 * RANK, D, dtype=x.dtype) / 3 for _ in range(2))
    return Params(W_enc, torch.zeros(2 * RANK, dtype=x.dtype), W_dec, x.mean(0))


def loss(cfg: saelab.LowRank, weights: Params, x: Tensor) -> Tensor:
    batch, state = Batch(x, x), State(cfg.d_sae, {})
    codes = cfg.allocate(cfg.scores(weights, batch), state, 0.0)
    return cfg.losses(batch, codes, codes @ weights.W_dec, weights, state)["ordered_fvu"]


def test_the_loss_is_the_mean_over_truncations():
    x, cfg = rows(), saelab.LowRank(d_sae=2 * RANK)
    weights = params(x)
    s = (x - weights.b_dec) @ weights.W_enc[:RANK].T
    errors = [(x - weights.b_dec - s[:, :b] @ weights.W_dec[:b]).square().sum() for b in range(1, RANK + 1)]
    torch.testing.assert_close(loss(cfg, weights, x), torch.stack(errors).mean() / (x - x.mean(0)).square().sum())


def test_the_minimum_is_pca_in_its_order():
    x, cfg = rows(), saelab.LowRank(d_sae=2 * RANK)
    weights = params(x)
    free = [weights.W_enc.requires_grad_(), weights.W_dec.requires_grad_()]
    optimiser = torch.optim.LBFGS(free, max_iter=400, tolerance_grad=1e-10, tolerance_change=1e-14,
                                  line_search_fn="strong_wolfe")  # fmt: skip

    def closure() -> Tensor:
        optimiser.zero_grad()
        value = loss(cfg, weights, x)
        value.backward()
        return value

    optimiser.step(closure)
    axes = torch.linalg.svd(x - x.mean(0), full_matrices=False).Vh[:RANK]
    for rows_ in free:
        directions = torch.nn.functional.normalize(rows_.detach()[:RANK], dim=1)
        torch.testing.assert_close((directions @ axes.T).abs(), torch.eye(RANK, dtype=x.dtype), atol=1e-3, rtol=0)


def test_a_trained_one_is_linear_and_comes_back(tmp_path):
    x = rows(1_000).float()
    sae = saelab.train(
        x, sae=saelab.LowRank(d_sae=2 * RANK), tokens=30_000, batch_size=250, lr=1e-2, progress=False
    ).sae
    codes = sae.encode(x)
    assert torch.equal(codes[:, :RANK] * codes[:, RANK:], torch.zeros(len(x), RANK))
    assert torch.equal(sae.W_dec[:RANK], -sae.W_dec[RANK:]) and torch.equal(sae.W_enc[:, :RANK], -sae.W_enc[:, RANK:])
    torch.testing.assert_close(sae(x[:9]) + sae(x[9:18]), 2 * sae((x[:9] + x[9:18]) / 2), rtol=1e-4, atol=1e-4)
    sizes = (codes[:, :RANK] - codes[:, RANK:]).var(0)
    assert (sizes.diff() < 0).all()
    sae.save(tmp_path / "sae")
    again = saelab.SAE.load(tmp_path / "sae")
    assert again.cfg == sae.cfg and torch.equal(again(x), sae(x))


def test_an_odd_number_of_latents_is_refused():
    with pytest.raises(ConfigError, match="d_sae=5 is odd"):
        saelab.LowRank(d_sae=5)
