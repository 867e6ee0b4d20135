"""Bias-free denoisers, their sampler, the experiment of two halves and the phase transition, against what is known."""

import math

import pandas
import pytest
import torch
from torch import Tensor

from saelab.analysis.denoisers import bias_free, generalisation
from saelab.analysis.denoisers.geometry import homogeneity_error
from saelab.base.errors import CheckpointError, ConfigError

SMALL = {"steps": 3, "batch_size": 4, "layers": 3, "width": 4}


def test_a_trained_denoiser_is_homogeneous_and_its_jacobian_acts_as_it_does():
    net = bias_free.train_bias_free(torch.rand(8, 1, 6, 6), **SMALL, progress=False).double()
    y = torch.randn(1, 1, 6, 6, dtype=torch.float64)
    assert homogeneity_error(net, y, 3.0) < 1e-12
    J = torch.autograd.functional.jacobian(net, y).view(36, 36)
    torch.testing.assert_close(J @ y.flatten(), net(y).flatten())


def test_training_lowers_the_error_and_repeats_to_the_bit():
    images = torch.rand(1, 1, 6, 6).expand(4, 1, 6, 6)
    how = {"batch_size": 8, "layers": 3, "width": 8, "progress": False}
    y = images + 0.3 * torch.randn(4, 1, 6, 6)
    state = torch.get_rng_state()
    few, many, again = (bias_free.train_bias_free(images, steps=steps, **how) for steps in (1, 60, 60))
    assert torch.equal(torch.get_rng_state(), state)
    assert (many(y) - images).square().mean() < 0.9 * (few(y) - images).square().mean()
    assert torch.equal(many(y), again(y)) and not torch.equal(
        many(y), bias_free.train_bias_free(images, steps=60, **how, seed=1)(y)
    )


def test_without_noise_the_sampler_projects():
    """f = P y: what lies in the subspace stays, the rest falls by (1 - h) a step, until the noise seen is at most sigma_end."""
    U = torch.linalg.qr(torch.randn(12, 3, dtype=torch.float64)).Q
    start = torch.randn(5, 12, dtype=torch.float64)
    y, sigma = bias_free.coarse_to_fine(lambda y: y @ U @ U.T, start, h0=0.05, beta=1.0, sigma_end=0.1)
    torch.testing.assert_close(y @ U, start @ U)
    for i in range(5):
        left = (start[i] - start[i] @ U @ U.T).norm() / 12**0.5
        t = 1
        while left > 0.1:
            left, t = left * (1 - 0.05 * t / (1 + 0.05 * (t - 1))), t + 1
        torch.testing.assert_close(sigma[i], left)


def test_the_samplers_noise_falls_as_it_is_meant_to():
    """Where all of y is noise, sigma falls by (1 - beta h) a step: what is taken away and what is added make that."""
    y, sigma = torch.randn(2, 20_000), 1.0
    for t in range(1, 4):
        y, _ = bias_free.coarse_to_fine(torch.zeros_like, y, h0=0.5, beta=0.2, sigma_end=0.0, most=1, seed=t)
        sigma *= 1 - 0.2 * 0.5
        torch.testing.assert_close(y.std(dim=1), torch.full((2,), sigma), rtol=0.02, atol=0)


def test_a_sample_that_is_driven_away_is_given_up_alone():
    """f = 1.5 y along the first row, 0 elsewhere: the first grows until it looks twice as noisy, the second arrives."""
    start = torch.tensor([[1.0, 1.0], [1.0, -1.0]])
    y, sigma = bias_free.coarse_to_fine(lambda y: y * torch.tensor([[1.5], [0.0]]), start, beta=1.0)
    assert 1.0 < sigma[0] < 1.1 and sigma[1] <= 0.05 and y.isfinite().all()


@pytest.mark.parametrize("rank", [4, 6])
def test_one_subspace_is_found_by_as_many_samples_as_it_has_dimensions(rank):
    found = generalisation.phase_curve(rank, [1, 2, rank - 1, rank, 3 * rank], dimensions=16, draws=3)
    expected = [min(n, rank) / rank for n in found.samples]
    torch.testing.assert_close(torch.tensor(found.affinity.to_numpy()), torch.tensor(expected, dtype=torch.float64))
    assert found.found.tolist() == [0, 0, 0, 1, 1] and (found.high - found.low).max() < 1e-9


def test_several_subspaces_are_found_from_many_samples_and_not_from_few():
    found = generalisation.phase_curve(2, [2, 20], dimensions=12, components=2, draws=4).set_index("samples")
    assert found.affinity[20] > 0.99 and found.affinity[2] < 0.9 and found.ratio[20] == 10


def test_psnr_distance_and_slopes_are_those_of_known_denoisers():
    test, noise = torch.rand(6, 1, 4, 4), torch.randn(6, 1, 4, 4)
    halves = torch.rand(3, 1, 4, 4), torch.rand(3, 1, 4, 4)
    nets = [lambda y: y, lambda y: y + 0.1]
    row = generalisation._compared(nets, halves, test, noise, 0.2)
    mse = (0.2 * noise).square().mean() / 2 + (0.2 * noise + 0.1).square().mean() / 2
    assert math.isclose(row["psnr_test"], -10 * math.log10(mse), rel_tol=1e-5)
    assert math.isclose(row["psnr_in"], -20 * math.log10(0.2), rel_tol=1e-6)
    assert math.isclose(row["distance"], 0.5, rel_tol=1e-5)  # 0.1 / 0.2
    level = [0.0, 10.0, 30.0]
    curves = pandas.DataFrame(
        {"images": 5, "psnr_in": level, "psnr_train": level, "psnr_test": [x / 2 + 7 for x in level]}
    )
    slopes = generalisation.TwoSplit(curves, curves).slopes().iloc[0]
    assert math.isclose(slopes.train, 1.0) and math.isclose(slopes.test, 0.5)


def test_the_experiment_goes_on_where_it_was_stopped(tmp_path, monkeypatch):
    images = torch.rand(11, 1, 6, 6)
    how = {"counts": [4, 2], "samples": 3, "sigmas": (0.1, 0.5), "progress": False, **SMALL}
    whole = generalisation.two_split(images, **how)
    real, made = generalisation.train_bias_free, []

    def stopping(*args: Tensor, **kwargs):
        made.append(args)
        if len(made) == 3:
            raise KeyboardInterrupt
        return real(*args, **kwargs)

    monkeypatch.setattr(generalisation, "train_bias_free", stopping)
    with pytest.raises(KeyboardInterrupt):
        generalisation.two_split(images, out=tmp_path, **how)
    again = generalisation.two_split(images, out=tmp_path, **how)
    assert len(made) == 3 + 2 and whole.curves.equals(again.curves) and whole.samples.equals(again.samples)
    assert len(whole.to_pandas()) == 4 and len(whole.plot().data) == 4 and list(whole.samples.images) == [2, 4]
    for other, reason in (({"steps": 4}, "settings"), ({"seed": 1}, "images and settings")):
        with pytest.raises(CheckpointError, match=reason):
            generalisation.two_split(images, out=tmp_path, **{**how, **other})
    with pytest.raises(ConfigError, match="leave none of 11"):
        generalisation.two_split(images, counts=[6])
