"""Budgets of latents: the law, the densities, what is made of them in the Feature Choice phase, and whole numbers."""

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

import saelab
from saelab import ConfigError, FeatureChoice
from saelab.autoencoders.architecture import Batch
from saelab.autoencoders.architectures import zipf
from tests.autoencoders.test_feature_choice import observed
from tests.training.test_train import planted

# --- budgets


@given(
    st.integers(1, 60), st.integers(1, 300), st.floats(0.05, 1), st.floats(0, 3), st.floats(0, 0.999), st.integers(0, 99)
)  # fmt: skip
@example(f=37, n=1, cap=1.0, a=3.0, u=0.0, seed=0)  # a rate of 1 where the cumulated sum is rounded up
@example(f=24, n=1, cap=1 - 2**-53, a=1.0, u=0.0, seed=0)  # and where it is rounded down before the last latent
@settings(max_examples=100, deadline=None)
def test_budgets_add_up_and_stay_next_to_their_rates(f, n, cap, a, u, seed):
    k = max(1, int(cap * f * 0.7))
    if k > cap * f:
        return
    shares = zipf.law(a, 0.5, f)[torch.randperm(f, generator=torch.Generator().manual_seed(seed))]
    rates = zipf.spread(shares, k, cap)
    assert float(rates.sum()) == pytest.approx(k) and float(rates.max()) <= cap * (1 + 1e-12)
    free = rates < cap * (1 - 1e-9)
    ratios = (rates / shares)[free]
    if len(ratios):
        torch.testing.assert_close(ratios, ratios[:1].expand_as(ratios))
        assert bool(
            (shares[~free] * ratios[0] >= cap * (1 - 1e-9)).all()
        )  # only those that the cap holds back are at it
    for budgets in (zipf.systematic(rates, n, k * n, u), zipf.largest_remainder(rates, n, k * n)):
        assert int(budgets.sum()) == k * n
        assert (
            bool(((budgets - rates * n).abs() < 1 + 1e-6).all()) and 0 <= int(budgets.min()) <= int(budgets.max()) <= n
        )


def test_systematic_rounding_is_right_on_average():
    rates = zipf.spread(zipf.law(1.2, 2.0, 37), 3, 0.5)
    draws = torch.stack([zipf.systematic(rates, 11, 33, (i + 0.5) / 1000) for i in range(1000)]).double()
    torch.testing.assert_close(draws.mean(0), rates * 11, rtol=0, atol=2e-3)


def test_the_sanity_figures_of_the_specification():
    budgets = zipf.largest_remainder(zipf.spread(zipf.law(1.0, 4.0, 256), 8, 0.5), 64, 512)
    assert int(budgets.sum()) == 512 and int(budgets.max()) <= 32


@pytest.mark.parametrize("f", [256, 1024, 4096])
@pytest.mark.parametrize(("a", "b"), [(1.0, 0.0), (1.5, 2.0), (1.6, 8.0), (1.0, 20.0), (3.0, 100.0)])
def test_a_law_is_found_again_from_counts(f, a, b):
    generator = torch.Generator().manual_seed(f)
    shares = zipf.law(a, b, f)
    counts = torch.poisson(2_000_000 * shares, generator=generator)
    found = zipf.fit(counts[torch.randperm(f, generator=generator)] / 250_000)
    assert found.holds and (found.a, found.b) == pytest.approx((a, b), rel=0.05, abs=0.05)
    exact = zipf.fit(shares)
    assert (exact.a, exact.b, exact.off) == pytest.approx((a, b, 0), rel=1e-3, abs=1e-3)


@pytest.mark.parametrize("silent", [0, 24, 3000])
def test_silent_latents_are_in_the_fit(silent):
    shares = torch.cat([zipf.law(1.2, 3.0, 512), torch.zeros(silent)])
    a, b, off = zipf.fit(shares)
    if silent == 0:
        assert (a, b, off) == pytest.approx((1.2, 3.0, 0), abs=1e-3)
    else:  # steeper, as no law of more ranks is so short
        assert a > 1.2 and off > (0.05 if silent > 1000 else 0)


@pytest.mark.parametrize("kind", ["exponential", "step", "two steps", "none fires", "two thirds silent"])
def test_what_is_no_law_is_said_to_be_none(kind):
    rank = torch.arange(1.0, 513)
    density = {
        "exponential": (-rank / 40).exp(),
        "step": (rank < 200).float(),
        "two steps": torch.where(rank < 50, 1.0, 0.01),
        "none fires": torch.zeros(512),
        "two thirds silent": (rank + 3) ** -1.0 * (rank < 171),
    }[kind]
    found = zipf.fit(density)
    assert not found.holds and bool(torch.isfinite(zipf.law(found.a, found.b, 512)).all())


