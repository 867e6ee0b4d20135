"""Directions from texts, latents for texts, and steering on the bundled model."""

import pytest
import torch

import saelab
from saelab import steering
from saelab.base.errors import ConfigError, DataError, SiteError
from saelab.models.generation import generate_ids
from saelab.steering import Scope
from tests.toy_steering import PROMPTS, SITE, TEXTS, busy, doubles, sae_of


@pytest.fixture(scope="module")
def lm():
    return doubles()[0]


@pytest.fixture(scope="module")
def sae(lm):
    return sae_of(lm)


POSITIVE, NEGATIVE = ["I love this", "what a day<|endoftext|>", "so good!"], ["I hate this", "awful"]


def test_difference_of_means(lm):
    """By hand: the last ordinary token of each text, or the mean over its ordinary tokens."""

    def by_hand(texts, at):
        vectors = []
        for text in texts:
            ids = lm.tokenize(text).ids[0]
            x = lm.record(text, SITE)[0]
            rows = x[[i for i in range(1, len(ids)) if ids[i] != 256]]
            vectors.append(rows[-1] if at == "last" else rows.mean(0))
        return torch.stack(vectors).mean(0)

    for at in ("last", "mean"):
        found = steering.difference(lm, POSITIVE, NEGATIVE, SITE, at=at, name="warm")
        torch.testing.assert_close(found.vector, by_hand(POSITIVE, at) - by_hand(NEGATIVE, at))
        assert (found.name, found.site) == ("warm", SITE)
    tokens = lm.tokenize(POSITIVE)
    again = steering.difference(lm, tokens, NEGATIVE, "blocks.1.hook_out", at="mean")
    assert torch.equal(again.vector, found.vector) and again.site == SITE


def test_figures_of_a_direction(lm):
    vector = torch.randn(32, dtype=torch.float64)
    found = steering.measured(steering.Direction(vector, SITE), lm, POSITIVE)
    tokens = lm.tokenize(POSITIVE)
    mask = tokens.mask & (tokens.ids != 256)
    mask[:, 0] = False
    rows = lm.record(tokens, SITE)[mask]
    along = rows @ vector / vector.norm()
    assert found.residual_norm == pytest.approx(rows.norm(dim=1).median().item())
    assert found.std == pytest.approx(along.std(correction=0).item())
    assert found.mean == pytest.approx((along / vector.norm()).mean().item())
    # one unit of "std" is one standard deviation along the vector
    assert steering.unit_size(steering.add(found, strength=1.0, unit="std")) * vector.norm() == pytest.approx(found.std)


def test_a_difference_steers(lm):
    warm = steering.difference(lm, POSITIVE, NEGATIVE, SITE)
    plain = lm.record(TEXTS[0], SITE)
    with lm.steer(steering.add(warm, strength=0.5)) as receipt:
        steered = lm.record(TEXTS[0], SITE)
    change = (steered - plain)[0, 1:].norm(dim=1)
    torch.testing.assert_close(change, torch.full_like(change, 0.5 * warm.residual_norm))
    table = receipt.to_pandas()
    rise = table.latent_after[0] - table.latent_before[0]
    assert rise == pytest.approx(0.5 * warm.residual_norm / warm.vector.norm().item())


def test_errors_of_directions(lm):
    with pytest.raises(ConfigError, match="entries are zero"):
        steering.difference(lm, POSITIVE, POSITIVE, SITE)
    with pytest.raises(DataError, match="negative text 1 has no token"):
        steering.difference(lm, POSITIVE, ["abc", "a"], SITE)
    with pytest.raises(ConfigError, match="at is 'first'"):
        steering.difference(lm, POSITIVE, NEGATIVE, SITE, at="first")
    with pytest.raises(SiteError, match="no site"):
        steering.difference(lm, POSITIVE, NEGATIVE, "blocks.77.hook_resid_post")
    with pytest.raises(ConfigError, match="at which site"):
        steering.measured(steering.Direction(torch.ones(32)), lm, POSITIVE)


