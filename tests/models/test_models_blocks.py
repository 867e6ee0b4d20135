"""Names of TransformerLens in any family: each against what transformers itself reports, and against sums that must hold."""

import pytest
import torch
from torch import nn

import saelab
from tests import families

IDS = torch.arange(14).reshape(2, 7) * 5 % 250
WHOLE = {"hook_resid_pre", "hook_attn_out", "hook_resid_mid", "hook_mlp_out", "hook_resid_post"}
BESIDE = {
    "gpt_neox",
    "gptj",
    "codegen",
    "cohere",
    "cohere2",
    "phi",
    "falcon_parallel",
    "falcon_new",
    "stablelm_parallel",
}
# what they add is scaled or normed by no module, is no attention, or comes in rows without a batch
LESS = {
    "granite": {"hook_resid_mid"}, "granitemoe": {"hook_resid_mid"}, "minicpm3": {"hook_resid_mid"}, "opt": {"hook_attn_out"},
    "granitemoehybrid": set(), "opt_after": set(), "openai-gpt": set(), "bloom_after": set(), "falcon_h1": set(),
    "mamba": set(), "mamba2": set(), "falcon_mamba": set(), "xlstm": set(), "zamba2": set(),
}  # fmt: skip
ENDS = {"hook_resid_pre", "hook_resid_post"}


def names_of(lm, layer):
    return {name.partition(f"blocks.{layer}.")[2] for name in lm.backend.named if name.startswith(f"blocks.{layer}.")}


@pytest.fixture(scope="module", params=families.CONFIGS)
def family(request):
    model = families.build(request.param)
    return request.param, saelab.load_model(model, device="cpu")


@pytest.mark.filterwarnings("ignore")  # of transformers' own, on some families
def test_every_name_holds_what_it_means(family):
    name, lm = family
    last = lm.n_layers - 1
    got = names_of(lm, last) & WHOLE
    assert got == (ENDS | LESS[name] if name in LESS else WHOLE - {"hook_resid_mid"} if name in BESIDE else WHOLE)
    found = lm.record(IDS, list(lm.backend.named))
    for site in lm.backend.named.values():
        assert found[site.name].shape == (*IDS.shape, site.width)
    states = hidden_states(lm)
    for layer in range(lm.n_layers):
        x = {hook: found[f"blocks.{layer}.{hook}"] for hook in names_of(lm, layer)}
        if layer < last:
            assert torch.equal(x["hook_resid_post"], found[f"blocks.{layer + 1}.hook_resid_pre"])
        if states is not None and layer:
            assert any(torch.equal(x["hook_resid_pre"], state) for state in states)
        pre, attention, mid, mlp, post = (x.get(hook) for hook in (
            "hook_resid_pre", "hook_attn_out", "hook_resid_mid", "hook_mlp_out", "hook_resid_post"))  # fmt: skip
        if attention is not None and mid is not None:
            near(mid, pre + attention)
        if mid is not None and mlp is not None:
            near(post, mid + mlp)
        if attention is not None and mlp is not None:
            near(post, pre + attention + mlp)
            assert not torch.allclose(pre + mlp, post, atol=1e-3) and not torch.allclose(
                pre + attention, post, atol=1e-3
            )


def near(one, other):
    torch.testing.assert_close(one, other, atol=2e-5, rtol=1e-4)


def hidden_states(lm):
    """As transformers hands them out; None where a family has them under other conditions."""
    with torch.no_grad():
        output = lm.model(input_ids=IDS, output_hidden_states=True, use_cache=False)
    return getattr(output, "hidden_states", None)


