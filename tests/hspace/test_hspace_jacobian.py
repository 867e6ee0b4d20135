"""Jacobians as linear maps: products and singular vectors against the dense matrix, on functions and on a small U-Net."""

import contextlib
import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import saelab
from saelab import hspace
from saelab.base.errors import ConfigError, DataError
from saelab.base.linear_maps import LinearMap, Stacked, singular_vectors
from tests.toy_denoiser import conditional_unet
from tests.toy_hspace import unet


def network(seed: int = 0, inputs: int = 6, outputs: int = 9):
    generator = torch.Generator().manual_seed(seed)
    A, B = (torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in ((inputs, 8), (8, outputs)))
    return lambda x: torch.tanh(x @ A) @ B


@settings(deadline=None, max_examples=20)
@given(seed=st.integers(0, 99), rows=st.integers(1, 7), block=st.integers(1, 4))
def test_products_are_those_of_the_dense_jacobian(seed, rows, block):
    fn, point = network(seed), torch.linspace(-1, 1, 6, dtype=torch.float64)
    J = torch.autograd.functional.jacobian(lambda x: fn(x[None])[0], point)
    linear = LinearMap(fn, point, block)
    v, u = torch.randn(rows, 6, dtype=torch.float64), torch.randn(rows, 9, dtype=torch.float64)
    torch.testing.assert_close(linear.push(v), v @ J.T)
    torch.testing.assert_close(linear.pull(u), u @ J)


@pytest.mark.parametrize("shape", [(6, 9), (9, 6)])
def test_singular_vectors_are_the_exact_ones(shape):
    fn, point = network(1, *shape), torch.linspace(-1, 1, shape[0], dtype=torch.float64)
    J = torch.autograd.functional.jacobian(lambda x: fn(x[None])[0], point)
    U, S, V = torch.linalg.svd(J, full_matrices=False)
    found = singular_vectors(LinearMap(fn, point, 5), 3, tol=1e-8, max_iter=500)
    torch.testing.assert_close(found.values, S[:3], rtol=1e-8, atol=0)
    signs = (found.right * V[:3]).sum(1).sign()[:, None]
    torch.testing.assert_close(found.right, signs * V[:3], rtol=0, atol=1e-6)
    torch.testing.assert_close(found.left, signs * U.T[:3], rtol=0, atol=1e-6)
    residuals = found.right @ J.T @ J - found.values[:, None] ** 2 * found.right
    torch.testing.assert_close(found.residuals, residuals.norm(dim=1) / found.values**2, rtol=1e-3, atol=1e-10)


def test_stacked_maps_add_their_squares():
    points = [torch.linspace(-1, 1, 6, dtype=torch.float64), torch.linspace(0, 2, 6, dtype=torch.float64)]
    Js = [torch.autograd.functional.jacobian(lambda x: network()(x[None])[0], point) for point in points]
    found = singular_vectors(Stacked([LinearMap(network(), point, 6) for point in points]), 2, tol=1e-8, max_iter=500)
    values = torch.linalg.eigvalsh(sum(J.T @ J for J in Js) / 2).flip(0)
    torch.testing.assert_close(found.values**2, values[:2], rtol=1e-7, atol=0)


def test_too_many_components():
    with pytest.raises(ConfigError, match="7 components of a Jacobian of 9 x 6"):
        singular_vectors(LinearMap(network(), torch.zeros(6, dtype=torch.float64), 2), 7)


# on a U-Net with attention


@pytest.fixture(scope="module")
def denoiser():
    return saelab.load_denoiser(unet())


@pytest.fixture(scope="module")
def trajectory(denoiser):
    return hspace.sample(denoiser, n=3, steps=4, eta=1.0, seed=0, progress=False)


def exact(denoiser, trajectory, step: int, mask=None) -> torch.Tensor:
    def epsilon(h):
        with denoiser.intervene(trajectory.site, lambda *_: h):
            found = denoiser.epsilon(trajectory.x[:1, step], int(trajectory.timesteps[step]))
        return (found if mask is None else found * mask).flatten()

    return torch.autograd.functional.jacobian(epsilon, trajectory.h[:1, step]).flatten(1).double()


