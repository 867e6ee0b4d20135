"""Names of TransformerLens from the adapters of the installed one: for a family whose modules are called as nobody else's."""

import warnings
from importlib.metadata import version
from types import SimpleNamespace

import pandas as pd
import pytest
import torch
from transformers import LlamaForCausalLM
from transformers.utils import logging

import saelab
from saelab import steering
from saelab.models.adapters import adapter_words
from tests import families, tiny

IDS = torch.arange(14).reshape(2, 7) * 5 % 250
bridges = pytest.importorskip("transformer_lens.model_bridge.generalized_components")
factory = pytest.importorskip("transformer_lens.factories.architecture_adapter_factory").ArchitectureAdapterFactory
bridged = pytest.mark.skipif(version("transformer-lens") < "4", reason="TransformerLens 3 has fewer names")


class OddForCausalLM(LlamaForCausalLM):
    """A family that nobody knows."""


def renamed(module, **names):
    """A module whose children are called otherwise; its own forward finds them."""
    for old, new in names.items():
        module._modules[new] = module._modules.pop(old)
    found = {old: property(lambda self, new=new: self._modules[new]) for old, new in names.items()}
    module.__class__ = type(f"Odd{len(names)}", (type(module),), found)


@pytest.fixture
def odd():
    model = tiny.llama_model()
    model.__class__ = OddForCausalLM
    for block in model.model.layers:
        renamed(block.self_attn, q_proj="asks", k_proj="offers", v_proj="holds", o_proj="tells")
        renamed(block.mlp, gate_proj="opens", up_proj="lifts", down_proj="drops")
        renamed(block, self_attn="looks", mlp="thinks", input_layernorm="first", post_attention_layernorm="second")
    return model


def block(attn="looks", mlp="thinks"):
    linear = bridges.LinearBridge
    return bridges.BlockBridge(
        name="model.layers",
        submodules={
            "ln1": bridges.RMSNormalizationBridge(name="first", config=SimpleNamespace()),
            "ln2": bridges.RMSNormalizationBridge(name="second", config=SimpleNamespace()),
            "attn": bridges.base.GeneralizedComponent(
                name=attn,
                submodules={"q": linear(name="asks"), "k": linear(name="offers"), "v": linear(name="holds"),
                            "o": linear(name="tells")},
            ),
            "mlp": bridges.base.GeneralizedComponent(
                name=mlp,
                submodules={"gate": linear(name="opens"), "in": linear(name="lifts"), "out": linear(name="drops")},
            ),
        },
    )  # fmt: skip


def know(monkeypatch, component):
    adapter = SimpleNamespace(get_component_mapping=lambda: {"blocks": component})
    monkeypatch.setitem(factory._adapters, "OddForCausalLM", lambda cfg: adapter)


def test_an_adapter_names_what_nobody_else_calls_so(odd, monkeypatch, tiny_llama):
    bare = saelab.load_model(odd, device="cpu")
    with pytest.raises(saelab.SiteError, match="hook_mlp_out"):
        bare.site("blocks.1.hook_mlp_out")
    know(monkeypatch, block())
    named, plain = saelab.load_model(odd, device="cpu"), saelab.load_model(tiny.llama_model(), device="cpu")
    assert list(named.sites()["name"]) == list(plain.sites()["name"])
    assert named.site("blocks.1.attn.hook_z").path == "model.layers.1.looks.tells"
    sites = list(plain.sites()["name"])
    ours, theirs = named.record(IDS, sites), plain.record(IDS, sites)
    assert all(torch.equal(ours[name], theirs[name]) for name in sites)


def test_an_adapter_is_believed_where_the_sums_hold(odd, monkeypatch):
    know(monkeypatch, block(attn="looks.holds", mlp="thinks.opens"))
    names = set(saelab.load_model(odd, device="cpu").backend.named)
    inside = {name.split(".", 2)[2] for name in names if name.startswith("blocks.")}
    assert inside == {"hook_resid_pre", "hook_resid_post"}


