"""SAEs of other libraries through everything: the statistics that they come without, and each tool once."""

import json
import math

import pytest
import torch
from safetensors.torch import save_file

import saelab
from saelab import ConfigError, DataError, SiteError, steering
from saelab.analysis import attention, dark_matter
from saelab.dashboards.assembly import build
from tests import tiny

STREAM, Z = "blocks.2.hook_resid_post", "blocks.2.attn.hook_z"
TEXTS = [f"{text} {number}" for number in range(40) for text in tiny.TEXTS]
D, F = 32, 48
QUIET = {"context_length": 32, "progress": False}


def rows(n, d=D, seed=0):
    made = torch.randn(n, d, generator=torch.Generator().manual_seed(seed))
    return made / made.norm(dim=1, keepdim=True)


def dictionary_learning(folder, threshold=0.02):
    """As its BatchTopK writes it."""
    folder.mkdir()
    weights = {
        "encoder.weight": rows(F), "encoder.bias": torch.full((F,), 0.001), "decoder.weight": rows(F).T.contiguous(),
        "b_dec": torch.full((D,), 0.002), "k": torch.tensor(4, dtype=torch.int32), "threshold": torch.tensor(threshold),
    }  # fmt: skip
    torch.save(weights, folder / "ae.pt")
    trainer = {
        "dict_class": "BatchTopKSAE",
        "k": 4,
        "layer": 2,
        "submodule_name": "resid_post_layer_2",
        "lm_name": "tiny",
    }
    (folder / "config.json").write_text(json.dumps({"trainer": trainer, "buffer": {"ctx_len": 32}}))
    return saelab.SAE.load(folder)


def sae_lens(folder, architecture="standard", site=STREAM, metadata=None, **more):
    """As SAELens 6 writes it."""
    folder.mkdir()
    weights = {
        "W_enc": rows(F).T.contiguous(),
        "b_enc": torch.full((F,), -0.005),
        "W_dec": rows(F),
        "b_dec": torch.zeros(D),
    }
    save_file(weights | {"threshold": torch.full((F,), 0.02)} if "jumprelu" in architecture else weights,
              folder / "sae_weights.safetensors")  # fmt: skip
    told = {"sae_lens_version": "6.54.0", "model_name": "tiny", "hook_name": site} | (metadata or {})
    config = {"architecture": architecture, "d_in": D, "d_sae": F, "metadata": told, **more}
    (folder / "cfg.json").write_text(json.dumps(config))
    return saelab.SAE.load(folder)


@pytest.fixture(scope="module")
def corpus():
    return saelab.load_corpus(TEXTS)


def recorded(lm, corpus, site, skip=1):
    """All rows that an SAE is for, by one dense pass."""
    contexts = corpus.contexts(lm, 32, "train")
    real = ~torch.isin(contexts.ids, torch.tensor(sorted(lm.special_ids)))
    real[:, :skip] = False
    x = lm.record(contexts.tokens(torch.arange(len(contexts))), site)
    return x[real[:, : x.shape[1]]]


def test_statistics_are_those_of_a_dense_pass(tiny_llama, corpus, tmp_path):
    sae = dictionary_learning(tmp_path / "sae")
    with pytest.raises(ConfigError, match="no activation statistics"):
        sae.latent_stats  # noqa: B018
    found = saelab.calibrate(sae, tiny_llama, corpus, tokens=10**6, **QUIET)
    x = recorded(tiny_llama, corpus, STREAM)
    codes, stats = sae.encode(x), found.latent_stats
    assert 0.5 < float((codes > 0).sum(1).float().mean()) < F / 2
    fires = (codes > 0).sum(0)
    torch.testing.assert_close(stats.max, codes.amax(0))
    torch.testing.assert_close(stats.mean, codes.sum(0) / fires.clamp(min=1))
    torch.testing.assert_close(stats.density, fires / len(x))
    torch.testing.assert_close(stats.std, (x @ sae.W_dec.T).std(0, correction=0), rtol=1e-4, atol=1e-4)
    assert found.metadata["median_norm"] == pytest.approx(float(x.norm(dim=1).median()))
    assert int(sae.state.stat_tokens) == 0 and found.W_dec.data_ptr() == sae.W_dec.data_ptr()
    found.save(tmp_path / "ours")
    assert torch.equal(saelab.SAE.load(tmp_path / "ours").latent_stats.max, stats.max)


