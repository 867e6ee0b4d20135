"""SAELens' `cfg.json`, of version 6 and before: what it says and what of it saelab has no architecture for."""

import re
from pathlib import Path
from typing import Any

from saelab.base.errors import FormatError
from saelab.base.manifests import FLAG, NUMBER, SIZE, TABLE, TEXT, held, read_json

_METADATA = {"training_architecture_details?": TABLE.or_null()}
_SCHEMA = {
    "d_in": SIZE, "d_sae": SIZE, "d_out?": SIZE, "architecture?": TEXT, "metadata?": _METADATA, "k?": NUMBER.or_null(),
    "matryoshka_widths?": [SIZE],
    "apply_b_dec_to_input?": FLAG, "rescale_acts_by_decoder_norm?": FLAG,
}  # fmt: skip
_MISSING = {
    "matching_pursuit": "an encoder that pursues the residual, latent by latent",
    "temporal": "attention over the sequence",
    "abstopk": "codes below zero",
    "lista": "an encoder of several steps",
}


def read_config(folder: Path) -> dict[str, Any]:
    """The configuration as version 6 writes it; older ones are brought to that as SAELens does.

    Raises `FormatError` for what it says that saelab has no architecture for.
    """
    config = read_json(held(folder, "cfg.json"), _SCHEMA)
    version = config.get("metadata", {}).get("sae_lens_version") or config.get("sae_lens_version") or "5"
    config = dict(config)
    if int((re.match("[0-9]{1,4}", str(version)) or ["0"])[0]) < 6:
        activation = config.get("activation_fn", config.get("activation_fn_str", "relu"))
        if activation == "topk":
            config |= {"architecture": "topk", "k": (config.get("activation_fn_kwargs") or {}).get("k")}
        elif activation != "relu":
            raise FormatError(f"{folder} has the activation function {activation!r}, and relu and topk are read")
        config["metadata"] = config | {"hook_name": config.get("hook_name", config.get("hook_point"))}
        config["metadata"].setdefault("prepend_bos", True)
    config.setdefault("architecture", "standard")
    name = config["architecture"]
    if name in _MISSING:
        raise FormatError(f"{folder} is a {name} SAE of SAELens: it needs {_MISSING[name]}, which saelab has not")
    if not re.fullmatch("standard|topk|gated|jumprelu|(matryoshka_)?batchtopk|(jumprelu_)?(skip_)?transcoder", name):
        raise FormatError(f"{folder} is of the architecture {name!r}, which is not known here")
    head = config["metadata"].get("hook_head_index", config["metadata"].get("hook_point_head_index"))
    if head is not None:
        raise FormatError(f"{folder} reads head {head} alone, which is no site here: SAEs of all heads are read")
    return config


def metadata_of(told: dict[str, Any], transcodes: bool) -> dict[str, Any]:
    """What SAELens' metadata say, in saelab's words."""
    positions = told.get("seqpos_slice")
    skipped = positions[0] if isinstance(positions, list | tuple) and positions else None
    kwargs = told.get("model_from_pretrained_kwargs")
    names = {
        "site": "hook_name", "model": "model_name", "corpus": "dataset_path", "context_length": "context_size",
        "prepend_bos": "prepend_bos", **({"target_site": "hook_name_out"} if transcodes else {}),
    }  # fmt: skip
    found = {ours: told.get(theirs) for ours, theirs in names.items()}
    if transcodes:
        found["target_site"] = found["target_site"] or found["site"]
    if positions is not None:
        found["skip_positions"] = skipped if type(skipped) is int and skipped >= 0 else 0
    found["centred"] = bool(isinstance(kwargs, dict) and kwargs.get("center_writing_weights"))
    return found
