"""SAEs of a denoiser's site: rows of images, timesteps and places, training and evaluation against sums by hand."""

import pytest
import torch
from diffusers import DDIMScheduler

import saelab
from saelab.base.errors import ConfigError, DataError, SiteError
from saelab.models.places import places_of_rows, rows_of_places
from saelab.reading.images import NoisedPlaces, load_images, noised
from tests import toy_denoiser as toy

TOPK = saelab.TopK(k=4, d_sae=32)
HOW = {"sae": TOPK, "site": "mid_block", "tokens": 2048, "batch_size": 256, "buffer_tokens": 4096, "progress": False}


@pytest.fixture(scope="module")
def den():
    return toy.denoiser()


@pytest.fixture(scope="module")
def images():
    return torch.randn(60, 1, 8, 8, generator=torch.Generator().manual_seed(3)).clamp(-1, 1)


@pytest.fixture(scope="module")
def sae(den, images):
    return saelab.train(den, images, **HOW).sae


def test_rows_are_places_and_come_back():
    h = torch.randn(2, 3, 4, 5)
    rows = rows_of_places(h)
    assert torch.equal(rows[1 * 20 + 2 * 5 + 4], h[1, :, 2, 4])
    assert torch.equal(places_of_rows(rows, h.shape), h)
    tokens = torch.randn(2, 7, 3)
    assert torch.equal(places_of_rows(rows_of_places(tokens), tokens.shape), tokens)
    with pytest.raises(DataError, match="no places"):
        rows_of_places(torch.zeros(2, 3))


def test_pieces_are_the_activations_of_noised_images(den, images):
    """Each image once an epoch; the same bits for the same seed and epoch, from any image on."""
    seen = []
    pieces = NoisedPlaces(den, load_images(images, den), "mid_block", seed=1)
    with den.intervene("conv_in.input", lambda x, where: seen.append((x, where.timesteps)) or x):
        ((rows, cursor),) = pieces.read(epoch=2, cursor=0)
    x, t = seen[0]
    assert cursor == 60 and torch.equal(rows["x"], rows_of_places(den.record(x, t))) and len(t.unique()) > 50
    assert torch.equal(next(pieces.read(2, 0))[0]["x"], rows["x"]) and list(pieces.read(2, 60)) == []
    assert not torch.equal(next(pieces.read(3, 0))[0]["x"], rows["x"])
    numbers, timesteps = torch.tensor([5, 7]), torch.tensor([0, 700])
    one = noised(den, load_images(images, den), numbers, timesteps, "name")
    a = den.scheduler.alphas_cumprod[timesteps].view(-1, 1, 1, 1)
    torch.testing.assert_close(one.x, a.sqrt() * images[numbers] + (1 - a).sqrt() * one.noise)
    assert torch.equal(one.images, images[numbers]) and abs(float(one.noise.std()) - 1) < 0.2


def test_heldout_images_are_apart_and_do_not_depend_on_the_order(den, images):
    one, other = load_images(images, den), load_images(images.flip(0), den)
    assert len(one.split("heldout")) == 3 and len(one.split("train")) == 57
    held = {tuple(image.flatten().tolist()) for image in one.split("heldout").images}
    assert held == {tuple(image.flatten().tolist()) for image in other.split("heldout").images}
    assert not held & {tuple(image.flatten().tolist()) for image in one.split("train").images}


def test_training_goes_on_to_the_same_bits(den, images, tmp_path, sae):
    run = saelab.train(den, images, **HOW, out=tmp_path / "run")
    assert torch.equal(run.sae.W_dec, sae.W_dec)
    assert run.sae.metadata["site"] == "mid_block" and run.sae.metadata["model_digest"] == den.digest
    assert run.sae.metadata["places"] == [16, 4, 4] and run.history.explained_variance.iloc[-1] > 0.2
    assert torch.equal(saelab.train(den, images, **HOW, out=tmp_path / "run").sae.W_dec, sae.W_dec)
    with pytest.raises(saelab.CheckpointError, match="corpus_digest"):
        saelab.train(den, images[1:], **HOW, out=tmp_path / "run")


def test_without_images_it_draws_its_own(den, monkeypatch):
    from saelab import hspace
    from saelab.reading import images as module

    monkeypatch.setattr(module, "DRAWN", 4)
    monkeypatch.setattr(module, "DRAWN_STEPS", 3)
    drawn = load_images(None, den)
    start = torch.stack([image for image in drawn.images])
    made = hspace.sample(den, n=4, steps=3, progress=False)
    assert start.shape == made.samples.shape and saelab.train(den, **{**HOW, "tokens": 256}).sae.d_in == 16
    assert torch.equal(module.ddim(den, made.start, 3), made.samples)


def test_splices(den, images, sae):
    x, t = images[:3], torch.tensor([10, 400, 900])
    with torch.no_grad():
        plain = den.epsilon(x, t)
        with den.splice(sae, error_term=True):
            assert torch.equal(den.epsilon(x, t), plain)
        with den.splice(sae, error_term=True, edit=lambda codes: codes) as receipt:
            assert torch.equal(den.epsilon(x, t), plain)
        assert receipt.positions == 48
        h = den.record(x, t)
        with den.splice(sae) as receipt:
            spliced = den.epsilon(x, t)
        rows = rows_of_places(h)
        new = torch.where(sae.replaceable(rows)[:, None], sae(rows), rows)
        with den.intervene("after", lambda *_: places_of_rows(new, h.shape)):
            assert torch.equal(den.epsilon(x, t), spliced)
    assert receipt.replaced == int(sae.replaceable(rows).sum()) and not torch.equal(spliced, plain)
    with pytest.raises(SiteError, match="16 wide and site 'conv_in' 8"), den.splice(sae, site="conv_in"):
        pass
    with pytest.raises(saelab.InterventionError, match="never ran"), den.splice(sae):
        pass


