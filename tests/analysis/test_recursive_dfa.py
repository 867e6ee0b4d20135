"""Attribution to features of the stream, and the recursion: exact sums at any pruning, each term by its definition."""

import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import saelab
from saelab.analysis import attention
from saelab.analysis.circuits import recursive_dfa
from tests import tiny
from tests.models.test_models_families import CONFIGS, IDS, build
from tests.toy_attribution import attention_sae, eager_pattern, pre_activation, residual_sae

TEXT = IDS[1:2]


@pytest.fixture(scope="module", params=CONFIGS)
def lm(request):
    return saelab.load_model(build(request.param), device="cpu")


@pytest.fixture(scope="module")
def llama():
    return saelab.load_model(tiny.llama_model(), tokenizer=tiny.byte_tokenizer(), device="cpu")


def test_features_of_the_stream_are_complete(lm):
    sae, residual = attention_sae(lm, 1), residual_sae(lm, 1)
    parts = attention.feature_attribution(sae, lm, IDS, 3, residual, destinations=[8, 7])
    direct = attention.direct_attribution(sae, lm, IDS, 3)
    at = torch.arange(2), torch.tensor([8, 7])
    torch.testing.assert_close(parts.pre_activation, direct.pre_activation[at], atol=1e-5, rtol=1e-5)
    assert float((parts.total - parts.pre_activation).abs().max()) < 1e-4
    torch.testing.assert_close(parts.by_source, direct.by_source[at], atol=1e-5, rtol=1e-4)
    assert float(parts.by_feature.abs().max()) > 1e-3


@pytest.mark.parametrize("keep, most", [(1.0, 10**6), (0.5, 5)])
def test_circuits_are_complete(lm, keep, most):
    """Kept, remainders, errors and biases sum to the root at depth 2, whichever SAEs there are."""
    sae, earlier, residual = attention_sae(lm, 1), attention_sae(lm, 0, seed=5), residual_sae(lm, 1)
    for saes in ([earlier, residual], [earlier], [residual], []):
        circuit = recursive_dfa.trace(sae, lm, TEXT, 3, position=7, saes=saes, keep=keep, most=most, share=0)
        sums = circuit.sums
        assert abs(sums.gap) < 1e-3 * sums.absolute
        assert sums.root == pytest.approx(
            float(attention.direct_attribution(sae, lm, TEXT, 3).pre_activation[0, 7]), abs=1e-5
        )
        if keep == 1:
            assert max(node.depth for node in circuit.nodes) == (2 if saes else 1)
        assert (sums.rest == 0) == (keep == 1)


