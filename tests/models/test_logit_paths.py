"""The way from a site to the logits against a composition by hand, in every family: nothing on it is left out.

The kind of fault: an effect that leaves out a layer (a soft cap, a scale, a bias, a mean that is subtracted, a norm between a
projection and the stream, a residual multiplier).
"""

import numpy as np
import pytest
import torch
import transformers as hf
from torch import nn

import saelab
from saelab.base.errors import ConfigError
from saelab.dashboards.assembly import build
from saelab.dashboards.collecting import effects
from saelab.dashboards.collecting.weights import ToLogits, logit_columns
from saelab.models.unembedding import unembedding, written_share
from saelab.steering import scores
from tests.toy_dashboard import LENGTH, TEXTS, make_sae
from tests.toy_logits import WAYS, by_hand, known, language_model

TEXT = "The state of the union is strong."


def seen_by(lm, path, text=TEXT):
    """What the norms on a path read and give, [position, D]."""
    names = {name: (next(n for n, m in lm.model.named_modules() if m is module), side)
             for name, (module, side) in path.places.items()}  # fmt: skip
    made = lm.record(text, [f"{n}.{side}" for n, side in names.values()])
    return {name: made[f"{n}.{side}"][0] for name, (n, side) in names.items()}


@pytest.mark.parametrize("name", WAYS)
def test_taking_a_vector_off_the_stream(name):
    way = WAYS[name]
    lm = known(name)
    path = ToLogits.of(lm, lm.site(f"{way.blocks}.2"))
    assert path.share == 1
    seen = seen_by(lm, path)
    x = seen["last input"]
    clean = by_hand(way, lm, x)
    torch.testing.assert_close(lm.logits(TEXT)[0].double(), clean, rtol=1e-3, atol=1e-4)  # the hand is right
    if way.cap:
        assert float(clean.abs().max()) > 0.7 * way.cap  # the cap is felt
    for size in (0.01, 1.0):
        removed = size * x.std() * torch.randn_like(x)
        change = by_hand(way, lm, x, removed.double()) - clean
        torch.testing.assert_close(
            path.change(removed, seen).double(), change, rtol=1e-3, atol=1e-4 * float(change.abs().max())
        )


def test_a_residual_multiplier_is_on_the_way():
    way, lm = WAYS["granite"], known("granite")
    path = ToLogits.of(lm, lm.site(f"{way.blocks}.2.mlp"))
    seen = seen_by(lm, path)
    x = seen["last input"]
    removed = x.std() * torch.randn_like(x)
    change = by_hand(way, lm, x, 0.22 * removed.double()) - by_hand(way, lm, x)
    torch.testing.assert_close(
        path.change(removed, seen).double(), change, rtol=1e-3, atol=1e-4 * float(change.abs().max())
    )


@pytest.mark.parametrize("name", ["llama", "gemma2", "cohere", "phi"])
def test_a_model_in_bfloat16(name):
    way = WAYS[name]
    lm = known(name, torch.bfloat16)
    path = ToLogits.of(lm, lm.site(f"{way.blocks}.2"))
    seen = seen_by(lm, path)
    x = seen["last input"]
    removed = 0.5 * x.float().std() * torch.randn(x.shape)
    change = by_hand(way, lm, x, removed.double()) - by_hand(way, lm, x)
    gap = (path.change(removed, seen).double() - change).norm() / change.norm()
    assert float(gap) < 0.02


@pytest.mark.parametrize("name", WAYS)
def test_logits_promoted_are_the_slope_of_the_models_own(name):
    """Of a small step off the stream, norm frozen, where no logit is near a cap: the scale of the norm is left out."""
    way = WAYS[name]
    lm = known(name)
    d = torch.randn(3, 32)
    head, norm = lm.model.get_output_embeddings().weight.detach(), lm.model.get_submodule(way.norm)
    centred = d - d.mean(1, keepdim=True) if way.centred else d
    wanted = way.scale * (centred * (norm.weight.detach() + way.one_plus)) @ head.T
    found = unembedding(lm).logits(d)
    torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-4 * float(wanted.abs().max()))
    assert torch.equal(scores.top_tokens(lm, d), wanted.topk(10).indices)
    path = ToLogits.of(lm, lm.site(f"{way.blocks}.1"))
    columns = logit_columns(path, d)
    raw = way.scale * d @ head.T
    for prefix, logits in (("", wanted), ("raw_", raw)):
        best = (logits - logits.mean(1, keepdim=True)).topk(10)
        np.testing.assert_allclose(columns[prefix + "top_value"], best.values, rtol=1e-3)


