import copy
import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import saelab
from saelab import ConfigError, FeatureChoice, MutualChoice, TopK
from saelab.autoencoders.architecture import Architecture, Batch
from saelab.autoencoders.architectures import zipf
from saelab.autoencoders.averages import average_, forgetting
from saelab.kernels import columns, dense, sparse
from saelab.training.schedule import Schedule
from saelab.training.step import Trainer
from tests.kernels.test_kernels import problem
from tests.training.test_train import interrupting, planted, run_on

shapes = st.tuples(st.integers(1, 300), st.integers(1, 6), st.integers(1, 80), st.integers(0, 40), st.integers(0, 9999))


def same(found, wanted, exact=True):
    assert torch.equal(found.indices, wanted.indices) and torch.equal(found.offsets, wanted.offsets)
    tolerance = {"rtol": 0, "atol": 0} if exact else {"rtol": 1e-5, "atol": 1e-4}
    torch.testing.assert_close(found.values, wanted.values, **tolerance)


def some_budgets(f, most, seed):
    return torch.randint(0, most + 1, (f,), generator=torch.Generator().manual_seed(seed))


# --- the kernel


@given(shapes)
@settings(max_examples=80, deadline=None)
def test_each_column_has_its_largest_as_a_stable_sort_finds_them(shape):
    n, d, f, most, seed = shape
    x, W, b = (t.round() for t in problem(n, d, f, seed))  # many ties and zeros
    m = some_budgets(f, most, seed)
    found = columns.per_latent(x, W, b, m)
    same(found, dense.per_latent(x, W, b, m))
    scores = torch.nn.functional.linear(x, W, b)
    assert torch.equal(found.by_latent().offsets.diff(), torch.minimum(m, (scores > 0).sum(0)))
    assert torch.equal(found.values, scores[found.rows(), found.indices])
    assert len(set(zip(found.rows().tolist(), found.indices.tolist(), strict=True))) == len(found.values)


def test_of_equal_scores_the_lower_token_wins():
    x = torch.tensor([[0.0], [2.0], [1.0], [2.0], [2.0], [-1.0]])
    codes = columns.per_latent(x, torch.ones(2, 1), torch.zeros(2), torch.tensor([2, 9]))
    assert codes.to_dense()[:, 0].tolist() == [0, 2, 0, 2, 0, 0]
    assert codes.to_dense()[:, 1].tolist() == [0, 2, 1, 2, 2, 0]


@pytest.mark.parametrize("f", [2304, 2310])
@pytest.mark.parametrize("kind", ["random", "heavy token", "unlike sample", "tied", "few positive", "zeros"])
def test_a_bf16_shortlist_gives_the_fp32_masks_of_columns(kind, f):
    x, W, b = problem(640, 96, f, 7, torch.float32)
    if kind == "heavy token":
        x[::50] *= 30
    if kind == "unlike sample":
        x[::5] *= 10  # the tokens that the guess is made from
    if kind == "tied":
        x[1::2] = x[::2]
    if kind == "few positive":
        b = b - 35
    if kind == "zeros":
        x[::3] = 0
        b = torch.zeros_like(b)
    m = torch.cat([some_budgets(f - 4, 5, 3), torch.tensor([100, 320, 639, 700])])
    wanted = dense.per_latent(x, W, b, m)
    for shortlist in (True, False):
        same(columns.per_latent(x, W, b, m, shortlist=shortlist), wanted, exact=False)


def test_rounding_does_not_decide():
    x, W, b = problem(640, 96, 2304, 3, torch.float32)
    x = x[:1] + 1e-7 * x  # the scores of a latent are within fp32's rounding of each other
    m = some_budgets(2304, 9, 1)
    for shortlist in (True, False):
        same(columns.per_latent(x, W, b * 0, m, shortlist), dense.per_latent(x, W, b * 0, m), exact=False)


def test_no_budget_gives_no_codes():
    codes = columns.per_latent(torch.randn(3, 2), torch.randn(5, 2), torch.zeros(5), torch.zeros(5, dtype=torch.int64))
    assert len(codes) == 3 and len(codes.values) == 0 and codes.n_latents == 5


