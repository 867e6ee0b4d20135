"""Transcoders: every architecture between two sites, against the dense formula, the folded scales and the model."""

import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import saelab
from saelab import ConfigError, SiteError, TopK, Transcoder
from saelab.autoencoders.architecture import Architecture
from saelab.training.schedule import Schedule
from saelab.training.step import Trainer
from tests.training.test_train import interrupting, run_on

ARCHITECTURES = (
    TopK(k=4, d_sae=61),
    saelab.MultiTopK(k=4, d_sae=61),
    saelab.MutualChoice(k=4, d_sae=61),
    saelab.FeatureChoice(k=4, d_sae=61),
    saelab.Matryoshka(k=4, d_sae=61),
    saelab.JumpReLU(target_l0=2, d_sae=61),
    saelab.Gated(l1=0.1, d_sae=61),
    saelab.ReLU(l1=0.1, d_sae=61, unit_decoder=True, resample=True),
)
INTO, OUT = "blocks.1.mlp.hook_pre", "blocks.1.hook_mlp_out"


def pair(n=3000, seed=0):
    """Targets of another width and size than the inputs, and no mean of zero."""
    generator = torch.Generator().manual_seed(seed)
    x = 20 * torch.randn(n, 12, generator=generator)
    return x, torch.relu(x @ torch.randn(12, 7, generator=generator)) / 100 + 3


def test_it_says_what_the_architecture_of_its_latents_says():
    """Whatever an architecture can override, but what is the same for all and what a transcoder adds."""
    same = {"usable", "check", "to_dict", "from_dict", "per_token"}
    members = {name for name, what in vars(Architecture).items() if callable(what) or isinstance(what, property)}
    own = {"extra_parameters", "to_saelens"}
    of = saelab.JumpReLU(target_l0=2, d_sae=61)
    for name in {name for name in members if not name.startswith("_")} - same - own:
        assert getattr(Transcoder(of=of), name) == getattr(of, name), name
    page = (Path(__file__).parents[2] / "docs" / "architectures.md").read_text()
    assert set(re.findall(r"^\| `(\w+)", page, re.M)) == {name for name in members if name[0] != "_"} - same


def explained(y, y_hat):
    return float(1 - (y - y_hat).square().sum() / (y - y.mean(0)).square().sum())


