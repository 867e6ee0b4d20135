"""The decomposition of an SAE's error against dense references and cases with a known answer."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import saelab
from saelab import ConfigError, DataError
from saelab.analysis.dark_matter import coded_rows as reading
from saelab.analysis.dark_matter import decompose
from saelab.analysis.dark_matter.rows import LEARN, MAP, SCORE, Rows
from saelab.base.moments import Moments, TargetMoments
from tests.toy_dark_matter import dead, multiple, planted, trained

TEXTS = [f"Speech {i}: " + " ".join(f"w{(i * j) % 17}" for j in range(40)) for i in range(60)]


@pytest.fixture(scope="module")
def x():
    return planted()


@pytest.fixture(scope="module")
def sae(x):
    return trained(x)


@pytest.fixture(scope="module")
def parts(sae, x):
    return decompose(sae, x, progress=False)


@pytest.fixture(scope="module")
def store(tiny_llama):
    return saelab.harvest(
        tiny_llama,
        saelab.load_corpus(TEXTS),
        site="blocks.2.hook_resid_post",
        tokens=5300,
        context_length=64,
        progress=False,
    )


def uses(rows):
    """The use of each row, in the order of the rows."""
    found = [(chunk.row, torch.full_like(chunk.row, chunk.use)) for chunk in rows]
    row, use = (torch.cat(column) for column in zip(*found, strict=True))
    return use[row.argsort()]


# moments


def lstsq(x, y, bias):
    x = torch.cat([x, torch.ones(len(x), 1).double()], 1) if bias else x
    found = torch.linalg.lstsq(x, y).solution
    return (found[:-1], found[-1]) if bias else (found, torch.zeros(y.shape[1]).double())


@settings(max_examples=25, deadline=None)
@given(
    d=st.integers(1, 6),
    m=st.integers(1, 4),
    chunks=st.lists(st.integers(0, 40), min_size=1, max_size=5),
    mean=st.sampled_from([0.0, 3.0, 1e4]),
    bias=st.booleans(),
    seed=st.integers(0, 99),
)
def test_the_streamed_fit_is_that_of_all_rows_at_once(d, m, chunks, mean, bias, seed):
    generator = torch.Generator().manual_seed(seed)
    n = sum(chunks) + d + 5
    x = torch.randn(n, d, generator=generator, dtype=torch.float64)
    x[:, 0] += mean
    y = x @ torch.randn(d, m, generator=generator).double() + torch.randn(n, m, generator=generator) + 2
    streams = [Moments(d, m), Moments(d, m)]
    for number, rows in enumerate(torch.arange(n).split([*chunks, d + 5])):
        streams[number % 2].add(x[rows], y[rows])
    moments = streams[0]
    moments.merge(streams[1])
    fit, (weights, intercept) = moments.fit(bias), lstsq(x, y, bias)
    assert torch.allclose(fit.map, weights, atol=1e-8) and torch.allclose(fit.bias, intercept, atol=1e-8 * max(1, mean))
    other = torch.randn(d, m, generator=generator).double()
    strange = fit._replace(map=other)
    residual = (y - x @ other - strange.bias).square().sum(0)
    assert torch.allclose(moments.residual(strange), residual, rtol=1e-8)
    spread = (y - y.mean(0)).square().sum(0)
    assert torch.allclose(moments.r2(strange), 1 - residual / spread, rtol=1e-7, atol=1e-8)
    assert moments.r2_pooled(strange) == pytest.approx(1 - float(residual.sum() / spread.sum()), rel=1e-7)


def test_dependent_and_constant_regressors_still_predict():
    x = torch.randn(100, 3).double()
    x = torch.cat([x, x[:, :1] * 2, torch.zeros(100, 1)], 1)
    y = x[:, :2]
    moments = Moments(5, 2)
    moments.add(x, y)
    fit = moments.fit()
    assert torch.allclose(fit(x), y, atol=1e-8) and torch.isfinite(fit.map).all()


def test_targets_of_a_second_pass_have_the_moments_of_one_pass():
    x, y = torch.randn(50, 3).double() + 5, torch.randn(50, 2).double() - 100
    once, known = Moments(3, 2), Moments(3, 1)
    once.add(x, y)
    known.add(x, y[:, :1])
    targets = TargetMoments(known, 2)
    for rows in torch.arange(50).split(17):
        targets.add(x[rows], y[rows])
    again = targets.moments()
    for name in ("mean_x", "mean_y", "xx", "xy", "yy"):
        assert torch.allclose(getattr(again, name), getattr(once, name), atol=1e-9), name


def test_combined_targets_have_the_moments_of_the_combination():
    x, y = torch.randn(50, 3).double() + 5, torch.randn(50, 3).double()
    moments, direct = Moments(3, 3), Moments(3, 3)
    moments.add(x, y)
    direct.add(x, 0.3 * x - 2 * y + 7)
    combined = moments.combined(0.3, -2.0, torch.full((3,), 7.0).double())
    for name in ("mean_y", "xx", "xy", "yy"):
        assert torch.allclose(getattr(combined, name), getattr(direct, name), atol=1e-9), name


# decomposition


def test_the_parts_add_up(parts, x):
    reconstruction, linear, nonlinear = parts.split(x)
    assert torch.allclose(reconstruction + linear + nonlinear, x, atol=1e-5)
    assert torch.equal(reconstruction, parts.sae(x).detach())
    expected = x.double() @ parts.linear_map + parts.bias
    assert torch.allclose(linear.double(), expected, atol=1e-4)
    shaped = parts.split(x[:6].view(2, 3, -1))
    assert all(torch.allclose(a.flatten(0, 1), b[:6], atol=1e-5) for a, b in zip(shaped, parts.split(x), strict=True))


@pytest.mark.parametrize("bias", [True, False])
def test_every_figure_is_that_of_a_dense_computation_on_held_out_rows(sae, x, bias):
    found = decompose(sae, x, holdout=0.4, bias=bias, seed=3, progress=False)
    use = uses(Rows(x, 0.4, 3))
    held = use != MAP
    assert found.tokens_heldout == int(held.sum()) and 0.3 < held.float().mean() < 0.5
    with torch.no_grad():
        error = (x - sae(x)).double()
    wide = x.double()
    weights, intercept = lstsq(wide[~held], error[~held], bias)
    assert torch.allclose(found.linear_map, weights, atol=1e-8) and torch.allclose(found.bias, intercept, atol=1e-8)
    linear = wide @ weights + intercept
    nonlinear = error - linear
    spread = (wide[held] - wide[held].mean(0)).square().sum()
    assert found.fvu == pytest.approx(float(error[held].square().sum() / spread), rel=1e-6)
    assert found.fvu_nonlinear == pytest.approx(float(nonlinear[held].square().sum() / spread), rel=1e-6)
    assert found.fvu_linear == pytest.approx(float(linear[held].square().sum() / spread), rel=1e-5)
    of_dimension = (error[held] - error[held].mean(0)).square().sum(0)
    left = nonlinear[held].square().sum(0)
    assert found.r2_error == pytest.approx(float((1 - left / of_dimension).mean()), rel=1e-6)
    assert found.r2_error_pooled == pytest.approx(1 - float(left.sum() / of_dimension.sum()), rel=1e-6)
    every = {"x": wide, "sae": wide - error, "error": error, "linear": linear, "nonlinear": nonlinear}
    for name, part in every.items():
        square = part.square().sum(1, keepdim=True)
        w, b = lstsq(wide[use == LEARN], square[use == LEARN], bias)
        left = (square - wide @ w - b)[use == SCORE].square().sum()
        scored = square[use == SCORE]
        expected = 1 - float(left / (scored - scored.mean()).square().sum())
        assert found.r2_norm[name] == pytest.approx(expected, abs=1e-5), name
        assert found.norms[name] == pytest.approx(float(part[held].norm(dim=1).mean()), rel=1e-5)
    assert found.l0 == pytest.approx(sae.encode_sparse(x[held]).l0)
    sums = found.sums.sum(0)
    assert sums[0] == pytest.approx(float(spread), rel=1e-6) and sums[1] / sums[0] == pytest.approx(found.fvu, rel=1e-5)
    assert sums[2] / sums[0] == pytest.approx(found.fvu_nonlinear, rel=1e-5)
    other = lstsq(wide[~held], error[~held], not bias)
    expected = 1 - (error - wide @ other[0] - other[1])[held].square().sum(0) / of_dimension
    assert found.controls["other_bias"].r2_error == pytest.approx(float(expected.mean()), rel=1e-6)


def test_a_dead_sae_has_only_linear_error(x):
    found = decompose(dead(12), x, progress=False)
    assert found.r2_error == pytest.approx(1, abs=1e-9) and found.fvu_nonlinear == pytest.approx(0, abs=1e-9)
    assert found.controls["dead"].r2_error == pytest.approx(1, abs=1e-9)
    assert found.l0 == 0 and found.fvu >= 1


def test_every_sae_has_the_dead_one_beside_it(parts):
    assert parts.controls["dead"].r2_error == pytest.approx(1, abs=1e-9)
    assert parts.r2_error < 0.9


@pytest.mark.parametrize("bias", [True, False])
def test_an_error_that_is_shrinkage_is_linear_and_gone_after_rescaling(x, bias):
    found = decompose(multiple(12, times=0.7), x, bias=bias, progress=False)
    assert found.r2_error == pytest.approx(1, abs=1e-6)
    assert found.controls["rescaled"].scale == pytest.approx(1 / 0.7, rel=1e-5)
    assert found.controls["rescaled"].fvu == pytest.approx(0, abs=1e-9)


def test_the_squared_norm_of_orthonormal_features_of_constant_weight_is_linear(sae):
    directions = torch.linalg.qr(torch.randn(12, 12))[0]
    x = (torch.rand(2000, 12) < 0.3) * torch.linspace(1, 4, 12) @ directions
    found = decompose(sae, x, bias=False, progress=False)
    assert found.r2_norm["x"] == pytest.approx(1, abs=1e-5)


def test_the_nonlinear_part_is_less_than_the_error_where_it_was_fitted(sae, x):
    found = decompose(sae, torch.cat([x, x]), progress=False)
    assert found.fvu_nonlinear < found.fvu


def test_codes_that_are_not_kept_are_made_again(sae, x, parts, monkeypatch):
    monkeypatch.setattr(reading, "CODES_KEPT", 0)
    again = decompose(sae, x, progress=False)
    assert again.to_pandas().equals(parts.to_pandas())


class Pieces:
    """A re-iterable of tensors, which differ from one time to the next with `drift`."""

    def __init__(self, x, drift=0.0):
        self.x, self.drift = x, drift

    def __iter__(self):
        yield from self.x.split(700)
        self.x = self.x * (1 + self.drift)


def test_an_iterable_gives_what_its_tensor_does(sae, x, parts):
    assert decompose(sae, Pieces(x), progress=False).fvu == pytest.approx(parts.fvu, rel=0.1)
    one_piece = decompose(sae, [x[:3000]], progress=False)
    assert one_piece.fvu_nonlinear == pytest.approx(parts.fvu_nonlinear, rel=1e-9)


def test_what_is_the_users_stays_as_it_was(sae, x):
    before, state, rows = sae.W_dec.clone(), torch.get_rng_state(), x.clone()
    found = decompose(sae, x, progress=False)
    assert not any(part.requires_grad for part in (found.linear_map, *found.split(x[:5])))
    assert torch.equal(sae.W_dec, before) and torch.equal(torch.get_rng_state(), state) and torch.equal(x, rows)


def test_high_norm_rows_are_left_out_and_counted(x):
    sae = multiple(12, times=0.9)
    sae.state.norm_limit.fill_(200.0)
    spiked = x.clone()
    spiked[::100] = 1000.0
    found = decompose(sae, spiked, progress=False)
    assert found.dropped == pytest.approx(0.01) and found.dropped_variance > 0.9
    assert found.tokens_fit + found.tokens_heldout == 2970
    total = (spiked - spiked.mean(0)).double().square().sum(1)
    assert found.dropped_variance == pytest.approx(float(total[::100].sum() / total.sum()), rel=1e-5)
    everything = decompose(sae, spiked, high_norm=True, progress=False)
    assert everything.dropped == 0 and everything.tokens_fit + everything.tokens_heldout == 3000
    assert sum(len(chunk.x) for chunk in found.chunks(spiked)) == 2970


def test_a_store_is_held_out_by_document(store):
    rows = Rows(store, 0.5, 0)
    use = uses(rows)
    held = use != MAP
    assert rows.held_out_by == "document" and len(held) == len(store)
    documents = [set(store.documents[use == which].tolist()) for which in (MAP, LEARN, SCORE)]
    assert all(documents) and sum(map(len, documents)) == len(store.documents.unique())
    assert 0.4 < held.float().mean() < 0.6 and 0.2 < (use == SCORE).float().mean() < 0.3
    order = store.documents.unique()
    half = order[len(order) // 2]
    assert held[store.documents < half].any() and held[store.documents >= half].any()  # from all over the corpus
    found = decompose(trained(store[:], tokens=4000, d_sae=64), store, progress=False)
    assert found.held_out_by == "document" and set(found.groups.tolist()) == set(store.documents[held].tolist())


def test_a_long_stream_has_no_more_groups_than_a_short_one():
    groups = torch.cat([chunk.group for chunk in Rows(torch.zeros(200_000, 1), 0.5, 0)])
    assert groups.unique().tolist() == list(range(1024))
    assert groups.bincount().max() < 1.5 * groups.bincount().min()


@pytest.mark.parametrize("holdout", [0.1, 0.25, 0.8])
def test_the_share_held_out_is_near_the_one_asked_for(store, holdout):
    use = uses(Rows(store, holdout, 0))
    assert abs((use != MAP).float().mean() - holdout) < 0.1
    assert abs((use == SCORE).float().mean() - holdout / 2) < 0.1


def test_what_is_learnt_from_the_parts_is_learnt_where_they_are_of_the_size_they_have_elsewhere():
    x = planted(9000, d=60, f=200)
    parts = decompose(trained(x, k=6, d_sae=100, tokens=10_000), x, holdout=0.7, progress=False)
    sizes = {use: [] for use in (MAP, LEARN, SCORE)}
    for chunk in parts.chunks(x):
        sizes[chunk.use].append(parts.split(chunk.x)[2].square().sum(1))
    fitted, learnt, scored = (float(torch.cat(found).mean()) for found in sizes.values())
    assert fitted < 0.98 * min(learnt, scored) and learnt == pytest.approx(scored, rel=0.05)


def test_one_document_is_held_out_by_context_and_one_context_not_at_all(tiny_llama):
    corpus = saelab.load_corpus([" ".join(TEXTS)])
    made = saelab.harvest(
        tiny_llama, corpus, site="blocks.1.hook_resid_post", tokens=1500, context_length=64, split="all", progress=False
    )
    with pytest.warns(UserWarning, match="too few documents"):
        rows = Rows(made, 0.5, 0)
    held = uses(rows) != MAP
    assert rows.held_out_by == "context"
    assert not set(made.contexts[held].tolist()) & set(made.contexts[~held].tolist())
    short = saelab.harvest(
        tiny_llama, corpus, site="blocks.1.hook_resid_post", tokens=60, context_length=64, split="all", progress=False
    )
    with pytest.raises(DataError, match="fewer than 3 contexts"):
        Rows(short, 0.5, 0)


def test_few_tokens_a_dimension_are_warned_of(sae, x):
    with pytest.warns(UserWarning, match=r"a dimension.*1,920"):
        decompose(sae, x[:200], progress=False)


def test_errors_name_the_way_out(sae, x):
    with pytest.raises(ConfigError, match="transcoder"):
        decompose(saelab.SAE(saelab.Transcoder(of=saelab.TopK(k=1, d_sae=4)), 12), x, progress=False)
    with pytest.raises(ConfigError, match="5 wide"):
        decompose(sae, x[:, :5], progress=False)
    with pytest.raises(ConfigError, match="one-shot"):
        decompose(sae, iter([x]), progress=False)
    with pytest.raises(ConfigError, match="holdout is 1.5"):
        decompose(sae, x, holdout=1.5, progress=False)
    with pytest.raises(ConfigError, match="3 dimensions"):
        decompose(sae, x[None], progress=False)
    with pytest.raises(DataError, match="NaN"):
        decompose(sae, torch.full_like(x, torch.nan), progress=False)
    with pytest.raises(DataError, match="more rows"):
        decompose(sae, x[:1], progress=False)
    with pytest.raises(DataError, match="not as tensors"):
        decompose(sae, [[1, 2]], progress=False)
    with pytest.raises(DataError, match="not the same"):
        decompose(sae, Pieces(x, drift=0.1), progress=False)


def test_the_table_has_the_figures(parts):
    table = parts.to_pandas()
    assert {
        "r2_error",
        "fvu",
        "fvu_nonlinear",
        "r2_norm_error",
        "rescaled_scale",
        "dead_r2_error",
        "tokens_per_dimension",
    } <= set(table.columns)
    assert len(table) == 1 and "held out by row" in repr(parts)
