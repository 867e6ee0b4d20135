"""ReLU, Gated, JumpReLU, Matryoshka, Multi-TopK: losses and gradients against dense twins, L0 targets, resampling, saving."""

import math

import pytest
import torch
from safetensors.torch import load_file

import saelab
from saelab import SAE, BatchTopK, ConfigError, Gated, JumpReLU, Matryoshka, MultiTopK, ReLU, TopK
from saelab.autoencoders import objectives, penalty
from saelab.autoencoders.architecture import Batch
from saelab.autoencoders.architectures import jumprelu
from saelab.base.codes import SparseCodes
from saelab.training.schedule import Schedule
from saelab.training.step import Trainer
from tests.training.test_train import interrupting, planted, run_on

D, F, N = 6, 20, 33
FAMILY = {
    "relu": ReLU(l1=0.7, d_sae=F),
    "relu, unit rows": ReLU(l1=0.7, d_sae=F, unit_decoder=True, resample=True),
    "attention output": ReLU.attention_output(l1=0.7, d_sae=F),
    "gated": Gated(l1=0.7, d_sae=F),
    "jumprelu": JumpReLU(target_l0=3, d_sae=F, bandwidth=0.6),
    "matryoshka": Matryoshka(k=3, d_sae=F),
    "multitopk": MultiTopK(k=3, d_sae=F),
}
family = pytest.mark.parametrize("cfg", FAMILY.values(), ids=FAMILY.keys())


def fvu(x, x_hat):
    return (x - x_hat).square().sum() / (x - x.mean(0)).square().sum()


def squared(x, x_hat):
    return (x - x_hat).square().sum(1).mean()


def jittered(cfg, dtype=torch.float64):
    """An SAE none of whose parameters is at its start."""
    sae = SAE(cfg, D).to(dtype)
    with torch.no_grad():
        for parameter in sae.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
        for name in ("input_norm", "price_share", "excess"):
            if name in sae.state._buffers:
                sae.state._buffers[name].fill_(0.8)
    return sae


def losses_of(sae, x, progress=0.5):
    """The terms as the trainer makes them, and the codes."""
    cfg, params = sae.cfg, sae.params()
    batch = Batch(x, x, progress=progress)
    batch.scores = cfg.scores(params, batch)
    codes = cfg.allocate(batch.scores, sae.state, progress)
    dense = codes if isinstance(codes, torch.Tensor) else codes.to_dense()
    x_hat = dense @ params.W_dec + params.b_dec
    terms = cfg.losses(batch, codes, x_hat, params, sae.state)
    if "price_share" in sae.state._buffers:
        with torch.no_grad():
            cfg.observe(batch, codes, params, sae.state)
    return terms, dense


class Step(torch.autograd.Function):
    """1[p > theta] in the words of the formula, one entry at a time."""

    @staticmethod
    def forward(ctx, p, theta, width):
        ctx.save_for_backward(p, theta)
        ctx.width = width
        return (p > theta).to(p.dtype)

    @staticmethod
    def backward(ctx, grad):
        p, theta = ctx.saved_tensors
        K = (((p - theta) / ctx.width).abs() < 0.5).to(p.dtype)
        return None, (-K / ctx.width * grad).sum(0), None


