import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import saelab
from saelab import ConfigError, GradientTopK, TopK
from saelab.autoencoders.architecture import Architecture, Batch
from saelab.autoencoders.architectures.gradient import GradientPreActivations, select_with_gradient
from saelab.evaluation.fidelity import SELECTIONS
from saelab.kernels import dense, selection, sparse, weighted
from saelab.models.sites import run_recording
from saelab.models.tokens import Tokens
from saelab.training.schedule import Schedule
from saelab.training.step import Trainer
from tests.kernels.test_kernels import problem
from tests.training.test_train import interrupting, planted, run_on

shapes = st.tuples(st.integers(1, 70), st.integers(1, 9), st.integers(1, 40), st.integers(1, 8), st.integers(0, 10_000))
SITE = "blocks.1.hook_resid_post"


class Rows:
    """Activations with gradients beside them, as a store has them."""

    def __init__(self, x, gradients):
        self.x, self.gradients, self.d_in, self.metadata, self.digest = x, gradients, x.shape[1], {}, "rows"

    def __len__(self):
        return len(self.x)

    def __getitem__(self, index):
        return self.x[index]


def directions(f, d, n, seed, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed + 1)
    W_dec = torch.randn(f, d, generator=generator, dtype=dtype)
    return W_dec, torch.randn(n, d, generator=generator, dtype=dtype)


@given(shapes, st.sampled_from([0.0, 0.3, 5.0]))
@settings(max_examples=80, deadline=None)
def test_the_choice_is_that_of_a_stable_sort_and_the_values_are_untouched(shape, strength):
    n, d, f, k, seed = shape
    k = min(k, f)
    x, W, b = (t.round() for t in problem(n, d, f, seed))  # many ties and zeros
    W_dec, g = (t.round() for t in directions(f, d, n, seed))
    found, wanted = (m.top_k_weighted(x, W, b, g, W_dec, strength, k) for m in (weighted, dense))
    assert torch.equal(found.indices, wanted.indices) and torch.equal(found.offsets, wanted.offsets)
    scores = torch.nn.functional.linear(x, W, b)
    assert torch.equal(found.values, scores[found.rows(), found.indices])
    assert torch.equal(found.offsets.diff(), (scores > 0).sum(1).clamp_max(k))
    assert len(set(zip(found.rows().tolist(), found.indices.tolist(), strict=True))) == len(found.values)
    if strength == 0:
        assert torch.equal(found.indices, selection.top_k(x, W, b, k).indices)


@pytest.mark.parametrize("gradients", ["zero", "any"])
def test_beta_0_or_no_gradient_is_topk_bit_for_bit(gradients):
    x, W, b = problem(700, 96, 2310, 3, torch.float32)
    W_dec, g = directions(2310, 96, 700, 3, torch.float32)
    wanted = selection.top_k(x, W, b, 8)
    scores = GradientPreActivations(x, W, b, g * 0 if gradients == "zero" else g, W_dec)
    found = scores.per_token_by_influence(8, 1.0 if gradients == "zero" else 0.0)
    assert torch.equal(found.indices, wanted.indices) and torch.equal(found.offsets, wanted.offsets)


@pytest.mark.parametrize("strength", [0.02, 0.3])
@pytest.mark.parametrize("kind", ["any", "no gradient", "few positive", "tied", "heavy gradient", "rounding decides"])
def test_a_bf16_shortlist_gives_the_fp32_masks(kind, strength):
    n, d, f, k = 300, 96, 2310, 8
    x, W, b = problem(n, d, f, 3, torch.float32)
    W_dec, g = directions(f, d, n, 3, torch.float32)
    if kind == "no gradient":
        g[::3] = 0
    if kind == "few positive":
        b = b - 35
    if kind == "tied":
        W[1::2], W_dec[1::2], b[1::2] = W[::2], W_dec[::2], b[::2]
    if kind == "heavy gradient":
        g[::7] *= 1e4
    if kind == "rounding decides":
        W = W[:1] + 1e-7 * W
        b = torch.zeros_like(b)
        W_dec = W_dec[:1].expand(f, d).contiguous()
    found, wanted = (weighted.top_k_weighted(x, W, b, g, W_dec, strength, k, shortlist) for shortlist in (True, False))
    assert torch.equal(found.indices, wanted.indices) and torch.equal(found.offsets, wanted.offsets)
    torch.testing.assert_close(found.values, wanted.values, rtol=1e-4, atol=1e-4)


