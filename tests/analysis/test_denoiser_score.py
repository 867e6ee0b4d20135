"""Scores, Tweedie's formulas and sampling against densities that are known."""

import pytest
import torch

from saelab.analysis.denoisers import score
from saelab.analysis.denoisers.oracles import Gaussian, LowRankMixture
from saelab.base.errors import ConfigError

D = torch.float64


def test_the_score_of_the_best_denoiser_is_that_of_the_density():
    mixture = LowRankMixture.random(dimensions=12, components=3, rank=3)
    y = mixture.sample(9)[0] + 0.4 * torch.randn(9, 12, dtype=D)
    found = score.score_of(lambda y: mixture.denoise(y, 0.4), 0.4)(y)
    y = y.requires_grad_()
    covariances = [U @ U.T + 0.16 * torch.eye(12, dtype=D) for U in mixture.bases]
    logs = [torch.distributions.MultivariateNormal(torch.zeros(12, dtype=D), C).log_prob(y) for C in covariances]
    (known,) = torch.autograd.grad(torch.logsumexp(torch.stack(logs), 0).sum(), y)
    torch.testing.assert_close(found, known)


def test_tweedie_is_exact_on_conjugate_pairs():
    y = torch.linspace(0.5, 8, 40, dtype=D).view(-1, 1).requires_grad_()
    # x ~ N(1, 2), y = x + N(0, .5): the posterior mean weighs by precisions
    normal = torch.distributions.Normal(torch.tensor(1.0, dtype=D), 2.5**0.5)
    (s,) = torch.autograd.grad(normal.log_prob(y).sum(), y)
    torch.testing.assert_close(score.tweedie(y, s, "gaussian", 0.5**0.5), (y / 0.5 + 1 / 2) / (1 / 0.5 + 1 / 2))
    # 1/x ~ Gamma(a, b), y = x Gamma(k, k): p(y) ~ y^(k - 1) (b + k y)^-(a + k), E[1/x | y] = (a + k) / (b + k y)
    a, b, k = 3.0, 2.0, 5.0
    (s,) = torch.autograd.grad(((k - 1) * y.log() - (a + k) * (b + k * y).log()).sum(), y)
    torch.testing.assert_close(score.tweedie(y, s, "gamma", k), (b + k * y) / (a + k))


def test_tweedie_of_poisson_nears_the_posterior_mean_as_counts_grow():
    """x / zeta ~ Gamma(a, b): z is negative binomial, E[x | z] = zeta (z + a) / (1 + b)."""
    a, b, zeta = 4.0, 0.5, 0.2
    z = torch.tensor([[20.0], [200.0], [2000.0]], dtype=D).requires_grad_()
    (s_z,) = torch.autograd.grad(
        (torch.lgamma(z + a) - torch.lgamma(z + 1) - z * torch.tensor(1 + b, dtype=D).log()).sum(), z
    )
    found = score.tweedie(zeta * z, s_z / zeta, "poisson", zeta)  # the score of y = zeta z
    known = zeta * (z + a) / (1 + b)
    assert ((found / known - 1).abs() < 0.6 / z).all()


@pytest.mark.parametrize(("family", "true"), [("gaussian", 0.4), ("gamma", 20.0), ("poisson", 0.3)])
def test_the_parameter_is_found_blind_on_constant_images(family, true):
    generator = torch.Generator().manual_seed(0)
    if family == "gaussian":
        y = 2 + true * torch.randn(2, 1, 32, 32, generator=generator)
        s = (2 - y) / true**2
    elif family == "gamma":
        torch.manual_seed(0)
        y = 2 * torch.distributions.Gamma(true, true).sample((2, 1, 32, 32))
        s = (true - 1) / y - true / 2
    else:
        y = true * torch.poisson(torch.full((2, 1, 32, 32), 6.0 / true), generator=generator)
        s = (torch.log(torch.tensor(6.0 / true)) - torch.digamma(y / true + 1)) / true
    grid = [true * factor for factor in (0.6, 0.8, 1.0, 1.25, 1.6)]
    assert score.blind_parameter(y, s, family, grid) == true
    with pytest.raises(ConfigError, match="family is 'cauchy'"):
        score.tweedie(y, s, "cauchy", 1.0)


def test_metropolis_takes_the_bias_of_the_step_away():
    gaussian = Gaussian(torch.diag(torch.tensor([2.0, 0.5], dtype=D)))
    start = torch.zeros(4000, 2, dtype=D)

    def at(y):
        return gaussian.score(y, sigma=0.5)  # variances 2.25 and 0.75

    known = torch.tensor([2.25, 0.75], dtype=D)
    corrected, accepted = score.langevin(at, start, step=1.0, steps=150)
    plain, everything = score.langevin(at, start, step=1.0, steps=150, metropolis=False)
    error = 4 * (2 / 4000) ** 0.5  # four standard errors of a variance
    assert ((corrected.var(0) / known - 1).abs() < error).all() and 0.5 < accepted < 1 and everything == 1
    # the discretised chain of a Gaussian has variance s / (1 - step^2 / (4 s))
    assert ((plain.var(0) / (known / (1 - 1 / (4 * known))) - 1).abs() < error).all()
    assert float(plain.var(0)[1] / known[1]) > 1 + error


def test_the_density_ratio_is_exact_for_a_gaussian():
    one, other = torch.randn(5, 3, dtype=D), torch.randn(5, 3, dtype=D)
    known = (one.square().sum(1) - other.square().sum(1)) / 2
    torch.testing.assert_close(score._log_ratio(lambda y: -y, one, other), known)


def test_every_measure_of_denoisers_is_a_name_of_the_package():
    from saelab.analysis import denoisers

    assert all(callable(getattr(denoisers, name)) and getattr(denoisers, name).__doc__ for name in denoisers.__all__)
    assert {"feature_reuse", "leading_directions", "alignment", "tweedie"} <= set(denoisers.__all__)