def twin(sae, x):
    """The sum of the losses in plain autograd, dense, from the formulas alone."""
    cfg, state = sae.cfg, sae.state
    W, b, W_dec, b_dec = sae.encoder_weight, sae.encoder_bias, sae.W_dec, sae.decoder_bias
    p = (x - b_dec) @ W.T + b
    norm = float(state._buffers.get("input_norm", torch.ones(())))
    if isinstance(cfg, ReLU):
        f = p.relu()
        size = 1.0 if cfg.unit_decoder else W_dec.norm(dim=1)
        return squared(x, f @ W_dec + b_dec) + 0.7 * norm * float(state.price_share) * (f * size).sum(1).mean()
    if isinstance(cfg, Gated):
        r, b_mag = sae.extra["r_mag"], sae.extra["b_mag"]
        f = (p > 0) * (r.exp() * ((x - b_dec) @ W.T) + b_mag).relu()
        price = 0.7 * norm * float(state.price_share) * p.relu().sum(1).mean()
        return squared(x, f @ W_dec + b_dec) + price + squared(x, p.relu() @ W_dec.detach() + b_dec.detach())
    if isinstance(cfg, JumpReLU):
        theta, width = sae.extra["log_threshold"].exp(), 0.6 * norm
        # p 1[p > theta]: the straight-through gradient of theta has theta where p is within the window
        fires = (p > theta).to(p.dtype)
        f = p * fires + theta.detach() * (Step.apply(p, theta, width) - fires)
        price = math.exp(float(state.log_price) + float(state.excess)) * norm**2
        return squared(x, f @ W_dec + b_dec) + price * Step.apply(p, theta, width).sum(1).mean()
    positive = p.relu()
    if isinstance(cfg, Matryoshka):
        cut = positive.flatten().topk(3 * N).values[-1]
        f = positive * (positive >= cut)
        edges = [1, 2, 5, 10, 20]  # 20 times 1/16, 1/8, 1/4, 1/2, 1, rounded
        assert cfg.widths == tuple(edges)
        return sum(fvu(x, f[:, :w] @ W_dec[:w] + b_dec) for w in edges) / 5
    kept = [positive * (positive >= positive.topk(k, dim=1).values[:, -1:]) for k in (3, 12)]
    small, wide = (fvu(x, f @ W_dec + b_dec) for f in kept)
    return small + wide / 8


@family
def test_loss_and_gradients_equal_the_dense_twin(cfg):
    sae, x = jittered(cfg), torch.randn(N, D, dtype=torch.float64)
    terms, _ = losses_of(sae, x)
    loss = torch.stack(list(terms.values())).sum()
    found = torch.autograd.grad(loss, list(sae.parameters()), allow_unused=True)
    wanted_loss = twin(sae, x)
    wanted = torch.autograd.grad(wanted_loss, list(sae.parameters()), allow_unused=True)
    torch.testing.assert_close(loss, wanted_loss)
    for name, one, other in zip(dict(sae.named_parameters()), found, wanted, strict=True):
        assert one is not None and float(one.abs().sum()) > 0, name
        torch.testing.assert_close(one, other, msg=name, check_dtype=False, rtol=1e-5, atol=1e-7)


def test_jump_and_its_count_have_the_papers_gradients():
    p = torch.tensor([0.5, 1.2, 1.9, 4.0], requires_grad=True)
    theta = torch.tensor([1.0, 1.0, 2.0, 1.0], requires_grad=True)
    near = SparseCodes(p, torch.arange(4), torch.tensor([0, 4]), 4)
    f = jumprelu.jump(near, theta, 0.5).values  # windows reach .25 to either side
    assert f.tolist() == [0.0, p[1].item(), 0.0, 4.0]
    f.backward(torch.tensor([1.0, 10.0, 100.0, 1000.0]))
    assert p.grad.tolist() == [0.0, 10.0, 0.0, 1000.0]
    assert theta.grad.tolist() == [0.0, -1 / 0.5 * 10, -2 / 0.5 * 100, 0.0]
    theta.grad = None
    fired = jumprelu.count(near, theta, 0.5)
    assert float(fired.detach()) == 2
    (3 * fired).backward()
    assert theta.grad.tolist() == [0.0, -3 / 0.5, -3 / 0.5, 0.0]


def test_what_does_not_fire_but_lets_its_threshold_learn_is_not_counted():
    x = planted(400, d=D, f=10)
    trainer = Trainer(SAE(JumpReLU(target_l0=3, d_sae=F, bandwidth=4.0), D), Schedule(4000, 400))
    trainer.initialise({"x": x})
    sae = trainer.sae
    scores = sae.cfg.scores(sae.params(), Batch(x * sae.state.scale, x * sae.state.scale))
    codes = sae.cfg.allocate(scores, sae.state, 0.5)
    fires = scores.dense() > scores.theta_F
    assert len(codes.values) > int(fires.sum()) and torch.equal(codes.to_dense(), scores.dense() * fires)
    assert bool((scores.near(4.0 * float(sae.state.input_norm)).values < 0).any())  # windows reach below zero
    assert trainer.step({"x": x})["l0"] == float(fires.sum()) / 400
    since = sae.state.tokens_since_fired
    assert torch.equal(since == 0, fires.any(0))