def test_an_infinite_beta_chooses_by_attribution_alone():
    x, W, b = problem(50, 6, 31, 3)
    W_dec, g = directions(31, 6, 50, 3)
    found = weighted.top_k_weighted(x, W, b, g, W_dec, 1e12, 4).to_dense() > 0
    z = torch.nn.functional.linear(x, W, b).relu()
    top = (z * (g @ W_dec.T).abs()).topk(4, dim=1).indices
    assert torch.equal(found, torch.zeros_like(z).scatter(1, top, 1.0).bool() & (z > 0))


def test_every_gradient_equals_the_dense_twins():
    x, W, b = problem(30, 5, 23, 4)
    W_dec, g = directions(23, 5, 30, 4)
    results = []
    for kernels, choose in ((sparse, weighted.top_k_weighted), (dense, dense.top_k_weighted)):
        leaves = [t.clone().requires_grad_() for t in (x, W, b, W_dec)]
        codes = kernels.encode_at(*leaves[:3], choose(x, W, b, g, W_dec, 0.7, 4))
        x_hat = kernels.decode(codes, leaves[3])
        loss = (x_hat - leaves[0].detach()).square().sum() + codes.values.cos().sum()
        results.append([x_hat, codes.values, *torch.autograd.grad(loss, leaves)])
    for found, wanted in zip(*results, strict=True):
        torch.testing.assert_close(found, wanted)


def test_nothing_is_differentiated_through_the_choice():
    x, W, b = problem(30, 5, 23, 4)
    W_dec, g = (t.requires_grad_() for t in directions(23, 5, 30, 4))
    codes = GradientPreActivations(x, W.requires_grad_(), b, g, W_dec).per_token_by_influence(3, 1.0)
    codes.values.sum().backward()
    assert W.grad is not None and g.grad is None and W_dec.grad is None


def test_a_run_with_beta_0_is_topks_to_the_bit():
    x = planted()
    gradients = torch.randn(x.shape)
    top = run_on(x, sae=TopK(k=3, d_sae=67), tokens=10_000)
    run = run_on(Rows(x, gradients), sae=GradientTopK(k=3, d_sae=67, beta=0.0), tokens=10_000)
    assert torch.equal(run.sae.W_dec, top.sae.W_dec) and torch.equal(run.sae.encode(x), top.sae.encode(x))
    other = run_on(Rows(x, gradients), sae=GradientTopK(k=3, d_sae=67), tokens=10_000)
    assert not torch.equal(other.sae.W_dec, top.sae.W_dec)


def test_beta_has_no_dimension():
    x, gradients = planted(), torch.randn(4000, 16)
    cfg = GradientTopK(k=3, d_sae=67, beta=2.0)
    one = run_on(Rows(x, gradients), sae=cfg, tokens=4000).sae
    other = run_on(Rows(x * 1024, gradients * 2.0**20), sae=cfg, tokens=4000).sae
    assert torch.equal(one.W_dec, other.W_dec)
    mean = float(one.state.influence_sum / one.state.influence_weight)
    codes = one.encode_sparse(x)
    influence = sparse.sampled_product(gradients, one.W_dec.detach(), codes).abs().mean() / one.state.scale
    assert mean == pytest.approx(float(influence), rel=0.15)


def test_inference_is_plain_topk_and_the_gradient_can_be_asked_for(tmp_path):
    x, gradients = planted(), torch.randn(4000, 16)
    sae = run_on(Rows(x, gradients), sae=GradientTopK(k=3, d_sae=67), tokens=4000).sae
    top = saelab.SAE(TopK(k=3, d_sae=67), 16)
    top.load_state_dict(sae.state_dict(), strict=False)
    assert torch.equal(sae.encode(x), top.encode(x))
    assert torch.equal(select_with_gradient(sae, x, gradients, beta=0.0).indices, sae.encode_sparse(x).indices)
    assert torch.equal(select_with_gradient(sae, x, gradients * 0).indices, sae.encode_sparse(x).indices)
    chosen = select_with_gradient(sae, x.view(40, 100, 16), gradients.view(40, 100, 16))
    assert not torch.equal(chosen.indices, sae.encode_sparse(x).indices)
    raw = (x - sae.b_dec) @ sae.W_enc + sae.b_enc
    torch.testing.assert_close(chosen.values, raw[chosen.rows(), chosen.indices], rtol=1e-4, atol=1e-3)
    sae.save(tmp_path / "sae")
    again = saelab.SAE.load(tmp_path / "sae")
    assert again.cfg == sae.cfg and torch.equal(again(x), sae(x))
    assert torch.equal(select_with_gradient(again, x, gradients).indices, chosen.indices)
    with pytest.raises(ConfigError, match="not a trained GradientTopK"):
        select_with_gradient(top, x, gradients)
    with pytest.raises(ConfigError, match=r"\[4000, 5\] .* \[..., 16\]"):
        select_with_gradient(sae, x[:, :5], gradients[:, :5])


