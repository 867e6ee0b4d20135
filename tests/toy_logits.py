"""Small random models of every way from the residual stream to the logits, and that way composed by hand.

Norms have gains and biases of their own, so that none passes for another; unembeddings are large, so that a soft cap is felt.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import transformers as hf
from torch import Tensor

import saelab
from tests import tiny

V = 258
_COMMON = {
    "vocab_size": V, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4,
    "max_position_embeddings": 256, "bos_token_id": 256, "eos_token_id": 256, "pad_token_id": 257,
}  # fmt: skip
_OPT = {"vocab_size": V, "hidden_size": 32, "ffn_dim": 48, "num_hidden_layers": 3, "num_attention_heads": 4,
        "max_position_embeddings": 256}  # fmt: skip
_GEMMA = _COMMON | {"head_dim": 8, "num_key_value_heads": 2, "query_pre_attn_scalar": 8}


@dataclass(frozen=True)
class Way:
    """A model's way: the path of its blocks and of its last norm, whether that subtracts the mean, its gain, and what is done
    to the logits."""

    make: Callable[[], Any]
    blocks: str
    norm: str
    centred: bool
    one_plus: bool = False
    scale: float = 1.0
    cap: float | None = None


class CappedPhi(hf.PhiForCausalLM):
    """A soft cap after an unembedding with a bias."""

    def forward(self, *args, **kwargs):
        output = super().forward(*args, **kwargs)
        output.logits = 1.5 * torch.tanh(output.logits / 3)
        return output


WAYS = {
    "gpt2": Way(lambda: hf.GPT2LMHeadModel(hf.GPT2Config(vocab_size=V, n_embd=32, n_layer=3, n_head=4, n_positions=256)),
                "transformer.h", "transformer.ln_f", True),
    "gpt_neox": Way(lambda: hf.GPTNeoXForCausalLM(hf.GPTNeoXConfig(**_COMMON)),
                    "gpt_neox.layers", "gpt_neox.final_layer_norm", True),
    "llama": Way(lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**_COMMON)), "model.layers", "model.norm", False),
    "gemma": Way(lambda: hf.GemmaForCausalLM(hf.GemmaConfig(**_COMMON, head_dim=8, num_key_value_heads=2)),
                 "model.layers", "model.norm", False, True),
    "gemma2": Way(lambda: hf.Gemma2ForCausalLM(hf.Gemma2Config(**_GEMMA, final_logit_softcapping=1.5)),
                  "model.layers", "model.norm", False, True, cap=1.5),
    "cohere": Way(lambda: hf.CohereForCausalLM(hf.CohereConfig(**_COMMON, logit_scale=0.3)),
                  "model.layers", "model.norm", True, scale=0.3),
    "granite": Way(lambda: hf.GraniteForCausalLM(hf.GraniteConfig(
                       **_COMMON, logits_scaling=8.0, residual_multiplier=0.22, embedding_multiplier=12.0)),
                   "model.layers", "model.norm", False, scale=1 / 8),
    "phi": Way(lambda: hf.PhiForCausalLM(hf.PhiConfig(**_COMMON)), "model.layers", "model.final_layernorm", True),
    "phi_capped": Way(lambda: CappedPhi(hf.PhiConfig(**_COMMON)), "model.layers", "model.final_layernorm", True, scale=0.5,
                      cap=1.5),
    "gptj": Way(lambda: hf.GPTJForCausalLM(hf.GPTJConfig(vocab_size=V, n_embd=32, n_layer=3, n_head=4, n_positions=256,
                                                         rotary_dim=4)), "transformer.h", "transformer.ln_f", True),
    "opt": Way(lambda: hf.OPTForCausalLM(hf.OPTConfig(**_OPT)), "model.decoder.layers", "model.decoder.final_layer_norm", True),
    "olmo2": Way(lambda: hf.Olmo2ForCausalLM(hf.Olmo2Config(**_COMMON)), "model.layers", "model.norm", False),
}  # fmt: skip


@cache
def known(name: str, dtype: torch.dtype = torch.float32) -> saelab.LanguageModel:
    """The model of a way, made once: do not change it."""
    return language_model(WAYS[name].make, dtype)


def language_model(make: Callable[[], Any], dtype: torch.dtype = torch.float32) -> saelab.LanguageModel:
    """The model with every norm and bias moved away from its first value, and matrices that do something."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = make().eval()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim == 1:
                    parameter.add_(0.3 * torch.randn_like(parameter))
                else:
                    parameter.mul_(6)
    return saelab.load_model(model.to(dtype), tokenizer=tiny.byte_tokenizer(), device="cpu")


def by_hand(way: Way, lm: Any, x_ND: Tensor, removed_ND: Tensor | float = 0.0) -> Tensor:
    """Logits [N, V] in float64 of the stream before the last norm less what is removed, the norm's scale that of the whole."""
    norm, head = lm.model.get_submodule(way.norm), lm.model.get_output_embeddings()
    epsilon = next(getattr(norm, name) for name in ("eps", "variance_epsilon") if hasattr(norm, name))
    x_ND = x_ND.double()
    left_ND = x_ND - removed_ND
    if way.centred:
        x_ND, left_ND = (rows - rows.mean(1, keepdim=True) for rows in (x_ND, left_ND))
    gain_D = norm.weight.detach().double() + way.one_plus
    normed_ND = left_ND / (x_ND.square().mean(1, keepdim=True) + epsilon).sqrt() * gain_D
    if getattr(norm, "bias", None) is not None:
        normed_ND = normed_ND + norm.bias.detach().double()
    z_NV = normed_ND @ head.weight.detach().double().T
    if head.bias is not None:
        z_NV = z_NV + head.bias.detach().double()
    z_NV = z_NV * way.scale
    return z_NV if way.cap is None else way.cap * torch.tanh(z_NV / way.cap)