def test_losses_by_hand():
    sae = SAE(ReLU(l1=2.0, d_sae=2), 2)
    with torch.no_grad():
        sae.encoder_weight.copy_(torch.eye(2))
        sae.W_dec.copy_(torch.tensor([[0.5, 0.0], [0.0, 2.0]]))
    terms, codes = losses_of(sae, torch.tensor([[2.0, 1.0], [-1.0, 3.0]]), progress=0.025)
    assert codes.tolist() == [[2, 1], [0, 3]]
    # reconstructions (1, 2) and (0, 6): errors 1 + 1 and 1 + 9; half of the price at 2.5% of the run
    assert float(terms["squared_error"].detach()) == pytest.approx((2 + 10) / 2)
    assert float(terms["l1"].detach()) == pytest.approx(2.0 * 0.5 * ((2 * 0.5 + 1 * 2) + 3 * 2) / 2)

    gated = SAE(Gated(l1=2.0, d_sae=2), 2)
    with torch.no_grad():
        gated.encoder_weight.copy_(torch.eye(2))
        gated.encoder_bias.copy_(torch.tensor([-1.0, 0.0]))
        gated.W_dec.copy_(torch.eye(2))
        gated.extra["r_mag"].copy_(torch.tensor([math.log(2), 0.0]))
        gated.extra["b_mag"].copy_(torch.tensor([0.0, -2.0]))
    terms, codes = losses_of(gated, torch.tensor([[3.0, 1.0]]), progress=1.0)
    torch.testing.assert_close(
        codes.detach(), torch.tensor([[6.0, 0.0]])
    )  # the gate opens both, the second is negative
    assert float(terms["squared_error"].detach()) == pytest.approx(9 + 1)
    assert float(terms["l1"].detach()) == pytest.approx(2 * (2 + 1))
    assert float(terms["aux"].detach()) == pytest.approx((3 - 2) ** 2)


def test_the_price_is_in_units_of_the_input():
    x = planted(500)
    for scale in (1.0, 8.0):
        sae = SAE(ReLU(l1=1.0, d_sae=F, input_scale=None), 16)
        Trainer(sae, Schedule(1000, 100)).initialise({"x": x * scale})
        assert float(sae.state.input_norm) == pytest.approx(float((x * scale).norm(dim=1).mean()) / 4)
    small, large = (run_on(x * scale, sae=ReLU(l1=1.0, d_sae=F), tokens=2000).sae for scale in (1, 1024))
    assert torch.equal(small.W_dec, large.W_dec) and torch.equal(small(x) * 1024, large(x * 1024))


@family
def test_training_explains_and_saving_keeps_the_bits(cfg, tmp_path):
    x = planted(3000, d=D, f=10)
    run = run_on(x, sae=cfg, tokens=30_000)
    sae = run.sae
    explained = 1 - fvu(x, sae(x).detach())
    assert float(explained) > 0.6
    norms = sae.W_dec.detach().norm(dim=1)
    assert torch.allclose(norms, torch.ones(F), atol=1e-5) == cfg.recipe.unit_decoder
    assert float(sae.state.scale) != 1
    sae.save(tmp_path / "sae")
    again = SAE.load(tmp_path / "sae")
    assert type(again.cfg) is type(cfg) and again.cfg == cfg == eval(repr(cfg))
    assert torch.equal(again.encode(x), sae.encode(x)) and torch.equal(again(x), sae(x))
    for name, tensor in sae.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name


@family
def test_inference_is_the_dense_rule(cfg):
    x = planted(2000, d=D, f=10)
    sae = run_on(x, sae=cfg, tokens=5000).sae
    with torch.no_grad():
        p = (x - sae.b_dec) @ sae.W_enc + sae.b_enc
        if isinstance(cfg, Gated):
            magnitude = ((p - sae.b_enc) * sae.extra["r_mag"].exp() + sae.extra["b_mag"] / sae.state.scale).relu()
            wanted = magnitude * (p > 0)
        elif isinstance(cfg, TopK):
            wanted = p.relu() * (p >= p.topk(3, dim=1).values[:, -1:])
        else:
            threshold = cfg.thresholds(sae.state)
            wanted = p.relu() * (p > (0 if threshold is None else threshold / sae.state.scale))
    torch.testing.assert_close(sae.encode(x).detach(), wanted, rtol=1e-4, atol=2e-3)


