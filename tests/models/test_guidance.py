"""Classifier-free guidance and latent diffusion: the pipelines' own figures, both branches, the way to pixels."""

import dataclasses

import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, DiTPipeline, DPMSolverMultistepScheduler, LDMPipeline, VQModel

import saelab
from saelab import hspace
from saelab.base.errors import ConfigError
from saelab.hspace.sampling import run as made
from tests import toy_denoiser as toy
from tests.toy_hspace import unet

LABELS = torch.tensor([0, 3])


def autoencoder(kind=AutoencoderKL, **changes):
    config = dict(
        in_channels=3, out_channels=3, down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(4, 8), latent_channels=1, norm_num_groups=2, sample_size=16,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return kind(**{**config, **changes}).eval()


@pytest.fixture
def x():
    return torch.randn(2, 1, 8, 8)


def test_guided_epsilon_is_of_two_passes(x):
    plain = saelab.load_denoiser(
        toy.conditional_unet(), DDIMScheduler(prediction_type="v_prediction", clip_sample=False)
    )
    cond, empty = torch.randn(2, 5, 12), torch.randn(1, 3, 12)
    with torch.no_grad():
        c, u = (plain.epsilon(x, 500, some) for some in (cond, empty))
        torch.testing.assert_close(plain.guided(3.0, empty).epsilon(x, 500, cond), u + 3 * (c - u))
        torch.testing.assert_close(plain.guided(1.0, empty).epsilon(x, 500, cond), c)
        assert torch.equal(plain.guided(0.0, empty).epsilon(x, 500, cond), u)
        assert torch.equal(plain.epsilon(x, 500, cond), c)
    digests = {den.digest for den in (plain, *(plain.guided(s, e) for s in (1, 2) for e in (empty, 0 * empty)))}
    assert len(digests) == 5


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of numpy, in diffusers' scheduler
def test_a_dit_is_guided_as_its_pipeline_does_it():
    dit = toy.dit(out_channels=1, num_embeds_ada_norm=1000)  # the pipeline's label for none is 1000
    pipe = DiTPipeline(dit, autoencoder(), DPMSolverMultistepScheduler())
    pipe.set_progress_bar_config(disable=True)
    start = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(3))
    images = pipe([0, 3], guidance_scale=4.0, generator=torch.Generator().manual_seed(3), num_inference_steps=5,
                  output_type="np").images  # fmt: skip
    den = saelab.load_denoiser(pipe).guided(4.0)
    bare = hspace.sample(den, n=2, steps=5, cond=LABELS, record=(), site="transformer_blocks.0", progress=False)
    ours = den.decode(made(den, dataclasses.replace(bare, start=start), (), progress=False).samples).detach()
    torch.testing.assert_close(
        (ours / 2 + 0.5).clamp(0, 1), torch.from_numpy(images).permute(0, 3, 1, 2), atol=1e-5, rtol=0
    )


def test_sites_of_both_branches(x):
    plain = saelab.load_denoiser(toy.dit(), DDIMScheduler(clip_sample=False))
    den, site = plain.guided(2.0), "transformer_blocks.0"
    null = den.guidance.unconditional
    assert null.tolist() == [5]
    seen = {}
    with torch.no_grad():
        with den.intervene(site, lambda h, where: seen.setdefault(where.unconditional, h)):
            expected = den.epsilon(x, 40, LABELS)
        assert torch.equal(expected, den.epsilon(x, 40, LABELS)) and set(seen) == {False, True}
        assert torch.equal(seen[False], den.record(x, 40, site, LABELS))
        assert torch.equal(seen[True], den.record(x, 40, site, null))
        changed = {}
        for branch in (False, True):
            with den.intervene(site, lambda h, where, branch=branch: h * (1 + (where.unconditional == branch))):
                changed[branch] = den.epsilon(x, 40, LABELS)
        assert not torch.equal(changed[False], changed[True]) and not torch.equal(changed[True], expected)


