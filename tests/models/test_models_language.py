"""Loading and wrapping, tokens, losses, digests; TransformerLens missing, broken or old."""

import subprocess
import sys

import pytest
import torch
from torch import nn

import saelab
from saelab.base.errors import ConfigError, DataError, SiteError
from saelab.models.tokens import Tokens, padded
from tests import tiny


def test_a_local_folder(tmp_path, tiny_llama, tiny_tokenizer):
    tiny_llama.model.save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="no tokenizer"):
        saelab.load_model(str(tmp_path))
    tiny_tokenizer.save_pretrained(tmp_path)
    lm = saelab.load_model(tmp_path, device="cpu")
    assert lm.name == str(tmp_path) and not lm.model.training
    assert torch.equal(lm.logits("The state"), tiny_llama.logits("The state"))
    assert lm.digest == tiny_llama.digest and lm.tokenizer_digest == tiny_llama.tokenizer_digest
    half = saelab.load_model(tmp_path, device="cpu", dtype=torch.bfloat16)
    assert half.dtype is torch.bfloat16 and half.digest != lm.digest


@pytest.mark.parametrize(("name", "message"), [
    ("./no/such/folder", "there is no folder"),
    ("smollm2-135", "Did you mean 'smollm2-135m'"),
    ("nobody/such-a-model", "local folder or a model object"),
])  # fmt: skip
def test_what_cannot_be_loaded_says_the_way_out(name, message):
    with pytest.raises(ConfigError, match=message):
        saelab.load_model(name)


def test_objects_are_wrapped_as_they_are(monkeypatch):
    model, tokenizer = tiny.llama_model(), tiny.byte_tokenizer()
    model.train()
    flags = [p.requires_grad for p in model.parameters()]
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    backend = tokenizer.backend_tokenizer.to_str()
    lm = saelab.load_model(model, tokenizer=tokenizer, device="cpu")
    lm.record(["The state", "of"], "blocks.1.attn.hook_z")
    lm.generate("The", 3)
    assert lm.model is model and lm.tokenizer is tokenizer
    assert model.training and [p.requires_grad for p in model.parameters()] == flags
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    assert tokenizer.backend_tokenizer.to_str() == backend
    assert saelab.load_model(lm) is lm
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    for wish in ({"device": "cuda"}, {"dtype": torch.float64}):
        with pytest.raises(ConfigError, match="move it yourself"):
            saelab.load_model(model, **wish)
    with pytest.raises(ConfigError, match="Linear is not a language model"):
        saelab.load_model(nn.Linear(2, 2))


def test_training_mode_with_dropout_is_said_aloud():
    model = tiny.gpt2_model().train()
    with pytest.warns(UserWarning, match=r"training mode with dropout 0\.1"):
        saelab.load_model(model, device="cpu")
    assert model.training


def test_facts_of_a_model(tiny_llama):
    lm = tiny_llama
    assert (lm.d_vocab, lm.n_layers, lm.max_context) == (258, 4, 256)
    assert (lm.special_ids, lm.separator_id, lm.bos_id) == (frozenset({256, 257}), 256, 256)
    assert "LlamaForCausalLM" in repr(lm) and "4 blocks" in repr(lm) and "float32 on cpu" in repr(lm)
    other = saelab.load_model(tiny.llama_model(seed=1), device="cpu")
    assert other.digest != lm.digest == saelab.load_model(tiny.llama_model(), device="cpu").digest
    assert (other.special_ids, other.separator_id, other.bos_id) == (frozenset(), None, None)


def test_the_digest_of_a_tokenizer_ignores_how_it_was_last_called(tiny_tokenizer, tiny_llama):
    before = tiny_llama.tokenizer_digest
    tokenizer = tiny.byte_tokenizer()
    tokenizer(["a", "bcd"], padding=True, truncation=True, max_length=2)
    assert saelab.load_model(tiny_llama.model, tokenizer=tokenizer, device="cpu").tokenizer_digest == before


def test_tokens(tiny_llama):
    lm = tiny_llama
    tokens = lm.tokenize(["abc", "d"])
    assert tokens.mask.tolist() == [[True] * 3, [True, False, False]]
    assert tokens.ids[1, 1:].tolist() == [257, 257] and tokens.lengths == [3, 1]
    assert lm.tokenizer.decode(tokens.rows()[0]) == "abc"
    assert lm.to_tokens(torch.tensor([1, 2], dtype=torch.int32)).ids.tolist() == [[1, 2]]
    assert lm.to_tokens(torch.tensor([[1], [2]])).ids.dtype is torch.int64
    for wrong, message in (
        (torch.tensor([[1, 258]]), r"from 1 to 258, the vocabulary from 0 to 257"),
        (torch.tensor([0.5]), "whole numbers"), (torch.zeros(1, 1, 1).long(), "whole numbers"),
        (torch.zeros(2, 0).long(), "whole numbers"), ("", "no tokens"), ([], "no text"), ([3, "a"], "int"),
    ):  # fmt: skip
        with pytest.raises(DataError, match=message):
            lm.to_tokens(wrong)
    with pytest.raises(DataError, match=r"300 tokens .* 256"):
        lm.logits(torch.zeros(300, dtype=torch.int64))
    with pytest.raises(ConfigError, match="tokenizer="):
        saelab.load_model(lm.model, device="cpu").record("text", "blocks.0.hook_resid_post")


