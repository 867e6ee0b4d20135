"""What each operation does to each vector, against the formulas written out; neutral ones; units; disagreements."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import saelab
from saelab import steering
from saelab.base.errors import ConfigError, SiteError
from saelab.steering import Direction, Scope
from tests import tiny
from tests.toy_steering import SITE, TEXTS, busy, doubles, sae_of


@pytest.fixture(scope="module")
def lm():
    return doubles()[0]


@pytest.fixture(scope="module")
def sae(lm):
    return sae_of(lm)


def steered(lm, *operations, texts=TEXTS, site=SITE):
    with lm.steer(*operations) as receipt:
        return lm.record(texts, site), receipt


def ordinary(lm):
    tokens = lm.tokenize(TEXTS)
    mask = tokens.mask & (tokens.ids != 256)
    mask[:, 0] = False
    return mask


FORMULAS = {  # h, code a, row d, value v -> h'
    "add": lambda h, a, d, v: h + v * d,
    "clamp": lambda h, a, d, v: h + (v - a) * d,
    "cap": lambda h, a, d, v: h + (v - a).clamp(max=0) * d,
    "scale": lambda h, a, d, v: h + (v - 1) * a * d,
    "ablate": lambda h, a, d, v: h - a * d,
    "project_out": lambda h, a, d, v: h - ((h @ d) / (d @ d))[:, None] * d,
}


@pytest.mark.parametrize("kind", FORMULAS)
@pytest.mark.parametrize("of", ["latent", "vector"])
def test_formulas(lm, sae, kind, of):
    """Against the definitions, at ordinary positions; all others keep their bits."""
    latent = busy(sae, 1)[0]
    plain, mask = lm.record(TEXTS, SITE), ordinary(lm)
    h = plain[mask]
    strength = 0.03 if kind in ("add", "clamp", "cap", "scale") else None
    unit = "activation" if kind in ("add", "clamp", "cap") else None
    if of == "latent":
        source, d, a = (sae, latent), sae.W_dec[latent].detach(), sae.encode(h)[:, latent]
        assert 0 < (a > 0).sum() < len(a)
    else:
        d = 3 * torch.randn(32, dtype=torch.float64)
        source, a = (d,), h @ d / (d @ d)
    operation = getattr(steering, kind)(*source, strength=strength, unit=unit, site=SITE)
    new, receipt = steered(lm, operation)
    expected = FORMULAS[kind](h, a[:, None].detach(), d, torch.tensor(strength or 0.0, dtype=torch.float64))
    torch.testing.assert_close(new[mask], expected, rtol=1e-12, atol=1e-14)
    assert torch.equal(new[~mask], plain[~mask])
    line = receipt.to_pandas().iloc[0]
    assert (line.calls, line.positions) == (1, int(mask.sum()))
    change = (new - plain)[mask].norm(dim=1) / h.norm(dim=1)
    assert line.relative_change == pytest.approx(change.mean().item(), rel=1e-9)
    assert line.latent_before == pytest.approx(a.mean().item(), rel=1e-9)
    read = sae.encode(new[mask])[:, latent] if of == "latent" else new[mask] @ d / (d @ d)
    assert line.latent_after == pytest.approx(read.mean().item(), rel=1e-9, abs=1e-12)


def test_operations_at_one_site_read_the_same_unsteered_vector(lm, sae):
    one, two, three = busy(sae, 3)
    made = [
        steering.add(sae, one, strength=2.0),
        steering.clamp(sae, two, strength=0.5),
        steering.scale(sae, three, strength=3.0),
    ]
    mask = ordinary(lm)
    plain = lm.record(TEXTS, SITE)
    together, _ = steered(lm, *made)
    alone = [steered(lm, operation)[0] - plain for operation in made]
    torch.testing.assert_close(together, plain + sum(alone), rtol=1e-12, atol=1e-14)
    # the order does not matter, and neither does under which name the site goes
    turned, _ = steered(lm, made[2], steering.clamp(sae, two, strength=0.5, site="model.layers.1"), made[0])
    torch.testing.assert_close(turned, together, rtol=1e-12, atol=1e-14)
    assert not torch.equal(together[mask], plain[mask])


def test_nested_contexts_act_one_after_the_other(lm, sae):
    latent = busy(sae, 1)[0]
    mask = ordinary(lm)
    with lm.steer(steering.clamp(sae, latent, strength=5.0)) as outer, lm.steer(steering.ablate(sae, latent)) as inner:
        lm.logits(TEXTS)
    before, after = outer.to_pandas().iloc[0], inner.to_pandas().iloc[0]
    assert before.latent_after == pytest.approx(after.latent_before, rel=1e-12) and after.positions == mask.sum()
    assert after.latent_before > before.latent_before


def test_projections_remove_the_whole_space(lm):
    """Two oblique directions together leave nothing along either; where one alone acts, it acts alone."""
    d = torch.randn(2, 32, dtype=torch.float64)
    d[1] += 2 * d[0]
    late = Scope(windows=[(4, None)])
    new, _ = steered(lm, steering.project_out(d[0], site=SITE), steering.project_out(d[1], site=SITE, scope=late))
    plain, mask = lm.record(TEXTS, SITE), ordinary(lm)
    both = mask.clone()
    both[:, :4] = False
    assert (new[both] @ d.T).abs().max() < 1e-12 < (plain[both] @ d.T).abs().min()
    h = plain[mask & ~both]
    torch.testing.assert_close(new[mask & ~both], h - (h @ d[0] / (d[0] @ d[0]))[:, None] * d[0])
    basis = torch.linalg.qr(d.T)[0]
    torch.testing.assert_close(new[both], plain[both] - plain[both] @ basis @ basis.T)
    # twice the same direction is once
    twice, _ = steered(lm, steering.project_out(d[0], site=SITE), steering.project_out(5 * d[0], site=SITE))
    once, _ = steered(lm, steering.project_out(d[0], site=SITE))
    torch.testing.assert_close(twice, once)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("site", [SITE, "blocks.1.attn.hook_z", "blocks.1.hook_resid_mid", "model.layers.2.mlp"])
def test_neutral_operations_change_no_bit(tiny_tokenizer, dtype, site):
    lm = saelab.load_model(tiny.llama_model().to(dtype), tokenizer=tiny_tokenizer, device="cpu")
    sae = sae_of(lm, site).float()
    one, two, three = busy(sae, 3)
    plain = lm.logits(TEXTS)
    neutral = [
        steering.add(sae, one, strength=0.0),
        steering.add(sae.W_dec[two], strength=0.0, unit="activation", site=site),
        steering.scale(sae, two, strength=1.0),
        steering.cap(sae, three, strength=math.inf),
        steering.scale(torch.ones(32), strength=1.0, site=site),
    ]
    for operations in (*([operation] for operation in neutral), neutral):
        with lm.steer(*operations) as receipt:
            assert torch.equal(lm.logits(TEXTS), plain)
        assert receipt.to_pandas().changed.sum() == 0 and (receipt.to_pandas().positions > 40).all()
    # a clamp to the present value, one position at a time
    x, alone = lm.record(TEXTS[0], site)[0].float(), lm.logits(TEXTS[0])
    for position in (1, 7):
        code = sae.encode(x[position : position + 1])[0]
        for latent in (int(code.argmax()), int(code.argmin())):
            present = steering.clamp(sae, latent, strength=code[latent].item(), unit="activation",
                                     scope=Scope(positions=[position]))  # fmt: skip
            with lm.steer(present) as receipt:
                assert torch.equal(lm.logits(TEXTS[0]), alone)
            assert receipt.to_pandas().positions[0] == 1


def test_splicing_with_the_error_term_is_bitwise_neutral_for_real_autoencoders(lm, sae):
    plain = lm.logits(TEXTS)
    with lm.splice(sae, error_term=True, edit=lambda codes: codes) as receipt:
        assert torch.equal(lm.logits(TEXTS), plain)
    assert receipt.replaced > 40


@settings(max_examples=25, deadline=None)
@given(
    strength=st.floats(-5, 5),
    kind=st.sampled_from(["add", "clamp", "cap", "scale"]),
    seed=st.integers(0, 100),
)
def test_what_is_left_unexplained_stays(lm, sae, strength, kind, seed):
    """Only the coordinate along d changes: the rest of the vector is the same."""
    generator = torch.Generator().manual_seed(seed)
    latent = busy(sae, 8)[int(torch.randint(8, (1,), generator=generator))]
    new, _ = steered(lm, getattr(steering, kind)(sae, latent, strength=strength))
    plain, d = lm.record(TEXTS, SITE), sae.W_dec[latent].detach()
    change = new - plain
    torch.testing.assert_close(change, (change @ d)[..., None] * d / (d @ d), rtol=1e-9, atol=1e-11)


def test_units(lm, sae):
    latent = busy(sae, 1)[0]
    stats, norm = sae.latent_stats, sae.metadata["median_norm"]
    sizes = {
        unit: steering.unit_size(steering.add(sae, latent, strength=1.0, unit=unit))
        for unit in ("activation", "max_activation", "residual_norm", "std")
    }
    assert sizes["activation"] == 1 and sizes["max_activation"] == float(stats.max[latent])
    length = float(sae.W_dec[latent].detach().norm())
    assert sizes["residual_norm"] * length == pytest.approx(norm)
    assert sizes["std"] * length == pytest.approx(float(stats.std[latent]))
    # one residual norm of anything is a change as long as the median activation
    for source in ((sae, latent), (Direction(torch.randn(32).double() * 9, SITE, residual_norm=norm),)):
        new, _ = steered(lm, steering.add(*source, strength=1.0, unit="residual_norm"))
        change = (new - lm.record(TEXTS, SITE))[ordinary(lm)].norm(dim=1)
        torch.testing.assert_close(change, torch.full_like(change, norm))
    assert steering.add(sae, latent, strength=1.0).unit == "max_activation"
    assert steering.add(torch.ones(32), strength=1.0, site=SITE).unit == "residual_norm"
    assert (steering.scale(sae, latent, strength=1.0).unit, steering.ablate(sae, latent).unit) == (None, None)


def test_ablate_to_the_mean(lm, sae):
    latent = busy(sae, 1)[0]
    stats = sae.latent_stats
    mean = float(stats.mean[latent] * stats.density[latent])
    ablated, _ = steered(lm, steering.ablate(sae, latent, to="mean"))
    clamped, _ = steered(lm, steering.clamp(sae, latent, strength=mean, unit="activation"))
    assert torch.equal(ablated, clamped)
    direction = Direction(torch.ones(32).double(), SITE, mean=0.25)
    ablated, _ = steered(lm, steering.ablate(direction, to="mean"))
    torch.testing.assert_close(ablated[ordinary(lm)].mean(1), torch.full((int(ordinary(lm).sum()),), 0.25).double())
    with (
        pytest.raises(ConfigError, match="mean coordinate"),
        lm.steer(steering.ablate(torch.ones(32), to="mean", site=SITE)),
    ):
        pass


def test_two_settings_of_one_latent(lm, sae):
    latent = busy(sae, 1)[0]
    clamp, cap = steering.clamp, steering.cap

    def run(*operations):
        return steered(lm, *operations)[0]

    with pytest.raises(ConfigError, match=rf"clamp\(latent {latent}, 1 max.*different values"):
        run(clamp(sae, latent, strength=1.0), clamp(sae, latent, strength=2.0))
    with pytest.raises(ConfigError, match="different values"):
        run(clamp(sae, latent, strength=1.0), steering.ablate(sae, latent))
    early, late = Scope(windows=[(0, 5)]), Scope(windows=[(4, None)])
    with pytest.raises(ConfigError, match="part their scopes"):
        run(clamp(sae, latent, strength=1.0, scope=early), clamp(sae, latent, strength=2.0, scope=late))
    with pytest.raises(ConfigError, match="different values"):
        run(clamp(sae, latent, strength=1.0), cap(sae, latent, strength=0.5))
    # parted, or of one mind, they go together, and act once
    late = Scope(windows=[(5, None)])
    parted = run(clamp(sae, latent, strength=1.0, scope=early), clamp(sae, latent, strength=2.0, scope=late))
    one, two = (run(clamp(sae, latent, strength=s)) for s in (1.0, 2.0))
    assert torch.equal(parted[:, :5], one[:, :5]) and torch.equal(parted[:, 5:], two[:, 5:])
    size = float(sae.latent_stats.max[latent])
    same = run(clamp(sae, latent, strength=1.0), clamp(sae, latent, strength=size, unit="activation", scope=early))
    assert torch.equal(same, one)
    # adding on top of a clamp is no disagreement
    run(clamp(sae, latent, strength=1.0), steering.add(sae, latent, strength=1.0))


def test_errors_of_operations(lm, sae):
    dead = int((sae.state.fires == 0).nonzero()[0]) if bool((sae.state.fires == 0).any()) else None
    if dead is None:
        dead = 5
        sae = sae_of(lm)
        sae.state.fires[dead] = 0
    add = steering.add
    for wrong in (48, -1, 1.5, True):
        with pytest.raises(ConfigError, match="latent is .* from 0 to 47"):
            add(sae, wrong, strength=1.0)
    with pytest.raises(ConfigError, match=rf"latent {dead} fired on none of the {int(sae.state.stat_tokens)}"):
        add(sae, dead, strength=1.0)
    with pytest.raises(ConfigError, match="which of the 48"):
        add(sae, strength=1.0)
    with pytest.raises(ConfigError, match="1 of 32 entries are NaN"):
        add(torch.tensor([math.nan] + [1.0] * 31), strength=1.0, site=SITE)
    with pytest.raises(ConfigError, match="all 32 entries are zero"):
        add(torch.zeros(32), strength=1.0, site=SITE)
    with pytest.raises(ConfigError, match=r"\[2, 16\]"):
        add(torch.ones(2, 16), strength=1.0, site=SITE)
    with pytest.raises(ConfigError, match="goes with an autoencoder"):
        add(torch.ones(32), 3, strength=1.0, site=SITE)
    latent = busy(sae, 1)[0]
    for strength in (math.nan, math.inf, -math.inf):
        with pytest.raises(ConfigError, match="finite"):
            add(sae, latent, strength=strength)
    with pytest.raises(ConfigError, match="needs a strength"):
        steering.clamp(sae, latent)
    with pytest.raises(ConfigError, match="has no strength"):
        steering.ablate(sae, latent, strength=1.0)
    with pytest.raises(ConfigError, match="has no unit"):
        steering.scale(sae, latent, strength=1.0, unit="std")
    with pytest.raises(ConfigError, match="unknown unit 'sigma'"):
        add(sae, latent, strength=1.0, unit="sigma")
    with pytest.raises(ConfigError, match="'zero' or to 'mean'"):
        steering.ablate(sae, latent, to="median")
    with pytest.raises(ConfigError, match="unknown operation"):
        steering.Operation("push", sae, latent)
    broken = sae_of(lm)
    with torch.no_grad():
        broken.W_dec[latent] = math.inf
    with pytest.raises(ConfigError, match=f"decoder row of latent {latent}"):
        add(broken, latent, strength=1.0)
    broken.metadata["target_site"] = "blocks.1.hook_mlp_out"
    with pytest.raises(ConfigError, match="reads at .* writes at"):
        add(broken, latent, strength=1.0)


def test_errors_that_need_the_model(lm, sae):
    latent = busy(sae, 1)[0]

    def enter(*operations):
        with lm.steer(*operations):
            lm.logits(TEXTS)

    with pytest.raises(SiteError, match=r"16 wide and site .* 32"):
        enter(steering.add(torch.ones(16), strength=1.0, unit="activation", site=SITE))
    with pytest.raises(SiteError, match=r"32 wide and site .* 64"):
        enter(steering.add(sae, latent, strength=1.0, site="blocks.1.mlp.hook_post"))
    with pytest.raises(SiteError, match="no site"):
        enter(steering.add(sae, latent, strength=1.0, site="blocks.9.hook_resid_post"))
    with pytest.raises(ConfigError, match="site="):
        enter(steering.add(torch.ones(32), strength=1.0, unit="activation"))
    with pytest.raises(ConfigError, match="at least one operation"):
        enter()
    with pytest.raises(ConfigError, match="is no operation"):
        enter(sae)
    with pytest.raises(ConfigError, match="median norm of direction is not known"):
        enter(steering.add(torch.ones(32), strength=1.0, site=SITE))
    with pytest.raises(ConfigError, match="no largest activation"):
        enter(steering.add(torch.ones(32), strength=1.0, unit="max_activation", site=SITE))
    bare = saelab.SAE(saelab.TopK(k=2, d_sae=8), d_in=32, metadata={"site": SITE})
    for unit, figure in (
        ("max_activation", "largest activation"),
        ("std", "standard dev"),
        ("residual_norm", "median"),
    ):
        with pytest.raises(ConfigError, match=figure):
            enter(steering.add(bare, 1, strength=1.0, unit=unit))
    enter(steering.add(bare, 1, strength=1.0, unit="activation"))
