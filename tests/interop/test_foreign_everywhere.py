"""SAEs of other libraries through all that saelab does with one: a model of width 6, which is that of the golden files."""

from pathlib import Path

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

import saelab
from saelab import SAE, ConfigError, steering
from saelab.analysis import attention, dark_matter, pursuit
from saelab.autoencoders.token_norm import sizes
from saelab.steering.harness import EVERYWHERE
from tests import tiny

GOLDEN = Path(__file__).parent / "golden"
SITE = "blocks.1.hook_resid_post"
BY_TOKEN = ["sae-lens/topk_layer_norm", "sae-lens/jumprelu_layer_norm", "sae-lens/gated_constant_norm_rescale"]
SAES = [
    "sae-lens/jumprelu", "sae-lens/matryoshka", "dictionary-learning/BatchTopKSAE/trainer_0",
    "dictionary-learning/GatedAutoEncoder/trainer_0", "sparsify/sae/layers.1", *BY_TOKEN,
]  # fmt: skip
every_sae = pytest.mark.parametrize("name", SAES)
normalised = pytest.mark.parametrize("name", BY_TOKEN)


@pytest.fixture(scope="module")
def lm():
    """Two heads of three, as the golden SAE of `hook_z` has them."""
    config = GPT2Config(
        vocab_size=258, n_embd=6, n_layer=3, n_head=2, n_positions=64, bos_token_id=256, eos_token_id=256
    )
    torch.manual_seed(0)
    model = GPT2LMHeadModel(config).eval()
    with torch.no_grad():
        model.transformer.wte.weight.mul_(40)  # vectors of about the size of the golden ones
    return saelab.load_model(model, tokenizer=tiny.byte_tokenizer(), device="cpu")


@pytest.fixture(scope="module")
def ids():
    return torch.randint(256, (40, 32), generator=torch.Generator().manual_seed(0))


def foreign(name, site=SITE):
    sae = SAE.load(GOLDEN / name)
    sae.metadata |= {"site": site, "prepend_bos": False, "context_length": 32}
    return sae


@every_sae
def test_it_is_evaluated(lm, ids, name):
    sae = foreign(name)
    report = saelab.evaluate(sae, lm, ids, tokens=1280, sparsity_tokens=1280, split="all", progress=False)
    x = lm.record(ids, SITE)[:, 1:].flatten(0, 1)
    missed = (x - sae(x)).square().sum() / (x - x.mean(0)).square().sum()
    assert report.fvu == pytest.approx(float(missed), rel=1e-4)
    assert report.l0 == pytest.approx(float((sae.encode(x) > 0).sum(1).float().mean()), rel=1e-4)


@every_sae
def test_it_is_spliced_and_edited(lm, ids, name):
    sae, rows = foreign(name), ids[:2]

    def replaced(x, where):
        return torch.cat([x[:, :1], sae(x[:, 1:])], 1)

    with lm.intervene(SITE, replaced):
        expected = lm.logits(rows)
    with lm.splice(sae):
        torch.testing.assert_close(lm.logits(rows), expected, rtol=1e-4, atol=1e-4)

    def without_3(x, where):
        codes = sae.encode(x[:, 1:])
        codes[..., 3] = 0
        kept = x[:, 1:]
        return torch.cat([x[:, :1], kept + sae.decode(codes, kept) - sae(kept)], 1)

    def ablated(codes):
        return codes.with_values(torch.where(codes.indices == 3, 0.0, codes.values))

    with lm.intervene(SITE, without_3):
        expected = lm.logits(rows)
    with lm.splice(sae, error_term=True, edit=ablated):
        torch.testing.assert_close(lm.logits(rows), expected, rtol=1e-4, atol=1e-4)


@every_sae
@pytest.mark.parametrize("unit", ["activation", "max_activation", "residual_norm", "std"])
def test_it_is_calibrated_and_steers(lm, ids, name, unit):
    sae = saelab.calibrate(foreign(name), lm, ids, tokens=512, progress=False)
    latent = int(sae.state.fires.argmax())
    plain, d = lm.record(ids[:2], SITE), sae.W_dec[latent]
    h, a = plain[:, 1:], sae.encode(plain[:, 1:])[..., latent, None]
    size = sizes(h, sae.cfg.input_scale) if sae.cfg.per_token else 1.0
    worth = 1.0 if unit == "residual_norm" else size
    u = steering.unit_size(steering.add(sae, latent, strength=1.0, unit=unit))
    expected = {
        steering.add: h + 0.3 * u * worth * d, steering.clamp: h + (0.3 * u * worth - a * size) * d,
        steering.scale: h + (0.3 - 1) * a * size * d, steering.ablate: h - a * size * d,
    }  # fmt: skip
    for operation, wanted in expected.items():
        how = {"strength": 0.3} if operation is not steering.ablate else {}
        how |= {"unit": unit} if operation in (steering.add, steering.clamp) else {}
        with lm.steer(operation(sae, latent, **how)):
            torch.testing.assert_close(lm.record(ids[:2], SITE)[:, 1:], wanted, rtol=1e-4, atol=1e-4)


