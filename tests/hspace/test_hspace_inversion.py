"""Inversions end in the images they were given, and are runs like any other."""

import pytest
import torch

import saelab
from saelab import hspace
from saelab.base.errors import ConfigError, DataError
from saelab.hspace.inversion import ascend
from tests import toy_denoiser as toy


@pytest.fixture(scope="module")
def images() -> torch.Tensor:
    return torch.rand(3, 1, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1


@pytest.mark.parametrize("method", ["edit-friendly", "edict"])
@pytest.mark.parametrize(
    "dtype, bar, prediction",
    [(torch.float32, 1e-5, "epsilon"), (torch.float32, 1e-5, "v_prediction"), (torch.float64, 1e-8, "epsilon")],
)
def test_exact_inversions(images, method, dtype, bar, prediction):
    from diffusers import DDIMScheduler

    den = toy.denoiser(DDIMScheduler(clip_sample=False, prediction_type=prediction))
    den = den if dtype == torch.float32 else den.to(dtype)
    trajectory = hspace.invert(den, images.to(dtype), method, steps=10, batch_size=2)
    assert trajectory.errors.shape == (3,) and float(trajectory.errors.max()) < bar
    again = hspace.replay(den, trajectory)
    assert torch.equal(again.samples, trajectory.samples) and torch.equal(again.h, trajectory.h)


@pytest.mark.parametrize("name", ["digits-unet", "mnist-unet"])
@pytest.mark.parametrize("method", ["edit-friendly", "edict"])
def test_exact_inversions_of_real_images(name, method):
    den = saelab.load_denoiser(name)
    trajectory = hspace.invert(den, den.examples()[0][:4], method, steps=10, record=(), progress=False)
    assert float(trajectory.errors.max()) < 1e-5


def test_ddim_comes_nearer_with_more_steps():
    den = saelab.load_denoiser("digits-unet")
    images = den.examples()[0][:2]
    few, many = (
        float(hspace.invert(den, images, "ddim", steps=s, record=(), progress=False).errors.mean()) for s in (10, 100)
    )
    assert 0 < many < few / 2


def test_the_ascent_is_undone_where_epsilon_is_constant(images):
    """With a network that sees the same epsilon everywhere, DDIM's way up and down is exact."""
    den = toy.denoiser().to(torch.float64)
    with den.intervene("conv_out", lambda out, where: 0 * out + 0.3):
        trajectory = hspace.invert(den, images.double(), "ddim", steps=15)
    path = ascend(den, images.double(), steps=15)
    assert float(trajectory.errors.max()) < 1e-12 and path.shape == (3, 16, 1, 8, 8)
    assert torch.equal(path[:, -1], images.double())


def test_edit_friendly_noise_explains_the_image(images):
    """x_t are independent draws of q(x_t | x_0), as far as one can see: the start is, with unit variance about its mean."""
    den = toy.denoiser()
    many = images[:1].expand(400, 1, 8, 8)
    trajectory = hspace.invert(den, many, steps=4, batch_size=400)
    a = den.alphas_cumprod[trajectory.timesteps[0]]
    free = (trajectory.start - a.sqrt() * many) / (1 - a).sqrt()
    assert abs(float(free.mean())) < 0.02 and abs(float(free.var()) - 1) < 0.03
    assert torch.equal(
        trajectory.noise[:, -1], torch.zeros_like(many)
    )  # the last step has none: its rest is the residual
    assert float(trajectory.residual.abs().max()) > 0
    again = hspace.invert(den, many[:3], steps=4, batch_size=400)
    assert torch.equal(again.start, trajectory.start[:3])


@pytest.mark.parametrize("method", ["edit-friendly", "ddim", "edict"])
def test_inversions_can_be_edited_and_kept(images, method, tmp_path):
    den = toy.denoiser()
    trajectory = hspace.invert(den, images, method, steps=6)
    vector = torch.ones(1, *den.site_shape()) / 16
    one = hspace.Direction(vector, torch.tensor([5.0]), None, trajectory.site, den.digest)
    assert torch.equal(hspace.edit(den, trajectory, one, 0.0).samples, trajectory.samples)
    edited = hspace.edit(den, trajectory, one)
    assert not torch.allclose(edited.samples, trajectory.samples, atol=1e-3)
    edited.save(tmp_path / "e.safetensors")
    assert torch.equal(hspace.replay(den, hspace.Trajectory.load(tmp_path / "e.safetensors")).samples, edited.samples)


def test_refusals(images):
    den = toy.denoiser()
    with pytest.raises(ConfigError, match="known are edit-friendly, ddim, edict"):
        hspace.invert(den, images, "null-text")
    with pytest.raises(ConfigError, match="eta above 0"):
        hspace.invert(den, images, eta=0.0)
    with pytest.raises(DataError, match=r"\[n, 1, 8, 8\]"):
        hspace.invert(den, images[..., :4])
    with pytest.raises(DataError, match="were drawn"):
        hspace.sample(den, n=1, steps=2).errors  # noqa: B018
