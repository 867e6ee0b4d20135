"""Direct attribution and head attribution against dense sums, on every family of models."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

import saelab
from saelab.analysis import attention
from saelab.analysis.circuits import frozen, recursive_dfa
from tests import families, tiny
from tests.models.test_models_families import CONFIGS, IDS, bridge_of, build
from tests.toy_attribution import attention_sae, eager_pattern, pre_activation, residual_sae


@pytest.fixture(scope="module", params=CONFIGS)
def lm(request):
    return saelab.load_model(build(request.param), device="cpu")


def test_parts_sum_to_the_pre_activation(lm):
    sae = attention_sae(lm, 1)
    z = lm.record(IDS, "blocks.1.attn.hook_z")
    for latent in (0, 17):
        parts = attention.direct_attribution(sae, lm, IDS, latent=latent)
        expected = pre_activation(sae, z, latent)
        torch.testing.assert_close(parts.pre_activation, expected, atol=1e-5, rtol=1e-5)
        for total in (parts.by_source.sum(-1), parts.by_head.sum(-1)):
            assert float((total + parts.bias - expected).abs().max()) < 1e-4
        assert parts.error < 1e-4
        assert float(parts.by_source.abs().max()) > 1e-2  # not of nothing
        assert torch.equal(parts.by_source, parts.by_source.tril())  # nothing comes from what is later


def test_sources_and_heads_against_dense_sums(lm):
    """With transformers' own eager weights, values written out by head: sum_k A^k_ts v^k_s . w^k."""
    sae = attention_sae(lm, 1)
    z = lm.record(IDS, "blocks.1.attn.hook_z").unflatten(-1, sae.metadata["heads"])
    A = eager_pattern(lm.model, IDS, 1)
    layer = frozen.read(lm, lm.to_tokens(IDS), [1]).layers[1]
    heads, groups = z.shape[2], layer.values.shape[2]
    v = layer.values.repeat_interleave(heads // groups, dim=2)
    torch.testing.assert_close(torch.einsum("bkts,bskd->btkd", A, v), z, atol=1e-5, rtol=1e-4)
    w = sae.W_enc[:, 5].unflatten(0, (heads, -1))
    parts = attention.direct_attribution(sae, lm, IDS, latent=5)
    expected = torch.einsum("bkts,bskd,kd->bts", A, v, w)
    torch.testing.assert_close(parts.by_source, expected.detach(), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(parts.by_head, torch.einsum("btkd,kd->btk", z, w).detach(), atol=1e-5, rtol=1e-4)


@pytest.mark.filterwarnings("ignore")  # of transformers' own
@pytest.mark.parametrize(
    "family", ["phi3", "falcon_new", "bloom", "gpt_bigcode", "gpt_neo", "qwen3_moe", "dbrx", "bamba"]
)
def test_attention_is_found_by_what_has_to_hold(family):
    """Joint projections by part and by group, one key-value head, norms with no table: z is the sum over the sources."""
    lm = saelab.load_model(families.build(family), device="cpu")
    layer = frozen.read(lm, lm.to_tokens(IDS), [1]).layers[1]
    z = torch.einsum("bhts,bshe->bthe", layer.pattern.full(), layer.values[:, :, layer.parts.group])
    torch.testing.assert_close(z.flatten(2), lm.record(IDS, "blocks.1.attn.hook_z"), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(
        z.flatten(2) @ layer.parts.W_O.flatten(0, 1) + layer.parts.b_O, lm.record(IDS, "blocks.1.hook_attn_out"),
        atol=1e-5, rtol=1e-4,
    )  # fmt: skip


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_the_pattern_is_the_model_s_own(lm, implementation):
    model = copy.deepcopy(lm.model)
    if implementation == "sdpa" and model.config.model_type == "gemma2":
        pytest.skip("transformers has no soft cap in its fused attention")
    model.set_attn_implementation(implementation)
    mask = torch.ones_like(IDS, dtype=torch.bool)
    mask[1, 6:] = False
    tokens = saelab.Tokens(IDS, mask)
    found = attention.patterns(saelab.load_model(model, device="cpu"), tokens, 0)
    whole = attention.patterns(lm, IDS, 0)
    torch.testing.assert_close(found[0], whole[0], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(found[1, :, :6, :6], whole[1, :, :6, :6], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(found.sum(-1)[mask[:, None].expand_as(found[..., 0])], torch.ones(15 * found.shape[1]))
    assert model.config._attn_implementation == implementation


@pytest.mark.parametrize("family", ["gpt2", "llama", "gpt_neox", "gemma2"])
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_bridge_gives_what_the_plain_model_does(family, tmp_path):
    model = build(family)
    plain, bridge = saelab.load_model(model, device="cpu"), saelab.load_model(bridge_of(model, tmp_path), device="cpu")
    sae = attention_sae(plain, 1)
    expected, found = (attention.direct_attribution(sae, lm, IDS, latent=3) for lm in (plain, bridge))
    torch.testing.assert_close(found.by_source, expected.by_source, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(found.by_head, expected.by_head, atol=1e-5, rtol=1e-4)
    assert found.error < 1e-4


@settings(max_examples=10, deadline=None)
@given(length=st.integers(1, 12), batch=st.integers(1, 3), left=st.integers(0, 3), seed=st.integers(0, 99))
def test_any_batch_and_padding(length, batch, left, seed):
    lm = saelab.load_model(tiny.llama_model(), device="cpu")
    ids = torch.randint(0, 250, (batch, length), generator=torch.Generator().manual_seed(seed))
    mask = torch.ones_like(ids, dtype=torch.bool)
    mask[0, : min(left, length - 1)] = False
    parts = attention.direct_attribution(attention_sae(lm, 2), lm, saelab.Tokens(ids, mask), latent=1)
    assert parts.error < 1e-4
    assert float(parts.by_source[0, mask[0]][:, ~mask[0]].abs().sum()) == 0  # padding gives nothing


class _Largest(TorchDispatchMode):
    """Remembers the largest tensor that any operation made (views of one are no larger)."""

    def __init__(self):
        super().__init__()
        self.numel, self.shape = 0, ()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        for tensor in made if isinstance(made, tuple | list) else (made,):
            if isinstance(tensor, torch.Tensor) and tensor.numel() > self.numel:
                self.numel, self.shape = tensor.numel(), tuple(tensor.shape)
        return made


def test_destination_by_source_by_width_is_never_made(tiny_llama):
    """[batch, destination, source, heads * d_head] would have 3 * 100 * 100 * 32 entries, one text's a third."""
    n = 100
    ids = torch.arange(3 * n).reshape(3, n) * 7 % 250
    sae, residual = attention_sae(tiny_llama, 2), residual_sae(tiny_llama, 2)
    batch = tiny_llama.to_tokens(ids)
    heads = sae.metadata["heads"][0]
    calls = {
        "direct": lambda: attention.direct_attribution(sae, tiny_llama, ids, 3),
        "features": lambda: attention.feature_attribution(sae, tiny_llama, ids, 3, residual),
        "pairs": lambda: attention.at_positions(
            sae, frozen.read(tiny_llama, batch, [2]).layers[2], 0, torch.arange(n), torch.arange(n) % 24
        ),
        "circuit": lambda: recursive_dfa.trace(sae, tiny_llama, ids[:1], 3, n - 1, saes=[residual], most=5),
    }
    for name, call in calls.items():
        with _Largest() as largest:
            call()
        assert 0 < largest.numel <= max(heads * n * n, 3 * n * 258), (name, largest.shape)  # or the model's own logits


def test_many_pairs_at_once_are_each_its_own(tiny_llama):
    sae = attention_sae(tiny_llama, 2)
    layer = frozen.read(tiny_llama, tiny_llama.to_tokens(IDS), [2]).layers[2]
    destinations, latents = torch.tensor([3, 8, 8, 0]), torch.tensor([5, 0, 23, 5])
    found = attention.at_positions(sae, layer, 1, destinations, latents)
    assert found.shape == (4, 4, 9)
    for parts, destination, latent in zip(found, destinations, latents, strict=True):
        one = attention.direct_attribution(sae, tiny_llama, IDS, int(latent))
        torch.testing.assert_close(parts.sum(0), one.by_source[1, destination], atol=1e-6, rtol=1e-5)
        torch.testing.assert_close(parts.sum(1), one.by_head[1, destination], atol=1e-6, rtol=1e-5)


ARCHITECTURES = (
    saelab.TopK(k=4, d_sae=24), saelab.MutualChoice(k=4, d_sae=24), saelab.Gated(l1=1.0, d_sae=24),
    saelab.JumpReLU(target_l0=4, d_sae=24), saelab.ReLU(l1=1.0, d_sae=24), saelab.Matryoshka(k=4, d_sae=24),
    saelab.Transcoder(of=saelab.TopK(k=4, d_sae=24)),
)  # fmt: skip


@pytest.mark.parametrize("cfg", ARCHITECTURES, ids=lambda cfg: type(cfg).__name__)
def test_a_reading_is_the_code_where_the_latent_fires(cfg, tiny_llama):
    """Each architecture with a scale that is folded, and its own gains and biases."""
    sae = attention_sae(tiny_llama, 2, cfg)
    z = tiny_llama.record(IDS, "blocks.2.attn.hook_z")
    if hasattr(sae.state, "cut_sum"):  # a threshold that training would have learnt
        sae.state.cut_sum.fill_(0.05)
        sae.state.cut_weight.fill_(1.0)
    codes = sae.encode(z).detach()
    weights, bias = frozen.readers(sae, torch.arange(sae.d_sae))
    readings = z @ weights.T + bias
    assert int((codes > 0).sum()) > 4
    torch.testing.assert_close(codes[codes > 0], readings[codes > 0], atol=1e-5, rtol=1e-4)
    parts = attention.direct_attribution(sae, tiny_llama, IDS, latent=int(codes.sum((0, 1)).argmax()))
    torch.testing.assert_close(parts.pre_activation, readings[..., parts.latent].detach(), atol=1e-5, rtol=1e-4)


def test_half_precision_is_read_as_it_is():
    lm = saelab.load_model(tiny.llama_model().to(torch.bfloat16), device="cpu")
    parts = attention.direct_attribution(attention_sae(lm, 2), lm, IDS, latent=1)
    assert parts.by_source.dtype == torch.float32
    assert parts.error < 0.02  # z was rounded to bf16


def test_head_shares(tiny_llama):
    sae = attention_sae(tiny_llama, 2)
    with torch.no_grad():
        sae.W_dec[3] = 0
        sae.W_dec[4] = torch.cat([torch.zeros(8), torch.full((8,), 3.0), torch.zeros(8), torch.full((8,), -1.0)])
    shares = attention.head_attribution(sae)
    assert shares.shape == (24, 4)
    torch.testing.assert_close(shares.sum(1), torch.ones(24))
    torch.testing.assert_close(shares[3], torch.full((4,), 0.25))
    torch.testing.assert_close(shares[4], torch.tensor([0, 0.75, 0, 0.25]))
    table = attention.top_latents(sae, k=3)
    assert len(table) == 12 and table.latent[table["head"] == 1].iloc[0] == 4
    assert table[table.latent == 4].query("head == 1").top_head.all()
    for head, own in table.groupby("head"):
        assert own.share.tolist() == sorted(shares[:, head].tolist(), reverse=True)[:3]


class TestErrors:
    def test_another_site(self, tiny_llama):
        sae = attention_sae(tiny_llama, 2)
        sae.metadata["site"] = "blocks.2.hook_resid_post"
        with pytest.raises(saelab.ConfigError, match="hook_resid_post.*hook_z only"):
            attention.head_attribution(sae)
        with pytest.raises(saelab.ConfigError, match="hook_z"):
            attention.direct_attribution(sae, tiny_llama, IDS, 0)

    @pytest.mark.parametrize("heads", [None, [3, 8], 4])
    def test_heads_that_are_not_known(self, heads, tiny_llama):
        sae = attention_sae(tiny_llama, 2)
        sae.metadata["heads"] = heads
        with pytest.raises(saelab.ConfigError, match=r"32 wide.*metadata\['heads'\]"):
            attention.head_attribution(sae)

    def test_no_site_at_all(self):
        with pytest.raises(saelab.ConfigError, match="site"):
            attention.head_attribution(saelab.SAE(saelab.TopK(k=2, d_sae=8), d_in=4))

    @pytest.mark.parametrize("latent", [24, -1])
    def test_a_latent_that_is_not_there(self, latent, tiny_llama):
        with pytest.raises(saelab.ConfigError, match=f"no latent {latent}.*24, from 0"):
            attention.direct_attribution(attention_sae(tiny_llama, 2), tiny_llama, IDS, latent)

    def test_another_model(self, tiny_llama, tiny_gpt2):
        with pytest.raises(saelab.SiteError, match="32 wide.* 24"):
            attention.direct_attribution(attention_sae(tiny_llama, 2), tiny_gpt2, IDS, 0)
        sae = attention_sae(tiny_llama, 2)
        sae.metadata["heads"] = [8, 4]
        with pytest.raises(saelab.ConfigError, match="8 heads.*has 4"):
            attention.direct_attribution(sae, tiny_llama, IDS, 0)

    def test_a_block_that_is_not_there(self, tiny_llama):
        with pytest.raises(saelab.ConfigError, match="no block 4.*has 4"):
            attention.patterns(tiny_llama, IDS, 4)

    @pytest.mark.filterwarnings("ignore")  # of transformers' own
    @pytest.mark.parametrize("family", ["deepseek_v2", "diffllama", "bitnet", "mamba"])
    def test_an_attention_of_another_kind(self, family):
        lm = saelab.load_model(families.build(family), device="cpu")
        with pytest.raises(saelab.ConfigError, match=r"no projection of it gives values that hook_z holds"):
            attention.patterns(lm, IDS, 0)

    def test_dropout_of_the_fused_attention(self):
        model = tiny.gpt2_model().train()
        with pytest.warns(UserWarning, match="dropout"):
            lm = saelab.load_model(model, device="cpu")
        with pytest.raises(saelab.ConfigError, match=r"model.eval\(\)"):
            attention.direct_attribution(attention_sae(lm, 1), lm, IDS, 0)
        assert model.training and not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