def test_another_input_scale_changes_no_choice():
    x, gradients = planted(), torch.randn(4000, 16)
    sae = run_on(Rows(x, gradients), sae=GradientTopK(k=3, d_sae=67), tokens=4000).sae
    before, plain = select_with_gradient(sae, x, gradients), sae.encode(x)
    Trainer(sae, Schedule(1000, 100))._rescale(*[float(sae.state.scale) / 64] * 2)
    after = select_with_gradient(sae, x, gradients)
    assert torch.equal(after.indices, before.indices) and torch.equal(after.values, before.values)
    assert torch.equal(sae.encode(x), plain)


def test_gradients_choose_the_latents_that_matter():
    """Of two equally strong features a token, only one moves the loss: with beta it is the one that is kept."""
    generator = torch.Generator().manual_seed(0)
    features = torch.linalg.qr(torch.randn(16, 16, generator=generator)).Q
    pick = torch.randint(8, (4000, 2), generator=generator)
    strength = 1 + 0.2 * torch.rand(4000, 2, generator=generator)
    x = strength[:, :1] * features[pick[:, 0]] + strength[:, 1:] * features[8 + pick[:, 1]]
    gradients = features[pick[:, 0]] * 0.01  # the loss feels the first eight features only
    start = saelab.SAE(GradientTopK(k=1, d_sae=16, beta=3.0, aux_coefficient=0.0), 16)
    with torch.no_grad():
        start.W_dec.copy_(features)
        start.encoder_weight.copy_(features)
    sae = run_on(Rows(x, gradients), sae=start, tokens=256, lr=1e-12).sae
    assert float((select_with_gradient(sae, x, gradients).indices < 8).float().mean()) > 0.99
    assert float((sae.encode_sparse(x).indices < 8).float().mean()) < 0.7


def test_a_batch_of_one_token():
    sae = saelab.SAE(GradientTopK(k=2, d_sae=13), 5)
    x = torch.randn(1, 5)
    codes = sae.cfg.allocate(sae.cfg.scores(sae.params(), Batch(x, x, torch.randn(1, 5))), sae.state, 0.0)
    assert len(codes) == 1 and 1 <= len(codes.values) <= 2


def test_resume_is_bitwise(tmp_path):
    x = Rows(planted(), torch.randn(4000, 16))
    arguments = {"sae": GradientTopK(k=3, d_sae=67), "tokens": 6000, "log_every": 1}
    whole = run_on(x, **arguments)
    assert run_on(x, out=tmp_path / "run", loggers=[interrupting(9)], **arguments).interrupted
    rest = run_on(x, out=tmp_path / "run", **arguments)
    assert all(torch.equal(rest.sae.state_dict()[name], tensor) for name, tensor in whole.sae.state_dict().items())


def test_a_tensor_without_gradients_says_how_to_harvest():
    with pytest.raises(ConfigError, match=r"saelab\.harvest\(.*gradients=True\)"):
        run_on(planted(), sae=GradientTopK(k=3, d_sae=64))
    with pytest.raises(ConfigError, match="has none"):
        x = torch.randn(2, 4)
        sae = saelab.SAE(GradientTopK(k=1, d_sae=8), 4)
        sae.cfg.allocate(sae.cfg.scores(sae.params(), Batch(x, x)), sae.state, 0.0)


def test_an_iterable_of_tensors_without_gradients_says_so_too():
    with pytest.raises(ConfigError, match="gradient"):
        run_on([planted()], sae=GradientTopK(k=3, d_sae=64))


@pytest.fixture(scope="module")
def corpus():
    generator = torch.Generator().manual_seed(0)
    words = ["economy", "union", "the", "state", "of", "war", "peace", "congress", "a", "nation"]
    texts = [
        " ".join(words[int(i)] for i in torch.randint(10, (90,), generator=generator)) + f" {n}" for n in range(30)
    ]
    return saelab.load_corpus(texts)