@given(shapes)
@settings(max_examples=30, deadline=None)
def test_the_largest_of_given_codes_are_the_largest_of_all(shape):
    n, d, f, most, seed = shape
    x, W, b = (t.round() for t in problem(n, d, f, seed))
    m = some_budgets(f, most, seed)
    same(columns.keep_largest(columns.per_latent(x, W, b, 2 * m + 3), m), columns.per_latent(x, W, b, m))


@pytest.mark.parametrize("narrowed", [False, True])
def test_every_gradient_equals_the_dense_twins(narrowed):
    x, W, b = problem(30, 5, 23, 4)
    W_dec, m = torch.randn(23, 5, dtype=torch.float64), some_budgets(23, 6, 0)
    gradients = []
    for kernels, per_latent in ((sparse, columns.per_latent), (dense, dense.per_latent)):
        leaves = [t.clone().requires_grad_() for t in (x, W, b, W_dec)]
        wide = narrowed and kernels is sparse
        codes = kernels.encode_at(*leaves[:3], per_latent(x, W, b, 2 * m if wide else m))
        codes = columns.keep_largest(codes, m) if wide else codes
        x_hat = kernels.decode(codes, leaves[3])
        loss = (x_hat - leaves[0].detach()).square().sum() + codes.values.cos().sum()
        gradients.append([x_hat, codes.values, *torch.autograd.grad(loss, leaves)])
    for found, wanted in zip(*gradients, strict=True):
        torch.testing.assert_close(found, wanted)


def test_an_average_forgets_and_begins_anew_with_a_new_run():
    total, weight, last = torch.tensor(8.0), torch.tensor(2.0), torch.tensor(0.5)
    assert forgetting(last, 0.6, 0.1) == pytest.approx(0.5) and float(last) == 0.5
    average_(total, weight, last, 0.6, 0.1, torch.tensor(3.0), 4)
    assert (float(total), float(weight), float(last)) == pytest.approx((7, 5, 0.6))
    assert forgetting(last, 0.0, 0.1) == 0


# --- the architecture


def scores_of(sae, x):
    return sae.cfg.scores(sae.params(), Batch(x, x))


def observed(sae, x, progress):
    """The codes of a batch from which the SAE has learnt."""
    batch = Batch(x, x, progress=progress)
    batch.scores = scores_of(sae, x)
    codes = sae.cfg.allocate(batch.scores, sae.state, progress)
    with torch.no_grad():
        sae.cfg.observe(batch, codes, sae.params(), sae.state)
    return codes


@pytest.mark.parametrize("rounding", ["systematic", "remainder"])
@pytest.mark.parametrize("n", [1, 7, 500])
def test_each_latent_gets_its_budget_and_the_rest_is_counted(rounding, n):
    shares = tuple(1.0 / (i + 1) for i in range(53))
    cfg = FeatureChoice(k=4, d_sae=53, budgets=shares, rounding=rounding, mutual_share=0)
    sae, x = saelab.SAE(cfg, 16), planted(n)
    with torch.no_grad():
        sae.encoder_bias[7] = -1e6  # never positive
        sae.encoder_bias[11] = 1e6  # always
    again = saelab.SAE(cfg, 16)
    again.load_state_dict(sae.state_dict())
    codes = observed(sae, x, 0.0)
    assert float(sae.state.rates.sum()) == pytest.approx(4) and float(sae.state.rates.max()) <= 0.5
    budgets, _ = cfg.whole_budgets(sae.state.rates, again.state.rounding_state, n)
    assert int(budgets.sum()) == 4 * n
    positive = (scores_of(sae, x).dense() > 0).sum(0)
    assert torch.equal(codes.by_latent().offsets.diff(), torch.minimum(budgets, positive))
    assert int(sae.state.offered) == 4 * n and int(sae.state.unspent) == 4 * n - len(codes.values)
    assert cfg.unspent_share(sae.state) == pytest.approx(1 - len(codes.values) / (4 * n))


