"""Where each family of transformers keeps what TransformerLens names: site name -> module path.

Names and places follow TransformerLens 4's bridges, and the tests compare with their activations: `hook_z` is the
input of the output projection, `hook_post` the input of the MLP's last projection, `hook_resid_mid` the input of the
MLP's norm; with norms after attention and MLP (Gemma 2 and 3), `hook_attn_out` and `hook_mlp_out` are what these
norms give, as it is what is added to the residual stream.
"""

import dataclasses
import re
from dataclasses import dataclass
from typing import Any, Literal

from torch import nn

RESIDUAL, ATTENTION, MLP, MODULE = "residual", "attention output", "mlp", "module"
PROJECTION, EMBEDDING, NORM = "query, key or value", "embedding", "norm"
Side = Literal["input", "output"]

# What TransformerLens 4 calls by another name too; the classic name is the one kept in metadata.
ALIASES = {
    "hook_in": "hook_resid_pre",
    "ln2.hook_in": "hook_resid_mid",
    "hook_out": "hook_resid_post",
    "attn.o.hook_in": "attn.hook_z",
    "mlp.out.hook_in": "mlp.hook_post",
}

KINDS = {
    "hook_resid_pre": RESIDUAL,
    "attn.hook_q": PROJECTION,
    "attn.hook_k": PROJECTION,
    "attn.hook_v": PROJECTION,
    "attn.hook_z": ATTENTION,
    "hook_attn_out": ATTENTION,
    "hook_resid_mid": RESIDUAL,
    "mlp.hook_pre": MLP,
    "mlp.hook_post": MLP,
    "hook_mlp_out": MLP,
    "hook_resid_post": RESIDUAL,
}


@dataclass(frozen=True)
class Family:
    """Paths inside one block; `norm` reads the residual stream for attention, `middle` between attention and MLP.

    `value` is the projection that makes the values: the third third of what it gives ("third"), that of each head
    ("third of each head"), or all of it.
    """

    types: tuple[str, ...]
    norm: str
    value: str
    value_part: Literal["all", "third", "third of each head"]
    attention: str
    z_reader: str
    mlp: str
    pre_writer: str
    post_reader: str
    middle: str | None
    attention_norm: str | None = None
    mlp_norm: str | None = None

    def places(self) -> dict[str, tuple[str, Side]]:
        """Hook name -> (path inside the block, side), in the order of the forward pass."""
        apart = self.value_part == "all"  # queries, keys and values each have a projection of their own
        places: dict[str, tuple[str, Side] | None] = {
            "hook_resid_pre": ("", "input"),
            **{
                f"attn.hook_{x}": (self.value.replace("v_proj", f"{x}_proj"), "output") if apart else None
                for x in "qkv"
            },
            "attn.hook_z": (self.z_reader, "input"),
            "hook_attn_out": (self.attention_norm or self.attention, "output"),
            "hook_resid_mid": (self.middle, "input") if self.middle else None,
            "mlp.hook_pre": (self.pre_writer, "output"),
            "mlp.hook_post": (self.post_reader, "input"),
            "hook_mlp_out": (self.mlp_norm or self.mlp, "output"),
            "hook_resid_post": ("", "output"),
        }
        return {name: place for name, place in places.items() if place}


_GPT2 = Family(
    ("gpt2",), "ln_1", "attn.c_attn", "third",
    "attn", "attn.c_proj", "mlp", "mlp.c_fc", "mlp.c_proj", "ln_2",
)  # fmt: skip
_LLAMA = Family(
    ("llama", "mistral", "qwen2", "qwen3", "smollm3", "gemma"), "input_layernorm", "self_attn.v_proj", "all",
    "self_attn", "self_attn.o_proj", "mlp", "mlp.gate_proj", "mlp.down_proj", "post_attention_layernorm",
)  # fmt: skip
_GEMMA = Family(
    ("gemma2", "gemma3", "gemma3_text"), "input_layernorm", "self_attn.v_proj", "all",
    "self_attn", "self_attn.o_proj", "mlp", "mlp.gate_proj", "mlp.down_proj", "pre_feedforward_layernorm",
    attention_norm="post_attention_layernorm", mlp_norm="post_feedforward_layernorm",
)  # fmt: skip
_NEOX = Family(
    ("gpt_neox",), "input_layernorm", "attention.query_key_value", "third of each head",
    "attention", "attention.dense", "mlp", "mlp.dense_h_to_4h", "mlp.dense_4h_to_h", "post_attention_layernorm",
)  # fmt: skip
# In the parallel form the same norm reads the stream before attention: there is no middle.
_NEOX_PARALLEL = dataclasses.replace(_NEOX, middle=None)

_FAMILIES = {name: family for family in (_GPT2, _LLAMA, _GEMMA, _NEOX) for name in family.types}
KNOWN = tuple(_FAMILIES)


def family_of(config: Any) -> Family | None:
    """The family of a transformers configuration; None for those with no table (module paths work all the same)."""
    family = _FAMILIES.get(config.model_type)
    return _NEOX_PARALLEL if family is _NEOX and config.use_parallel_residual else family


def block_list(model: nn.Module, family: Family) -> tuple[str, nn.ModuleList] | None:
    """The path and the list of blocks: the first `ModuleList` whose items have the family's attention and MLP."""
    for path, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) and _has(module[0], family.z_reader, family.post_reader):
            return path, module
    return None


def in_features(module: nn.Module) -> int:
    """Width that a projection reads: `nn.Linear`, or GPT-2's `Conv1D`, whose weight is [in, out]."""
    width = getattr(module, "in_features", None)
    return int(module.weight.shape[0] if width is None else width)  # type: ignore[index]


def classic_name(name: str) -> str:
    """A TransformerLens 4 name under its classic form: blocks.3.hook_out -> blocks.3.hook_resid_post.

    >>> classic_name("blocks.3.hook_out"), classic_name("blocks.3.hook_resid_pre")
    ('blocks.3.hook_resid_post', 'blocks.3.hook_resid_pre')
    """
    match = re.fullmatch(r"(blocks\.\d+)\.(.+)", name)
    return f"{match[1]}.{ALIASES[match[2]]}" if match and match[2] in ALIASES else name


def _has(module: nn.Module, *paths: str) -> bool:
    try:
        return all(module.get_submodule(path) is not None for path in paths)
    except AttributeError:
        return False