def frozen_reading(lm, block, sae, latent, position):
    """p(x), written out with a Llama's own weights: pattern and norm of the true pass held fixed."""
    model, ids = lm.model, TEXT
    attn, norm = model.model.layers[block].self_attn, model.model.layers[block].input_layernorm
    x0 = lm.record(ids, f"blocks.{block}.hook_resid_pre")
    rms = (x0.square().mean(-1, keepdim=True) + norm.variance_epsilon).sqrt()
    A = eager_pattern(model, ids, block)
    heads, kv_heads = A.shape[1], model.config.num_key_value_heads

    def p(x):
        v = torch.nn.functional.linear(x * norm.weight / rms, attn.v_proj.weight).unflatten(-1, (kv_heads, -1))
        v = v.repeat_interleave(heads // kv_heads, dim=2)
        z = torch.einsum("bhts,bshd->bthd", A, v).flatten(2)
        return ((z[0, position] - sae.b_dec) @ sae.W_enc[:, latent] + sae.b_enc[latent]).item()

    return p, x0


def test_each_term_by_taking_it_away(llama):
    """A frozen layer is linear: a term's contribution is what the reading loses when the term is taken out of the stream."""
    sae, earlier = attention_sae(llama, 2), attention_sae(llama, 1, seed=5)
    with torch.no_grad():
        p, x0 = frozen_reading(llama, 2, sae, 3, 7)
        circuit = recursive_dfa.trace(sae, llama, TEXT, 3, position=7, saes=[earlier], depth=1, keep=1, most=10**6)
        z = llama.record(TEXT, "blocks.1.attn.hook_z")
        codes, miss = earlier.encode(z)[0], (z - earlier(z))[0]
        codes[0], miss[0] = 0, z[0, 0] - earlier.b_dec  # the first position is none of the SAE's
        W_O = llama.model.model.layers[1].self_attn.o_proj.weight.T
        seen = set()
        for node in circuit.nodes[1:]:
            s = node.position
            if node.kind == "attention":
                assert node.activation == pytest.approx(float(codes[s, node.latent]), rel=1e-4)
                written = codes[s, node.latent] * earlier.W_dec[node.latent] @ W_O
            elif node.kind == "error":
                written = miss[s] @ W_O
            elif node.kind == "mlp":
                written = llama.record(TEXT, f"blocks.{node.block}.hook_mlp_out")[0, s]
            elif node.kind == "embedding":
                written = llama.model.model.embed_tokens(TEXT)[0, s]
            elif node.kind == "attention output":
                assert node.block == 0
                written = llama.record(TEXT, "blocks.0.hook_attn_out")[0, s]
            else:
                continue
            seen.add(node.kind)
            less = x0.clone()
            less[0, s] -= written
            assert node.contribution == pytest.approx(p(x0) - p(less), abs=2e-5)
        assert seen == {"attention", "error", "mlp", "embedding", "attention output"}


def test_contributions_pass_on_in_proportion(llama):
    """contribution(child) = contribution(parent) u / f, over all parents, at depth 2."""
    sae, residual, earlier = attention_sae(llama, 2), residual_sae(llama, 2), attention_sae(llama, 0, seed=5)
    W_enc = residual.W_enc.detach()
    options = {"position": 7, "saes": [residual, earlier], "keep": 1, "most": 10**6, "share": 0}
    circuit = recursive_dfa.trace(sae, llama, TEXT, 3, **options)
    parts = attention.feature_attribution(sae, llama, TEXT, 3, residual, destinations=[7])
    by_key = {(n.position, n.latent): n for n in circuit.nodes if n.kind == "residual"}
    rows = parts.codes.rows()
    assert len(by_key) == int((rows <= 7).sum())
    mlp = llama.record(TEXT, "blocks.1.hook_mlp_out")[0]
    expected = torch.zeros(9)
    for row, latent, f, value in zip(rows, parts.codes.indices, parts.codes.values, parts.by_feature, strict=True):
        if int(row) > 7:
            continue
        node = by_key[int(row), int(latent)]
        assert node.contribution == pytest.approx(float(value), abs=1e-6) and node.expanded
        expected[row] += float(value) * float(mlp[row] @ W_enc[:, latent]) / float(f)
    found = torch.zeros(9)
    for node in circuit.nodes:
        if node.kind == "mlp" and node.block == 1:
            found[node.position] = node.contribution
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-3)
    # a node that several parents read is one node: its contribution is the sum over the edges
    table = circuit.edge_table().groupby("child").contribution.sum()
    for node in circuit.nodes[1:]:
        assert node.contribution == pytest.approx(table[node.id], abs=1e-6)
    assert circuit.edge_table().child.duplicated().any()


@settings(max_examples=25, deadline=None)
@given(keep=st.floats(0.01, 1), most=st.integers(1, 40), share=st.floats(0, 0.5), depth=st.integers(1, 5),
       latent=st.integers(0, 23), position=st.integers(0, 8), seed=st.integers(0, 3))  # fmt: skip
def test_nothing_is_lost_at_any_pruning(keep, most, share, depth, latent, position, seed):
    lm = saelab.load_model(tiny.llama_model(seed), device="cpu")
    saes = [attention_sae(lm, 3), attention_sae(lm, 1), residual_sae(lm, 3), residual_sae(lm, 1)]
    options = {"keep": keep, "most": most, "share": share, "depth": depth}
    circuit = recursive_dfa.trace(saes[0], lm, TEXT, latent, position, saes=saes, **options)
    assert abs(circuit.sums.gap) < 1e-3 * circuit.sums.absolute
    ids = {node.id for node in circuit.nodes}
    assert ids == set(range(len(circuit.nodes)))
    children = circuit.edge_table().groupby("parent").contribution.agg(["sum", "size"])
    for node in circuit.nodes:
        if node.expanded:
            assert children.loc[node.id, "sum"] == pytest.approx(node.contribution, rel=1e-3, abs=1e-5)
            assert children.loc[node.id, "size"] <= most + 5  # remainders of two kinds and signs, and the bias
        assert node.depth <= depth
        if node.kind in ("rest", "error") and node.position < 0:
            assert (node.contribution > 0) == (node.of == "+")


def test_a_node_is_as_deep_as_its_shortest_way_to_the_root(llama):
    """A later layer is expanded first, though further from the root: what it reads may be nearer by an earlier one."""
    saes = [*(attention_sae(llama, block) for block in range(3)), residual_sae(llama, 2)]
    circuit = recursive_dfa.trace(attention_sae(llama, 3), llama, TEXT, 8, 7, saes=saes, depth=4, most=30, share=0)
    parents = circuit.edge_table().groupby("child").parent.apply(list)
    nearer = 0
    for node in circuit.nodes[1:]:
        ways = [circuit.nodes[parent].depth for parent in parents[node.id]]
        assert node.depth == 1 + min(ways)
        nearer += ways[0] > min(ways)
    assert nearer


