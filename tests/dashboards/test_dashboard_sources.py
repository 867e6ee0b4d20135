"""Where the peaks of attention latents come from, and which latents fire before which: against the slow way."""

import numpy as np
import pytest
import torch

import saelab
from saelab.analysis import attention
from saelab.dashboards.assembly import build
from saelab.dashboards.collecting import peak_sources as sources
from saelab.dashboards.collecting.one_pass import TILE_TOKENS
from tests.toy_attribution import eager_pattern, pre_activation
from tests.toy_dashboard import LENGTH, TEXTS, make_sae, oracle

SITE, BLOCK, HEADS, WIDTH = "blocks.2.attn.hook_z", 2, 4, 8
HALF = 2**-10


@pytest.fixture(scope="module")
def made(tiny_llama, tmp_path_factory):
    """(sae, contexts, data)"""
    sae, corpus = make_sae(tiny_llama, SITE, heads=[HEADS, WIDTH]), saelab.load_corpus(TEXTS)
    folder = tmp_path_factory.mktemp("page")
    page = build(
        sae, tiny_llama, corpus, folder / "page.html", tokens=3_000, window=12, effects=None, evaluation=None, parquet=False,
        work=folder / "work", progress=False,
    )  # fmt: skip
    return sae, corpus.contexts(tiny_llama, LENGTH), page.data


def dense_parts(lm, sae, ids, latent):
    """[heads, destination, source] of one context, from the eager pattern and the values of every query head."""
    pattern = eager_pattern(lm.model, ids[None], BLOCK)[0]
    values = []
    projection = lm.model.model.layers[BLOCK].self_attn.v_proj
    handle = projection.register_forward_hook(lambda module, inputs, output: values.append(output[0]))
    try:
        lm.logits(ids[None])
    finally:
        handle.remove()
    v = values[0].detach().view(LENGTH, -1, WIDTH).repeat_interleave(2, 1)  # two query heads a key-value head
    read = torch.einsum("she,he->hs", v, sae.W_enc.detach()[:, latent].view(HEADS, WIDTH))
    return pattern * read[:, None]


def test_sources_of_the_peaks(made, tiny_llama):
    sae, contexts, data = made
    page = data["f-00000"]
    owner = np.repeat(page["latent"], page["windows"]).astype(int)
    row = page["context"].astype(int) * LENGTH + page["start"] + page["peak"]
    ends = np.cumsum(page["dfa_n"], dtype=np.int64)
    assert page["dfa_n"].max() == sources.N
    np.testing.assert_array_equal(page["dfa_n"] == 0, page["act"] == 0)
    for w in np.flatnonzero(page["dfa_n"])[::37]:
        mine = slice(ends[w] - page["dfa_n"][w], ends[w])
        context, position = divmod(int(row[w]), LENGTH)
        ids = contexts.ids[context].long()
        parts = dense_parts(tiny_llama, sae, ids, owner[w])[:, position]
        summed = parts.sum(0)
        expected = summed.abs().sort(descending=True).values[: sources.N]
        from_start = position - page["dfa_back"][mine].astype(int)
        scale = float(np.abs(page["dfa"]).max())
        np.testing.assert_allclose(
            np.abs(page["dfa"][mine]), expected[: page["dfa_n"][w]], atol=HALF * scale, rtol=HALF
        )
        np.testing.assert_allclose(page["dfa"][mine], summed[from_start], atol=HALF * scale, rtol=HALF)
        signed = (parts * summed.sign())[:, from_start]
        chosen = signed.gather(0, torch.from_numpy(page["dfa_head"][mine].astype(np.int64))[None])[0]
        np.testing.assert_allclose(chosen, signed.amax(0), atol=1e-6)
        # all sources and the bias are the pre-activation, which the window has
        bias = float(pre_activation(sae, torch.zeros(1, HEADS * WIDTH), owner[w]))
        assert float(summed.sum()) + bias == pytest.approx(float(page["act"][w]), abs=1e-5)


def test_one_pass_up_to_the_layer_for_all_latents(made, tiny_llama):
    sae, contexts, data = made
    page = data["f-00000"]
    peaks = np.flatnonzero(page["act"])
    row = (page["context"].astype(int) * LENGTH + page["start"] + page["peak"])[peaks]
    places = sources.Places(np.repeat(page["latent"], page["windows"])[peaks].astype(int), row, page["act"][peaks])
    seen: dict[int, list[int]] = {2: [], 3: []}
    layers = tiny_llama.model.model.layers
    handles = [layers[i].register_forward_pre_hook(lambda m, args, i=i: seen[i].append(len(args[0]))) for i in seen]
    try:
        sources.sources(tiny_llama, sae, BLOCK, contexts, places, progress=False)
    finally:
        for handle in handles:
            handle.remove()
    assert sum(seen[BLOCK]) == len(np.unique(row // LENGTH)) and not seen[BLOCK + 1]


def test_head_shares_are_those_of_the_analysis(made):
    sae, _, data = made
    shares = data["f-00000"]["heads"].reshape(-1, HEADS)
    np.testing.assert_allclose(shares, attention.head_attribution(sae), atol=1e-3)
    norms = sae.W_dec.detach().view(-1, HEADS, WIDTH).norm(dim=2)
    np.testing.assert_allclose(shares, norms / norms.sum(1, keepdim=True), atol=1e-3)


def test_other_sites_have_no_sources(tiny_llama):
    for name in ("blocks.1.hook_resid_post", "blocks.1.hook_attn_out", "blocks.1.mlp.hook_post"):
        assert sources.block_of(tiny_llama, tiny_llama.site(name)) is None
    assert sources.block_of(tiny_llama, tiny_llama.site("blocks.3.attn.hook_z")) == 3


def test_attention_that_shows_no_pattern_costs_the_sources_only(tiny_llama, tmp_path, monkeypatch):
    def unknown(*_):
        raise saelab.ConfigError("the attention of block 2 gives no weights")

    monkeypatch.setattr(sources.frozen, "read", unknown)
    options = {"evaluation": None, "parquet": False, "effects": None, "progress": False, "work": tmp_path / "work"}
    with pytest.warns(UserWarning, match="where attention reads from: the attention of block 2 gives no weights"):
        page = build(
            make_sae(tiny_llama, SITE),
            tiny_llama,
            saelab.load_corpus(TEXTS),
            tmp_path / "a.html",
            tokens=500,
            **options,
        )
    assert "dfa_n" not in page.data["f-00000"] and "heads" in page.data["f-00000"]


def test_which_of_two_latents_fires_before(made, tiny_llama):
    sae, contexts, data = made
    page = data["f-00000"]
    n = data.manifest["corpus"]["contexts"]
    fires = oracle(tiny_llama, sae, contexts, n, TILE_TOKENS // LENGTH).acts.reshape(n, LENGTH, -1) > 0
    first = np.where(fires.any(1), fires.argmax(1), -1)
    columns = [page[f"coact{name}"].reshape(48, 10) for name in ("", "_both", "_before", "_after", "_lag")]
    for latent in range(48):
        for other, both, before, after, lag in zip(*(column[latent] for column in columns), strict=True):
            if other == 0xFFFFFFFF:
                assert both == before == after == 0 and np.isnan(lag)
                continue
            shared = (first[:, latent] >= 0) & (first[:, other] >= 0)
            apart = (first[:, latent] - first[:, other])[shared]
            assert (both, before, after) == (len(apart), (apart > 0).sum(), (apart < 0).sum())
            assert lag == pytest.approx(apart.mean(), rel=HALF, abs=1e-6)