@pytest.mark.filterwarnings("ignore")
def test_an_edit_at_a_name_goes_on_to_the_end_of_the_block(family):
    _, lm = family
    last = lm.n_layers - 1
    names = names_of(lm, last) & WHOLE
    d = lm.site(f"blocks.{last}.hook_resid_pre").width
    push = torch.linspace(-1, 1, d)
    read = [f"blocks.{last}.{hook}" for hook in ("hook_resid_post", "hook_mlp_out") if hook in names]
    clean = lm.record(IDS, read)
    for hook in names & {"hook_attn_out", "hook_resid_mid", "hook_mlp_out", "hook_resid_post"}:
        with lm.intervene(f"blocks.{last}.{hook}", lambda x, where: x + push):
            edited = lm.record(IDS, read)
            assert not torch.equal(lm.logits(IDS), lm.logits(IDS[:, :1]).expand(-1, 7, -1))
        change = {name: edited[name] - clean[name] for name in read}
        post = change[f"blocks.{last}.hook_resid_post"]
        if hook in ("hook_mlp_out", "hook_resid_post"):
            near(post, push.expand_as(post))
        elif f"blocks.{last}.hook_mlp_out" in change:
            near(post, push + change[f"blocks.{last}.hook_mlp_out"])
        else:
            assert post.abs().max() > 0.1


@pytest.mark.filterwarnings("ignore")
def test_the_embedding_and_the_last_norm(family):
    name, lm = family
    assert lm.record(IDS, "hook_embed").shape[:2] == IDS.shape
    assert torch.equal(lm.record(IDS, "hook_embed"), lm.inner.get_input_embeddings()(IDS).detach())
    if name in ("openai-gpt", "opt_after", "lfm2"):
        with pytest.raises(saelab.SiteError):
            lm.site("ln_final")
        return
    states, last = hidden_states(lm), lm.record(IDS, "ln_final")
    if states is not None and name != "rwkv":
        assert any(torch.allclose(state, last, atol=1e-6) for state in states)


def test_queries_keys_values_and_what_heads_give():
    lm = saelab.load_model(families.build("phi"), device="cpu")
    attention = lm.inner.model.layers[1].self_attn
    normed = lm.record(IDS, "model.layers.1.input_layernorm")
    for letter in "qkv":
        projection = getattr(attention, f"{letter}_proj")
        near(lm.record(IDS, f"blocks.1.attn.hook_{letter}"), projection(normed).detach())
    site = lm.site("blocks.1.attn.hook_z")
    assert (site.width, site.heads, site.kind) == (32, 4, "attention output")
    near(attention.dense(lm.record(IDS, site)).detach(), lm.record(IDS, "blocks.1.hook_attn_out"))
    near(
        lm.inner.model.layers[1].mlp.fc2(lm.record(IDS, "blocks.1.mlp.hook_post")).detach(),
        lm.record(IDS, "blocks.1.hook_mlp_out"),
    )
    near(
        nn.functional.gelu(lm.record(IDS, "blocks.1.mlp.hook_pre"), approximate="tanh"),
        lm.record(IDS, "blocks.1.mlp.hook_post"),
    )


def test_names_are_measured_without_a_trace_on_the_model():
    model = families.build("phi")
    lm = saelab.load_model(model, device="cpu")
    with lm.intervene("model.layers.0", lambda x, where: x.fill_(0.0)):
        names = list(lm.sites()["name"])
    assert "blocks.1.hook_resid_post" in names and lm.site("blocks.1.hook_out") == lm.site("blocks.1.hook_resid_post")
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize(
    ("name", "site", "why"),
    [
        ("phi", "blocks.0.hook_resid_mid", "beside each other"),
        ("granite", "blocks.0.hook_mlp_out", "be scaled"),
        ("mamba", "blocks.1.hook_attn_out", "of another kind"),
        ("phi", "blocks.7.hook_resid_pre", "near it: blocks.1.hook_resid_pre"),
    ],
)
def test_what_is_not_there_says_why(name, site, why):
    lm = saelab.load_model(families.build(name), device="cpu")
    with pytest.raises(saelab.SiteError, match=why):
        lm.site(site)


def test_a_model_of_several_lists_names_them():
    from transformers import XLMConfig, XLMWithLMHeadModel

    model = XLMWithLMHeadModel(
        XLMConfig(vocab_size=50, emb_dim=16, n_layers=2, n_heads=2, causal=True, max_position_embeddings=32)
    )
    lm = saelab.load_model(model.eval(), device="cpu")
    assert len(lm.sites()) == 0
    with pytest.raises(
        saelab.SiteError, match=r"its lists of modules are transformer\.attentions, transformer\.layer_norm1"
    ):
        lm.site("blocks.0.hook_resid_pre")