SAELENS = {
    "relu": ("standard", set()),
    "gated": ("gated", {"b_gate", "r_mag", "b_mag"}),
    "jumprelu": ("jumprelu", {"threshold"}),
    "matryoshka": ("jumprelu", {"threshold"}),
    "multitopk": ("topk", set()),
}


@pytest.mark.parametrize("name", SAELENS)
def test_the_folder_is_saelens_v6s(name, tmp_path):
    x = planted(1000, d=D, f=10)
    sae = run_on(x, sae=FAMILY[name], tokens=3000).sae
    sae.save(tmp_path / "sae")
    weights = load_file(tmp_path / "sae" / "sae_weights.safetensors")
    architecture, more = SAELENS[name]
    assert f'"architecture": "{architecture}"' in (tmp_path / "sae" / "cfg.json").read_text()
    bias = set() if architecture == "gated" else {"b_enc"}
    assert set(weights) == {"W_enc", "W_dec", "b_dec"} | bias | more
    p = (x - weights["b_dec"]) @ weights["W_enc"]  # SAELens's own forward
    if architecture == "gated":
        magnitude = (p * weights["r_mag"].exp() + weights["b_mag"]).relu()
        codes = magnitude * (p + weights["b_gate"] > 0)
    elif architecture == "topk":
        top = (p + weights["b_enc"]).relu().topk(3, dim=1)
        codes = torch.zeros_like(p).scatter(1, top.indices, top.values)
    else:
        p = p + weights["b_enc"]
        codes = p.relu() * (p > weights.get("threshold", torch.zeros(F)))
    torch.testing.assert_close(codes, sae.encode(x).detach(), rtol=1e-4, atol=2e-3)


@family
def test_resume_is_bitwise(cfg, tmp_path):
    x = planted()
    arguments = {"sae": cfg, "tokens": 6000, "log_every": 1}
    whole = run_on(x, **arguments)
    assert run_on(x, out=tmp_path / "run", loggers=[interrupting(15)], **arguments).interrupted
    rest = run_on(x, out=tmp_path / "run", **arguments)
    assert all(torch.equal(rest.sae.state_dict()[name], tensor) for name, tensor in whole.sae.state_dict().items())


@family
def test_going_on_at_another_scale_starts_from_the_same_codes(cfg):
    x = planted(3000)
    sae = run_on(x, sae=cfg, tokens=20_000).sae
    for name in ("first", "second"):
        more = run_on(x * 64, sae=sae, tokens=256, batch_size=256, lr=0.0).sae
        assert float(more.state.scale) == float(sae.state.scale) / 64, name
        codes, kept = more.encode(x[:200]), sae.encode(x[:200])
        torch.testing.assert_close(codes, kept, rtol=1e-3, atol=1e-2)
    more = run_on(x, sae=sae, tokens=20_000)
    assert float(more.history.explained_variance.iloc[-1]) > 0.5
    if isinstance(cfg, ReLU | Gated):
        assert float(more.sae.state.price_share) == 1


def with_dead_latents(cfg, n_dead=24):
    sae = SAE(cfg, 16)
    with torch.no_grad():
        sae.encoder_bias[:n_dead] = -1e4
    return sae


