"""Models as people hand them in: wrapped, compiled, adapted, of other tasks, with caches of any kind or none."""

import copy

import pytest
import torch
from torch import nn

import saelab
from saelab.models import generation, sites
from saelab.models.generation import generate_ids
from saelab.models.wrappers import eager
from tests import families
from tests.tiny import byte_tokenizer, gpt2_model, llama_model

SITE = "blocks.1.hook_resid_post"
PROMPTS = ["The state of", "My", "We ask the Congress"]


class Wrapper(nn.Module):
    """As peft's and others': any call goes on to the model inside."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, *args, **kwargs):
        return self.model(*args, **kwargs)


class Bypassing(Wrapper):
    """As peft's tuners, which run the forward method of the model and not the model, and name fewer arguments."""

    def get_base_model(self):
        return self.model

    def forward(self, input_ids=None, attention_mask=None, labels=None, **kwargs):
        return self.model.forward(input_ids=input_ids, attention_mask=attention_mask, labels=labels, **kwargs)


def forward_compiled(model):
    model.forward = torch.compile(model.forward, backend="eager")
    return model


def in_place_compiled(model):
    model.compile(backend="eager")
    return model


def blocks_compiled(model):
    for block in model.transformer.h:
        block.compile(backend="eager")
    return model


AROUND = {
    "plain": lambda model: model,
    "wrapper": Wrapper,
    "twice": lambda model: Wrapper(Wrapper(model)),
    "adapter": Bypassing,
    "data parallel": nn.DataParallel,
    "compiled": lambda model: torch.compile(model, backend="eager"),
    "compiled in place": in_place_compiled,
    "compiled forward": forward_compiled,
    "compiled blocks": blocks_compiled,
    "compiled wrapper": lambda model: torch.compile(Wrapper(model), backend="eager"),
}


@pytest.fixture(scope="module")
def plain():
    return saelab.load_model(gpt2_model(), tokenizer=byte_tokenizer(), device="cpu")


@pytest.mark.parametrize("around", AROUND)
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_wrapped_model_is_the_model_inside(plain, around):
    model = AROUND[around](gpt2_model())
    ids = plain.tokenize("The state").ids
    with torch.no_grad():
        model(input_ids=ids)  # what is compiled is compiled before any hook is there
    lm = saelab.load_model(model, tokenizer=byte_tokenizer(), device="cpu")
    assert lm.model is model and lm.digest == plain.digest and lm.name == plain.name
    assert lm.sites().equals(plain.sites()) and lm.site("transformer.h.1").width == 24
    assert lm.generate(PROMPTS, 8) == plain.generate(PROMPTS, 8)  # GPT-2's positions have to know of the padding
    assert torch.equal(lm.record(PROMPTS, SITE), plain.record(PROMPTS, SITE))

    def push(x, where):
        return x + where.positions[..., None]

    with plain.intervene(SITE, push):
        batch, alone = plain.logits(PROMPTS), plain.model(ids).logits
        text = plain.model.generate(input_ids=ids, max_new_tokens=4, do_sample=False, pad_token_id=0)
    with lm.intervene(SITE, push):
        assert torch.equal(lm.logits(PROMPTS), batch)
        with torch.no_grad():
            assert torch.equal(model(ids).logits, alone) and torch.equal(model(input_ids=ids).logits, alone)
        inside = lm.inner.generate(input_ids=ids, max_new_tokens=4, do_sample=False, pad_token_id=0)
    assert torch.equal(inside, text)
    assert torch.equal(sites.record(model, f"{prefix(model)}transformer.h.1", ids), plain.record("The state", SITE))


class Narrow(Wrapper):
    """Hands on the ids and the mask, and nothing else."""

    def forward(self, input_ids, attention_mask=None):
        return self.model(input_ids, attention_mask=attention_mask)


class Nameless(Wrapper):
    def forward(self, x):
        return self.model(x).logits