def test_the_span_of_calibration_chooses_alike():
    cfg = FeatureChoice(k=4, d_sae=53, budgets="uniform", mutual_share=0)
    one, other = saelab.SAE(cfg, 16), saelab.SAE(cfg, 16)
    x = planted(300)
    same(observed(one, x, 0.5), observed(other, x, 0.95))
    assert not cfg.usable(one.state) and cfg.usable(other.state)


def zipfian(n, f=48, d=24, k=3.0, seed=0):
    """Planted features that fire on rates * n of the tokens each, and those rates."""
    generator = torch.Generator().manual_seed(seed)
    rates = zipf.spread(zipf.law(1.0, 2.0, f), k, 0.5).float()
    features = torch.nn.functional.normalize(torch.randn(f, d, generator=generator), dim=1)
    fires = torch.rand(n, f, generator=generator) < rates
    strengths = 0.5 + torch.rand(n, f, generator=generator)
    return (strengths * fires) @ features, features, rates


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1])
def test_with_the_true_budgets_it_reconstructs_better_than_topk(seed):
    x, _, rates = zipfian(25_000, seed=seed)
    true = FeatureChoice(k=3, d_sae=48, budgets=tuple(rates.tolist()), mutual_share=0)
    left = {}
    for cfg in (TopK(k=3, d_sae=48), MutualChoice(k=3, d_sae=48), true):
        sae = run_on(x[:20_000], sae=cfg, tokens=200_000, batch_size=1000, lr=2e-3, seed=seed).sae
        held_out = x[20_000:]
        assert sae.encode_sparse(held_out).l0 == pytest.approx(3, rel=0.05)
        left[type(cfg)] = float((held_out - sae(held_out).detach()).square().sum() / held_out.var(0).sum())
    assert left[FeatureChoice] < 0.9 * left[TopK] and left[MutualChoice] < left[TopK]


@pytest.fixture(scope="module")
def trained():
    x, _, _ = zipfian(60_000, f=120, d=32)
    cfg = FeatureChoice(k=3, d_sae=150, aux="zipf")
    return run_on(x[:50_000], sae=cfg, tokens=200_000, batch_size=1000), x[50_000:]


def test_thresholds_keep_the_budgets_on_new_tokens(trained):
    run, held_out = trained
    codes = run.sae.encode_sparse(held_out)
    state = run.sae.state
    assert codes.l0 == pytest.approx(3, rel=0.1)
    fires = codes.by_latent().offsets.diff()
    frequent = state.rates * len(held_out) > 150
    ratio = fires[frequent] / (state.rates[frequent] * len(held_out))
    assert int(frequent.sum()) > 20 and float((ratio.log().abs()).mean()) < 0.2
    assert int((fires[state.rates * len(held_out) > 10] == 0).sum()) == 0
    assert run.sae.cfg.unspent_share(state) < 0.05
    assert float(state.zipf[0]) > 0.3


def test_the_plot_shows_densities_budgets_and_the_law(trained):
    run, _ = trained
    curves = {trace.name: trace.y for trace in run.plot().data[4:]}
    assert set(curves) == {"density", "budget", "law"} and sum(curves["law"]) == pytest.approx(3)
    assert all(len(curve) == 150 and list(curve) == sorted(curve, reverse=True) for curve in curves.values())


def test_ranks_come_from_the_mutual_choice_phase(trained):
    run, _ = trained
    assert float(run.sae.state.rates.sum()) == pytest.approx(3)
    ranks = run.sae.state.rates.argsort(descending=True)
    densities = run.sae.latent_stats.density[ranks]
    assert float(densities[:30].mean()) > 2 * float(densities[-30:].mean())


def test_it_is_saved_and_loaded_to_the_same_bits(trained, tmp_path):
    run, x = trained
    run.sae.save(tmp_path / "sae")
    again = saelab.SAE.load(tmp_path / "sae")
    assert again.cfg == run.sae.cfg and torch.equal(again(x[:300]), run.sae(x[:300]))
    assert all(torch.equal(again.state_dict()[name], tensor) for name, tensor in run.sae.state_dict().items())


