"""Planted features: that they fire as they should, and that recovery says what was lost, and how."""

import numpy as np
import pytest
import torch
from sklearn.metrics import f1_score

import saelab
from saelab import ConfigError, synthetic
from saelab.base.statistics import mean_interval
from saelab.evaluation.matching import matched
from saelab.evaluation.scores import Score, Scores, named

QUIET = {"batch_size": 512, "lr": 3e-3, "progress": False}


def test_features_fire_as_often_as_said_and_children_with_their_parents():
    planted = synthetic.make(20, 12, l0=2.5, skew=1.0, children=8, correlation=0.4, circles=2, seed=3)
    _, codes = planted.sample(20_000)
    fires = codes.to_dense() > 0
    assert codes.l0 == pytest.approx(2.5, abs=0.1)
    torch.testing.assert_close(fires.float().mean(0), planted.densities, atol=0.02, rtol=0)
    assert planted.densities[0] > 5 * planted.densities[11]
    for child in range(12, 20):
        parent = int(planted.parents[child])
        assert not bool((fires[:, child] & ~fires[:, parent]).any())
        assert float(fires[fires[:, parent], child].float().mean()) == pytest.approx(0.3, abs=0.04)


def test_correlated_features_fire_together_and_others_do_not():
    planted = synthetic.make(8, 8, l0=2.0, correlation=0.8)
    fires = (planted.sample(10_000)[1].to_dense() > 0).double()
    together = torch.corrcoef(fires.T)
    assert together[0, 1] > 0.3 and abs(together[0, 5]) < 0.05
    torch.testing.assert_close(fires.mean(0).float(), planted.densities, atol=0.02, rtol=0)


def test_rows_are_the_sums_of_what_fires():
    planted = synthetic.make(6, 10, l0=1.5, orthogonal=True, circles=1, magnitudes=(1.0, 2.0))
    x, codes = planted.sample(500)
    dense = codes.to_dense()
    torch.testing.assert_close(x @ planted.directions.T, dense[:, :6], atol=1e-5, rtol=0)
    torch.testing.assert_close((x @ planted.planes[0].T).norm(dim=1), dense[:, 6], atol=1e-5, rtol=0)
    assert dense[dense > 0].min() >= 1 and dense.max() <= 2
    noisy = synthetic.make(6, 10, l0=1.5, noise=0.1).sample(2000)[0] - synthetic.make(6, 10, l0=1.5).sample(2000)[0]
    assert float(noisy.std()) == pytest.approx(0.1, rel=0.05)


def test_what_is_trained_on_is_endless_and_never_what_is_measured_on():
    planted = synthetic.make(6, 4, l0=1.0)
    stream = iter(planted)
    first, second = next(stream), next(stream)
    assert first.shape == (4096, 4) and not torch.equal(first, second)
    assert torch.equal(first, next(iter(planted)))
    assert not torch.equal(first[:100], planted.sample(100)[0])
    run = saelab.train(planted, sae=saelab.TopK(k=1, d_sae=6), tokens=9000, **QUIET)
    assert run.history.tokens.iloc[-1] == 9000


def test_the_planted_dictionary_recovers_all_and_a_shuffled_and_rescaled_one_too():
    planted = synthetic.make(12, 16, l0=2.0, orthogonal=True)
    whole = planted.dictionary()
    other = saelab.SAE(whole.cfg, 16).requires_grad_(False)
    order = torch.randperm(12)
    scale = torch.rand(12, 1) + 0.5
    other.encoder_weight.copy_((whole.encoder_weight / scale)[order])
    other.encoder_bias.copy_((whole.encoder_bias / scale[:, 0])[order])
    other.W_dec.copy_((whole.W_dec * scale)[order])
    first, second = (synthetic.recovery(sae, planted, tokens=1000).to_pandas() for sae in (whole, other))
    for figure in ("matched cosine", "f1", "mcc", "explained variance"):
        assert first[(first.figure == figure) & (first.source == "sae")].value.tolist() == pytest.approx(
            [1.0], abs=1e-3
        )
    np.testing.assert_allclose(first[first.source == "sae"].value, second[second.source == "sae"].value, atol=1e-4)


def test_f1_and_correlation_are_those_of_the_matched_latent():
    planted = synthetic.make(5, 8, l0=1.5)
    sae = saelab.SAE(saelab.TopK(k=2, d_sae=7), 8, seed=1).requires_grad_(False)
    scores = synthetic.recovery(sae, planted, tokens=400)
    x, codes = planted.sample(400)
    fires, active = codes.to_dense(), sae.encode(x)
    table = scores.details["recovery"]
    assert sorted(table.latent) == sorted(set(table.latent))
    for row in table.itertuples():
        truth, found = fires[:, row.feature] > 0, active[:, row.latent] > 0
        assert row.f1 == pytest.approx(f1_score(truth, found, zero_division=0.0))
    cosine = torch.nn.functional.cosine_similarity(planted.directions, sae.W_dec[table.latent.tolist()])
    assert scores.value("matched cosine") == pytest.approx(float(cosine.mean()))
    with np.errstate(invalid="ignore"):  # a latent that never fires
        correlation = np.corrcoef(fires.T, active.T)[:5, 5:]
    chosen = np.nan_to_num(np.abs(correlation))
    best = matched(torch.from_numpy(chosen))
    assert scores.value("mcc") == pytest.approx(chosen[range(5), best].mean(), abs=1e-5)