def test_resampling_revives_dead_latents():
    x = planted()
    dead = {}
    for resample in (False, True):
        cfg = ReLU(l1=1.0, d_sae=64, unit_decoder=True, resample=resample)
        run = run_on(x, sae=with_dead_latents(cfg), tokens=60_000)
        dead[resample] = int(run.history.dead.iloc[-1])
        alive = run.sae.encode(x)[:, :24].sum(0) > 0
        assert int(alive.sum()) == 0 if not resample else int(alive.sum()) >= 20
    assert dead[True] < 4 < 24 <= dead[False]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_resampled_latent_points_at_a_row_and_has_no_past(dtype):
    x = planted(256)
    cfg = ReLU(l1=0.0, d_sae=32, unit_decoder=True, resample=True)
    sae = with_dead_latents(cfg, 5).to(dtype)
    trainer = Trainer(sae, Schedule(256 * 10, 256), lr=1e-3)
    trainer.initialise({"x": x})
    with torch.no_grad():
        sae.encoder_bias[:5] = -1e4
    while trainer.done < 2:
        trainer.step({"x": x})
    sae.state.tokens_since_fired[:5] = 10**9
    before = sae.encoder_weight.detach().float()[5:].norm(dim=1).mean()
    trainer.step({"x": x})  # the one at 20% of the run
    rows = torch.nn.functional.normalize(x * sae.state.scale - sae.decoder_bias.detach().float(), dim=1)
    fit = (sae.W_dec.detach().float()[:5] @ rows.T).amax(1)
    assert torch.all(fit > 0.999)
    norms = sae.encoder_weight.detach().float()[:5].norm(dim=1)
    torch.testing.assert_close(norms, 0.2 * before.expand(5), rtol=0.02, atol=0)
    assert sae.encoder_bias[:5].tolist() == [0.0] * 5
    assert int(sae.state.tokens_since_fired[:5].max()) <= 256
    for parameter in (sae.W_dec, sae.encoder_weight, sae.encoder_bias):
        moments = trainer.optimizer.state[parameter]
        assert float(moments["exp_avg"][:5].abs().sum()) == 0 == float(moments["exp_avg_sq"][:5].abs().sum())
    assert float(trainer.optimizer.state[sae.W_dec]["exp_avg_sq"][5:].sum()) > 0


def test_the_rate_climbs_again_after_resampling():
    cfg = ReLU.attention_output(l1=1.0, d_sae=F)
    assert cfg.recipe.lr_factor(0.19, 1.0) == 1.0
    assert cfg.recipe.lr_factor(0.2, 1.0) == pytest.approx(0.1) and cfg.recipe.lr_factor(0.21, 1.0) == pytest.approx(
        0.55
    )
    assert cfg.recipe.lr_factor(0.22, 1.0) == pytest.approx(1) and cfg.recipe.lr_factor(0.6, 0.5) == pytest.approx(0.05)
    assert TopK(k=1, d_sae=2).recipe.lr_factor(0.2, 0.7) == 0.7
    assert run_on(planted(), sae=cfg, tokens=25_600, lr=1e-3).history.lr.iloc[20] == pytest.approx(1e-4)


def test_an_encoder_starts_where_it_reconstructs():
    x = planted(2000)
    for cfg in (ReLU(l1=1.0, d_sae=200), Gated(l1=1.0, d_sae=200)):
        run = run_on(x, sae=cfg, tokens=256, lr=1e-12)
        assert run.history.explained_variance.iloc[0] > 0
    batch = Batch(x, x, progress=0.05)
    assert float(penalty.share(batch, run.sae.state, ramp=0.2)) == 0.25


def test_relus_price_rises_as_the_source_has_it():
    """Over 5% of the run (Conerly et al. 2024)."""
    sae = SAE(ReLU(l1=1.0, d_sae=8), 4)
    for progress, share in ((0.0, 0.0), (0.01, 0.2), (0.05, 1.0), (0.5, 1.0)):
        losses_of(sae, torch.randn(4, 4), progress)
        assert float(sae.state.price_share) == pytest.approx(share)


def test_matryoshka_uses_mutual_choice():
    x = planted(30_000)
    nested = run_on(x[:20_000], sae=Matryoshka(k=4, d_sae=64), tokens=50_000)
    plain = run_on(x[:20_000], sae=BatchTopK(k=4, d_sae=64), tokens=50_000)
    assert nested.sae.encode_sparse(x[20_000:]).l0 == pytest.approx(4, rel=0.1)

    def first(sae):  # how well the first quarter of the latents reconstructs
        codes = sae.encode(x[20_000:]).detach()
        codes[:, 16:] = 0
        return 1 - fvu(x[20_000:], sae.decode(codes).detach())

    assert float(first(nested.sae)) > float(first(plain.sae)) + 0.1