@pytest.mark.parametrize("left", [False, True])
def test_the_loss_is_over_real_targets(tiny_llama, left):
    lm, rows = tiny_llama, [[5, 6, 7, 256, 8], [9, 10, 11]]
    tokens = padded(rows, 257, left=left)
    by_hand = []
    for row in rows:
        with torch.no_grad():
            logits = lm.model(torch.tensor([row])).logits[0].double()
        by_hand.append([-torch.log_softmax(logits[i], 0)[row[i + 1]].item() for i in range(len(row) - 1)])
    every = sum(by_hand, [])
    assert lm.loss(tokens).item() == pytest.approx(sum(every) / 6, rel=1e-5)
    assert lm.loss(tokens, "sum").item() == pytest.approx(sum(every), rel=1e-5)
    table = lm.loss(tokens, "none")
    assert table.shape == (2, 4) and not table.requires_grad
    expected = [by_hand[0], [0, 0, *by_hand[1]] if left else [*by_hand[1], 0, 0]]
    torch.testing.assert_close(table, torch.tensor(expected), rtol=1e-4, atol=1e-5)
    with pytest.raises(DataError, match="at least two"):
        lm.loss("a")


def test_a_row_does_not_depend_on_its_padding(tiny_gpt2):
    together = tiny_gpt2.record(["The state of the union", "My fellow"], "blocks.2.hook_resid_post")
    alone = tiny_gpt2.record("My fellow", "blocks.2.hook_resid_post")
    torch.testing.assert_close(together[1, :9], alone[0], atol=1e-5, rtol=1e-4)


def test_record_gives_what_was_asked_under_the_names_given(tiny_llama):
    lm = tiny_llama
    found = lm.record("abc", ["blocks.1.hook_out", "model.layers.1", "layers.1.output", "layers.2.input"])
    assert list(found) == ["blocks.1.hook_out", "model.layers.1", "layers.1.output", "layers.2.input"]
    assert all(torch.equal(x, lm.record("abc", "blocks.1.hook_resid_post")) for x in found.values())
    assert lm.site("layers.1.mlp.up_proj").width == 64 and not found["model.layers.1"].requires_grad
    scale = torch.ones(1, requires_grad=True)
    (found["model.layers.1"] * scale).sum().backward()  # what was recorded can be trained on


@pytest.mark.parametrize(("name", "near"), [
    ("blocks.1.hook_resid_pst", "blocks.1.hook_resid_post"), ("blocks.4.attn.hook_z", "blocks.3.attn.hook_z"),
    ("model.layer.1", "model.layers.1"),
])  # fmt: skip
def test_an_unknown_site_lists_near_names(tiny_llama, name, near):
    with pytest.raises(SiteError, match=near.replace(".", r"\.")):
        tiny_llama.record("abc", name)


def test_a_place_without_one_vector_a_token_is_no_site(tiny_llama):
    with pytest.raises(SiteError, match="one vector a token"):
        tiny_llama.site("model.rotary_emb")


class HookPoint(nn.Module):
    def forward(self, x):
        return x


class HookedTransformer(nn.Module):
    """A stand-in with what saelab uses of TransformerLens 2 and 3: hook_dict, cfg, tokenizer, forward."""

    class Config:
        d_model, n_heads, d_head, d_mlp, d_vocab, n_layers, n_ctx = 12, 3, 5, 20, 258, 2, 64

    def __init__(self, tokenizer):
        super().__init__()
        self.cfg, self.tokenizer = self.Config(), tokenizer
        self.embed, self.unembed = nn.Embedding(258, 12), nn.Linear(12, 258)
        self.w_v, self.w_o = nn.Linear(12, 15), nn.Linear(15, 12)
        self.w_in, self.w_out = nn.Linear(12, 20), nn.Linear(20, 12)
        hooks = ("hook_resid_pre", "attn.hook_z", "hook_attn_out", "hook_resid_mid", "mlp.hook_post", "hook_mlp_out",
                 "hook_resid_post")  # fmt: skip
        self.hook_dict = {f"blocks.{i}.{hook}": HookPoint() for i in range(2) for hook in hooks}
        self.hook_dict["hook_embed"] = HookPoint()
        self.points = nn.ModuleList(self.hook_dict.values())

    def forward(self, input, return_type="logits", attention_mask=None):
        assert return_type == "logits"
        x = self.hook_dict["hook_embed"](self.embed(input))
        for i in range(2):
            hook = lambda name, value, i=i: self.hook_dict[f"blocks.{i}.{name}"](value)  # noqa: E731
            x = hook("hook_resid_pre", x)
            z = hook("attn.hook_z", self.w_v(x).unflatten(2, (3, 5)).cumsum(1))
            x = hook("hook_resid_mid", x + hook("hook_attn_out", self.w_o(z.flatten(2))))
            inside = hook("mlp.hook_post", self.w_in(x).relu())
            x = hook("hook_resid_post", x + hook("hook_mlp_out", self.w_out(inside)))
        return self.unembed(x)


