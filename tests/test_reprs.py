"""What a notebook prints of each public object: short, with its size, and where it came from."""

import inspect

import pytest
import torch

import saelab
from saelab import dashboards, hspace, steering
from saelab.analysis import attention, dark_matter
from tests import tiny, toy_attention, toy_denoiser
from tests.toy_sweep import trained

SITE = "blocks.1.hook_resid_post"
QUIET = {"progress": False}
ROOMS = (saelab, steering, hspace, dashboards, attention, dark_matter)
ABSTRACT = {dark_matter.Family}  # a mapping of SAEs by their widths


def public() -> dict[type, str]:
    """Each public class that is no error, by its name."""
    found = {getattr(room, name): f"{room.__name__}.{name}" for room in ROOMS for name in room.__all__}
    return {
        one: name
        for one, name in found.items()
        if inspect.isclass(one) and not issubclass(one, BaseException) and one not in ABSTRACT
    }


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> dict[type, object]:
    """One of each public class, of a size at which a tensor or table printed whole would be too long."""
    folder = tmp_path_factory.mktemp("made")
    lm = saelab.load_model(tiny.llama_model(), tokenizer=tiny.byte_tokenizer(), device="cpu")
    sae, busy = trained(lm)
    corpus = saelab.load_corpus([f"It was so in {1800 + i}; the people know it well." for i in range(120)])
    x = torch.randn(6_000, 32)
    many = "The economy grew. " * 12
    run = saelab.train(x, sae=saelab.TopK(k=2, d_sae=16), tokens=256, batch_size=64, out=folder / "run", **QUIET)
    denoiser = toy_denoiser.denoiser()
    trajectory = hspace.sample(denoiser, n=12, steps=3, eta=1.0, **QUIET)
    directions = hspace.pca(trajectory, components=2)
    with lm.steer(*[steering.add(sae, latent, strength=1.0, unit="activation") for latent in busy * 20]) as receipt:
        lm.logits(many)
    z_sae = toy_attention.token_latents(1)
    copier = toy_attention.copier()
    widths = saelab.sweep(
        x, [saelab.TopK(k=2, d_sae=d) for d in (8, 16, 24, 32, 40)], tokens=256, batch_size=64, **QUIET
    )
    page = dashboards.build(
        sae,
        lm,
        corpus,
        folder / "page.html",
        latents=4,
        tokens=500,
        effects=None,
        evaluation=None,
        parquet=False,
        **QUIET,
    )
    buffer = saelab.ActivationBuffer(64, {"x": (32, torch.float32), "token": (0, torch.int32)}, seed=0)
    buffer.add({"x": x[:40], "token": torch.arange(40, dtype=torch.int32)})
    configurations = [
        saelab.TopK(k=2, d_sae=16), saelab.MutualChoice(k=2, d_sae=16), saelab.FeatureChoice(k=2, d_sae=16),
        saelab.ReLU(l1=1.0, d_sae=16), saelab.Gated(l1=1.0, d_sae=16), saelab.JumpReLU(target_l0=4, d_sae=16),
        saelab.Matryoshka(k=2, d_sae=16), saelab.LowRank(d_sae=16),
        saelab.MultiTopK(k=2, d_sae=16), saelab.GradientTopK(k=2, d_sae=16), saelab.Transcoder(of=saelab.TopK(k=2, d_sae=16)),
    ]  # fmt: skip
    sizes = [256, 512, 1024, 2048, 4096, 8192]
    fvu = 0.1 + 2 * torch.tensor(sizes, dtype=torch.float64) ** -0.5
    law = dark_matter.fit_power_law(sizes, fvu, fvu.expand(20, -1))
    objects = [
        *configurations, lm, sae, corpus, run, widths, denoiser, trajectory, directions, directions[0], receipt, page, buffer,
        saelab.harvest(lm, corpus, site=SITE, tokens=300, context_length=32, **QUIET), sae.encode_sparse(x),
        lm.tokenize([many]),
        saelab.evaluate(sae, lm, corpus, tokens=128, sparsity_tokens=128, **QUIET), saelab.QuickSelection(epochs=2),
        hspace.edit(denoiser, trajectory, directions[0]), hspace.Edit(directions[0]),
        hspace.effects(denoiser, trajectory, directions, strengths=(-1.0, 0.0, 1.0),
                       classifier=lambda images: images.flatten(1)[:, :7], **QUIET),
        steering.add(sae, busy[0], strength=2.0), steering.Scope(positions=list(range(2_000))),
        steering.Direction(torch.randn(576), site=SITE, name="a vector"), dashboards.Label("the word union", "by hand", 0.5),
        steering.sweep(lm, sae, latents=busy[:2], operations=["add"], strengths=[1.0], prompts=["So it", "It was"],
                       max_new_tokens=2, **QUIET),
        dark_matter.decompose(run.sae, x), dark_matter.planted_experiment(run.sae, x),
        attention.direct_attribution(z_sae, copier, torch.arange(12)[None] % 5, 0),
        attention.head_agreement(torch.rand(40, 3), torch.rand(40, 3), permutations=20),
        attention.latent_families(z_sae, copier, torch.arange(24).view(2, 12) % 5),
        attention.FeatureAttribution(0, torch.zeros(2), sae.encode_sparse(x), torch.zeros(9_000), *[torch.zeros(2, 900)] * 4,
                                     0.0, torch.zeros(2), torch.zeros(2, 900)),
        law, dark_matter.Scaling(2.0, law, dict.fromkeys(range(8, 16), 0.123456789), dict.fromkeys(range(8, 16), 0.1), -0.1,
                                 (-0.2, 0.0), -0.1, (-0.2, 0.0)),
    ]  # fmt: skip
    return {type(one): one for one in objects}


def test_reprs_are_short_and_say_the_size(made):
    for one, value in made.items():
        text = repr(value)
        assert len(text) < 2_000, f"{one}: {text[:300]}"
        assert "tensor(" not in text and "object at 0x" not in text, f"{one}: {text}"
        assert any(character.isdigit() for character in text), f"{one}: {text}"


def test_each_public_class_is_there(made):
    missing = [name for one, name in public().items() if one not in made]
    assert missing == []