def test_widths_of_few_latents_and_other_groups():
    assert Matryoshka(k=1, d_sae=3).widths == (1, 2, 3)
    assert Matryoshka(k=1, d_sae=1).widths == (1,)
    assert Matryoshka(k=1, d_sae=7, groups=(0.5, 0.5)).widths == (4, 7)
    assert Matryoshka(k=1, d_sae=7, groups=(1.0,)).widths == (7,)
    one = jittered(Matryoshka(k=2, d_sae=F, groups=(1.0,)))
    terms, dense = losses_of(one, x := torch.randn(N, D, dtype=torch.float64))
    torch.testing.assert_close(terms["prefix_fvu"], fvu(x, dense @ one.W_dec + one.decoder_bias))


def test_multitopk_works_better_with_a_wider_budget():
    x = planted(10_000)
    explained = {}
    for cfg in (TopK(k=2, d_sae=64), MultiTopK(k=2, d_sae=64)):
        sae = run_on(x, sae=cfg, tokens=50_000).sae
        params = sae.params()
        batch = Batch(x * sae.state.scale, x * sae.state.scale)
        wide = cfg.scores(params, batch).per_token(8).to_dense().detach()
        x_hat = wide @ params.W_dec + params.b_dec
        explained[type(cfg)] = 1 - float(objectives.fraction_of_variance_unexplained(batch.x, x_hat.detach()))
    assert explained[MultiTopK] > explained[TopK]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ReLU(l1=-1.0, d_sae=8), "l1 is -1.0"),
        (lambda: ReLU(l1=float("nan"), d_sae=8), "l1 is nan"),
        (lambda: ReLU(l1=1.0, d_sae=8, betas=(0.9, 1.0)), r"betas\[1\] is 1.0"),
        (lambda: ReLU(l1=1.0, d_sae=8, warm_restarts=True), "resample=True"),
        (lambda: ReLU(l1=1.0, d_sae=0), "d_sae is 0"),
        (lambda: Gated(l1=-2, d_sae=8), "l1 is -2"),
        (lambda: JumpReLU(target_l0=9, d_sae=8), "target_l0 is 9.*at most 8"),
        (lambda: JumpReLU(target_l0=0, d_sae=8), "target_l0 is 0"),
        (lambda: JumpReLU(target_l0=1, d_sae=8, bandwidth=0.0), "bandwidth is 0.0"),
        (lambda: JumpReLU(target_l0=1, d_sae=8, start_factor=-1), "start_factor is -1"),
        (lambda: JumpReLU(target_l0=1, d_sae=8, dead_coefficient=-1), "dead_coefficient is -1"),
        (lambda: Matryoshka(k=1, d_sae=8, groups=(0.5, 0.4)), "adding up to 0.9"),
        (lambda: Matryoshka(k=1, d_sae=8, groups=()), "adding up to 0"),
        (lambda: Matryoshka(k=1, d_sae=8, groups=(1.5, -0.5)), "above 0"),
        (lambda: Matryoshka(k=9, d_sae=8), r"k is 9.*from 1 to 8 \(d_sae\)"),
        (lambda: MultiTopK(k=9, d_sae=8), r"k is 9.*from 1 to 8 \(d_sae\)"),
    ],
)
def test_bad_numbers_are_named(make, message):
    with pytest.raises(ConfigError, match=message):
        make()


@pytest.mark.parametrize("name", ["relu", "attention output", "gated", "jumprelu"])
def test_one_row_and_rows_of_zeros(name):
    sae = SAE(FAMILY[name], D)
    trainer = Trainer(sae, Schedule(64, 8), lr=1e-3)
    rows = [torch.randn(8, D), torch.zeros(8, D), torch.randn(1, D)]
    trainer.initialise({"x": rows[0]})
    for x in rows:
        figures = trainer.step({"x": x})
        assert math.isfinite(float(figures["loss"]))
    assert all(bool(torch.isfinite(parameter).all()) for parameter in sae.parameters())


def test_dense_training_that_cannot_fit_says_so():
    sae = SAE(ReLU(l1=1.0, d_sae=200_000), 2)
    with pytest.raises(ConfigError, match="bytes"):
        losses_of(sae, torch.randn(20_000, 2))


def test_the_package_offers_them():
    assert {"ReLU", "Gated", "JumpReLU", "Matryoshka", "MultiTopK"} <= set(saelab.__all__)
