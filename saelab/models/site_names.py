"""What TransformerLens calls the places of a transformer.

Names and places follow TransformerLens 4's bridges, and the tests compare with their activations: `hook_z` is the
input of the output projection, `hook_post` the input of the MLP's last projection, `hook_resid_mid` the input of the
MLP's norm; with norms after attention and MLP (Gemma 2 and 3), `hook_attn_out` and `hook_mlp_out` are what these
norms give, as it is what is added to the residual stream.
"""

import re
from typing import Literal

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

# In the order of the forward pass.
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


def classic_name(name: str) -> str:
    """A TransformerLens 4 name under its classic form: blocks.3.hook_out -> blocks.3.hook_resid_post.

    >>> classic_name("blocks.3.hook_out"), classic_name("blocks.3.hook_resid_pre")
    ('blocks.3.hook_resid_post', 'blocks.3.hook_resid_pre')
    """
    match = re.fullmatch(r"(blocks\.\d+)\.(.+)", name)
    return f"{match[1]}.{ALIASES[match[2]]}" if match and match[2] in ALIASES else name