def test_reverse_products_agree_with_finite_differences(denoiser, trajectory):
    precise = denoiser.to(torch.float64)
    x, h, t = trajectory.x[0, 1].double(), trajectory.h[0, 1].double(), int(trajectory.timesteps[1])

    def epsilon(h):
        with precise.intervene("after", lambda *_: h):
            return precise.epsilon(x.expand(len(h), *x.shape), t)

    v = torch.randn(1, h.numel(), dtype=torch.float64)
    step = 1e-4 * v.view(1, *h.shape)
    with torch.no_grad():
        expected = (epsilon(h[None] + step) - epsilon(h[None] - step)) / 2e-4
    torch.testing.assert_close(LinearMap(epsilon, h, 1).push(v), expected.flatten(1), rtol=1e-3, atol=1e-7)


@pytest.mark.parametrize("step", [0, 2])
@pytest.mark.parametrize("masked", [False, True])
def test_jacobian_directions_are_the_exact_ones(denoiser, trajectory, step, masked):
    mask = torch.zeros(8, 8) if masked else None
    if mask is not None:
        mask[:4, 2:6] = 1
    found = hspace.jacobian(denoiser, trajectory[:1], step, 3, mask, max_iter=60)
    _, S, V = torch.linalg.svd(exact(denoiser, trajectory, step, mask), full_matrices=False)
    values = found.details["singular_values"].flatten().double()
    torch.testing.assert_close(values, S[:3], rtol=1e-2, atol=0)
    gaps = torch.minimum(S[:3] / S[1:4], torch.cat([torch.tensor([9.0]), S[:2] / S[1:3]])) > 1.05
    cosines = (found.vectors.flatten(1).double() * V[:3]).sum(1).abs()
    assert gaps.any() and (cosines[gaps] > 0.99).all()
    assert (found.details["residuals"] < 1e-3).all()
    assert found.timesteps is None and (found.details["timestep"] == trajectory.timesteps[step]).all()


def test_jacobian_leaves_the_network_as_it_was(denoiser, trajectory):
    before = {name: p.clone() for name, p in denoiser.unet.named_parameters()}
    state = torch.get_rng_state()
    hspace.jacobian(denoiser, trajectory[:1], 1, 1)
    assert torch.equal(state, torch.get_rng_state())
    assert all(
        p.requires_grad and p.grad is None and torch.equal(p, before[n]) for n, p in denoiser.unet.named_parameters()
    )
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in denoiser.unet.modules())


def test_the_scale_is_the_standard_deviation_over_samples(denoiser, trajectory):
    found = hspace.jacobian(denoiser, trajectory, 1, 2)
    along = trajectory.h[:, 1].flatten(1) @ found.vectors.flatten(1).T
    torch.testing.assert_close(found.scales[:, 0], along.std(0))
    one = hspace.jacobian(denoiser, trajectory[:1], 1, 1)
    torch.testing.assert_close(one.scales[0, 0], trajectory.h[0, 1].square().mean().sqrt())


def test_one_condition_serves_all_samples():
    conditional = saelab.load_denoiser(conditional_unet())
    cond = torch.randn(1, 3, 12)
    shared = hspace.sample(conditional, n=2, steps=2, eta=1.0, cond=cond, progress=False)
    each = dataclasses.replace(shared, cond=cond.expand(2, 3, 12))
    one, other = (hspace.jacobian(conditional, trajectory, 0, 1) for trajectory in (shared, each))
    torch.testing.assert_close(one.details["singular_values"], other.details["singular_values"])


def test_in_inference_mode_it_is_the_same(denoiser):
    for parameter in denoiser.unet.parameters():
        assert parameter.requires_grad
    found = []
    for mode in (contextlib.nullcontext, torch.inference_mode):
        with mode():
            sampled = hspace.sample(denoiser, n=1, steps=3, seed=0, progress=False)
            found.append(hspace.jacobian(denoiser, sampled, step=1, components=1).vectors)
    assert torch.equal(*found)


def test_jacobian_errors(denoiser, trajectory):
    with pytest.raises(ConfigError, match="no step 4"):
        hspace.jacobian(denoiser, trajectory, 4, 1)
    with pytest.raises(ConfigError, match="the mask is"):
        hspace.jacobian(denoiser, trajectory, 0, 1, torch.ones(4, 4))
    with pytest.raises(ConfigError, match="another denoiser"):
        hspace.jacobian(saelab.load_denoiser(unet(block_out_channels=(8, 24))), trajectory, 0, 1)
    with pytest.raises(DataError, match="no x"):
        hspace.jacobian(denoiser, hspace.sample(denoiser, 1, steps=2, record=("h",)), 0, 1)