def test_the_model_is_not_wrapped_and_settings_stay(odd, monkeypatch):
    before = {name: type(module) for name, module in odd.named_modules()}
    component = block()

    def quietly(cfg):  # as TransformerLens' import does
        logging.set_verbosity_error()
        warnings.simplefilter("ignore")
        return SimpleNamespace(get_component_mapping=lambda: {"blocks": component})

    monkeypatch.setitem(factory._adapters, "OddForCausalLM", quietly)
    verbosity, filters = logging.get_verbosity(), list(warnings.filters)
    state = torch.get_rng_state()
    assert adapter_words(odd).ends.search("looks.tells")
    assert (logging.get_verbosity(), list(warnings.filters)) == (verbosity, filters)
    assert {name: type(module) for name, module in odd.named_modules()} == before
    assert torch.equal(torch.get_rng_state(), state)


def test_no_adapter_is_no_error(odd):
    assert adapter_words(odd) is None


def test_names_are_those_of_evaluation_mode_while_the_model_drops():
    model = tiny.gpt2_model()
    quiet = saelab.load_model(model, device="cpu").sites()
    with pytest.warns(UserWarning, match="dropout"):
        lm = saelab.load_model(model.train(), device="cpu")
    state = torch.get_rng_state()
    assert lm.sites().equals(quiet) and torch.equal(torch.get_rng_state(), state)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("llama")
    tiny.llama_model().save_pretrained(path)
    tiny.byte_tokenizer().save_pretrained(path)
    return str(path)


@bridged
def test_a_model_loaded_into_a_bridge_is_the_plain_one(folder):
    plain = saelab.load_model(folder, device="cpu")
    lm = saelab.load_model(folder, device="cpu", backend="transformer-lens")
    assert type(lm.model).__name__ == "TransformerBridge" and lm.name == plain.name
    assert lm.digest == plain.digest and lm.tokenizer_digest == plain.tokenizer_digest
    columns = ["name", "width", "kind", "heads"]
    pd.testing.assert_frame_equal(lm.sites()[columns], plain.sites()[columns])
    names = list(plain.sites()["name"])
    prompts = ["The state of the union", "My"]
    mask = plain.tokenize(prompts).mask
    ours, theirs = lm.record(prompts, names), plain.record(prompts, names)
    for name in names:
        torch.testing.assert_close(ours[name][mask], theirs[name][mask], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(lm.logits(prompts)[mask], plain.logits(prompts)[mask], atol=1e-5, rtol=1e-4)
    assert lm.generate(prompts, 8) == plain.generate(prompts, 8)
    push = torch.linspace(-1, 1, 32)
    changed = []
    for one in (lm, plain):
        added = steering.add(push, strength=2.0, unit="activation", site="blocks.2.hook_resid_post")
        with one.steer(added), one.intervene("blocks.1.attn.hook_z", lambda x, where: 1.5 * x):
            changed.append(one.logits(prompts)[mask])
    torch.testing.assert_close(*changed, atol=1e-5, rtol=1e-4)
    assert not torch.allclose(changed[0], plain.logits(prompts)[mask], atol=1e-2)
    own = lm.record(prompts, "blocks.1.ln2.hook_out")[mask]
    torch.testing.assert_close(
        own, plain.record(prompts, "model.layers.1.post_attention_layernorm")[mask], atol=1e-5, rtol=1e-4
    )


@bridged
def test_a_bridge_tuned_in_place_is_another_model(folder):
    lm = saelab.load_model(folder, device="cpu", backend="transformer-lens")
    before = lm.digest
    with torch.no_grad():
        lm.model.embed.weight.mul_(1.1)
    assert lm.digest != before


def test_no_bridge_is_built_around_what_is_not_ours(tiny_llama, tmp_path):
    for given in (tiny.llama_model(), saelab.load_model(tiny.llama_model(), device="cpu")):
        with pytest.raises(
            saelab.ConfigError, match="replace the modules of your LlamaForCausalLM: give a name or a folder"
        ):
            saelab.load_model(given, device="cpu", backend="transformer-lens")
    families.build("biogpt").save_pretrained(tmp_path)
    tiny.byte_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(saelab.ConfigError, match="no bridge for BioGptForCausalLM"):
        saelab.load_model(str(tmp_path), device="cpu", backend="transformer-lens")
    with pytest.raises(saelab.ConfigError, match="backend is 'nnsight'"):
        saelab.load_model(str(tmp_path), backend="nnsight")