def test_it_can_be_trained_on_and_begins_a_new_schedule(trained):
    run, x = trained
    more = run_on(x * 64, sae=run.sae, tokens=20_000, batch_size=1000).sae
    assert float(more.state.scale) == float(run.sae.state.scale) / 64
    assert int(more.state.offered) == 3 * 6000  # the last 30%
    assert float(more.state.density_weight) < 20_000
    stopped = run_on(x, sae=run.sae, tokens=1000, batch_size=1000).sae  # only Mutual Choice: the old thresholds serve
    assert torch.isfinite(stopped(x[:10])).all()


def test_another_input_scale_changes_no_code(trained):
    run, x = trained
    sae = copy.deepcopy(run.sae)
    Trainer(sae, Schedule(1000, 100))._rescale(*[float(sae.state.scale) / 64] * 2)
    assert torch.equal(sae.encode(x), run.sae.encode(x))


@pytest.mark.parametrize("at", [10, 18, 23])
def test_resume_is_bitwise_in_every_phase(tmp_path, at):
    x = planted()
    cfg = FeatureChoice(k=3, d_sae=67, aux="zipf")
    arguments = {"sae": cfg, "tokens": 6000, "log_every": 1, "lr": 1e-3}
    whole = run_on(x, **arguments)
    assert run_on(x, out=tmp_path / "run", loggers=[interrupting(at)], **arguments).interrupted
    rest = run_on(x, out=tmp_path / "run", **arguments)
    assert all(torch.equal(rest.sae.state_dict()[name], tensor) for name, tensor in whole.sae.state_dict().items())


def test_one_threshold_serves_until_there_are_many(tmp_path):
    x = planted()
    run = run_on(
        x, sae=FeatureChoice(k=3, d_sae=64), tokens=6000, out=tmp_path, log_every=1, loggers=[interrupting(12)]
    )
    assert run.sae.cfg.thresholds(run.sae.state).ndim == 0 and run.sae.encode_sparse(x).l0 > 0
    with pytest.raises(ConfigError, match="threshold"):
        saelab.SAE(FeatureChoice(k=2, d_sae=8), 4)(torch.randn(2, 4))


def test_a_latent_that_cannot_spend_its_budget_fires_on_all_it_has():
    x = planted(4000)
    start = saelab.SAE(FeatureChoice(k=3, d_sae=64, budgets="uniform", mutual_share=0, aux_coefficient=0.0), 16)
    with torch.no_grad():
        start.encoder_bias[5] = -1e6
    run = run_on(x, sae=start, tokens=20_000)
    assert float(run.sae.state.latent_cut[5]) == 0 and int(run.sae.state.unspent) > 0
    assert 5 not in run.sae.encode_sparse(x).indices


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"k": 0}, "k is 0"),
        ({"k": 6}, "k is 6 and 10 latents .* 0.5 .* 5"),
        ({"cap": 0.0}, "cap is 0.0"),
        ({"mutual_share": 0.9}, "mutual_share is 0.9"),
        ({"mutual_share": 0}, "'density' are learnt"),
        ({"mutual_share": 0, "budgets": "zipf"}, "'zipf' are learnt"),
        ({"shrinkage": 1.5}, "shrinkage is 1.5"),
        ({"rounding": "up"}, "'up'"),
        ({"budgets": "flat"}, "'flat'"),
        ({"budgets": (1.0, 2.0)}, "2 budgets .* d_sae = 10"),
        ({"budgets": (1.0,) * 9 + (0.0,)}, "least of them 0.0"),
        ({"aux": "l1"}, "'l1'"),
        ({"tau": -1.0}, "tau is -1.0"),
    ],
)
def test_bad_configurations_say_their_numbers(arguments, message):
    with pytest.raises(ConfigError, match=message):
        FeatureChoice(**{"k": 2, "d_sae": 10} | arguments)


