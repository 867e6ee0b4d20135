"""Every family's sites against what TransformerLens 4 reports for the same weights."""

import warnings
from importlib.metadata import version

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    GemmaConfig,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    Qwen2Config,
    Qwen3Config,
    SmolLM3Config,
)  # fmt: skip

import saelab
from saelab.models.site_names import KINDS, PROJECTION
from tests.tiny import byte_tokenizer

SIZES = {
    "vocab_size": 258, "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 40,
    "max_position_embeddings": 64, "bos_token_id": 256, "eos_token_id": 256, "pad_token_id": 257,
}  # fmt: skip
GROUPED = {**SIZES, "num_key_value_heads": 2}
WIDE_HEADS = {**GROUPED, "head_dim": 8}
CONFIGS = {
    "gpt2": lambda: GPT2Config(vocab_size=258, n_embd=24, n_layer=2, n_head=4, n_positions=64, bos_token_id=256,
                               eos_token_id=256),
    "llama": lambda: LlamaConfig(**GROUPED),
    "mistral": lambda: MistralConfig(**GROUPED),
    "qwen2": lambda: Qwen2Config(**GROUPED),
    "qwen3": lambda: Qwen3Config(**WIDE_HEADS),
    "smollm3": lambda: SmolLM3Config(**GROUPED),
    "gpt_neox": lambda: GPTNeoXConfig(**SIZES),
    "gpt_neox_sequential": lambda: GPTNeoXConfig(**SIZES, use_parallel_residual=False),
    "gemma": lambda: GemmaConfig(**WIDE_HEADS),
    "gemma2": lambda: Gemma2Config(**WIDE_HEADS, sliding_window=4),
    "gemma3": lambda: Gemma3TextConfig(**WIDE_HEADS, sliding_window=4),
}  # fmt: skip
IDS = torch.arange(18).reshape(2, 9) * 7 % 250


def build(family):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(CONFIGS[family]())
        for parameter in model.parameters():  # norms start as the identity, which would hide a wrong side of one
            parameter.data += 0.1 * torch.randn_like(parameter)
    return model.eval()


def bridge_of(model, folder):
    """A TransformerLens 4 bridge around a separate copy: building one replaces a model's modules in place."""
    model.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from transformer_lens.model_bridge import TransformerBridge

        return TransformerBridge.boot_transformers(str(folder), device="cpu", dtype=torch.float32)


