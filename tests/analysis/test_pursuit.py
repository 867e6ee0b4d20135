"""Pursuit against the per-token algorithm written out, and against what it must not do."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import saelab
from saelab import ConfigError, DataError
from saelab.analysis.dark_matter import pursuit
from saelab.analysis.dark_matter.pursuit import gradient_pursuit, orthogonal_pursuit, support_least_squares
from saelab.analysis.dark_matter.support import descend
from tests.toy_dark_matter import planted, trained

PURSUITS = [gradient_pursuit, orthogonal_pursuit]


@pytest.fixture(scope="module")
def x():
    return planted()


@pytest.fixture(scope="module")
def sae(x):
    return trained(x)


def fvu(sae, x, codes):
    return float((x - sae.decode(codes).detach()).square().sum() / (x - x.mean(0)).square().sum())


def one_token(x, D, budget):
    """Gradient pursuit, dense, of one token."""
    w = torch.zeros(len(D))
    for _ in range(budget):
        r = x - w @ D
        c = D @ r
        active = w > 0
        best = int(c.argmax())
        active[best] = active[best] or bool(c[best] > 0)
        grad = torch.where(active, c, 0.0)
        u = grad @ D
        w = (w + (u @ r) / (u @ u + 1e-12) * grad).clamp(min=0)
    return w


def one_token_exact(x, D, budget):
    """Orthogonal matching pursuit with non-negative codes, dense, of one token."""
    w = torch.zeros(len(D), dtype=torch.float64)
    for _ in range(budget):
        c = D @ (x - w @ D)
        on = w > 0
        on[c.argmax()] |= bool(c.max() > 1e-6 * x.norm())
        while bool(on.any()):
            goal = torch.zeros_like(w)
            goal[on] = torch.linalg.lstsq(D[on].T, x).solution
            crossing = on & (goal <= 0)
            if not bool(crossing.any()):
                w = goal
                break
            share = torch.where(crossing, w / (w - goal), torch.inf)
            w = torch.where(on, w + share.min() * (goal - w), 0.0)
            on &= ~(crossing & (share <= share.min()))
            w[~on] = 0.0
    return w


@pytest.mark.parametrize("gram", [0, pursuit._GRAM_LATENTS])
def test_gradient_pursuit_is_the_algorithm_token_by_token(sae, x, gram, monkeypatch):
    monkeypatch.setattr(pursuit, "_GRAM_LATENTS", gram)
    rows, budget = x[:40], torch.arange(40) % 6
    found = gradient_pursuit(sae, rows, budget).to_dense()
    D, centred = sae.W_dec.detach(), rows - sae.b_dec.detach()
    expected = torch.stack([one_token(row, D, int(b)) for row, b in zip(centred, budget, strict=True)])
    assert torch.allclose(found, expected, atol=2e-3)
    assert torch.equal(found > 0, expected > 0)


@pytest.mark.parametrize("gram", [0, pursuit._GRAM_LATENTS])
def test_orthogonal_pursuit_is_the_algorithm_token_by_token(gram, monkeypatch):
    monkeypatch.setattr(pursuit, "_GRAM_LATENTS", gram)
    sae = saelab.SAE(saelab.TopK(k=2, d_sae=40), d_in=12)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():  # directions near each other, so that values would become negative
        sae.W_dec.copy_(torch.nn.functional.normalize(torch.randn(40, 12, generator=generator) + 1, dim=1))
    rows, budget = torch.randn(60, 12, generator=generator) + 1, torch.arange(60) % 9
    D, centred = sae.W_dec.detach().double(), (rows - sae.b_dec.detach()).double()
    expected = torch.stack([one_token_exact(row, D, int(b)) for row, b in zip(centred, budget, strict=True)])
    assert ((expected > 0).sum(1) < budget).sum() > 10  # some latents went off
    found = orthogonal_pursuit(sae, rows, budget).to_dense()
    assert torch.allclose(found.double(), expected, atol=1e-3)


@pytest.mark.parametrize("search", PURSUITS)
def test_an_orthonormal_dictionary_gives_the_largest_products(search):
    sae = saelab.SAE(saelab.TopK(k=2, d_sae=6), d_in=6)
    directions = torch.linalg.qr(torch.randn(6, 6))[0]
    with torch.no_grad():
        sae.W_dec.copy_(directions)
    x = torch.randn(50, 6)
    products = (x @ directions.T).relu()
    values, places = products.topk(2)
    expected = torch.zeros(50, 6).scatter(1, places, values)
    assert torch.allclose(search(sae, x, 2).to_dense(), expected, atol=1e-5)


def test_pursuit_lowers_fvu_at_equal_l0(sae):
    x = planted(seed=5)
    found = pursuit.compared(sae, x)
    figures = {name: fvu(sae, x, codes) for name, codes in found.items()}
    assert figures["orthogonal pursuit"] < figures["gradient pursuit"] < figures["encoder"]
    assert figures["support least squares"] < figures["encoder"]
    assert all(bool((codes.offsets.diff() <= found["encoder"].offsets.diff()).all()) for codes in found.values())


@pytest.mark.parametrize("search", [*PURSUITS, support_least_squares])
def test_codes_are_in_order_and_positive(search, sae, x):
    codes = search(sae, x[:100])
    assert len(codes) == 100 and bool((codes.values > 0).all())
    for i in range(100):
        latents = codes.row(i)[1].tolist()
        assert latents == sorted(set(latents))


@pytest.mark.parametrize("search", PURSUITS)
def test_budgets(search, sae, x):
    rows = x[:30]
    assert torch.equal(search(sae, rows, 4).to_dense(), search(sae, rows, torch.full((30,), 4)).to_dense())
    assert len(search(sae, rows, 0).values) == 0 and len(search(sae, rows[:0])) == 0
    assert torch.equal(
        search(sae, rows).to_dense(), search(sae, rows, sae.encode_sparse(rows).offsets.diff()).to_dense()
    )
    budget = torch.arange(30) % 5
    assert bool((search(sae, rows, budget).offsets.diff() <= budget).all())
    mixed = search(sae, rows, budget).to_dense()
    alone = torch.cat([search(sae, rows[i : i + 1], int(budget[i])).to_dense() for i in range(30)])
    assert torch.allclose(mixed, alone, atol=1e-3)
    assert search(sae, rows.view(2, 15, -1)).offsets.shape == (31,)


@pytest.mark.parametrize("search", [*PURSUITS, support_least_squares])
def test_the_length_of_decoder_rows_only_rescales_codes(search, sae, x):
    stretched = saelab.SAE(sae.cfg, sae.d_in)
    stretched.load_state_dict(sae.state_dict())
    lengths = torch.linspace(0.5, 3, sae.d_sae)
    with torch.no_grad():
        stretched.W_dec.mul_(lengths[:, None])
    codes = sae.encode_sparse(x[:50])
    budget = codes.offsets.diff()
    if search is support_least_squares:
        smaller = codes.with_values(codes.values / lengths[codes.indices])
        ours, theirs = search(sae, x[:50], codes), search(stretched, x[:50], smaller)
    else:
        ours, theirs = search(sae, x[:50], budget), search(stretched, x[:50], budget)
    assert torch.allclose(theirs.to_dense() * lengths, ours.to_dense(), atol=1e-3)


def test_tiles_do_not_change_the_result(sae, x, monkeypatch):
    whole = gradient_pursuit(sae, x[:100]).to_dense()
    monkeypatch.setattr(pursuit, "_TILE_ROWS", 7)
    assert torch.allclose(gradient_pursuit(sae, x[:100]).to_dense(), whole, atol=1e-3)


@settings(max_examples=30, deadline=None)
@given(n=st.integers(1, 4), s=st.integers(1, 4), d=st.integers(1, 5), seed=st.integers(0, 999))
def test_descent_never_raises_the_error_and_ends_at_least_squares(n, s, d, seed):
    generator = torch.Generator().manual_seed(seed)
    atoms = torch.nn.functional.normalize(torch.randn(n, s, d, generator=generator).double(), dim=2)
    x = torch.randn(n, d, generator=generator).double()
    on = torch.rand(n, s, generator=generator) < 0.7
    start = torch.rand(n, s, generator=generator).double() * on
    gram, target = atoms @ atoms.transpose(1, 2), torch.einsum("nsd,nd->ns", atoms, x)
    found = descend(gram, target, start, on)

    def error(values):
        return (x - torch.einsum("ns,nsd->nd", values, atoms)).square().sum(1)

    assert bool((found >= 0).all()) and not bool(found[~on].any())
    assert bool((error(found) <= error(start) + 1e-6).all())
    for i in range(n):  # the optimum of its own support
        support = found[i] > 1e-9
        residual = x[i] - found[i] @ atoms[i]
        assert torch.allclose(atoms[i][support] @ residual, torch.zeros(int(support.sum())).double(), atol=1e-4)
        best = min(  # no support within it does better
            float((x[i] - torch.linalg.lstsq(atoms[i][list(c)].T, x[i]).solution @ atoms[i][list(c)]).square().sum())
            for k in range(1, int(support.sum()) + 1)
            for c in itertools.combinations(support.nonzero()[:, 0].tolist(), k)
        ) if bool(support.any()) else float(x[i].square().sum())  # fmt: skip
        assert float(error(found)[i]) <= best + 1e-6


def test_equal_directions_share(sae, x):
    twins = saelab.SAE(sae.cfg, sae.d_in)
    twins.load_state_dict(sae.state_dict())
    with torch.no_grad():
        twins.W_dec[1::2] = twins.W_dec[::2]
    codes = support_least_squares(twins, x[:50], saelab.SparseCodes.from_dense(torch.ones(50, sae.d_sae)))
    assert bool(torch.isfinite(codes.values).all())
    assert fvu(twins, x[:50], codes) < 0.02
    found = orthogonal_pursuit(twins, x[:50], 12).to_dense()
    assert not bool(((found[:, ::2] > 0) & (found[:, 1::2] > 0)).any())  # the second one adds nothing


def test_a_silent_latent_of_length_zero_is_never_chosen(sae, x):
    hollow = saelab.SAE(sae.cfg, sae.d_in)
    hollow.load_state_dict(sae.state_dict())
    with torch.no_grad():
        hollow.W_dec[:40] = 0
    codes = gradient_pursuit(hollow, x[:50], 6)
    assert bool((codes.indices >= 40).all()) and bool(torch.isfinite(codes.values).all())


def test_errors(sae, x):
    with pytest.raises(ConfigError, match="transcoder"):
        gradient_pursuit(saelab.SAE(saelab.Transcoder(of=saelab.TopK(k=1, d_sae=4)), 12), x)
    with pytest.raises(ConfigError, match="5 wide"):
        gradient_pursuit(sae, x[:, :5])
    with pytest.raises(ConfigError, match="budget is -1"):
        gradient_pursuit(sae, x, -1)
    with pytest.raises(ConfigError, match="shape"):
        gradient_pursuit(sae, x, torch.ones(3))
    with pytest.raises(ConfigError, match="codes of 5 tokens"):
        support_least_squares(sae, x, sae.encode_sparse(x[:5]))
    with pytest.raises(DataError, match="NaN"):
        gradient_pursuit(sae, torch.full((2, 12), torch.nan), 1)