class Bare(Wrapper):
    def forward(self, input_ids, **more):
        return self.model(input_ids, **more).logits


def test_a_wrapper_that_hands_on_some_arguments(plain):
    lm = saelab.load_model(Narrow(gpt2_model()), tokenizer=byte_tokenizer(), device="cpu")
    assert lm.generate(PROMPTS, 8) == plain.generate(PROMPTS, 8)
    assert torch.equal(lm.record(PROMPTS, SITE), plain.record(PROMPTS, SITE))


def test_wrappers_that_are_called_otherwise_are_refused():
    with pytest.raises(saelab.ConfigError, match=r"Nameless.forward takes \['x'\], not input_ids"):
        saelab.load_model(Nameless(gpt2_model()), tokenizer=byte_tokenizer(), device="cpu")
    with pytest.raises(saelab.ConfigError, match="Bare gives Tensor"):
        saelab.load_model(Bare(gpt2_model()), tokenizer=byte_tokenizer(), device="cpu").logits("ab")


def prefix(model):
    path = next(path for path, module in model.named_modules() if hasattr(type(module), "base_model_prefix")
                and not hasattr(module, "_orig_mod"))  # fmt: skip
    return f"{path}." if path else ""


def test_compiled_code_comes_back_when_nobody_looks():
    from torch._dynamo import eval_frame

    model = torch.compile(gpt2_model(), backend="eager")
    with torch.no_grad():
        model(torch.tensor([[1, 2]]))
    with eager(model), eager(model):
        assert eval_frame._stance.stance == "force_eager"
    assert eval_frame._stance.stance == "default"
    with pytest.raises(RuntimeError, match="inside"), eager(model):
        raise RuntimeError("inside")
    assert eval_frame._stance.stance == "default"


def test_virtual_tokens_and_copies_on_several_devices_are_refused():
    class Prompted(Bypassing):
        active_peft_config = type("Config", (), {"is_prompt_learning": True})()

    with pytest.raises(saelab.ConfigError, match="virtual tokens"):
        saelab.load_model(Prompted(gpt2_model()))
    parallel = nn.DataParallel(gpt2_model())
    parallel.device_ids = [0, 1]
    with pytest.raises(saelab.ConfigError, match=r"model\.module"):
        saelab.load_model(parallel)


def alone(lm, prompts, n, use_cache=True):
    return [generate_ids(lm, lm.tokenize(text), n, 1.0, [(0, i)], use_cache)[0] for i, text in enumerate(prompts)]


CACHES = ["gpt2", "bloom", "mpt", "gptj", "openai-gpt", "mamba", "mamba2", "rwkv", "xlstm", "recurrent_gemma", "jamba", "bamba",
          "falcon_h1", "zamba2", "lfm2", "qwen3_next", "deepseek_v2", "gemma3_text"]  # fmt: skip


@pytest.mark.parametrize("family", CACHES)
def test_a_batch_is_as_one_text_and_a_cache_as_none(family):
    lm = saelab.load_model(families.build(family), tokenizer=byte_tokenizer(), device="cpu")
    batch = generate_ids(lm, lm.tokenize(PROMPTS), 6)
    assert batch == generate_ids(lm, lm.tokenize(PROMPTS), 6, use_cache=False)
    assert batch == alone(lm, PROMPTS, 6) == alone(lm, PROMPTS, 6, use_cache=False)


def test_the_measure_of_padding_is_no_part_of_a_recording():
    lm = saelab.load_model(gpt2_model(), tokenizer=byte_tokenizer(), device="cpu")
    rows = lm.tokenize(PROMPTS).rows()
    left = generation.padded(rows, 0, left=True)
    x = lm.record(left, SITE)  # measured within this very pass
    assert x.shape[:2] == left.ids.shape
    torch.testing.assert_close(x[1, -len(rows[1]) :], lm.record(PROMPTS[1], SITE)[0], atol=1e-5, rtol=1e-4)