def test_remainders_keep_their_sign(llama):
    sae = attention_sae(llama, 2)
    whole = recursive_dfa.trace(sae, llama, TEXT, 3, 7, depth=1, keep=1, most=10**6)
    few = recursive_dfa.trace(sae, llama, TEXT, 3, 7, depth=1, keep=0.5)
    kept = {(n.kind, n.block, n.position) for n in few.nodes if n.kind != "rest"}
    pruned = [n.contribution for n in whole.nodes if (n.kind, n.block, n.position) not in kept]
    rest = {n.of: n for n in few.nodes if n.kind == "rest"}
    for sign, own in (("+", [p for p in pruned if p > 0]), ("-", [p for p in pruned if p < 0])):
        assert rest[sign].members == len(own) and rest[sign].contribution == pytest.approx(sum(own), abs=1e-6)
    smallest = min(abs(n.contribution) for n in few.nodes[1:] if n.kind not in ("rest", "bias"))
    assert smallest >= max(abs(p) for p in pruned) and few.root.kept_mass >= 0.5


def test_a_root_in_the_stream_and_the_default_position(llama):
    residual, earlier = residual_sae(llama, 2), attention_sae(llama, 1)
    late = attention_sae(llama, 3)
    circuit = recursive_dfa.trace(residual, llama, TEXT, 4, saes=[earlier, late], share=0)
    x = llama.record(TEXT, "blocks.2.hook_resid_pre")[0]
    p = pre_activation(residual, x, 4)
    assert circuit.root.position == int(p.argmax()) and circuit.root.activation == pytest.approx(
        float(p.max()), abs=1e-4
    )
    assert {node.block for node in circuit.nodes if node.kind == "attention"} == {1}
    assert ("attention", 3) not in circuit.saes
    post = residual_sae(llama, 2)
    post.metadata["site"] = "blocks.1.hook_resid_post"  # the same place by its other name
    again = recursive_dfa.trace(post, llama, TEXT, 4, saes=[earlier], share=0)
    assert again.root.contribution == pytest.approx(circuit.root.contribution)


def test_tables_and_json(llama, tmp_path):
    sae, residual = attention_sae(llama, 2), residual_sae(llama, 2)
    residual.metadata["labels"] = {str(i): f"feature <{i}>" for i in range(40)}
    text = "The <b>state</b>"
    circuit = recursive_dfa.trace(sae, llama, text, 3, saes=[residual], share=0)
    table = circuit.to_pandas()
    assert len(table) == len(circuit.nodes) and table.name[0] == "attention 2 · 3"
    residuals = table[table.kind == "residual"]
    assert (residuals.label == "feature <" + residuals.latent.astype(str) + ">").all()
    assert table.share[0] == pytest.approx(1) and table.token[0] == text[circuit.root.position]
    by_token = circuit.by_token()
    assert by_token.contribution.sum() == pytest.approx(circuit.root.activation, rel=1e-3, abs=1e-4)
    circuit.to_json(tmp_path / "circuit.json")
    read = json.loads((tmp_path / "circuit.json").read_text())
    assert (read["format"], read["version"], read["tokens"]) == ("saelab-circuit", 1, list(text))
    assert read["nodes"][0]["latent"] == 3 and read["sums"]["root"] == pytest.approx(circuit.root.activation)
    assert all(edge["child"] > edge["parent"] for edge in read["edges"])
    assert any(node["activation"] is None for node in read["nodes"])  # NaN is not JSON
    assert "attention 2 · 3" in repr(circuit)


def test_the_same_bits_twice_and_the_model_untouched(llama):
    before = {name: tensor.clone() for name, tensor in llama.model.state_dict().items()}
    sae, saes = attention_sae(llama, 3), [attention_sae(llama, 1), residual_sae(llama, 3)]
    state, hooks = (
        torch.get_rng_state(),
        [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in llama.model.modules()],
    )
    first, second = (recursive_dfa.trace(sae, llama, TEXT, 3, saes=saes).to_dict() for _ in range(2))
    assert first == second
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(before[name], tensor) for name, tensor in llama.model.state_dict().items())
    assert hooks == [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in llama.model.modules()]
    assert llama.model.config._attn_implementation == "sdpa"