def absorbing(planted):
    """The planted dictionary whose latent of feature 0 is silent where its first child fires."""
    whole = planted.dictionary()
    child = int((planted.parents == 0).nonzero()[0])
    sae = saelab.SAE(whole.cfg, planted.d_in).requires_grad_(False)
    sae.encoder_weight.copy_(whole.encoder_weight)
    sae.encoder_bias.copy_(whole.encoder_bias)
    sae.W_dec.copy_(whole.W_dec)
    sae.encoder_weight[0] -= 10 * whole.encoder_weight[child]
    return sae


def test_absorption_is_found_where_it_was_planted_and_nowhere_else():
    planted = synthetic.make(12, 16, l0=2.0, children=6, orthogonal=True)
    whole, absorbed = (synthetic.recovery(sae, planted, tokens=4000).details["recovery"].absorbed
                       for sae in (planted.dictionary(), absorbing(planted)))  # fmt: skip
    assert whole.dropna().abs().max() == 0 and len(whole.dropna()) == 3
    # one of its two children, alone or with the other: .3 of .51 of the rows with a child
    assert absorbed[0] == pytest.approx(0.3 / 0.51, abs=0.1) and absorbed[1:].dropna().abs().max() == 0


def test_a_circle_is_several_latents_of_its_plane():
    planted = synthetic.make(4, 8, l0=1.0, circles=1, orthogonal=True)
    with pytest.raises(ConfigError, match="circles"):
        planted.dictionary()
    sae = saelab.SAE(saelab.ReLU(l1=1.0, d_sae=8), 8).requires_grad_(False)
    around = torch.cat([planted.planes[0], -planted.planes[0]])
    sae.W_dec.copy_(torch.cat([planted.directions, around]))
    sae.encoder_weight.copy_(sae.W_dec)
    sae.encoder_bias.fill_(-1e-3)
    scores = synthetic.recovery(sae, planted, tokens=2000)
    assert scores.value("latents in a circle", of="circle 0") == 4
    assert scores.value("circle", of="circle 0") > 0.99


def test_architectures_are_told_apart_in_one_call():
    planted = synthetic.make(16, 24, l0=1.5, children=6, orthogonal=True)
    saes = [saelab.MutualChoice(k=2, d_sae=16), saelab.TopK(k=16, d_sae=16)]
    scores = synthetic.compare(saes, planted, tokens=60_000, **QUIET)
    sparse, dense = (scores.value("f1", sae=repr(sae)) for sae in saes)
    null = scores.value("matched cosine", sae=repr(saes[0]), source="random directions")
    assert sparse > dense + 0.2 and scores.value("matched cosine", sae=repr(saes[0])) > null + 0.3


def test_bad_numbers_are_named():
    with pytest.raises(ConfigError, match="l0=9 is more than 8 features"):
        synthetic.make(8, 4, l0=9)
    with pytest.raises(ConfigError, match="do not fit into d_in=4"):
        synthetic.make(8, 4, l0=1, orthogonal=True)
    with pytest.raises(ConfigError, match="magnitudes"):
        synthetic.make(8, 4, l0=1, magnitudes=(2, 1))
    with pytest.raises(ConfigError, match="width 4 and these are 8"):
        synthetic.recovery(saelab.SAE(saelab.TopK(k=1, d_sae=4), 4), synthetic.make(4, 8, l0=1))
    with pytest.raises(ConfigError, match="no autoencoder"):
        named([])
    with pytest.raises(ConfigError, match="one of saes has to be an autoencoder"):
        named("a folder")


def test_the_interval_contains_the_mean_shrinks_and_covers():
    generator = np.random.default_rng(1)
    widths = []
    for n in (10, 1000):
        values = generator.normal(1, 1, n)
        low, high = mean_interval(values, 300)
        assert low < values.mean() < high and mean_interval(values, 300) == (low, high)
        widths.append(high - low)
    assert widths[1] < widths[0] / 3
    assert all(np.isnan(mean_interval([2.0], 10)))  # one value says nothing of others
    covered = [low < 1 < high for low, high in (mean_interval(generator.normal(1, 1, 60), 300) for _ in range(300))]
    assert 0.91 < np.mean(covered) < 0.98


def test_scores_are_found_by_name_and_added():
    one = Scores.of(
        "a", "t", [Score.mean("x", [1, 3]), Score.mean("x", [5, 5], of="part"), Score.mean("x", [0], source="null")]
    )
    both = one + Scores.of("b", "t", [Score.mean("x", [7])])
    assert (
        both.value("x", sae="a") == 2
        and both.value("x", sae="a", of="part") == 5
        and both.value("x", source="null") == 0
    )
    assert both.to_pandas().shape == (4, 9) and "part" in repr(both)
    with pytest.raises(ConfigError, match="2 rows have"):
        both.value("x")
    with pytest.raises(ConfigError, match="there are t: x; t: x of part"):
        both.value("y")