def test_evaluation_by_hand(den, images, sae):
    report = saelab.evaluate(sae, den, images, tokens=3 * 16 * 10, sparsity_tokens=500, progress=False)
    held = load_images(images, den).split("heldout").images
    noise = torch.randn(held.shape, generator=saelab.base.seeds.named_generator("evaluated 0"))
    clean, spliced, zero, kept, total = [], [], [], [], []
    for t in range(50, 1000, 100):
        a = den.alphas_cumprod[t].float()
        x = a.sqrt() * held + (1 - a).sqrt() * noise
        with torch.no_grad():
            clean.append((den.epsilon(x, t) - noise).square().mean())
            with den.splice(sae):
                spliced.append((den.epsilon(x, t) - noise).square().mean())
            with den.intervene("after", lambda h, _: places_of_rows(
                torch.where(sae.replaceable(rows_of_places(h))[:, None], 0.0, rows_of_places(h)), h.shape)):  # fmt: skip
                zero.append((den.epsilon(x, t) - noise).square().mean())
        rows = rows_of_places(den.record(x, t))
        rows = rows[sae.replaceable(rows)]
        kept.append(rows)
        total.append(sae(rows))
    rows, back = torch.cat(kept), torch.cat(total)
    variance = 1 - (rows - back).square().sum() / (rows - rows.mean(0)).square().sum()
    assert report.explained_variance == pytest.approx(float(variance), rel=1e-4)
    assert report.by_timestep.loss_clean.tolist() == pytest.approx([float(one) for one in clean], rel=1e-5)
    assert report.by_timestep.loss_sae.tolist() == pytest.approx([float(one) for one in spliced], rel=1e-5)
    assert report.loss_zero == pytest.approx(float(sum(zero) / 10), rel=1e-5)
    assert report.delta_loss == pytest.approx(report.loss_sae - report.loss_clean, rel=1e-4)
    assert report.tokens == 480 and report.l0 == pytest.approx(4, abs=0.1) and 0 < report.sample_change < 1
    assert "Report at mid_block" in repr(report) and len(report.to_pandas()) == 1


def test_a_perfect_autoencoder_loses_nothing(den, images):
    """A dictionary of the coordinate axes and their opposites writes every vector back."""
    sae = saelab.SAE(saelab.TopK(k=16, d_sae=32), 16, {"site": "mid_block"})
    axes = torch.cat([torch.eye(16), -torch.eye(16)])
    sae.W_dec.data.copy_(axes), sae.encoder_weight.data.copy_(axes)
    report = saelab.evaluate(sae, den, images, tokens=160, sparsity_tokens=160, progress=False)
    assert report.fvu < 1e-10 and abs(report.delta_loss) < 1e-6 and report.loss_score == pytest.approx(1, abs=1e-4)
    assert report.sample_change < 1e-5


def test_conditional_denoisers_take_pairs(images):
    den = saelab.load_denoiser(toy.conditional_unet(), DDIMScheduler(clip_sample=False))
    cond = torch.randn(60, 5, 12)
    sae = saelab.train(den, (images, cond), **{**HOW, "tokens": 512}).sae
    report = saelab.evaluate(sae, den, (images, cond), tokens=160, sparsity_tokens=160, progress=False)
    assert report.sample_change != report.sample_change and report.delta_loss == report.delta_loss
    with pytest.raises(ConfigError, match="pair \\(images, cond\\)"):
        saelab.train(den, images, **HOW)


def test_refusals(den, images, sae):
    with pytest.raises(ConfigError, match="needs a site"):
        saelab.train(den, images, **{**HOW, "site": None})
    with pytest.raises(DataError, match=r"\[n, 1, 8, 8\]"):
        saelab.train(den, images[:, 0], **HOW)
    with pytest.raises(ConfigError, match="target_site goes with a language model"):
        saelab.train(den, images, **HOW, target_site="conv_in")
    with pytest.raises(ConfigError, match="context_length means nothing"):
        saelab.evaluate(sae, den, images, context_length=4)
    with pytest.warns(UserWarning, match="trained on split 'train'"):
        saelab.evaluate(sae, den, images, tokens=160, sparsity_tokens=100, split="train", progress=False)
    with pytest.warns(UserWarning, match="ends after 3 images"):
        saelab.evaluate(sae, den, images, sparsity_tokens=100, progress=False)


def test_latents_are_directions_and_have_a_page(den, sae, tmp_path):
    from saelab import hspace

    trajectory = hspace.sample(den, n=2, steps=3, progress=False)
    codes = hspace.latent_codes(sae, trajectory)
    assert torch.equal(codes.to_dense(), sae.encode(trajectory.h.permute(0, 1, 3, 4, 2).reshape(-1, 16)))
    latent = int(codes.indices[0])
    (direction,) = hspace.latent_directions(sae, [latent])
    added = direction.delta(trajectory.timesteps)
    torch.testing.assert_close(added[1, :, 2, 3], sae.W_dec[latent] * sae.latent_stats.max[latent])
    assert torch.equal(hspace.edit(den, trajectory, direction, strength=0.0).samples, trajectory.samples)
    hspace.show_latents(sae, trajectory, tmp_path / "page.html", latents=[latent])
    assert (tmp_path / "page.html").stat().st_size > 10_000