@pytest.mark.parametrize("skip", [False, True], ids=["plain", "skip"])
@pytest.mark.parametrize("of", ARCHITECTURES, ids=lambda cfg: type(cfg).__name__)
def test_it_predicts_the_target_by_its_public_weights(of, skip, tmp_path):
    x, y = pair()
    lr = 3e-3 if isinstance(of, saelab.JumpReLU) else 1e-2  # thresholds move ten times as fast
    run = run_on((x, y), sae=Transcoder(of=of, skip=skip), tokens=60_000, lr=lr)
    sae = run.sae
    assert (sae.d_in, sae.d_out, sae.W_enc.shape, sae.W_dec.shape) == (12, 7, (12, 61), (61, 7))
    y_hat = sae(x)
    assert run.history.explained_variance.iloc[-1] > 0.5
    codes = sae.encode(x)
    by_hand = codes @ sae.W_dec + sae.b_dec + (x @ sae.W_skip.T if skip else 0)
    torch.testing.assert_close(by_hand, y_hat, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(sae.decode(codes, x), y_hat, rtol=1e-3, atol=1e-3)
    if not isinstance(of, saelab.Gated):  # of which a code is more than a pre-activation
        scores = x @ sae.W_enc + sae.b_enc
        torch.testing.assert_close(torch.where(codes > 0, scores, 0), codes, rtol=1e-3, atol=1e-3)
    sae.save(tmp_path / "sae")
    again = saelab.SAE.load(tmp_path / "sae")
    assert again.cfg == sae.cfg and torch.equal(again(x), y_hat) and torch.equal(again.encode(x), codes)


def test_the_skip_connection_starts_at_zero_and_learns_a_linear_map():
    x, _ = pair()
    y = x @ torch.randn(12, 7, generator=torch.Generator().manual_seed(1)) + 5
    cfg = Transcoder(of=TopK(k=1, d_sae=8), skip=True)
    assert not saelab.SAE(cfg, 12, d_out=7).W_skip.any()
    skip = run_on((x, y), sae=cfg, tokens=60_000, lr=1e-2).sae
    plain = run_on((x, y), sae=Transcoder(of=TopK(k=1, d_sae=8)), tokens=60_000, lr=1e-2).sae
    assert explained(y, skip(x).detach()) > 0.99 > 0.9 > explained(y, plain(x).detach())
    assert plain.W_skip is None


def test_b_dec_starts_at_the_targets_mean_and_the_encoder_on_its_own():
    x, y = pair()
    sae = saelab.SAE(Transcoder(of=TopK(k=4, d_sae=61)), 12, d_out=7)
    Trainer(sae, Schedule(1000, 100)).initialise({"x": x, "target": y})
    torch.testing.assert_close(sae.b_dec.detach(), y.mean(0))
    square = saelab.SAE(Transcoder(of=TopK(k=4, d_sae=61)), 7)
    assert not torch.equal(square.W_dec, square.encoder_weight)


@pytest.mark.parametrize("skip", [False, True], ids=["plain", "skip"])
def test_one_step_has_the_gradients_of_the_dense_formula(skip):
    x, y = pair(200)
    sae = saelab.SAE(Transcoder(of=TopK(k=61, d_sae=61, aux_coefficient=0.0), skip=skip), 12, d_out=7).double()
    trainer = Trainer(sae, Schedule(1000, 200))
    trainer.initialise({"x": x, "target": y})
    kept = {name: weight.detach().clone().requires_grad_() for name, weight in sae.named_parameters()}
    seen = {}
    for name, weight in sae.named_parameters():
        weight.register_hook(lambda grad, name=name: seen.update({name: grad.clone()}))
    figures = trainer.step({"x": x, "target": y})
    x_in, target = x.double() * sae.state.scale, y.double() * sae.state.target_scale
    y_hat = (x_in @ kept["encoder_weight"].T + kept["encoder_bias"]).relu() @ kept["W_dec"] + kept["decoder_bias"]
    if skip:
        y_hat = y_hat + x_in @ kept["extra.W_skip"].T
    loss = (target - y_hat).square().sum() / (target - target.mean(0)).square().sum()
    assert float(figures["loss"]) == pytest.approx(float(loss.detach()))
    for name, gradient in zip(kept, torch.autograd.grad(loss, list(kept.values())), strict=True):
        torch.testing.assert_close(seen[name], gradient, rtol=1e-6, atol=1e-9)


def test_other_scales_of_input_and_target_change_nothing():
    x, y = pair()
    sae = run_on((x, y), sae=Transcoder(of=saelab.JumpReLU(target_l0=4, d_sae=61), skip=True), tokens=4000).sae
    codes, y_hat = sae.encode(x), sae(x)
    with torch.no_grad():
        Trainer(sae, Schedule(1000, 100))._rescale(float(sae.state.scale) / 64, float(sae.state.target_scale) * 16)
    assert torch.equal(sae.encode(x), codes) and torch.equal(sae(x), y_hat)
    small = run_on((x, y), sae=Transcoder(of=TopK(k=4, d_sae=61)), tokens=4000).sae
    large = run_on((x * 64, y / 16), sae=Transcoder(of=TopK(k=4, d_sae=61)), tokens=4000).sae
    assert torch.equal(small(x) / 16, large(x * 64))


def test_saelens_finds_its_keys(tmp_path):
    x, y = pair()
    for of, skip, name in (
        (saelab.MutualChoice(k=4, d_sae=61), False, "jumprelu_transcoder"),
        (saelab.ReLU(l1=0.1, d_sae=61), True, "skip_transcoder"),
        (TopK(k=4, d_sae=61), True, "topk_skip_transcoder"),
    ):
        sae = run_on((x, y), sae=Transcoder(of=of, skip=skip), tokens=4000).sae
        sae.save(tmp_path / name)
        config = json.loads((tmp_path / name / "cfg.json").read_text())
        assert (config["architecture"], config["d_in"], config["d_out"]) == (name, 12, 7)
        assert config["apply_b_dec_to_input"] is False
        tensors = load_file(tmp_path / name / "sae_weights.safetensors")
        extra = ({"W_skip"} if skip else set()) | ({"threshold"} if "jumprelu" in name else set())
        assert set(tensors) == {"W_enc", "b_enc", "W_dec", "b_dec"} | extra
        assert not skip or tensors["W_skip"].shape == (7, 12)


def test_resume_is_bitwise(tmp_path):
    arguments = {"sae": Transcoder(of=TopK(k=3, d_sae=67), skip=True), "tokens": 6000, "log_every": 1}
    whole = run_on(pair(), **arguments)
    assert run_on(pair(), out=tmp_path / "run", loggers=[interrupting(9)], **arguments).interrupted
    assert saelab.load_run(tmp_path / "run").sae.d_out == 7
    rest = run_on(pair(), out=tmp_path / "run", **arguments)
    assert all(torch.equal(rest.sae.state_dict()[name], tensor) for name, tensor in whole.sae.state_dict().items())


@pytest.fixture(scope="module")
def corpus():
    return saelab.load_corpus([f"Speech {i}: " + " ".join(f"w{(i * j) % 17}" for j in range(40)) for i in range(60)])


def test_from_a_model_to_its_evaluation(tiny_llama, corpus):
    lm = tiny_llama
    sae = saelab.train(
        lm, corpus, site=INTO, target_site=OUT, sae=Transcoder(of=TopK(k=8, d_sae=64), skip=True), tokens=6000,
        batch_size=256, context_length=32, buffer_tokens=2048, progress=False,
    ).sae  # fmt: skip
    assert (sae.metadata["site"], sae.metadata["target_site"], sae.d_in, sae.d_out) == (INTO, OUT, 64, 32)
    report = saelab.evaluate(sae, lm, corpus, tokens=256, sparsity_tokens=256, batch_size=3, progress=False)

    contexts = corpus.contexts(lm, 32, "heldout")
    ids, mask = contexts.ids[:8].long(), contexts.mask[:8].clone()
    found = lm.record(ids, [INTO, OUT])
    mine = mask & (torch.arange(32) > 0) & sae.replaceable(found[INTO])
    x, y = found[INTO][mine], found[OUT][mine]
    assert report.explained_variance == pytest.approx(explained(y.double(), sae(x).double().detach()), rel=1e-5)
    clean = lm.logits(ids).double()
    with lm.splice(sae):
        spliced = lm.logits(ids).double()
    kl = (clean.softmax(-1) * (clean.log_softmax(-1) - spliced.log_softmax(-1))).sum(-1)[mask].mean()
    assert report.kl == pytest.approx(float(kl), rel=1e-2)

    def zero(activation, where):
        activation = activation.clone()
        activation[mine] = 0
        return activation

    with lm.intervene(OUT, zero):
        zeroed = lm.logits(ids).double()
    real = mask[:, 1:]
    ce = torch.nn.functional.cross_entropy(zeroed[:, :-1][real], ids[:, 1:][real])
    assert report.ce_zero == pytest.approx(float(ce), rel=1e-5)
    assert report.site == f"{INTO} to {OUT}"


def test_an_autoencoder_does_not_take_a_target_site_silently(tiny_llama, corpus):
    arguments = {"tokens": 512, "batch_size": 128, "context_length": 32, "buffer_tokens": 1024, "progress": False}
    cfg = TopK(k=4, d_sae=32)
    with pytest.raises(ConfigError, match=r"reconstructs the site.*Transcoder\(of=TopK\(k=4, d_sae=32\)\)"):
        saelab.train(tiny_llama, corpus, site=OUT, target_site=INTO, sae=cfg, **arguments)
    with pytest.raises(ConfigError, match="reconstructs the site"):
        saelab.train(torch.randn(512, 8), site=INTO, target_site=OUT, sae=cfg, tokens=512, progress=False)
    with pytest.raises(ConfigError, match="reconstructs the site"):
        saelab.sweep(tiny_llama, corpus, [Transcoder(of=cfg), cfg], site=INTO, target_site=OUT, **arguments)


def test_errors_say_the_way_out():
    x, y = pair(300)
    with pytest.raises(ConfigError, match="target_site="):
        run_on(x, sae=Transcoder(of=TopK(k=2, d_sae=8)))
    with pytest.raises(ConfigError, match=r"width 12 and the target 7.*Transcoder\(of=TopK"):
        run_on((x, y), sae=TopK(k=2, d_sae=8))
    with pytest.raises(ConfigError, match="use TopK"):
        Transcoder(of=saelab.GradientTopK(k=2, d_sae=8))
    with pytest.raises(ConfigError, match="must be an architecture"):
        Transcoder(of=Transcoder(of=TopK(k=2, d_sae=8)))
    sae = run_on((x, y), sae=Transcoder(of=TopK(k=2, d_sae=8)), tokens=300).sae
    with pytest.raises(SiteError, match="writes 7"):
        run_on((x, y[:, :5]), sae=sae, tokens=300)
