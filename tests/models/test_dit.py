"""A DiT as a denoiser: what is read, replaced, sampled and refused, and an SAE at one of its sites."""

import pytest
import torch
from diffusers import DDIMScheduler, DiTTransformer2DModel

import saelab
from saelab import hspace
from saelab.base.errors import ConfigError, SiteError
from saelab.models.denoising import ddim
from saelab.models.places import rows_of_places
from tests import toy_denoiser as toy

SITE = "transformer_blocks.0"


@pytest.fixture(scope="module")
def den():
    return saelab.load_denoiser(toy.dit(), DDIMScheduler(clip_sample=False))


@pytest.fixture
def x():
    return torch.randn(3, 1, 8, 8)


LABELS = torch.tensor([0, 3, 4])


def test_epsilon_is_the_networks_own(den, x):
    t = torch.tensor([3, 500, 990])
    with torch.no_grad():
        assert torch.equal(den.epsilon(x, t, LABELS), den.unet(x, t, class_labels=LABELS).sample)
        assert not torch.equal(den.epsilon(x, t, LABELS[:1]), den.epsilon(x, t, LABELS))
        both = saelab.load_denoiser(toy.dit(out_channels=2))  # the second channel is a learned variance
        assert torch.equal(both.epsilon(x, t, LABELS), both.unet(x, t, class_labels=LABELS).sample[:, :1])


def test_sites_and_the_two_verbs(den, x):
    table = den.sites().set_index("name")
    expected = [f"transformer_blocks.{i}{part}" for i in range(2) for part in (".attn1", ".ff", "")]
    assert table.index.tolist() == expected and set(table.width) == {16} and set(table.height) == {4}
    assert table.loc[SITE, "kind"] == "block" and den.site_shape(SITE) == (16, 16)
    seen = []
    hook = den.unet.transformer_blocks[0].register_forward_hook(lambda m, args, out: seen.append(out))
    h = den.record(x, 40, SITE, LABELS)
    hook.remove()
    assert torch.equal(h, seen[0]) and h.shape == (3, 16, 16)
    with torch.no_grad(), den.intervene(SITE, lambda h, where: h * (where.timesteps < 100).view(-1, 1, 1)):
        assert torch.equal(den.epsilon(x, 40, LABELS), den.unet(hidden_states=x, timestep=torch.full((3,), 40),
                                                                class_labels=LABELS).sample)  # fmt: skip
        assert den.record(x, 400, SITE, LABELS).abs().sum() == 0


def test_the_sampler_is_the_schedulers(den):
    trajectory = hspace.sample(den, n=3, steps=4, cond=LABELS, record=("x", "x0"), site=SITE, progress=False)
    scheduler = DDIMScheduler(clip_sample=False)
    scheduler.set_timesteps(4)
    x = trajectory.start
    for t in scheduler.timesteps:
        with torch.no_grad():
            x = scheduler.step(den.unet(x, t.expand(3), class_labels=LABELS).sample, t, x).prev_sample
    assert torch.equal(x, trajectory.samples) and torch.equal(ddim(den, trajectory.start, 4, LABELS), x)
    with pytest.raises(ConfigError, match="tokens and no feature map"):
        hspace.sample(den, n=1, steps=2, cond=LABELS[:1], site=SITE, progress=False)


def test_an_sae_at_a_site(den):
    images, labels = torch.randn(40, 1, 8, 8), torch.arange(40) % 5
    sae = saelab.train(den, (images, labels), site=SITE, sae=saelab.TopK(k=4, d_sae=32), tokens=1024, batch_size=128,
                       buffer_tokens=2048, progress=False).sae  # fmt: skip
    x, cond = images[:2], labels[:2]
    with torch.no_grad():
        plain = den.epsilon(x, 300, cond)
        with den.splice(sae, error_term=True, edit=lambda codes: codes):
            assert torch.equal(den.epsilon(x, 300, cond), plain)
        with den.splice(sae) as receipt:
            assert not torch.equal(den.epsilon(x, 300, cond), plain)
    assert receipt.positions == 32 and sae.d_in == rows_of_places(den.record(x, 300, SITE, cond)).shape[1]
    report = saelab.evaluate(sae, den, (images, labels), tokens=320, sparsity_tokens=320, progress=False)
    assert report.explained_variance > 0 and len(report.by_timestep) == 10


def test_folders_and_refusals(den, x, tmp_path):
    den.unet.save_pretrained(tmp_path / "dit")
    again = saelab.load_denoiser(tmp_path / "dit", den.scheduler)
    assert isinstance(again.unet, DiTTransformer2DModel) and again.digest == den.digest
    with pytest.raises(ConfigError, match="labels"):
        den.epsilon(x, 4)
    with pytest.raises(SiteError, match="no middle block.*transformer_blocks.1"):
        den.record(x, 4, cond=LABELS)
    with pytest.raises(ConfigError, match="eval"):
        saelab.load_denoiser(toy.dit().train())
