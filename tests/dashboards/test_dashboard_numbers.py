"""Every number of a dashboard against the slow way: dense codes of a toy model, loops, and the quantisation of the format."""

from collections import Counter

import numpy as np
import pytest
import torch

import saelab
from saelab.dashboards.assembly import build
from saelab.dashboards.collecting import effects, weights
from saelab.dashboards.collecting.one_pass import TILE_TOKENS
from saelab.dashboards.collecting.priority import priorities
from saelab.dashboards.writing import codec
from saelab.dashboards.writing.chunks import PER_CHUNK
from tests.toy_dashboard import LENGTH, TEXTS, make_sae, oracle

TOKENS, WINDOWS, WINDOW = 6_000, 45, 12
HALF = {"rtol": 2**-10, "atol": 1e-6}


@pytest.fixture(scope="module", params=["blocks.1.hook_resid_post", "blocks.3.attn.hook_z"])
def made(request, tiny_llama, tmp_path_factory):
    """(sae, contexts, oracle, data): a page of every latent, effects and all."""
    sae, corpus = make_sae(tiny_llama, request.param), saelab.load_corpus(TEXTS)
    folder = tmp_path_factory.mktemp("page")
    page = build(
        sae, tiny_llama, corpus, folder / "page.html", tokens=TOKENS, windows=WINDOWS, window=WINDOW,
        prompts=["The state of the union \U0001f600"], evaluation=None, parquet=False, work=folder / "w", progress=False,
    )  # fmt: skip
    data = page.data
    contexts = corpus.contexts(tiny_llama, LENGTH)
    n = data.manifest["corpus"]["contexts"]
    return sae, contexts, oracle(tiny_llama, sae, contexts, n, TILE_TOKENS // LENGTH), data


@pytest.fixture
def page(made):
    """The only chunk of pages, its matrices [L, n], and ids instead of local tokens."""
    columns = dict(made[3]["f-00000"])
    assert len(columns["latent"]) == 48 <= PER_CHUNK
    ids = made[3].vocab["id"].astype(np.int64)
    for name in ("tok", "top", "bottom", "raw_top", "raw_bottom", "pool", "x_next", "x_up", "x_down"):
        if name in columns:
            local = columns[name]
            none = local == codec.none_of(local.dtype)
            columns[name] = np.where(none, -1, ids[np.where(none, 0, local)])
    for name, column in columns.items():
        if isinstance(column, np.ndarray) and name[:3] in (
            "tok",
            "top",
            "bot",
            "raw",
            "dec",
            "enc",
            "coa",
            "log",
            "hea",
        ):
            columns[name] = column.reshape(48, -1).squeeze()
    return columns


def windows_of(columns, latent):
    """(first, last) window of a latent."""
    edges = np.concatenate([[0], np.cumsum(columns["windows"], dtype=np.int64)])
    return range(edges[latent], edges[latent + 1])


def test_provenance(made, tiny_llama):
    sae, contexts, truth, data = made
    corpus = data.manifest["corpus"]
    described = data.manifest["saes"][0]
    assert (corpus["tokens"], corpus["counted"]) == (truth.ids.size, truth.counted.sum())
    assert data.manifest["model"]["digest"] == tiny_llama.digest
    fired = truth.acts > 0
    assert described["l0"] == fired.sum() / truth.counted.sum()
    assert described["silent"] == (fired.sum(0) == 0).sum() >= 1
    assert described["firings"] == fired.sum()


def test_explained_variance_against_the_evaluation_module(made, tiny_llama):
    sae, contexts, truth, data = made
    from saelab.evaluation.reconstruction import Reconstruction

    x = tiny_llama.record(contexts.ids[: truth.n_contexts].long(), sae.metadata["site"]).flatten(0, 1)[
        torch.from_numpy(truth.counted)
    ]
    part = Reconstruction(sae.d_in)
    with torch.no_grad():
        part.add(x, sae(x))
    assert data.manifest["saes"][0]["explained_variance"] == pytest.approx(part.explained_variance, abs=1e-5)


def test_neighbours_are_the_same_in_blocks(monkeypatch):
    table = torch.randn(50, 8, generator=torch.Generator().manual_seed(0))
    asked = np.array([3, 7, 40])
    whole = weights.neighbours(table, asked)
    monkeypatch.setattr(weights, "_CELLS", 60)  # a row at a time
    for one, other in zip(whole, weights.neighbours(table, asked), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-6)


def characteristic(truth, latent):
    """(token, share of its reads on which the latent fires times the mean there, four reads without it added), best first."""
    fired, reads = truth.acts[:, latent] > 0, Counter(truth.ids[truth.counted].tolist())
    total = {t: truth.acts[fired & (truth.ids == t), latent].sum(dtype=float) for t in set(truth.ids[fired].tolist())}
    return sorted(((t, sum_ / (reads[t] + 4)) for t, sum_ in total.items()), key=lambda item: (-item[1], item[0]))


def test_the_index(made):
    sae, _, truth, data = made
    index, more = data["idx-0"], data["idx-1"]
    fired = truth.acts > 0
    np.testing.assert_array_equal(index["count"], fired.sum(0))
    np.testing.assert_allclose(index["max"], truth.acts.max(0), **HALF)
    np.testing.assert_allclose(index["mean"], truth.acts.sum(0) / np.maximum(fired.sum(0), 1), **HALF)
    np.testing.assert_allclose(more["dec_norm"], sae.W_dec.detach().norm(dim=1), **HALF)
    unit = sae.W_dec.detach() / sae.W_dec.detach().norm(dim=1, keepdim=True)
    cosine = (unit @ unit.T).fill_diagonal_(-2)
    np.testing.assert_allclose(more["near_cos"], cosine.amax(1), atol=1e-3)
    np.testing.assert_allclose(
        cosine[torch.arange(48), torch.from_numpy(more["near"].astype(int))], cosine.amax(1), atol=1e-6
    )
    flags = index["flags"]
    assert (flags & 1).all()
    assert flags[4] & 8 and flags[5] & 8  # the two that are the same
    np.testing.assert_array_equal((flags & 2) > 0, fired.sum(0) == 0)
    np.testing.assert_array_equal((flags & 4) > 0, fired.sum(0) > 0.1 * truth.counted.sum())
    words = data.vocab["id"]
    for latent in range(48):
        ranked = characteristic(truth, latent)
        for j in range(3):
            stored = index[f"tok{j}"][latent]
            assert (words[stored] == ranked[j][0]) if j < len(ranked) else stored == 0xFFFF


def test_the_vocabulary(made, tiny_llama):
    _, _, truth, data = made
    read = Counter(truth.ids[truth.counted].tolist())
    assert [read[int(i)] for i in data.vocab["id"]] == data.vocab["count"].tolist()
    for i, word, flag in zip(data.vocab["id"].tolist(), data._words, data.vocab["flags"].tolist(), strict=True):
        if i < 256:
            decoded = tiny_llama.tokenizer.decode([i])
            assert word.decode("utf-8", "replace") == decoded
            assert bool(flag & 2) == (decoded == "\ufffd") and not flag & 1
        else:
            assert flag & 1 and word in (b"<|endoftext|>", b"<|pad|>")


def test_moments_and_histograms(made, page):
    _, _, truth, _ = made
    first = 0
    for latent in range(48):
        a = truth.acts[:, latent].astype(np.float64)
        a = a[a > 0]
        bins = page["hist_bins"][latent]
        hist = page["hist"][first : first + bins]
        first += bins
        assert page["count"][latent] == len(a) == hist.sum()
        if not len(a):
            assert np.isnan(page["mean"][latent]) and not bins
            continue
        found = Counter(int(np.floor(4 * np.log2(v) + 1e-12)) for v in a)
        assert {page["hist_first"][latent] + b: n for b, n in enumerate(hist.tolist()) if n} == found
        assert (page["max"][latent], page["min"][latent]) == (np.float32(a.max()), np.float32(a.min()))
        centred = a - a.mean()
        np.testing.assert_allclose(page["mean"][latent], a.mean(), rtol=1e-6)
        np.testing.assert_allclose(page["square"][latent], (a**2).sum() / truth.counted.sum(), rtol=1e-6)
        np.testing.assert_allclose(page["std"][latent], a.std(), rtol=1e-5, atol=1e-12)
        if len(a) > 2:
            np.testing.assert_allclose(page["skew"][latent], (centred**3).mean() / a.std() ** 3, rtol=1e-5, atol=1e-6)
            np.testing.assert_allclose(
                page["kurtosis"][latent], (centred**4).mean() / a.std() ** 4 - 3, rtol=1e-5, atol=1e-6
            )


def test_token_statistics(made, page):
    _, _, truth, data = made
    for latent in range(48):
        fired = truth.acts[:, latent] > 0
        times = Counter(truth.ids[fired].tolist())
        by_read = characteristic(truth, latent)
        ranked = [(t, times[t]) for t, _ in by_read[:10]]
        focus = by_read[0][1] / truth.acts[:, latent].max() if ranked else 0
        np.testing.assert_allclose(data["idx-0"]["focus"][latent], focus, rtol=2**-10, atol=1e-4)
        ranked += [(-1, 0)] * (10 - len(ranked))
        assert list(zip(page["tok"][latent].tolist(), page["tok_count"][latent].tolist(), strict=True)) == ranked
        assert page["tok_n"].ravel()[latent] == fired.sum()
        means = [truth.acts[fired & (truth.ids == t), latent].mean() if n else 0 for t, n in ranked]
        np.testing.assert_allclose(page["tok_mean"][latent], means, rtol=2**-10, atol=1e-4)


def lowest(truth, latent, rows, n):
    """The n rows of lowest priority, one a context."""
    ranked = sorted(rows, key=lambda row: int(priorities(0, np.array([latent]), np.array([row]))[0]))
    chosen = {}
    for row in ranked:
        chosen.setdefault(row // LENGTH, row)
    return set(list(chosen.values())[:n])


def test_which_examples_are_shown(made, page):
    _, _, truth, data = made
    groups = data.manifest["groups"]
    assert [g["kind"] for g in groups] == ["top"] + ["interval"] * 5 + ["quantile"] * 5 + ["random", "near"]
    start = page["context"].astype(np.int64) * LENGTH + page["start"]
    peak = start + page["peak"]
    for latent in range(48):
        mine = windows_of(page, latent)
        shown = {g: [int(peak[w]) for w in mine if page["group"][w] == g] for g in range(len(groups))}
        a = truth.acts[:, latent]
        by_context = a.reshape(-1, LENGTH)
        peaks = [(c * LENGTH + int(row.argmax()), row.max()) for c, row in enumerate(by_context) if row.max() > 0]
        best = [row for row, _ in sorted(peaks, key=lambda item: (-item[1], item[0]))[:15]]
        assert shown[0] == best
        rows = np.flatnonzero(a)
        if len(rows):
            ordered = np.sort(a[rows])
            edges = [ordered[min(-(-j * len(rows) // 5), len(rows) - 1)] for j in range(1, 5)]
            for g in range(1, 6):
                part = 5 - g
                inside = [r for r in rows if min(int(a[r] * (5 / float(a.max()))), 4) == part]
                assert set(shown[g]) == lowest(truth, latent, inside, 2)
            for g in range(6, 11):
                part = 10 - g
                inside = [r for r in rows if sum(a[r] >= e for e in edges) == part]
                assert set(shown[g]) == lowest(truth, latent, inside, 2)
        assert len({r // LENGTH for r in shown[11]}) == len(shown[11]) == 5
        assert truth.counted[shown[11]].all()
        for w in mine:
            if page["group"][w] == 12:
                assert a[peak[w]] == 0
                np.testing.assert_allclose(page["act"][w], truth.scores[peak[w], latent], rtol=1e-4, atol=1e-5)
            else:
                assert page["act"][w] == a[peak[w]]


def test_near_misses_are_the_largest_of_the_rows_looked_at(made, page):
    """One tile has one candidate a latent: the largest score where it stays silent, among 64 rows of lowest priority."""
    _, _, truth, data = made
    tile = TILE_TOKENS
    for latent in range(48):
        found = sorted(page["act"][w] for w in windows_of(page, latent) if page["group"][w] == 12)[::-1]
        candidates = []
        for base in range(0, truth.ids.size, tile):
            rows = base + np.flatnonzero(truth.counted[base : base + tile])
            looked = rows[np.argsort(priorities(0, np.zeros(len(rows)), rows), kind="stable")[:64]]
            silent = looked[truth.acts[looked, latent] == 0]
            candidates += [truth.scores[silent, latent].max()] if len(silent) else []
        np.testing.assert_allclose(found, sorted(candidates)[::-1][:5], rtol=1e-4, atol=1e-5)


def test_what_the_windows_show(made, page):
    _, contexts, truth, data = made
    miss = data["m-00000"]["miss"]
    starts = np.cumsum(page["length"], dtype=np.int64) - page["length"]
    documents = contexts.documents.flatten().numpy()
    owner = np.repeat(np.arange(48), page["windows"])
    seen = {}
    for w in range(len(owner)):
        rows = int(page["context"][w]) * LENGTH + int(page["start"][w]) + np.arange(page["length"][w])
        pooled = slice(page["offset"][w], page["offset"][w] + page["length"][w])
        np.testing.assert_array_equal(page["pool"][pooled], truth.ids[rows])
        np.testing.assert_array_equal(miss[pooled], truth.miss[rows])
        acts, scale = truth.acts[rows, owner[w]].astype(np.float64), float(page["scale"][owner[w]])
        stored = page["acts"][starts[w] : starts[w] + page["length"][w]]
        expected = np.where(acts > 0, np.clip(np.round(255 * acts / scale), 1, 255), 0) if scale else acts
        np.testing.assert_array_equal(stored, expected)
        document = documents[rows[page["peak"][w]]]
        assert page["document"][w] == (document if document >= 0 else 0xFFFFFFFF)
        tokens = (owner[w], *truth.ids[rows])
        assert page["repeat"][w] == (tokens in seen)
        seen[tokens] = w


def test_logits(made, page, tiny_llama):
    sae = made[0]
    model = tiny_llama.model
    d = sae.W_dec.detach()
    if sae.metadata["site"].endswith("hook_z"):
        d = d @ model.model.layers[3].self_attn.o_proj.weight.detach().T
    W_U = model.lm_head.weight.detach().T
    for prefix, gain in (("", model.model.norm.weight.detach()), ("raw_", 1.0)):
        logits = (d * gain) @ W_U
        logits = (logits - logits.mean(1, keepdim=True)).numpy()
        for name, sign in (("top", -1), ("bottom", 1)):
            best = np.argsort(sign * logits, axis=1)[:, :10]
            np.testing.assert_allclose(
                page[f"{prefix}{name}_value"], np.take_along_axis(logits, best, 1), rtol=1e-3, atol=1e-4
            )
            np.testing.assert_allclose(
                np.take_along_axis(logits, page[prefix + name], 1), np.take_along_axis(logits, best, 1), atol=1e-5
            )
        if not prefix:
            np.testing.assert_allclose(page["logit_lo"], logits.min(1), atol=1e-5)
            np.testing.assert_allclose(page["logit_hi"], logits.max(1), atol=1e-5)
            for row, hist in zip(logits, page["logit_hist"], strict=True):
                assert hist.sum() == len(row)
                counts = np.histogram(row, bins=40)[0]
                assert np.abs(np.cumsum(hist) - np.cumsum(counts)).max() <= 1  # a value on an edge


def test_weights_and_neighbours(made, page):
    sae = made[0]
    dec, enc = sae.W_dec.detach(), sae.W_enc.detach().T
    np.testing.assert_allclose(page["dec_norm"], dec.norm(dim=1), rtol=1e-6)
    np.testing.assert_allclose(page["enc_norm"], enc.norm(dim=1), rtol=1e-6)
    np.testing.assert_allclose(page["b_enc"], sae.b_enc.detach(), rtol=1e-6)
    unit = [w / w.norm(dim=1, keepdim=True) for w in (dec, enc)]
    np.testing.assert_allclose(page["enc_dec"], (unit[0] * unit[1]).sum(1), atol=1e-6)
    for name, u in zip(("dec", "enc"), unit, strict=True):
        cosine = (u @ u.T).fill_diagonal_(-2)
        np.testing.assert_allclose(page[name + "_cos"], cosine.topk(10).values, atol=1e-3)
        chosen = cosine.gather(1, torch.from_numpy(page[name + "_near"].astype(np.int64)))
        np.testing.assert_allclose(chosen, cosine.topk(10).values, atol=1e-6)


def test_coactivation(made, page):
    _, _, truth, data = made
    fires = (truth.acts.reshape(-1, LENGTH, 48) > 0).any(1)
    assert data.manifest["coactivation"]["contexts"] == len(fires)
    both = fires.T.astype(int) @ fires.astype(int)
    alone = fires.sum(0)
    np.testing.assert_array_equal(data["idx-1"]["contexts"], alone)
    np.testing.assert_array_equal(page["contexts"], alone)
    jaccard = both / np.maximum(alone[:, None] + alone[None] - both, 1)
    np.fill_diagonal(jaccard, -1)
    for latent in range(48):
        shown = page["coact"][latent].astype(np.int64)
        real = shown != 0xFFFFFFFF
        expected = np.sort(jaccard[latent])[::-1][:10]
        np.testing.assert_allclose(jaccard[latent, shown[real]], expected[expected > 0], rtol=1e-6)
        np.testing.assert_array_equal(page["coact_both"][latent][real], both[latent, shown[real]])
        np.testing.assert_array_equal(page["coact_contexts"][latent][real], alone[shown[real]])
        assert latent not in shown


def test_who_fires_first_in_a_context(made, page):
    """Of the contexts in which both fire: the other one earlier, later, and the mean lag; on the same token it is neither."""
    acts = made[2].acts.reshape(-1, LENGTH, 48) > 0
    first = np.where(acts.any(1), acts.argmax(1), -1)  # [contexts, latents]
    together = 0
    for latent in range(48):
        for rank, other in enumerate(page["coact"][latent].astype(np.int64)):
            if other == 0xFFFFFFFF:
                continue
            both = (first[:, latent] >= 0) & (first[:, other] >= 0)
            apart = first[both, latent] - first[both, other]
            together += int((apart == 0).sum())
            assert page["coact_before"][latent][rank] == (apart > 0).sum()
            assert page["coact_after"][latent][rank] == (apart < 0).sum()
            assert page["coact_lag"][latent][rank] == pytest.approx(apart.mean(), rel=2e-3, abs=1e-6)
    assert together > 100


def context_loss(lm, sae, contexts, context, push=None):
    """Summed loss of a context and its log-probabilities, `push` = (position, latent, activation) taken away."""

    def edit(x, where):
        x = x.clone().double()
        if push:
            x[0, push[0]] -= push[2] * sae.W_dec[push[1]].detach()
        return x.float()

    with lm.intervene(sae.metadata["site"], edit):
        log_p = lm.logits(contexts.ids[context][None].long())[0].double().log_softmax(-1)
    targets = contexts.ids[context, 1:, None].long()
    return float(-log_p[:-1].gather(1, targets).sum()), log_p


def test_first_order_effects_are_the_slope_of_real_ablations(made, page, tiny_llama):
    sae, contexts, truth, _ = made
    starts = np.cumsum(page["length"], dtype=np.int64) - page["length"]
    owner = np.repeat(np.arange(48), page["windows"])
    rng = np.random.default_rng(0)
    places = [
        (w, i)
        for w in range(len(owner))
        for i in np.flatnonzero(page["acts"][starts[w] : starts[w] + page["length"][w]])
    ]
    assert not page["effects"][page["acts"] == 0].any()
    for w, i in [places[j] for j in rng.choice(len(places), 12, replace=False)]:
        context, position = int(page["context"][w]), int(page["start"][w]) + int(i)
        a = float(truth.acts[context * LENGTH + position, owner[w]])
        step = 1e-2
        slope = sum(
            sign * context_loss(tiny_llama, sae, contexts, context, (position, owner[w], sign * step * a))[0]
            for sign in (1, -1)
        ) / (2 * step)
        stored = page["effects"][starts[w] + i] * float(page["effect_scale"][owner[w]]) / 127
        half_a_step = float(page["effect_scale"][owner[w]]) / 127 / 2
        assert stored == pytest.approx(slope, abs=half_a_step + 2e-3 * max(abs(slope), 0.02))


def test_full_effects_are_real_ablations(made, page, tiny_llama):
    sae, contexts, truth, data = made
    owner = np.repeat(np.arange(48), page["windows"])
    rows = np.flatnonzero(page["x_method"] == effects.FULL)
    assert len(rows) and data.manifest["saes"][0]["effects"]["n"] == len(rows)
    for x in rows[:: max(len(rows) // 8, 1)]:
        w = page["x_window"][x]
        context, position = int(page["context"][w]), int(page["start"][w]) + int(page["peak"][w])
        clean, p = context_loss(tiny_llama, sae, contexts, context)
        ablated, q = context_loss(tiny_llama, sae, contexts, context, (position, owner[w], float(page["act"][w])))
        assert page["x_loss"][x] == pytest.approx(ablated - clean, abs=2e-4)
        check_distribution(page, x, p[position], q[position], contexts.ids[context], position)


def check_distribution(page, x, p, q, ids, position):
    assert page["x_kl"][x] == pytest.approx(float((p.exp() * (p - q)).sum()), abs=2e-6)
    change = q.exp() - p.exp()
    up, down = page["x_up"].reshape(-1, 3)[x], page["x_down"].reshape(-1, 3)[x]
    np.testing.assert_allclose(change[up], change.topk(3).values, atol=1e-6)
    np.testing.assert_allclose(change[down], -(-change).topk(3).values, atol=1e-6)
    np.testing.assert_allclose(page["x_up_delta"].reshape(-1, 3)[x], change.topk(3).values, rtol=1e-3, atol=1e-6)
    if position + 1 < LENGTH:
        following = int(ids[position + 1])
        assert page["x_next"][x] == following
        np.testing.assert_allclose(
            [page["x_p"][x], page["x_p_ablated"][x]], [p[following].exp(), q[following].exp()], rtol=1e-3
        )
    else:
        assert page["x_next"][x] == -1 and np.isnan(page["x_p"][x])


def test_direct_effects_freeze_the_last_norm(made, page, tiny_llama):
    sae, contexts, truth, data = made
    direct = np.flatnonzero(page["x_method"] == effects.DIRECT)
    late = sae.metadata["site"].startswith("blocks.3")
    assert bool(len(direct)) == late
    assert data.manifest["saes"][0]["effects"]["mode"] == ("direct" if late else "first-order")
    model, owner = tiny_llama.model, np.repeat(np.arange(48), page["windows"])
    for x in direct[:: max(len(direct) // 6, 1)]:
        w = page["x_window"][x]
        context, position = int(page["context"][w]), int(page["start"][w]) + int(page["peak"][w])
        final = tiny_llama.record(contexts.ids[context][None].long(), "blocks.3.hook_resid_post")[0, position]
        rms = (final.square().mean() + model.config.rms_norm_eps).sqrt()
        d = model.model.layers[3].self_attn.o_proj.weight.detach() @ sae.W_dec[owner[w]].detach()
        normed = [(v / rms * model.model.norm.weight.detach()) @ model.lm_head.weight.detach().T
                  for v in (final, final - float(page["act"][w]) * d)]  # fmt: skip
        p, q = (logits.double().log_softmax(-1) for logits in normed)
        check_distribution(page, x, p, q, contexts.ids[context], position)
        if position + 1 < LENGTH:
            following = int(contexts.ids[context, position + 1])
            assert page["x_loss"][x] == pytest.approx(float(p[following] - q[following]), abs=1e-5)


def test_the_rank_correlation_printed(made, page):
    starts = np.cumsum(page["length"], dtype=np.int64) - page["length"]
    owner = np.repeat(np.arange(48), page["windows"])
    rows = np.flatnonzero(page["x_method"] == effects.FULL)
    w = page["x_window"][rows]
    estimate = page["effects"][starts[w] + page["peak"][w]] * page["effect_scale"][owner[w]] / 127
    printed = made[3].manifest["saes"][0]["effects"]["rank_correlation"]
    from scipy.stats import spearmanr

    assert printed == pytest.approx(spearmanr(estimate, page["x_loss"][rows]).statistic, abs=0.02)
    assert printed > 0.9


def test_the_prompt_page(made, tiny_llama):
    sae, _, truth, data = made
    columns = data["p-000"]
    tokens = tiny_llama.tokenize("The state of the union \U0001f600")
    assert data.vocab["id"][columns["token"]].tolist() == tokens.ids[0].tolist()
    log_p = tiny_llama.logits(tokens)[0].log_softmax(-1)
    expected = log_p[:-1].gather(1, tokens.ids[0, 1:, None])[:, 0]
    assert np.isnan(columns["logprob"][0])
    np.testing.assert_allclose(columns["logprob"][1:], expected, rtol=1e-3)
    x = tiny_llama.record(tokens, sae.metadata["site"])[0]
    dense = sae.encode(x).detach().numpy()
    assert columns["n"][0] == 0 and columns["miss"][0] == 255  # the first position is skipped
    at = 0
    for t in range(1, len(dense)):
        n = columns["n"][t]
        order = np.argsort(-dense[t], kind="stable")[: (dense[t] > 0).sum()]
        assert columns["latent"][at : at + n].tolist() == order.tolist()
        np.testing.assert_allclose(columns["act"][at : at + n], dense[t, order], rtol=1e-4)
        for latent, value, quantile in zip(
            order, columns["act"][at : at + n], columns["quantile"][at : at + n], strict=True
        ):
            firings = truth.acts[truth.acts[:, latent] > 0, latent]
            assert (
                np.isnan(quantile)
                if not len(firings)
                else quantile == pytest.approx((firings < value).mean(), abs=1e-3)
            )
        at += n
    losses = []
    for sign in (1, -1):

        def edit(v, where, sign=sign):
            v = v.clone()
            v[0, 5] -= (
                sign
                * 0.01
                * float(columns["act"][columns["n"][:5].sum()])
                * sae.W_dec[int(columns["latent"][columns["n"][:5].sum()])].detach()
            )
            return v

        with tiny_llama.intervene(sae.metadata["site"], edit):
            losses.append(float(tiny_llama.loss(tokens, "sum")))
    slope = (losses[0] - losses[1]) / 0.02
    assert columns["effect"][columns["n"][:5].sum()] == pytest.approx(slope, rel=0.03, abs=2e-3)


def test_the_inverted_index(made):
    data = made[3]
    columns, inverted = data["f-00000"], data["inv"]
    for name, source in (("acts", columns["tok"].reshape(48, 10)), ("logits", columns["top"].reshape(48, 10))):
        edges = np.concatenate([[0], np.cumsum(inverted[name + "_n"], dtype=np.int64)])
        for token in range(len(data.vocab["id"])):
            pages = np.flatnonzero((source == token).any(1))
            assert inverted[name][edges[token] : edges[token + 1]].tolist() == pages.tolist()