def test_a_configuration_survives_json():
    for budgets in ("density", "zipf", "uniform", (3.0, 2.0, 1.0, 1.0)):
        cfg = FeatureChoice(k=2, d_sae=4, budgets=budgets, seed=3)
        fields = json.loads(json.dumps(cfg.to_dict()))
        assert Architecture.from_dict(fields) == cfg
        fields.pop("shrinkage")  # as older files have it
        assert Architecture.from_dict(fields) == cfg


# --- aux_zipf


@pytest.mark.parametrize("kind", [MutualChoice, FeatureChoice])
def test_aux_zipf_at_tau_0_is_aux_k(kind):
    x = planted()
    start = saelab.SAE(kind(k=3, d_sae=64), 16)
    with torch.no_grad():
        start.encoder_bias[:20] = -300.0
    runs = []
    for cfg in (kind(k=3, d_sae=64), kind(k=3, d_sae=64, aux="zipf", tau=0.0)):
        sae = saelab.SAE(cfg, 16)
        sae.load_state_dict(start.state_dict(), strict=False)
        runs.append(run_on(x, sae=sae, tokens=10_000))
    assert runs[0].history.aux.max() > 0
    assert runs[0].history.aux.tolist() == runs[1].history.aux.tolist()
    assert torch.equal(runs[0].sae.W_dec, runs[1].sae.W_dec)


def test_aux_zipf_revives_the_dead_and_the_under_used_of_the_lower_half():
    cfg = MutualChoice(k=2, d_sae=9, aux="zipf")
    state = saelab.SAE(cfg, 4).state
    density = 0.9 * torch.arange(1, 10, dtype=torch.float64) ** -1.0
    density[8] /= 100
    state.density_sum.copy_(density[torch.tensor([8, 1, 2, 3, 4, 5, 6, 7, 0])] * 1000)  # latent 0 is the rarest
    state.density_weight.fill_(1000)
    order = cfg.density(state).argsort(descending=True)
    state.target.copy_(cfg.expected_density(state, order))
    assert float(state.target.sum()) == pytest.approx(2) and int(state.target.argmax()) == 8
    assert zipf.aux_zipf_latents(state.dead, cfg.density(state), state.target, 0.5).nonzero().tolist() == [[0]]
    state.tokens_since_fired[3] = state.dead_after
    found = zipf.aux_zipf_latents(state.dead, cfg.density(state), state.target, 0.5)
    assert found.nonzero().flatten().tolist() == [0, 3]
    assert torch.equal(zipf.aux_zipf_latents(state.dead, cfg.density(state), state.target, 0.0), state.dead)


def test_the_upper_half_has_no_target():
    run = run_on(planted(), sae=MutualChoice(k=3, d_sae=65, aux="zipf"), tokens=10_000)
    target = run.sae.state.target
    assert int((target > 0).sum()) == 32
    assert float(run.sae.state.density_sum.sum() / run.sae.state.density_weight) == pytest.approx(3, rel=1e-3)


def test_its_first_phase_is_mutual_choice_bit_for_bit():
    """What benchmarks/architectures_data.py rests on when it trains that phase once for both."""
    x = planted()
    schedule = Schedule(tokens=8000, batch_size=400)
    trainers = [
        Trainer(saelab.SAE(cfg, 16, seed=3), schedule)
        for cfg in (FeatureChoice(k=3, d_sae=67), MutualChoice(k=3, d_sae=67))
    ]
    for trainer in trainers:
        trainer.initialise({"x": x})
    step = 0
    while schedule.progress(step) < trainers[0].sae.cfg.mutual_share:
        for trainer in trainers:
            trainer.step({"x": x[400 * (step % 10) : 400 * (step % 10 + 1)]}, log=False)
        step += 1
    ours, theirs = (trainer.state_dict() for trainer in trainers)
    assert set(theirs) <= set(ours) and step == 14
    for name, tensor in theirs.items():  # what is not known yet is NaN in both
        torch.testing.assert_close(ours[name], tensor, rtol=0, atol=0, equal_nan=True)
