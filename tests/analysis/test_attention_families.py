"""Families of latents on the hand-made model, where each latent's sources are known, and scores against a dense count."""

import numpy as np
import pytest
import torch

import saelab
from saelab import cli
from saelab.analysis import attention
from saelab.analysis.attention.families_of_latents import FAMILIES, latent_families
from tests import tiny, toy_attention


@pytest.fixture(scope="module")
def copier():
    return toy_attention.copier()


@pytest.fixture(scope="module")
def corpus():
    """20 texts of 30 tokens of 15, so that tokens come again; the first is another, which the induction head rests on."""
    ids = torch.randint(0, 15, (20, 30), generator=torch.Generator().manual_seed(0))
    ids[:, 0] = 20
    return saelab.load_corpus(ids)


def families(lm, corpus, block, **options):
    options = {"split": "all", "progress": False, **options}
    return latent_families(toy_attention.token_latents(block), lm, corpus, **options)


def test_latents_of_the_first_block_are_previous_token_ones(copier, corpus):
    found = families(copier, corpus, 0)
    assert set(found.labels) == {"previous token"} and found.tested == 16
    assert found.table.previous_token.min() > 0.99
    # latent i fires where the token before is i, and its source is that token
    assert (found.table.top_token == found.table.index).all() and (found.table.top_token_share == 1).all()


def test_latents_of_the_second_block_are_induction_ones(copier, corpus):
    found = families(copier, corpus, 1)
    ids = found.ids
    for f in found.firings.itertuples():
        assert ids[f.context, f.source] == f.latent  # the token that came after is what is written
    context, t, source = (found.firings[name].to_numpy().copy() for name in ("context", "destination", "source"))
    earlier = np.array([bool((ids[c, :d] == ids[c, d]).any()) for c, d in zip(context, t, strict=True)])
    twice = (
        ids[context, t] == ids[context, t - 1]
    ).numpy()  # running: then the token after the copy is the current one
    assert (found.firings.induction[earlier & ~twice & (source > 0)] > 0.99).all()
    # without any earlier copy the head reads the first position
    assert (found.firings.first_position[~earlier] > 0.99).all()
    assert found.labels[20] == "first position" and (found.labels.drop(20) == "induction").all() and found.tested == 16
    assert found.counts()["induction"] == (found.labels == "induction").sum() and found.counts().sum() == len(
        found.table
    )


def test_shuffled_text_keeps_what_needs_no_order(copier, corpus):
    found = families(copier, corpus, 0, shuffled=True)
    assert set(found.labels) == {"previous token"}
    for mine, theirs in zip(found.ids, families(copier, corpus, 0).ids, strict=True):
        assert torch.equal(mine.sort().values, theirs.sort().values) and not torch.equal(mine, theirs)


def test_matching_by_chance_is_rarer_than_matching(copier, corpus):
    found = families(copier, corpus, 1)
    assert found.table.induction_chance.mean() < 0.5 * found.table.induction.mean()
    assert found.matched_by_chance() < 0.1
    with pytest.raises(saelab.ConfigError, match="matches no tokens"):
        found.matched_by_chance("previous token")


def test_scores_are_those_of_the_dense_attribution(tiny_llama):
    sae = saelab.SAE(saelab.TopK(k=3, d_sae=12), 32, {"site": "blocks.2.attn.hook_z", "heads": [4, 8]}, seed=2)
    corpus = saelab.load_corpus(torch.randint(0, 20, (2, 24)))
    found = latent_families(sae, tiny_llama, corpus, split="all", progress=False)
    ids = found.ids
    codes = sae.encode(tiny_llama.record(ids, "blocks.2.attn.hook_z")).detach()
    codes[:, 0] = 0
    latent = int(codes.count_nonzero(dim=(0, 1)).argmax())
    by_source = attention.direct_attribution(sae, tiny_llama, ids, latent).by_source.clamp(min=0)
    total, weights = (
        dict.fromkeys(("induction", "duplicate", "previous_token", "local", "entropy", "follows"), 0.0),
        0.0,
    )
    firings = codes[..., latent].nonzero().tolist()
    for b, t in firings:
        share = by_source[b, t] / by_source[b, t].sum()
        f = float(codes[b, t, latent])
        weights += f
        for s in range(t + 1):
            if s < t and s > 0 and ids[b, s - 1] == ids[b, t]:
                total["induction"] += f * float(share[s])
            if s < t and ids[b, s] == ids[b, t]:
                total["duplicate"] += f * float(share[s])
            if s == t - 1:
                total["previous_token"] += f * float(share[s])
            if t - s <= 8:
                total["local"] += f * float(share[s])
        total["entropy"] += f * float(torch.special.entr(share).sum().exp())
        total["follows"] += [b, t + 1] in firings
    row = found.table.loc[latent]
    assert row.firings == len(firings)
    for name in ("induction", "duplicate", "previous_token", "local"):
        assert row[name] == pytest.approx(total[name] / weights, abs=1e-5)
    assert row.effective_sources == pytest.approx(total["entropy"] / weights, rel=1e-4)
    assert row.persistence == pytest.approx(total["follows"] / len(firings))