def test_statistics_are_those_of_the_codes(lm, ids):
    sae = saelab.calibrate(foreign(BY_TOKEN[0]), lm, ids, tokens=1280, split="all", progress=False)
    x = lm.record(ids, SITE)[:, 1:].flatten(0, 1)
    codes, seen = sae.encode(x), sae.scaled(x)
    torch.testing.assert_close(sae.latent_stats.max, codes.amax(0))
    along = seen @ (sae.W_dec / sae.W_dec.norm(dim=1, keepdim=True)).T
    torch.testing.assert_close(sae.latent_stats.std, along.std(0, correction=0), rtol=1e-4, atol=1e-5)


@every_sae
def test_a_sweep_steers_with_it(lm, ids, name):
    sae = saelab.calibrate(foreign(name), lm, ids, tokens=512, progress=False)
    latent = int(sae.state.fires.argmax())
    table = steering.sweep(
        lm, sae, [latent], ["add", "ablate"], [0.5], ids[:2, :8], max_new_tokens=2, baselines=("none",), progress=False
    ).to_pandas()
    assert set(table["operation"]) >= {"add", "ablate"} and bool((table["kl_text"].dropna() >= 0).all())


@every_sae
def test_its_dark_matter_is_taken_apart(lm, ids, name):
    sae, x = foreign(name), lm.record(ids, SITE)[:, 1:].flatten(0, 1)
    parts = dark_matter.decompose(sae, x, progress=False)
    torch.testing.assert_close(sum(parts.split(x)), x, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(parts.split(x)[0], sae(x), rtol=1e-5, atol=1e-5)
    found = pursuit.support_least_squares(sae, x[:64])
    missed = [(x[:64] - sae.decode(codes, x[:64])).square().sum(1) for codes in (found, sae.encode_sparse(x[:64]))]
    assert bool((missed[0] <= missed[1] + 1e-3).all())


@every_sae
def test_a_dashboard_shows_it(lm, ids, name, tmp_path):
    sae = saelab.calibrate(foreign(name), lm, ids, tokens=512, progress=False)
    how = {"latents": 3, "tokens": 512, "evaluation": None, "parquet": False, "progress": False, "split": "all"}
    page = saelab.dashboards.build(sae, lm, ids, tmp_path / "page.html", effects=None, **how)
    assert page.path.stat().st_size > 10_000
    if sae.cfg.per_token:
        with pytest.raises(ConfigError, match="give effects=None"):
            saelab.dashboards.build(sae, lm, ids, tmp_path / "other.html", effects="direct", **how)


@every_sae
def test_training_goes_on_with_it(lm, ids, name):
    sae, x = foreign(name), lm.record(ids, SITE)[:, 1:].flatten(0, 1)
    how = {"batch_size": 256, "max_norm": None, "progress": False}
    first = saelab.sweep(x, [sae], tokens=512, lr=1e-9, **how)[0].sae
    torch.testing.assert_close(first.W_dec, sae.W_dec, rtol=1e-5, atol=1e-5)  # rows keep the lengths that they have
    run, other = saelab.sweep(x, [sae, saelab.TopK(k=4, d_sae=20)], tokens=8_192, **how)
    trained = run.sae
    missed = [float((x - one(x)).square().sum() / (x - x.mean(0)).square().sum()) for one in (sae, trained)]
    assert trained.cfg == sae.cfg and missed[1] < missed[0] and other.sae.d_in == 6


@pytest.mark.parametrize("name", ["sae-lens/hook_z"])
def test_an_attention_sae_is_attributed_to_heads(lm, ids, name):
    sae = saelab.calibrate(foreign(name, "blocks.1.attn.hook_z"), lm, ids, tokens=512, progress=False)
    torch.testing.assert_close(attention.head_attribution(sae).sum(1), torch.ones(20))
    latent = int(sae.state.fires.argmax())
    found = attention.direct_attribution(sae, lm, ids[:2], latent=latent)
    z = lm.record(ids[:2], "blocks.1.attn.hook_z")
    expected = (z - sae.b_dec) @ sae.W_enc[:, latent] + sae.b_enc[latent]
    torch.testing.assert_close(found.pre_activation, expected.to(found.pre_activation), rtol=1e-4, atol=1e-4)


@normalised
def test_what_is_normalised_has_no_attribution_and_no_other_format(lm, ids, name, tmp_path):
    sae = foreign(name, "blocks.1.attn.hook_z")
    sae.metadata["heads"] = [2, 3]
    with pytest.raises(ConfigError, match="not linear in the vector"):
        attention.direct_attribution(sae, lm, ids[:2], latent=3)
    with pytest.raises(ConfigError, match=r"give decode\(codes, x\)"):
        sae.decode(sae.encode(torch.randn(2, 6)))
    for format in ("dictionary_learning", "sparsify", "circuit-tracer"):
        with pytest.raises(ConfigError, match="normalised one by one"):
            sae.save(tmp_path / format, format)
    with pytest.raises(ConfigError, match="residual_norm"):
        sae.metadata["site"] = SITE
        added = steering.add(sae, 3, strength=1.0, unit="activation", scope=EVERYWHERE)
        steering.to_lm_eval(lm, added, tmp_path / "steer.pt")


@normalised
def test_its_derivatives_are_those_of_the_composition(name):
    sae = foreign(name).double()
    x = torch.randn(3, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(2), requires_grad=True)
    assert torch.autograd.gradcheck(sae, x, eps=1e-7, atol=1e-4)


@normalised
def test_a_vector_of_zeros_is_finite(name):
    sae = foreign(name)
    assert bool(sae(torch.zeros(1, 6)).isfinite().all())
