"""The size of a page made from real text by the bundled model."""

import numpy as np
import pytest

import saelab
from saelab.dashboards.assembly import build
from saelab.dashboards.collecting import effects
from saelab.dashboards.writing import bundle

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("site", ["blocks.0.hook_resid_post", "blocks.0.attn.hook_z"])
def test_bytes_a_latent(smollm2, tmp_path, monkeypatch, site):
    """45 windows of 48 tokens with effects, real text: at most 6 kB a latent, everything but the shell counted; with the
    sources of attention latents and direct effects too."""
    corpus = saelab.load_corpus("sotu")
    sae = saelab.SAE(saelab.TopK(k=32, d_sae=1024), 576, {"site": site, "context_length": 256}, seed=0)
    rng = np.random.default_rng(0)

    def changes(n):  # what does not compress
        ids = [rng.integers(0, 49_152, (n, effects.CHANGES)) for _ in range(2)]
        wide = [rng.normal(size=(n, effects.CHANGES)) for _ in range(2)]
        loss, kl, p, ablated = rng.random((4, n))
        return effects.Changes(loss, kl, rng.integers(0, 49_152, n), p, ablated, ids[0], wide[0], ids[1], wide[1])

    def noise(lm, sae, site, contexts, shown, in_full, directly, path, progress):
        return rng.normal(size=len(shown)), changes(len(in_full)), changes(len(directly))

    monkeypatch.setattr(effects, "explain", noise)
    page = build(
        sae, smollm2, corpus, tmp_path / "a.html", tokens=40_000, latents=128, evaluation=None, parquet=False,
        work=tmp_path / "work", progress=False,
    )  # fmt: skip
    manifest, containers = bundle.read(page.path)
    inline = sum(-(-manifest["chunks"][name][1] // 3) * 4 for name in containers)
    assert (manifest["settings"]["windows"], manifest["settings"]["window"]) == (45, 48)
    assert inline / 128 <= 6_000