def test_every_eligible_firing_is_counted(tiny_llama):
    sae = saelab.SAE(saelab.TopK(k=3, d_sae=12), 32, {"site": "blocks.1.attn.hook_z", "heads": [4, 8]}, seed=2)
    corpus = saelab.load_corpus(torch.randint(0, 20, (3, 16)))
    found = latent_families(sae, tiny_llama, corpus, split="all", progress=False)
    codes = sae.encode(tiny_llama.record(found.ids, "blocks.1.attn.hook_z"))[:, 1:].detach()
    assert len(found.firings) == codes.count_nonzero() == found.table.firings.sum()
    assert found.firings.activation.sum() == pytest.approx(float(codes.sum()), rel=1e-5)


def test_examples_show_the_sources(copier, corpus):
    found = families(copier, corpus, 0)
    latent = int(found.table.index[0])
    table = found.examples(latent, k=4)
    assert len(table) == 4 and table.activation.is_monotonic_decreasing
    assert (table.source_token == str(latent)).all() and (table.destination - table.source == 1).all()
    assert list(table.text.str[-1]) == list(table.token.str[-1])


def test_what_cannot_work_is_refused(copier, tiny_llama, corpus):
    sae = toy_attention.token_latents(0)
    with pytest.raises(saelab.ConfigError, match="tokens=0"):
        latent_families(sae, copier, corpus, tokens=0)
    with pytest.raises(saelab.SaelabError):
        latent_families(sae, tiny_llama, corpus)
    with torch.no_grad():
        sae.encoder_bias.fill_(-1e9)
    with pytest.raises(saelab.DataError, match="no latent fires"):
        latent_families(sae, copier, corpus, split="all", progress=False)


def test_families_are_named_in_order():
    assert FAMILIES[-1] == "too few firings" and len(set(FAMILIES)) == 10


def test_analyze_from_the_command_line(tmp_path, capsys):
    tiny.llama_model().save_pretrained(tmp_path / "model")
    tiny.byte_tokenizer().save_pretrained(tmp_path / "model")
    (tmp_path / "text.txt").write_text("\n\n".join(f"{n}. {text}" for n in range(20) for text in tiny.TEXTS))
    metadata = {"site": "blocks.2.attn.hook_z", "heads": [4, 8], "context_length": 32}
    metadata |= {"model": str(tmp_path / "model"), "corpus": str(tmp_path / "text.txt")}
    saelab.SAE(saelab.TopK(k=2, d_sae=16), 32, metadata).save(tmp_path / "sae")
    sizes = ["--tokens", "200", "--latents", "3", "--csv", str(tmp_path / "table.csv")]
    assert cli.main(["analyze", "attention", str(tmp_path / "sae"), *sizes]) == 0
    printed = capsys.readouterr().out
    assert "by family" in printed and "Latent 3" in printed
    header, *rows = (tmp_path / "table.csv").read_text().splitlines()
    assert {"family", "head", "induction"} <= set(header.split(",")) and len(rows) > 5
    saelab.SAE(saelab.TopK(k=2, d_sae=16), 32, metadata | {"site": "blocks.2.hook_resid_post"}).save(tmp_path / "other")
    assert cli.main(["analyze", "attention", str(tmp_path / "other")]) == 2