def test_find_ranks_by_surprise(lm, sae):
    """Against the definition, latent by latent."""
    texts = ["The state of the union is strong", "the union"]
    table = steering.find(lm, sae, texts, k=48)
    rows = torch.cat([lm.record(text, SITE)[0, 1:] for text in texts])
    codes = sae.encode(rows).detach()
    fires, n, seen = (codes > 0).sum(0), len(rows), int(sae.state.stat_tokens)
    p = (fires + 0.5) / (n + 1)
    q = (sae.state.fires + 0.5) / (seen + 1)
    score = p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log()
    expected = [i for i in score.argsort(descending=True, stable=True).tolist() if p[i] > q[i] and fires[i]]
    assert table.latent.tolist() == expected and len(expected) > 3
    best = table.iloc[0]
    assert best.score == pytest.approx(score[best.latent].item())
    assert best.share == pytest.approx((fires[best.latent] / n).item())
    assert best.activation == pytest.approx((codes[:, best.latent].sum() / fires[best.latent]).item())
    assert all(len(text.split()) >= 5 for text in table.promotes)
    against = steering.find(lm, sae, texts, k=3, against=texts)
    assert against.empty and list(against.columns) == list(table.columns)


def test_errors_of_find(lm, sae):
    with pytest.raises(DataError, match="no token"):
        steering.find(lm, sae, "a")
    with pytest.raises(ConfigError, match="k is 0"):
        steering.find(lm, sae, "abc", k=0)
    bare = saelab.SAE(saelab.TopK(k=2, d_sae=8), d_in=32, metadata={"site": SITE})
    with pytest.raises(ConfigError, match="against="):
        steering.find(lm, bare, "abc")
    assert len(steering.find(lm, bare, "abcde", against=["xyz", "uvw"])) > 0


@pytest.mark.slow
def test_the_bundled_model_is_steered_alike_with_and_without_a_cache(smollm2):
    """Teacher-forced logits within 1e-3, and the same tokens wherever the best two are further apart than that."""
    lm, site = smollm2, "blocks.12.hook_resid_post"
    prompts = ["The state of the union is", "My fellow"]
    sae = saelab.SAE(saelab.TopK(k=16, d_sae=256), d_in=576, metadata={"site": site})
    warm = steering.difference(lm, ["I love this so much"], ["I hate this so much"], site)
    scopes = [Scope(), Scope(prompt=False), Scope(positions=[-1]), Scope(windows=[(3, 12)], generated=True)]
    for scope in scopes:
        made = [
            steering.add(warm, strength=0.5, scope=scope),
            steering.clamp(sae, 7, strength=20.0, unit="activation", scope=scope),
        ]
        with lm.steer(*made) as receipt:
            logits, ids = _logits_while_generating(lm, prompts, 8)
        with lm.steer(*made):
            full, _ = _logits_while_generating(lm, prompts, 8, forced=ids, use_cache=False)
        assert (receipt.to_pandas().changed > 0).all()
        assert (logits - full).abs().max() < 1e-3
        best = full.topk(2).values
        sure = best[..., 0] - best[..., 1] > 1e-3
        assert torch.equal(logits.argmax(-1)[sure], full.argmax(-1)[sure]) and sure.float().mean() > 0.9


def _logits_while_generating(lm, prompts, n, forced=None, use_cache=True):
    """Logits [batch, n, vocabulary] of each greedy step, and the tokens; with `forced` those tokens are taken."""
    from saelab.models.tokens import padded
    from saelab.models.where import prompt

    context = padded(lm.tokenize(prompts).rows(), 0, left=True)
    ids, mask, cache, step = context.ids, context.mask, None, context.ids
    found, chosen = [], []
    with torch.no_grad(), prompt(ids.shape[1]):
        for i in range(n):
            logits, cache = lm.backend.logits(step, mask, last_only=True, cache=cache, use_cache=use_cache)
            found.append(logits[:, -1])
            chosen.append(found[-1].argmax(1) if forced is None else forced[:, i])
            ids = torch.cat([ids, chosen[-1][:, None]], 1)
            mask = torch.cat([mask, torch.ones(len(ids), 1, dtype=torch.bool)], 1)
            step = ids if cache is None else chosen[-1][:, None]
    return torch.stack(found, 1), torch.stack(chosen, 1)


def test_steering_changes_what_is_written(lm, sae):
    """A strong push along any latent changes the continuation; weak ones change little."""
    with lm.steer(steering.add(sae, busy(sae, 1)[0], strength=20.0)):
        strong = generate_ids(lm, lm.tokenize(PROMPTS), 8, temperature=0)
    assert strong != generate_ids(lm, lm.tokenize(PROMPTS), 8, temperature=0)