def test_equal_densities_are_a_flat_law():
    found = zipf.fit(torch.full((10,), 0.2))
    assert found.holds and found.a == pytest.approx(0, abs=1e-6)


def test_latents_that_cannot_spend_k_are_refused():
    with pytest.raises(ConfigError, match="4 latents .* 0.5 .* k = 3"):
        zipf.spread(torch.ones(4), 3, 0.5)


# --- budgets that are learnt


def ranked_state(cfg, density):
    """The state of a Mutual Choice phase that has counted these densities [d_sae]."""
    state = saelab.SAE(cfg, 4).state
    state.density_sum.copy_(density * 100_000)
    state.density_weight.fill_(100_000)
    return state


LAW = 2 * zipf.law(1.2, 4.0, 200)
STEP = torch.where(torch.arange(200) < 100, 0.02, 0.0).double()


def test_budgets_are_the_densities_smoothed_and_falling():
    density = LAW[torch.randperm(200)]
    rates, law = FeatureChoice(k=2, d_sae=200)._share_out(ranked_state(FeatureChoice(k=2, d_sae=200), density), 0.85)
    assert float(rates.sum()) == pytest.approx(2) and law.tolist() == pytest.approx([1.2, 4.0], rel=1e-3)
    torch.testing.assert_close(rates, density, rtol=0.05, atol=0)
    ranks = density.argsort(descending=True)
    assert bool((rates[ranks].diff() <= 0).all())


def test_a_silent_latent_is_tried_and_let_go():
    cfg = FeatureChoice(k=2, d_sae=200)
    tried, let_go = (cfg._share_out(ranked_state(cfg, STEP), progress)[0] for progress in (0.75, 0.85))
    assert tried[150:].tolist() == pytest.approx([0.02 * 2 / 200] * 50, rel=0.05)
    assert bool((let_go[150:] == 0).all()) and float(let_go.sum()) == pytest.approx(2)
    few = FeatureChoice(k=2, d_sae=200, cap=0.015)  # those that fire cannot spend k under the cap
    assert bool((few._share_out(ranked_state(few, STEP), 0.85)[0] > 0).all())


@pytest.mark.parametrize("shrinkage", [0.0, 0.25, 1.0])
def test_shrinkage_goes_from_the_densities_to_the_law(shrinkage):
    density = (LAW * torch.where(torch.arange(200) < 150, 1.0, 0.5)).double()
    density *= 2 / density.sum()
    cfg = FeatureChoice(k=2, d_sae=200, shrinkage=shrinkage)
    found, (a, b) = cfg._share_out(ranked_state(cfg, density), 0.85)
    own = FeatureChoice(k=2, d_sae=200)._share_out(ranked_state(cfg, density), 0.85)[0]
    torch.testing.assert_close(found, shrinkage * 2 * zipf.law(float(a), float(b), 200) + (1 - shrinkage) * own)
    if shrinkage == 1:
        law = FeatureChoice(k=2, d_sae=200, budgets="zipf")
        assert torch.equal(law._share_out(ranked_state(law, density), 0.85)[0], found)


def test_where_there_is_no_law_a_warning_says_so_once_and_the_densities_serve():
    cfg = FeatureChoice(k=2, d_sae=200, budgets="zipf")
    state = ranked_state(cfg, STEP)
    with pytest.warns(UserWarning, match=r"no Zipf law: .*% of the firings .* budgets='density'"):
        rates, _ = cfg._share_out(state, 0.7)
    own = FeatureChoice(k=2, d_sae=200)._share_out(state, 0.7)[0]
    assert torch.equal(rates, own)
    state.rates.copy_(rates)
    cfg._share_out(state, 0.75)  # a second warning would be an error


def test_budgets_are_revised_by_what_mutual_choice_would_do():
    """A latent that comes to score high everywhere gets more than the budget that it began with."""
    cfg, x = FeatureChoice(k=4, d_sae=53), planted(400)
    sae = saelab.SAE(cfg, 16)
    for progress in (0.68, 0.69, 0.7):
        observed(sae, x, progress)
    before = sae.state.rates.clone()
    with torch.no_grad():
        rare = int(before.argmin())
        sae.encoder_bias[rare] = 1e3
    for progress in (0.71, 0.73, 0.74):
        observed(sae, x, progress)
    assert torch.equal(sae.state.rates, before)
    observed(sae, x, 0.751)
    assert float(sae.state.rates[rare]) > 10 * float(before[rare])
    batch = Batch(x[::4], x[::4])
    once = super(FeatureChoice, cfg).allocate(cfg.scores(sae.params(), batch), sae.state, 0.7)
    assert int(once.by_latent().offsets.diff()[rare]) == 100
    kept = sae.state.rates.clone()
    for progress in (0.9, 0.95, 0.99):  # thresholds are being learnt: the budgets stay
        observed(sae, x, progress)
    assert torch.equal(sae.state.rates, kept)