class TestErrors:
    def test_residual_sae_of_another_block(self, llama):
        with pytest.raises(saelab.ConfigError, match=r"blocks.1.hook_resid_pre and block 2's"):
            attention.feature_attribution(attention_sae(llama, 2), llama, TEXT, 3, residual_sae(llama, 1))

    def test_an_sae_of_another_kind_of_site(self, llama):
        sae = residual_sae(llama, 1)
        sae.metadata["site"] = "blocks.1.hook_mlp_out"
        with pytest.raises(saelab.ConfigError, match="hook_mlp_out, not the stream"):
            recursive_dfa.trace(attention_sae(llama, 2), llama, TEXT, 3, saes=[sae])

    def test_two_of_one_site(self, llama):
        with pytest.raises(saelab.ConfigError, match="two autoencoders of blocks.1"):
            recursive_dfa.trace(
                attention_sae(llama, 2), llama, TEXT, 3, saes=[residual_sae(llama, 1), residual_sae(llama, 1)]
            )

    @pytest.mark.parametrize("position", [9, -1])
    def test_a_position_that_is_not_there(self, llama, position):
        with pytest.raises(saelab.DataError, match=f"no position {position}.*9 tokens"):
            recursive_dfa.trace(attention_sae(llama, 2), llama, TEXT, 3, position)
        with pytest.raises(saelab.DataError, match="one position each"):
            attention.feature_attribution(attention_sae(llama, 2), llama, TEXT, 3, residual_sae(llama, 2), [position])

    def test_several_texts(self, llama):
        with pytest.raises(saelab.DataError, match="not 2"):
            recursive_dfa.trace(attention_sae(llama, 2), llama, IDS, 3)

    @pytest.mark.parametrize("wrong", [{"depth": 0}, {"keep": 0.0}, {"keep": 1.1}, {"most": 0}, {"share": -0.1}])
    def test_numbers_that_cannot_work(self, llama, wrong):
        with pytest.raises(saelab.ConfigError, match=next(iter(wrong))):
            recursive_dfa.trace(attention_sae(llama, 2), llama, TEXT, 3, **wrong)

    def test_a_latent_that_is_not_there(self, llama):
        with pytest.raises(saelab.ConfigError, match="no latent 24"):
            recursive_dfa.trace(attention_sae(llama, 2), llama, TEXT, 24)


def test_positions_that_an_sae_is_not_for_are_all_error(llama):
    sae, residual = attention_sae(llama, 2), residual_sae(llama, 2)
    x = llama.record(TEXT, "blocks.2.hook_resid_pre")[0]
    norms = x.norm(dim=1)
    residual.state.norm_limit.fill_(float(norms.sort().values[-2] * 0.999))  # the two largest are above it
    parts = attention.feature_attribution(sae, llama, TEXT, 3, residual, destinations=[8])
    out = {0, *norms.topk(2).indices.tolist()}
    assert not out & set(parts.codes.rows().tolist())
    assert set(parts.codes.rows().tolist()) == set(range(9)) - out
    assert float((parts.total - parts.pre_activation).abs().max()) < 1e-4
    assert np.isclose(float(parts.error[0, 0] + parts.residual_bias[0, 0]), float(parts.by_source[0, 0]), atol=1e-5)


@pytest.mark.slow
def test_on_the_bundled_model(smollm2):
    """Exact where the stream has its high norms, too: two of these tokens have six to eight times the median."""
    text = "The state of the union is strong, and the state of the economy"
    sae, saes = attention_sae(smollm2, 5), [attention_sae(smollm2, 2), residual_sae(smollm2, 5)]
    parts = attention.direct_attribution(sae, smollm2, text, 3)
    assert parts.error < 1e-4
    residual = attention.feature_attribution(sae, smollm2, text, 3, saes[1], destinations=[9])
    assert float((residual.total - residual.pre_activation).abs().max()) < 1e-4
    circuit = recursive_dfa.trace(sae, smollm2, text, 3, position=9, saes=saes)
    assert abs(circuit.sums.gap) < 1e-3 * circuit.sums.absolute
    assert circuit.root.activation == pytest.approx(float(parts.pre_activation[0, 9]), abs=1e-4)


@pytest.mark.parametrize("site", ["hook_z", "hook_resid_pre"])
def test_a_stream_that_is_no_plain_sum_is_refused(site):
    """A multiplier that no site shows would be left out of every contribution."""
    lm = saelab.load_model(tiny.llama_model(), device="cpu")
    lm.model.model.layers[1].register_forward_hook(lambda module, args, output: 2 * output)
    sae = attention_sae(lm, 2) if site == "hook_z" else residual_sae(lm, 2)
    with pytest.raises(saelab.ConfigError, match=r"before block 2 of .* is not the sum"):
        recursive_dfa.trace(sae, lm, TEXT, 3)
    early = attention_sae(lm, 1) if site == "hook_z" else residual_sae(lm, 1)
    assert recursive_dfa.trace(early, lm, TEXT, 3).nodes