def test_it_trains_from_a_store_with_gradients_and_from_a_model(tiny_llama, corpus):
    store = saelab.harvest(
        tiny_llama, corpus, site=SITE, tokens=3000, context_length=32, gradients=True, progress=False
    )
    arguments = {"sae": GradientTopK(k=4, d_sae=61), "tokens": 4000, "batch_size": 256, "progress": False, "lr": 1e-2}
    streamed = {"site": SITE, "context_length": 32, "buffer_tokens": 2048}
    for run in (
        saelab.train(store, **arguments),
        saelab.train(tiny_llama, corpus, **streamed, **arguments),
    ):
        assert run.history.explained_variance.iloc[-1] > run.history.explained_variance.iloc[0]
        assert float(run.sae.state.influence_sum) > 0
        x, gradients = store[:500], store.gradients[:500]
        weighed, plain = select_with_gradient(run.sae, x, gradients), run.sae.encode_sparse(x)
        assert len(weighed.values) == len(plain.values) and not torch.equal(weighed.indices, plain.indices)
    without = saelab.harvest(tiny_llama, corpus, site=SITE, tokens=300, context_length=32, progress=False)
    with pytest.raises(ConfigError, match="gradients=True"):
        saelab.train(without, **arguments)


@pytest.mark.parametrize("beta", [-0.1, float("nan"), float("inf")])
def test_bad_betas(beta):
    with pytest.raises(ConfigError, match="beta is"):
        GradientTopK(k=2, d_sae=8, beta=beta)


def test_a_configuration_survives_json():
    cfg = GradientTopK(k=2, d_sae=8, beta=0.3)
    assert Architecture.from_dict(json.loads(json.dumps(cfg.to_dict()))) == cfg


def test_evaluation_in_three_modes(tiny_llama):
    """Plain is what `encode` does; the others choose with gradients, of the model's labels or of the true ones."""
    lm = tiny_llama
    corpus = saelab.load_corpus(torch.randint(256, (80, 32), generator=torch.Generator().manual_seed(0)))
    sae = saelab.train(
        lm, corpus, site=SITE, sae=GradientTopK(k=3, d_sae=64, beta=3.0), tokens=3000, batch_size=256, context_length=32,
        buffer_tokens=2048, progress=False,
    ).sae  # fmt: skip
    arguments = {"tokens": 64, "sparsity_tokens": 64, "batch_size": 1, "progress": False}
    reports = {mode: saelab.evaluate(sae, lm, corpus, selection=mode, **arguments) for mode in SELECTIONS}
    assert len({report.fvu for report in reports.values()}) == 3
    assert all(report.dead_fraction == reports["plain"].dead_fraction for report in reports.values())
    assert "diagnostic" in repr(reports["grad_true"]) and "diagnostic" not in repr(reports["plain"])

    contexts = corpus.contexts(lm, 32, "heldout")
    for mode in SELECTIONS:
        x_all, hats = [], []
        for number in range(2):
            ids = contexts.ids[number : number + 1].long()
            tokens = Tokens(ids, torch.ones_like(ids, dtype=torch.bool))
            seeds = [number] if mode == "grad_model" else None
            found, slopes = run_recording(lm, tokens, [lm.site(SITE)], gradients=True, label_seeds=seeds)
            x, slope = found[SITE][0], slopes[SITE][0]
            codes = sae.encode_sparse(x) if mode == "plain" else select_with_gradient(sae, x, slope)
            mine = (torch.arange(32) > 0) & sae.replaceable(x)
            x_all.append(x[mine])
            hats.append(sae.decode(codes)[mine].detach())
        x, x_hat = torch.cat(x_all).double(), torch.cat(hats).double()
        fvu = (x - x_hat).square().sum() / (x - x.mean(0)).square().sum()
        assert reports[mode].fvu == pytest.approx(float(fvu), rel=1e-5)
    with pytest.raises(ConfigError, match="grad_model"):
        saelab.evaluate(sae, lm, corpus, selection="gradient", **arguments)
    top = run_on(planted(d=32), tokens=1000).sae
    with pytest.raises(ConfigError, match="not a trained GradientTopK"):
        saelab.evaluate(top, lm, corpus, site=SITE, selection="grad_true", **arguments)