@pytest.mark.parametrize(("kind", "through"), [("attn.hook_z", "attn_out"), ("mlp.hook_post", "mlp_out")])
@pytest.mark.parametrize("name", ["gpt2", "gpt_neox", "llama", "gemma2"])
def test_sites_before_a_projection(name, kind, through):
    """What the projection makes of the vector, and a norm after it, is what leaves the stream."""
    way = WAYS[name]
    lm = known(name)
    site = lm.site(f"blocks.2.{kind}")
    path = ToLogits.of(lm, site)
    assert (path.post is not None) == (name == "gemma2")
    seen, z = seen_by(lm, path), lm.record(TEXT, site)[0]
    removed = 0.3 * z.std() * torch.randn_like(z)
    module = lm.model.get_submodule(site.path)
    weight = module.weight.detach().double()
    written = removed.double() @ (weight.T if isinstance(module, nn.Linear) else weight)
    if path.post:
        made = lm.record(TEXT, [f"blocks.2.hook_{through}", site.path])
        block = lm.model.model.layers[2]
        norm = block.post_attention_layernorm if kind == "attn.hook_z" else block.post_feedforward_layernorm
        read = made[site.path][0].double()
        sigma = (read.square().mean(1, keepdim=True) + norm.eps).sqrt()
        gain = 1 + norm.weight.detach().double()
        torch.testing.assert_close(
            made[f"blocks.2.hook_{through}"][0].double(), read / sigma * gain, rtol=1e-3, atol=1e-4
        )
        written = written / sigma * gain
    change = by_hand(way, lm, seen["last input"], written) - by_hand(way, lm, seen["last input"])
    torch.testing.assert_close(
        path.change(removed, seen).double(), change, rtol=1e-3, atol=1e-4 * float(change.abs().max())
    )


@pytest.mark.parametrize(
    ("name", "module", "share"),
    [
        ("llama", "mlp", 1), ("llama", "input_layernorm", None), ("llama", "self_attn.q_proj", None),
        ("gemma2", "mlp", None), ("gemma2", "post_feedforward_layernorm", 1), ("olmo2", "self_attn", None),
        ("granite", "mlp", 0.22), ("granite", "self_attn", 0.22), ("cohere", "mlp", 1), ("gpt2", "attn", 1),
    ],
)  # fmt: skip
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_which_modules_write_to_the_stream(name, module, share, dtype):
    way = WAYS[name]
    lm = known(name, dtype)
    found = written_share(lm, lm.site(f"{way.blocks}.1.{module}"), unembedding(lm).module)
    assert found == (None if share is None else pytest.approx(share, rel=0.01))