def test_statistics_of_scaled_activations_are_in_their_own_units(tiny_llama, corpus, tmp_path):
    sae = dictionary_learning(tmp_path / "sae")
    sae.state.scale.fill_(0.25), sae.state.target_scale.fill_(0.25)
    found = saelab.calibrate(sae, tiny_llama, corpus, tokens=10**6, **QUIET)
    codes = sae.encode(recorded(tiny_llama, corpus, STREAM))
    assert float(codes.max()) > 0
    torch.testing.assert_close(found.latent_stats.max, codes.amax(0))
    torch.testing.assert_close(found.latent_stats.mean, codes.sum(0) / (codes > 0).sum(0).clamp(min=1))


def test_a_threshold_that_is_not_there_is_learnt(tiny_llama, corpus, tmp_path):
    sae = dictionary_learning(tmp_path / "sae", threshold=-1.0)
    assert not sae.cfg.usable(sae.state)
    found = saelab.calibrate(sae, tiny_llama, corpus, tokens=10**6, **QUIET)
    assert 2 < float(found.latent_stats.density.sum()) < 7  # k is 4; a quarter of the contexts set the cut


def test_what_cannot_be_measured_says_why(tiny_llama, corpus, tmp_path):
    sae = dictionary_learning(tmp_path / "sae")
    with pytest.raises(SiteError, match="32 wide"):
        saelab.calibrate(sae, tiny_llama, corpus, site="blocks.0.mlp.hook_post", **QUIET)
    with pytest.raises(DataError, match="no position"):
        saelab.calibrate(sae, tiny_llama, corpus, skip_positions=32, **QUIET)


def test_it_is_evaluated_spliced_and_steered(tiny_llama, corpus, tmp_path):
    sae = saelab.calibrate(sae_lens(tmp_path / "sae", "jumprelu"), tiny_llama, corpus, **QUIET)
    report = saelab.evaluate(sae, tiny_llama, corpus, tokens=64, sparsity_tokens=64, **QUIET)
    assert math.isfinite(report.delta_ce) and 0 < report.l0 < F
    x = tiny_llama.record(TEXTS[0], STREAM)
    with tiny_llama.splice(sae):
        spliced = tiny_llama.record(TEXTS[0], STREAM)
    torch.testing.assert_close(spliced[:, 1:], sae(x)[:, 1:])
    latent = int(sae.latent_stats.density.argmax())
    for unit in ("max_activation", "residual_norm", "std"):
        with tiny_llama.steer(steering.add(sae, latent, strength=2.0, unit=unit)) as receipt:
            tiny_llama.generate("The state", max_new_tokens=4, seed=0)
        assert receipt.to_pandas()["positions"].item() > 0


def test_it_has_a_dashboard(tiny_llama, corpus, tmp_path):
    sae = saelab.calibrate(dictionary_learning(tmp_path / "sae"), tiny_llama, corpus, **QUIET)
    page = build(sae, tiny_llama, corpus, tmp_path / "page.html", tokens=2_000, latents=4, evaluation=None, effects=None,
                 parquet=False, progress=False, work=tmp_path / "work")  # fmt: skip
    assert len(page.path.read_bytes()) > 10_000


def test_its_error_is_decomposed_and_it_is_trained_on(tiny_llama, corpus, tmp_path):
    sae = dictionary_learning(tmp_path / "sae")
    x = recorded(tiny_llama, corpus, STREAM)
    parts = dark_matter.decompose(sae, x, progress=False)
    torch.testing.assert_close(sum(parts.split(x)), x, rtol=1e-4, atol=1e-4)
    run = saelab.train(x, sae=sae, tokens=4_096, batch_size=256, lr=1e-3, max_norm=None, progress=False)
    before = (x - sae(x)).square().sum()
    assert (x - run.sae(x)).square().sum() < before
    plain = sae_lens(tmp_path / "plain")  # which learns no threshold: at a rate of almost 0 it stays what it was
    still = saelab.train(x, sae=plain, tokens=512, batch_size=256, lr=1e-12, max_norm=None, progress=False).sae
    torch.testing.assert_close(still(x), plain(x), rtol=1e-3, atol=1e-4)


def test_attention_is_traced_to_its_heads(tiny_llama, corpus, tmp_path):
    sae = saelab.calibrate(
        sae_lens(tmp_path / "sae", site=Z, reshape_activations="hook_z"), tiny_llama, corpus, **QUIET
    )
    assert sae.metadata["heads"] == [4, 8]
    shares = attention.head_attribution(sae)
    assert shares.shape == (F, 4) and torch.allclose(shares.sum(1), torch.ones(F))
    attribution = attention.direct_attribution(sae, tiny_llama, TEXTS[0], latent=3)
    assert attribution is not None