def test_runs_edits_and_directions_of_a_guided_unet():
    net = unet(num_class_embeds=5)
    den = saelab.load_denoiser(net, DDIMScheduler(clip_sample=False)).guided(2.0, torch.tensor([4]))
    run = hspace.sample(den, n=2, steps=3, cond=LABELS, progress=False)
    assert torch.equal(run.h[:, 1], den.record(run.x[:, 1], int(run.timesteps[1]), cond=LABELS))
    found = hspace.jacobian(den, run[:1], step=1, components=1, max_iter=5)
    assert torch.equal(hspace.edit(den, run, found[0], 0.0, progress=False).samples, run.samples)
    plain = saelab.load_denoiser(net, DDIMScheduler(clip_sample=False))
    with pytest.raises(ConfigError, match="load the one that made it"):
        hspace.replay(plain, run)
    assert hspace.replay(den.to(torch.float64).to(torch.float32), run, progress=False).samples.allclose(run.samples)


def test_what_cannot_guide():
    with pytest.raises(ConfigError, match="not conditioned on anything"):
        toy.denoiser().guided(2.0)
    with pytest.raises(ConfigError, match=r"unconditional=.*\[1, 1, 12\]"):
        saelab.load_denoiser(toy.conditional_unet()).guided(2.0)


@pytest.mark.parametrize("kind", [AutoencoderKL, VQModel])
def test_latents_and_pixels(kind, tmp_path):
    more = {"shift_factor": 0.3} if kind is AutoencoderKL else {"num_vq_embeddings": 7, "vq_embed_dim": 1}
    vae = autoencoder(kind, scaling_factor=0.5, **more)
    pipe = LDMPipeline(vae, unet(), DDIMScheduler(clip_sample=False))
    pipe.save_pretrained(tmp_path)
    images = torch.rand(2, 3, 16, 16) * 2 - 1
    shift = more.get("shift_factor", 0.0)
    for den in (saelab.load_denoiser(pipe), saelab.load_denoiser(tmp_path)):
        with torch.no_grad():
            encoded = vae.encode(images)
            raw = encoded.latent_dist.mean if kind is AutoencoderKL else encoded.latents
            latents = den.encode(images)
            torch.testing.assert_close(latents, (raw - shift) * 0.5)
            assert torch.equal(den.decode(latents), vae.decode(latents / 0.5 + shift).sample)
            assert latents.shape[1:] == den.sample_shape
    with pytest.raises(ConfigError, match="no autoencoder"):
        toy.denoiser().decode(latents)


def test_directions_of_the_decoded_image():
    """The leading singular value is that of the whole Jacobian of the decoded prediction, by autograd."""
    small = autoencoder(block_out_channels=(4,), down_block_types=("DownEncoderBlock2D",),
                        up_block_types=("UpDecoderBlock2D",), in_channels=1, out_channels=1)  # fmt: skip
    pipe = LDMPipeline(small, unet(), DDIMScheduler(clip_sample=False))
    den = saelab.load_denoiser(pipe).to(torch.float64)
    den.autoencoder.double()
    run = hspace.sample(den, n=1, steps=2, progress=False)
    found = hspace.jacobian(den, run, step=1, components=1, pixels=True)
    h = run.h[0, 1]

    def image(h):
        with den.intervene("mid_block", lambda *_: h[None]):
            return den.decode(den.x0(run.x[:, 1], int(run.timesteps[1]))).flatten()

    J = torch.autograd.functional.jacobian(image, h).flatten(1)
    values = torch.linalg.svdvals(J)
    torch.testing.assert_close(found.details["singular_values"][0, 0], values[0].float(), rtol=1e-2, atol=0)
    with pytest.raises(ConfigError, match=r"image \[8, 8\]"):
        hspace.jacobian(den, run, step=1, components=1, pixels=True, mask=torch.ones(4, 4))