def test_an_older_hooked_transformer_by_duck_type(tiny_tokenizer):
    model = HookedTransformer(tiny_tokenizer)
    lm = saelab.load_model(model, device="cpu")
    assert lm.tokenizer is tiny_tokenizer and lm.model is model and len(lm.sites()) == 15
    assert (lm.d_vocab, lm.n_layers, lm.max_context, lm.name) == (258, 2, 64, "HookedTransformer")
    z = lm.site("blocks.1.attn.hook_z")
    assert (z.width, z.heads, z.d_head) == (15, 3, 5)
    assert lm.site("blocks.0.mlp.hook_post").width == 20 and lm.site("hook_embed").width == 12
    recorded = lm.record(["abc", "d"], ["blocks.1.attn.hook_z", "blocks.0.hook_resid_mid"])
    assert recorded["blocks.1.attn.hook_z"].shape == (2, 3, 15)
    plain, seen = lm.logits("abc"), []

    def double(x, where):
        seen.append(where)
        return 2 * x

    with lm.intervene("blocks.1.attn.hook_z", double):
        torch.testing.assert_close(lm.record("abc", z), 2 * recorded["blocks.1.attn.hook_z"][:1])
        assert not torch.equal(lm.logits("abc"), plain)
    assert seen[0].positions.tolist() == [[0, 1, 2]] and seen[0].ids.tolist() == lm.tokenize("abc").ids.tolist()
    assert isinstance(lm.generate("abc", 5), str) and lm.loss("abc").item() > 0
    with pytest.raises(SiteError, match=r"blocks\.1\.hook_resid_post"):
        lm.site("blocks.1.hook_resid_pst")
    model.hook_dict["blocks.1.attn.hook_z"] = HookPoint()  # as SAELens does when it takes an SAE away
    with lm.intervene("blocks.1.attn.hook_z", double):
        assert not torch.equal(lm.logits("abc"), plain)


def test_without_transformer_lens():
    """As where it is not installed, and where importing it fails."""
    code = """
import sys, builtins
real = builtins.__import__
failure = None
def fake(name, *args, **kwargs):
    if name.split(".")[0] == "transformer_lens":
        raise failure
    return real(name, *args, **kwargs)
builtins.__import__ = fake
for failure in (ModuleNotFoundError("missing"), AttributeError("broken")):
    import saelab, torch
    from tests import tiny
    lm = saelab.load_model(tiny.llama_model(), tokenizer=tiny.byte_tokenizer(), device="cpu")
    assert lm.record("The", "blocks.1.attn.hook_z").shape == (1, 3, 32)
    assert isinstance(lm.generate("The", 3), str)
    assert "transformer_lens" not in sys.modules
"""
    subprocess.run([sys.executable, "-W", "error", "-c", code], check=True, timeout=120)


def test_the_import_is_light():
    code = (
        "import sys, saelab.models.language; "
        "heavy = {'transformers', 'transformer_lens', 'pandas', 'tokenizers'} & set(sys.modules); "
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_tokens_are_moved_not_changed(tiny_llama):
    tokens = Tokens(torch.tensor([[1, 2]]), torch.tensor([[True, True]]))
    assert torch.equal(tiny_llama.logits(tokens), tiny_llama.logits(torch.tensor([1, 2])))


def test_the_bundled_model(smollm2):
    lm = smollm2
    site = lm.site("blocks.3.attn.hook_z")
    assert (site.width, site.heads, site.d_head) == (576, 9, 64)
    assert lm.record("The state of the union", "blocks.3.hook_resid_post").shape == (1, 5, 576)
    assert lm.generate("The capital of France is", 4, temperature=0).strip().startswith("Paris")
    answer = lm.generate([{"role": "user", "content": "What is the capital of France?"}], 12, temperature=0)
    assert "Paris" in answer
    assert lm.separator_id in lm.special_ids