@pytest.mark.skipif(version("transformer-lens") < "4", reason="TransformerLens 3 has fewer families and names")
@pytest.mark.parametrize("family", CONFIGS)
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_sites_agree_with_transformer_lens(family, tmp_path):
    model = build(family)
    lm = saelab.load_model(model, device="cpu")
    bridge = bridge_of(model, tmp_path)
    with torch.no_grad():
        _, cache = bridge.run_with_cache(IDS)
    names = [name for name in lm.backend.named if name.startswith("blocks.")]
    assert [name for name in lm.backend.named if name not in names] == ["hook_embed", "ln_final"]
    torch.testing.assert_close(lm.record(IDS, "ln_final"), cache["ln_final.hook_out"], atol=2e-5, rtol=1e-4)
    torch.testing.assert_close(lm.record(IDS, "hook_embed"), cache["hook_embed"], atol=2e-5, rtol=1e-4)
    theirs = [f"blocks.{layer}.{hook}" for layer in range(2) for hook in KINDS]
    assert set(names) <= set(theirs) and all(  # a bridge takes GPT-2's and NeoX's joint projection apart
        KINDS[name.split(".", 2)[2]] == PROJECTION
        for name in theirs
        if name in cache.keys() and name not in names  # noqa: SIM118
    )
    ours = lm.record(IDS, names)
    for name in names:
        expected = cache[name].flatten(2)
        assert lm.site(name).width == expected.shape[-1]
        torch.testing.assert_close(ours[name], expected, atol=2e-5, rtol=1e-4, msg=lambda m, n=name: f"{n}: {m}")

    wrapped = saelab.load_model(bridge, device="cpu")
    assert wrapped.model is bridge and wrapped.tokenizer is bridge.tokenizer
    same = wrapped.sites()[wrapped.sites()["name"].isin(lm.sites()["name"])].reset_index(drop=True)
    assert same[["name", "width", "kind", "heads"]].equals(lm.sites()[["name", "width", "kind", "heads"]])
    through = wrapped.record(IDS, names)
    for name in names:
        torch.testing.assert_close(through[name], cache[name].flatten(2), atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(wrapped.logits(IDS), lm.logits(IDS), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("family", CONFIGS)
def test_an_edit_of_the_stream_goes_on_to_the_end(family):
    lm = saelab.load_model(build(family), device="cpu")
    push = torch.linspace(-1, 1, 24)
    clean = lm.record(IDS, ["blocks.1.hook_resid_post", "blocks.1.hook_mlp_out"])
    for hook in ("hook_attn_out", "hook_resid_mid", "hook_mlp_out", "hook_resid_post"):
        if f"blocks.1.{hook}" not in lm.backend.named:
            continue
        with lm.intervene(f"blocks.1.{hook}", lambda x, where: x + push):
            edited = lm.record(IDS, ["blocks.1.hook_resid_post", "blocks.1.hook_mlp_out"])
        downstream = edited["blocks.1.hook_mlp_out"] - clean["blocks.1.hook_mlp_out"]
        rest = edited["blocks.1.hook_resid_post"] - clean["blocks.1.hook_resid_post"] - push
        if hook == "hook_resid_post":
            assert torch.equal(downstream, torch.zeros_like(downstream))
        elif hook == "hook_mlp_out":
            downstream = downstream - push
        torch.testing.assert_close(rest, downstream, atol=1e-5, rtol=1e-5)


def test_transformer_lens_names_of_version_4_mean_the_same(tiny_llama):
    for name, classic in (("hook_in", "hook_resid_pre"), ("hook_out", "hook_resid_post"),
                          ("attn.o.hook_in", "attn.hook_z"), ("mlp.out.hook_in", "mlp.hook_post")):  # fmt: skip
        assert tiny_llama.site(f"blocks.2.{name}") == tiny_llama.site(f"blocks.2.{classic}")


def test_the_table_of_sites(tiny_llama):
    table = tiny_llama.sites().set_index("name")
    assert len(table) == 4 * 11 + 2
    assert table.loc["blocks.2.attn.hook_z"].tolist() == [
        "model.layers.2.self_attn.o_proj.input", 32, "attention output", 4]  # fmt: skip
    assert table.loc["blocks.0.hook_resid_post", "kind"] == "residual"
    kinds = {"residual", "attention output", "mlp", "query, key or value", "embedding", "norm"}
    assert set(table.kind) == kinds and table.loc["blocks.0.attn.hook_k", "width"] == 16


def test_a_bridge_intervenes_generates_and_splices_like_the_plain_model(tmp_path):
    model = build("gemma2")
    tokenizer = byte_tokenizer()
    plain = saelab.load_model(model, tokenizer=tokenizer, device="cpu")
    bridge = saelab.load_model(bridge_of(model, tmp_path), device="cpu")
    prompts = plain.tokenize(["The state of", "My"])  # the bridge gives its tokenizer a BOS of its own
    assert bridge.generate(prompts, 8) == plain.generate(prompts, 8) == bridge.generate(prompts, 8, use_cache=False)
    for site in ("blocks.0.attn.hook_z", "blocks.1.hook_resid_mid", "blocks.1.hook_resid_post"):
        logits, places = [], []
        for lm in (plain, bridge):

            def edit(x, where, places=places):
                places.append(where.positions)
                return x * 1.5

            with lm.intervene(site, edit):
                logits.append(lm.logits(prompts)[prompts.mask])
        torch.testing.assert_close(*logits, atol=1e-4, rtol=1e-4)
        assert torch.equal(*places)
    # the paths of the model that the bridge drives
    values = [lm.record(prompts, site)[prompts.mask] for lm, site in ((bridge, "model.layers.1"), (plain, site))]
    torch.testing.assert_close(*values, atol=1e-4, rtol=1e-4)
