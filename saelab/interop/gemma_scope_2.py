"""Gemma Scope 2: JumpReLU SAEs and transcoders of Gemma 3 (`params.safetensors`, and often `config.json`).

As in Gemma Scope, p = x W_enc + b_enc fires above its threshold. Sites have the names of transformers' modules.
"""

import re
from pathlib import Path

from saelab.autoencoders.sae import SAE
from saelab.base.errors import FormatError
from saelab.base.manifests import FLAG, NUMBER, TEXT, exactly, held, read_json
from saelab.interop.assembly import CROSS_LAYER
from saelab.interop.gemma_scope import check_told, loaded
from saelab.interop.given import Given
from saelab.interop.weights import names

_CONFIG = {
    "architecture": exactly("jump_relu"), "model_name?": TEXT.or_null(), "hf_hook_point_in?": TEXT.or_null(),
    "hf_hook_point_out?": TEXT.or_null(), "affine_connection?": FLAG.or_null(), "l0?": NUMBER.or_null(),
}  # fmt: skip
_SITES = {
    "output": "blocks.{}.hook_resid_post", "self_attn.o_proj.input": "blocks.{}.attn.hook_z",
    "post_feedforward_layernorm.output": "blocks.{}.hook_mlp_out",
    "pre_feedforward_layernorm.output": "model.layers.{}.pre_feedforward_layernorm",
}  # fmt: skip
_KINDS = ("resid_post", "attn_out", "mlp_out", "transcoder", "clt")


def load_gemma_scope_2(file: Path, given: Given) -> SAE:
    """The SAE or transcoder in a `params.safetensors` of Gemma Scope 2, at the sites of `config.json` beside it.

    Without that, the folder's name says what it is ("resid_post/layer_17_width_16k_l0_big"). Raises `FormatError` for broken
    files, parts of a cross-layer transcoder, and where nothing says whether it is an SAE or a transcoder.
    """
    path = file.with_name("config.json")
    config = read_json(held(file.parent, path.name), _CONFIG) if path.exists() else {}
    folders = file.absolute().parts[:-1]
    kind = next((kind for part in folders for kind in _KINDS if part.startswith(kind)), "")
    found = next((f for part in reversed(folders) if (f := re.match(r"layer_(\d+)", part))), None)
    if kind == "clt" or len(names(file).get("w_dec", ((), (0, 0)))[1]) == 3:
        raise FormatError(f"{file} {CROSS_LAYER}")
    points = [config.get("hf_hook_point_in"), config.get("hf_hook_point_out")]
    if points[0] is None and kind and found is not None:
        ends = {
            "resid_post": "output",
            "attn_out": "self_attn.o_proj.input",
            "mlp_out": "post_feedforward_layernorm.output",
        }
        start = ends.get(kind, "pre_feedforward_layernorm.output")
        points = [f"model.layers.{found[1]}.{start}", None]
    if kind == "transcoder" and points[1] is None and found is not None:
        points[1] = f"model.layers.{found[1]}.post_feedforward_layernorm.output"
    sites = dict(zip(("site", "target_site"), map(_site, points), strict=True))
    metadata = {name: site for name, site in sites.items() if site} | {"model": _gemma_3(config.get("model_name"))}
    metadata |= given.known()
    check_told(file, metadata)
    affine = "affine_skip_connection" in names(file)
    if config.get("affine_connection") not in (None, affine):
        raise FormatError(
            f"{file}: config.json says affine_connection {config['affine_connection']}, and the tensors do not"
        )
    return loaded(file, config.get("l0"), metadata)


def _site(point: str | None) -> str | None:
    found = re.fullmatch(r"model\.layers\.(\d+)\.(.*)", point or "")
    return _SITES[found[2]].format(found[1]) if found and found[2] in _SITES else point


def _gemma_3(name: str | None) -> str | None:
    """The hub's name of what a configuration calls "gemma-v3-1b-pt"; the 270m model has no "-pt" there."""
    if name is None:
        return None
    name = name.replace("-v3", "-3")
    name = name.replace("-pt", "") if "270m" in name else name
    return name if "/" in name else f"google/{name}"