def test_what_is_no_norm_and_a_matrix_is_refused_by_name():
    opt = {"vocab_size": 258, "hidden_size": 32, "ffn_dim": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    projected = language_model(lambda: hf.OPTForCausalLM(hf.OPTConfig(**opt, word_embed_proj_dim=16)))
    with pytest.raises(ConfigError, match="no norm of width 16"):
        unembedding(projected)
    lm = language_model(WAYS["llama"].make)

    class Adapted(nn.Linear):
        def forward(self, x):
            return super().forward(x) + x[..., :1]

    head = lm.model.lm_head
    lm.model.lm_head = Adapted(*head.weight.shape[::-1], bias=False)
    lm.model.lm_head.weight = head.weight
    with pytest.raises(ConfigError, match="more than its weight and bias"):
        unembedding(lm)

    class Odd(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.weight = inner.weight

        def forward(self, x):
            return x.abs() * self.weight

    lm.model.lm_head = head
    lm.model.model.norm = Odd(lm.model.model.norm)
    with pytest.raises(ConfigError, match="its last norm .Odd. is another function"):
        unembedding(lm)


def test_other_functions_of_the_logits_are_refused(tmp_path):
    class Squared(hf.LlamaForCausalLM):
        def forward(self, *args, **kwargs):
            output = super().forward(*args, **kwargs)
            output.logits = output.logits * output.logits.abs()
            return output

    lm = language_model(lambda: Squared(hf.LlamaConfig(vocab_size=258, hidden_size=32, intermediate_size=48,
                                                       num_hidden_layers=2, num_attention_heads=4)))  # fmt: skip
    with pytest.raises(ConfigError, match="no scale and no soft cap"):
        unembedding(lm)
    corpus = saelab.load_corpus(TEXTS)
    sae = make_sae(lm, "blocks.1.hook_resid_post")
    with pytest.warns(UserWarning, match="no logits and no direct effects: .* no scale and no soft cap"):
        page = build(sae, lm, corpus, tmp_path / "page.html", latents=2, tokens=256, windows=9, evaluation=None, parquet=False,
                     work=tmp_path / "w", progress=False)  # fmt: skip
    assert "top" not in page.data["f-00000"]


def test_the_last_norm_of_every_kind_and_width():
    class OnePlus(nn.Module):
        def __init__(self, width):
            super().__init__()
            self.weight = nn.Parameter(torch.randn(width))

        def forward(self, x):
            return x * x.pow(2).mean(-1, keepdim=True).add(1e-6).rsqrt() * (1 + self.weight)

    for width in (24, 27):
        layer, rms = nn.LayerNorm(width), nn.RMSNorm(width, eps=1e-6)
        for parameter in [*layer.parameters(), *rms.parameters()]:
            nn.init.normal_(parameter)
        model = hf.GPT2LMHeadModel(hf.GPT2Config(vocab_size=9, n_embd=width, n_layer=1, n_head=3, n_positions=8)).eval()
        one_plus = OnePlus(width)
        kinds = [(layer, layer.weight, True), (rms, rms.weight, False), (one_plus, 1 + one_plus.weight, False),
                 (nn.LayerNorm(width, elementwise_affine=False), torch.ones(width), True)]  # fmt: skip
        for norm, gain, centred in kinds:
            model.transformer.ln_f = norm
            found = unembedding(saelab.load_model(model, device="cpu"))
            assert found.norm.centred == centred
            torch.testing.assert_close(found.norm.gain, gain.detach(), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", ["gpt2", "gpt_neox", "gemma2"])
def test_the_direct_effects_of_a_page(name, tmp_path):
    """Loss and KL of every direct example of a page, the last norm frozen, against the composition by hand."""
    way = WAYS[name]
    lm = known(name)
    corpus = saelab.load_corpus(TEXTS)
    sae = make_sae(lm, "blocks.2.hook_resid_post")
    page = build(sae, lm, corpus, tmp_path / "page.html", latents=4, tokens=1_000, windows=22, evaluation=None,
                 parquet=False, progress=False, work=tmp_path / "w")  # fmt: skip
    columns = page.data["f-00000"]
    contexts = corpus.contexts(lm, LENGTH)
    owner = columns["latent"][np.repeat(np.arange(4), columns["windows"])]
    direct = np.flatnonzero(columns["x_method"] == effects.DIRECT)
    assert len(direct) > 10
    for i in direct:
        w = columns["x_window"][i]
        ids = contexts.ids[int(columns["context"][w])].long()
        at = int(columns["start"][w]) + int(columns["peak"][w])
        x = lm.record(ids[None], f"{way.norm}.input")[0, at][None]
        removed = float(columns["act"][w]) * sae.W_dec[int(owner[w])].detach().double()
        p, q = (by_hand(way, lm, x, part)[0].log_softmax(0) for part in (0.0, removed))
        kl = float((p.exp() * (p - q)).sum())
        assert columns["x_kl"][i] == pytest.approx(kl, rel=2e-3, abs=1e-5)
        if at + 1 < LENGTH:
            assert columns["x_loss"][i] == pytest.approx(float(p[ids[at + 1]] - q[ids[at + 1]]), rel=2e-3, abs=1e-4)