def test_padding_that_would_be_read_is_refused_and_generation_does_without():
    lm = saelab.load_model(families.build("rwkv"), tokenizer=byte_tokenizer(), device="cpu")
    rows = lm.tokenize(PROMPTS).rows()
    with pytest.raises(saelab.DataError, match="pad on the right"):
        lm.logits(generation.padded(rows, 0, left=True))
    logits = lm.logits(PROMPTS)
    torch.testing.assert_close(logits[1, : len(rows[1])], lm.logits(PROMPTS[1])[0], atol=1e-5, rtol=1e-4)
    seen = []
    with lm.intervene("rwkv.blocks.1", lambda x, where: seen.append(where) or x):
        lm.generate(PROMPTS, 3, seed=1)
    lengths = [len(row) for row in rows]
    for step, where in enumerate(seen):
        counts = (where.generated & where.mask).sum(1).tolist()
        assert all(count in (step, seen[step - 1].generated[i].sum()) for i, count in enumerate(counts))
        assert (where.mask & ~where.generated).sum(1).tolist() == lengths and where.phase == "prompt"


def causal(kind, config, **more):
    import transformers

    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16, **more}
    return getattr(transformers, kind)(getattr(transformers, config)(**sizes))


T5 = {"d_model": 16, "d_kv": 8, "d_ff": 16, "num_layers": 1, "num_heads": 2, "vocab_size": 50}


@pytest.mark.parametrize(
    ("make", "why"),
    [
        (lambda: causal("ViTModel", "ViTConfig"), "reads no tokens"),
        (lambda: causal("LlamaForSequenceClassification", "LlamaConfig", vocab_size=50, pad_token_id=0), "no head"),
        (lambda: causal("LlamaModel", "LlamaConfig", vocab_size=50), "no head"),
        (lambda: causal("T5ForConditionalGeneration", "T5Config", **T5), "an encoder-decoder"),
        (lambda: causal("BertForMaskedLM", "BertConfig", vocab_size=50), "sees what comes after"),
        (lambda: causal("BertLMHeadModel", "BertConfig", vocab_size=50), "sees what comes after"),
        (lambda: nn.Sequential(nn.Linear(2, 2), nn.ReLU()), "Sequential is not a language model"),
        (lambda: Wrapper(causal("LlamaModel", "LlamaConfig", vocab_size=50)), "LlamaModel is not a causal"),
    ],
    ids=[
        "image",
        "classifier",
        "headless",
        "encoder-decoder",
        "masked",
        "masked with a causal head",
        "module",
        "wrapped",
    ],
)
def test_models_of_other_tasks_are_refused_with_the_way_out(make, why):
    with pytest.raises(saelab.ConfigError, match=why) as caught:
        saelab.load_model(make())
    assert "saelab.models.sites.record" in str(caught.value)


def test_a_decoder_of_an_encoders_family_is_taken():
    lm = saelab.load_model(causal("BertLMHeadModel", "BertConfig", vocab_size=50, is_decoder=True).eval(), device="cpu")
    ids = torch.tensor([[1, 2, 3]])
    assert torch.allclose(lm.logits(ids)[:, :2], lm.logits(ids[:, :2]), atol=1e-6)


@pytest.mark.parametrize("kind", ["LlamaModel", "LlamaForSequenceClassification"])
def test_a_folder_without_the_weights_of_a_head_is_refused(tmp_path, kind):
    model = causal(kind, "LlamaConfig", vocab_size=258, pad_token_id=0)
    model.save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(saelab.ConfigError, match=r"lm_head\.weight"):
        saelab.load_model(tmp_path)
    whole = copy.deepcopy(llama_model())
    whole.save_pretrained(tmp_path / "whole")
    byte_tokenizer().save_pretrained(tmp_path / "whole")
    assert saelab.load_model(tmp_path / "whole", device="cpu").n_layers == 4
