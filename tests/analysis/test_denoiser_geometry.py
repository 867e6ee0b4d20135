"""Geometry, dynamics and probes of denoisers against distributions whose best denoiser is known, and dense references."""

import dataclasses

import pandas
import pytest
import torch

import saelab
from saelab import hspace
from saelab.analysis.denoisers import dynamics, geometry, probes
from saelab.analysis.denoisers.oracles import Gaussian, LowRankMixture, subspace_affinity
from saelab.base.errors import ConfigError, DataError
from tests.toy_hspace import unet

SIGMA = 0.5


@pytest.fixture(scope="module")
def gaussian():
    root = torch.randn(6, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return Gaussian(root @ root.T)


@pytest.fixture(scope="module")
def mixture():
    return LowRankMixture.random(dimensions=16, components=3, rank=4, seed=1)


def test_the_gaussian_basis_is_that_of_its_covariance(gaussian):
    basis = geometry.jacobian_basis(lambda y: gaussian.denoise(y, SIGMA), torch.zeros(6, dtype=torch.float64))
    s, e = torch.linalg.eigh(gaussian.covariance)
    torch.testing.assert_close(basis.values, (s / (s + SIGMA**2)).flip(0))
    torch.testing.assert_close((basis.vectors * e.T.flip(0)).sum(1).abs(), torch.ones(6, dtype=torch.float64))
    assert basis.asymmetry < 1e-12 and basis.negative == 0


@pytest.mark.parametrize("oracle", ["gaussian", "mixture"])
def test_oracles_obey_tweedie_and_their_own_density(oracle, request):
    model = request.getfixturevalue(oracle)
    y = model.sample(5)[0] if oracle == "mixture" else model.sample(5)
    y = y + SIGMA * torch.randn(y.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    found = geometry.score_error(lambda y: model.denoise(y, SIGMA), lambda y: gradient(model, y), y, SIGMA)
    assert found["relative"] < 1e-10 and found["cosine"] > 1 - 1e-10
    torch.testing.assert_close(model.score(y, SIGMA), gradient(model, y))


def gradient(model, y):
    """Of log p_sigma, by differentiating the density itself."""
    y = y.clone().requires_grad_()
    with torch.enable_grad():
        if isinstance(model, Gaussian):
            covariances, weights = [model.covariance], torch.ones(1, dtype=torch.float64)
        else:
            covariances, weights = [U @ U.T for U in model.bases], model.weights
        logs = [
            torch.distributions.MultivariateNormal(
                y.new_zeros(y.shape[1]), C + SIGMA**2 * torch.eye(y.shape[1])
            ).log_prob(y)
            for C in covariances
        ]
        total = torch.logsumexp(torch.stack(logs) + weights.log()[:, None], 0).sum()
    return torch.autograd.grad(total, y)[0]


def test_rank_of_the_mixture_is_that_of_the_component(mixture):
    x, labels = mixture.sample(3, seed=4)
    for point, label in zip(x, labels, strict=True):
        basis = geometry.jacobian_basis(lambda y: mixture.denoise(y, 0.05), point)
        assert basis.rank() == 4
        assert basis.effective_dimension == pytest.approx(4 / (1 + 0.05**2), rel=1e-3)
        assert subspace_affinity(basis.vectors[:4].T, mixture.bases[label]) > 0.999
    with pytest.raises(ConfigError, match="4,097 entries"):
        geometry.jacobian_basis(lambda y: y, torch.zeros(4097))


def test_derivatives_are_taken_in_inference_mode_too():
    y = torch.randn(50, 3, generator=torch.Generator().manual_seed(0))
    slopes = torch.tensor([0.9, 0.5, 0.1])
    wanted = (
        geometry.sure(lambda y: y * slopes, y, 1.0),
        geometry.leading_directions(lambda y: y * slopes, y[0], k=2).values,
    )
    with torch.inference_mode():
        made = y.clone()
        found = geometry.sure(lambda y: y * slopes, made, 1.0)
        assert found == wanted[0]
        assert torch.equal(geometry.leading_directions(lambda y: y * slopes, made[0], k=2).values, wanted[1])


def test_sure_is_the_error_without_the_clean_image(mixture):
    x, _ = mixture.sample(4000)
    y = x + SIGMA * torch.randn(x.shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    denoised = mixture.denoise(y, SIGMA)
    error = float((denoised - x).square().sum(1).mean())
    assert geometry.sure(lambda y: mixture.denoise(y, SIGMA), y, SIGMA) == pytest.approx(error, rel=0.03)


def test_homogeneity_sees_a_constant():
    y = torch.randn(4, 6, generator=torch.Generator().manual_seed(0))
    assert geometry.homogeneity_error(torch.relu, y) < 1e-6
    assert geometry.homogeneity_error(lambda y: torch.relu(y) + 0.1, y) > 0.01


# on a U-Net


@pytest.fixture(scope="module")
def denoiser():
    return saelab.load_denoiser(unet())


@pytest.fixture(scope="module")
def trajectory(denoiser):
    return hspace.sample(denoiser, n=2, steps=3, eta=1.0, seed=0, progress=False)


def test_spectrum_along_a_trajectory(denoiser, trajectory):
    table = geometry.jacobian_spectrum(denoiser, trajectory, [1])
    t = int(trajectory.timesteps[1])
    alpha = denoiser.alphas_cumprod[t]
    traces = []
    for x in trajectory.x[:, 1]:  # d x0 / d y = 1 - sqrt(1 - alpha) d epsilon / d x_t
        J = torch.autograd.functional.jacobian(lambda x: denoiser.epsilon(x[None], t).flatten(), x).flatten(1)
        traces.append(64 - (1 - alpha).sqrt() * J.diagonal().sum())
    assert table.t.tolist() == [t] and table.sigma[0] == pytest.approx(float(((1 - alpha) / alpha).sqrt()))
    assert table.effective_dimension[0] == pytest.approx(float(sum(traces) / 2), rel=1e-3)


def test_dynamics_by_hand(denoiser, trajectory):
    found = dynamics.feature_dynamics(denoiser, trajectory, ["mid_block", "conv_in"])
    row = found.table[found.table.site == "mid_block"].iloc[0]
    a, b = trajectory.h[:, 0].flatten(1), trajectory.h[:, 1].flatten(1)
    assert row.relative == pytest.approx(float(((b - a).norm(dim=1) / a.norm(dim=1)).mean()), rel=1e-4)
    assert row.cosine == pytest.approx(float(torch.cosine_similarity(a, b).mean()), rel=1e-4)
    torch.testing.assert_close(found.cosines["conv_in"].diagonal(), torch.ones(3))
    assert found.summary().site.tolist() == ["mid_block", "conv_in"]
    with pytest.raises(DataError, match="two steps"):
        dynamics.feature_dynamics(denoiser, hspace.sample(denoiser, 1, steps=1), ["mid_block"])


def test_reuse_by_hand(denoiser, trajectory):
    found = dynamics.feature_reuse(denoiser, trajectory, ["mid_block", "conv_in"], lags=[2, 1])
    assert len(found) == 2 * (2 + 1) and set(found.lag) == {1, 2}
    row = found[(found.site == "mid_block") & (found.lag == 2)].iloc[0]
    x, t = trajectory.x[:, 2], int(trajectory.timesteps[2])
    with torch.no_grad():
        plain = denoiser.epsilon(x, t)
        with denoiser.intervene("after", lambda *_: trajectory.h[:, 0]):
            changed = denoiser.epsilon(x, t)
    error = ((changed - plain).flatten(1).norm(dim=1) / plain.flatten(1).norm(dim=1)).mean()
    assert row.t == t and row.error == pytest.approx(float(error), rel=1e-4) and row.error > 0
    still = dataclasses.replace(trajectory, x=trajectory.x[:, :1].expand(-1, 4, -1, -1, -1),
                                timesteps=trajectory.timesteps[:1].expand(3))  # fmt: skip
    assert (dynamics.feature_reuse(denoiser, still, ["mid_block"]).error == 0).all()
    with pytest.raises(DataError, match="more than 3 steps"):
        dynamics.feature_reuse(denoiser, trajectory, ["mid_block"], lags=[3])


def test_the_schedule_stops_at_the_first_lag_that_fails():
    found = pandas.DataFrame(
        {"site": "a", "lag": [1, 2, 4, 1, 2, 4], "t": [9, 9, 9, 5, 5, 5], "error": [0.01, 0.2, 0.01, 0.01, 0.02, 0.05]}
    )
    table = dynamics.reuse_schedule(found)
    assert table.loc["a", 9] == 1 and table.loc["a", 5] == 4 and dynamics.reuse_schedule(found, 0.001).loc["a", 5] == 0


def test_leading_directions_are_those_of_the_whole_jacobian(denoiser):
    t, y = 300, torch.randn(1, 8, 8)
    denoise, _ = geometry.posterior_mean(denoiser, t)
    found = geometry.leading_directions(denoise, y, k=3, tol=1e-6, max_iter=300)
    J = torch.autograd.functional.jacobian(lambda y: denoise(y[None]).flatten(), y).flatten(1).double()
    _, values, right = torch.linalg.svd(J)
    torch.testing.assert_close(found.values, values[:3], rtol=1e-3, atol=0)
    assert ((found.right * right[:3]).sum(1).abs() > 0.99).all()


def test_probes_see_what_is_there_and_noise_hides_it(denoiser):
    labels = torch.arange(80) % 2
    images = 0.1 * torch.randn(80, 1, 8, 8) + (2.0 * labels - 1).view(-1, 1, 1, 1)
    table = probes.probe_timesteps(denoiser, images, labels, [0, 999], pooled=True)
    accuracy = table.set_index(["t", "site"]).accuracy
    assert (accuracy[0] == 1).all() and accuracy[999, "x_t"] < 0.8
    assert set(table.site) == {"mid_block", "mid_block, pooled", "x_t"}
    assert (table.low <= table.accuracy).all() and (table.accuracy <= table.high).all() and (table.chance == 0.5).all()
    assert ((table.shuffled - 0.5).abs() < 0.5 * (table.high - table.low).max() + 0.15).all()
    by_hand = [probes._wilson(8 / 10, 10), probes._wilson(0.0, 10)]  # the textbook's (0.490, 0.943) and (0, 0.278)
    assert by_hand[0] == pytest.approx((0.490, 0.943), abs=1e-3) and by_hand[1] == pytest.approx((0, 0.278), abs=1e-3)
    with pytest.raises(DataError, match="1 classes"):
        probes.probe_timesteps(denoiser, images, torch.zeros(80, dtype=torch.long))


def test_posterior_gap_is_that_of_the_means(denoiser):
    images = torch.randn(3, 1, 8, 8)
    row = probes.posterior_gap(denoiser, images, [500]).iloc[0]
    scheduler = denoiser.scheduler  # the posterior's mean, written with the schedule's own betas
    a, before, beta = scheduler.alphas_cumprod[500], scheduler.alphas_cumprod[499], scheduler.betas[500]
    noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(0))
    x_t = a.sqrt() * images + (1 - a).sqrt() * noise
    with torch.no_grad():
        gap = before.sqrt() * beta / (1 - a) * (denoiser.x0(x_t, 500) - images)
    assert row.posterior_mean_gap == pytest.approx(float(gap.flatten(1).square().sum(1).mean()), rel=1e-3)
