"""SAEs on disk: SAELens v6's layout, plus what is ours.

A folder holds

* `cfg.json`, with SAELens v6's keys; `metadata["saelab"]` has the format's version, the original configuration and the
  size and SHA-256 of the other files;
* `sae_weights.safetensors`: exactly SAELens's tensors (`W_enc` [d_in, d_sae], `b_enc`, `W_dec` [d_sae, d_out], `b_dec`, and
  `threshold` [d_sae] where latents fire by one; `r_mag`, `b_mag` and `b_gate` for `b_enc` in a gated SAE), in units of the
  raw activation: the scale is folded into the biases and thresholds, the decoder rows keep their norm;
* `sparsity.safetensors`: `sparsity` [d_sae], log10 of the share of tokens on which a latent fires;
* `saelab.safetensors`: the scale and the training state. The scale is a power of two, so unfolding it is exact.
"""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Shaped
from torch import Tensor

from saelab.autoencoders.architecture import Architecture
from saelab.autoencoders.foreign import described
from saelab.autoencoders.sae import SAE
from saelab.base import digests
from saelab.base.errors import FormatError
from saelab.base.files import current, user_path, whole_folder
from saelab.base.lazy import provided
from saelab.base.manifests import (
    ALL,
    FILE,
    FLOATS,
    METADATA,
    SIZE,
    TABLE,
    TEXT,
    Layout,
    check,
    check_finite,
    exactly,
    fit,
    inside,
    read_json,
    read_tensors,
    verify_file,
    verifying,
)  # fmt: skip
from saelab.base.owned import owned, rows_of
from saelab.base.tensors import save_tensors

CONFIG, WEIGHTS, SPARSITY, OURS = "cfg.json", "sae_weights.safetensors", "sparsity.safetensors", "saelab.safetensors"
FORMAT = 1
# What is read of `cfg.json`.
SCHEMA = {
    "d_in": SIZE, "d_sae": SIZE, "d_out?": SIZE, "dtype": TEXT,
    "metadata": {"saelab": {"config": TABLE, "metadata": METADATA, "files": {WEIGHTS: FILE, OURS: FILE, "*": FILE}}},
}  # fmt: skip
_NORMALISED = {"layer_norm": "layer_norm", "token_norm": "constant_norm_rescale"}  # SAELens' words
UNBOUNDED = ("state.norm_limit", "state.direction_std")  # no limit is infinity, no statistics are NaN


def save(sae: SAE, path: str | os.PathLike[str]) -> None:
    """See `SAE.save`."""
    with whole_folder(path, listed=listed, what="an SAE folder") as folder:
        save_tensors(folder / WEIGHTS, saelens_tensors(sae))
        ours = {name: tensor for name, tensor in sae.state_dict().items() if name.startswith(("state.", "extra."))}
        save_tensors(folder / OURS, ours)
        names = [WEIGHTS, OURS]
        if (density := sparsity(sae)) is not None:
            save_tensors(folder / SPARSITY, {"sparsity": density})
            names.append(SPARSITY)
        files = {name: digests.entry(folder / name) for name in names}
        config = saelens_config(sae)
        config["metadata"]["saelab"] = {
            "format": FORMAT, "config": sae.cfg.to_dict(), "metadata": sae.metadata, "files": files,
        }  # fmt: skip
        (folder / CONFIG).write_text(json.dumps(config, indent=2))


def _bias(cfg: Architecture) -> str:
    """What SAELens calls the bias of the encoder."""
    return "b_gate" if cfg.to_saelens()["architecture"].startswith("gated") else "b_enc"


def listed(folder: Path) -> list[str] | None:
    """The files that saelab has written into an SAE's folder, by its `cfg.json`; None where that is not ours."""
    try:
        names = read_json(folder / CONFIG, {"metadata": {"saelab": {"files": TABLE}}})["metadata"]["saelab"]["files"]
    except FormatError:
        return None
    return [name for name in (WEIGHTS, OURS, SPARSITY) if name in names] + [CONFIG]


def load(path: str | os.PathLike[str]) -> SAE:
    """See `SAE.load`."""
    folder = user_path(path)
    where = f"{folder / CONFIG}"
    try:
        config = read_json(current(folder, CONFIG), {"metadata": {"saelab": TABLE}})
    except FormatError as error:
        raise FormatError(f"{folder} is not an SAE folder of saelab's: {described(folder)} ({error})") from error
    ours = config["metadata"]["saelab"]
    check(ours, {"format": exactly(FORMAT)}, f"{where} is of another version of saelab")
    check(config, SCHEMA, where)
    cfg = architecture(ours["config"], where)
    d_in, d_out = config["d_in"], config.get("d_out", config["d_in"])
    plain = {
        "W_enc": (FLOATS, f"{d_in} {cfg.d_sae}"), _bias(cfg): (FLOATS, f"{cfg.d_sae}"),
        "W_dec": (FLOATS, f"{cfg.d_sae} {d_out}"), "b_dec": (FLOATS, f"{d_out}"), "W_skip?": (FLOATS, f"{d_out} {d_in}"),
        **{f"{name}?": (FLOATS, f"{cfg.d_sae}") for name in ("threshold", "r_mag", "b_mag")},
    }  # fmt: skip
    path, file = current(folder, WEIGHTS), ours["files"][WEIGHTS]
    with verifying(path, file["bytes"], file["sha256"]):
        shapes, rows = rows_of(path)
        fit(shapes, plain, str(path))
        weights = {name: owned(path, name, found, rows, turned=name == "W_enc") for name, found in shapes.items()}
    sae = unfilled(cfg, d_in, d_out, weights["W_dec"].dtype)
    _agree(config, sae, where)
    layout = {name: wanted for name, wanted in state_layout(sae).items() if name.startswith(("state.", "extra."))}
    layout["state.target_scale?"] = layout.pop("state.target_scale")  # older files have one scale for both
    rest = _owned(read_tensors(_verified(folder, OURS, ours["files"]), layout)[0])
    for name in ours["files"].keys() - {WEIGHTS, OURS}:
        inside(folder, name)
        verify_file(current(folder, name), ours["files"][name]["bytes"], ours["files"][name]["sha256"])
    scale = rest.setdefault("state.target_scale", rest["state.scale"])
    tensors = {
        "encoder_weight": weights["W_enc"].mul_(scale / rest["state.scale"]),
        "W_dec": weights["W_dec"],
        "encoder_bias": weights[_bias(cfg)] * scale,
        "decoder_bias": weights["b_dec"] * scale,
        **rest,
    }
    return _filled(sae, tensors, ours["metadata"], f"{folder}")


def architecture(fields: Any, where: str) -> Architecture:
    """The architecture that `to_dict` described; `FormatError` for anything else."""
    try:
        return Architecture.from_dict(fields)
    except (ValueError, TypeError, KeyError) as error:  # ConfigError is a ValueError
        raise FormatError(f"{where} describes no architecture: {error}") from error


def _verified(folder: Path, name: str, files: dict[str, Any]) -> Path:
    path = current(folder, name)
    verify_file(path, files[name]["bytes"], files[name]["sha256"])
    return path


def _owned(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copies of tensors that a file may stand behind."""
    return {name: value.clone(memory_format=torch.contiguous_format) for name, value in tensors.items()}


def _agree(config: dict[str, Any], sae: SAE, where: str) -> None:
    """What SAELens reads of this file and what saelab reads are one SAE."""
    made = _shape(sae)
    differ = [
        f"{name} is {config[name]!r} and {made[name]!r}"
        for name in made.keys() & config.keys()
        if config[name] != made[name]
    ]
    if differ:
        raise FormatError(f"{where} contradicts itself or its tensors: {'; '.join(sorted(differ))}")


def unfilled(cfg: Architecture, d_in: int, d_out: int, dtype: torch.dtype) -> SAE:
    """An SAE whose tensors have shapes and no storage."""
    with torch.device("meta"):
        return SAE(cfg, d_in, d_out=d_out).to(dtype)


def state_layout(sae: SAE) -> Layout:
    """The layout of a file that holds its state_dict; a float may be of another precision."""
    return {
        name: (FLOATS if value.is_floating_point() else (value.dtype,), " ".join(map(str, value.shape)))
        for name, value in sae.state_dict().items()
    }


def of_state(
    cfg: Architecture, tensors: Mapping[str, Shaped[Tensor, "..."]], metadata: dict[str, Any], where: str
) -> SAE:
    """The SAE of this architecture that has this state_dict; `FormatError` unless it can."""
    shape = {name: (tensor.dtype, tensor.shape) for name, tensor in tensors.items()}
    size = {"encoder_weight": (FLOATS, f"{cfg.d_sae} in"), "W_dec": (FLOATS, f"{cfg.d_sae} out"), "*": (ALL, "...")}
    fit(shape, size, where)
    sae = unfilled(cfg, shape["encoder_weight"][1][1], shape["W_dec"][1][1], shape["W_dec"][0])
    fit(shape, state_layout(sae), where)
    return _filled(sae, _owned(tensors), metadata, where)


def _filled(sae: SAE, tensors: Mapping[str, Shaped[Tensor, "..."]], metadata: dict[str, Any], where: str) -> SAE:
    """The SAE of `unfilled` with the tensors of a state_dict, which are its own.

    Raises `FormatError` where a weight is NaN or infinite, a scale is not above 0 or a count is below.
    """
    for name in ("state.scale", "state.target_scale", "state.norm_limit"):
        if not bool(tensors[name] > 0):
            raise FormatError(f"{where}: {name.removeprefix('state.')} is {float(tensors[name]):g} and must be above 0")
    check_finite({name: value for name, value in tensors.items() if name not in UNBOUNDED}, where)
    for name, value in tensors.items():
        if value.dtype == torch.int64 and value.numel() and int(value.min()) < 0:
            raise FormatError(f"{where}: {name.removeprefix('state.')} counts {int(value.min()):,}, below 0")
    sae.load_state_dict(tensors, assign=True)
    sae.metadata = dict(metadata)
    return sae


def saelens_tensors(sae: SAE) -> dict[str, Shaped[Tensor, "..."]]:
    """SAELens' tensors, in units of the raw activation."""
    weights = {"W_enc": sae.W_enc, _bias(sae.cfg): sae.b_enc, "W_dec": sae.W_dec, "b_dec": sae.b_dec}
    if sae.W_skip is not None:
        weights["W_skip"] = sae.W_skip
    threshold = sae.cfg.thresholds(sae.state)
    if threshold is not None and sae.cfg.usable(sae.state):
        weights["threshold"] = (threshold / sae.state.target_scale).expand(sae.d_sae)
    if "r_mag" in sae.extra:
        weights |= {"r_mag": sae.extra["r_mag"], "b_mag": sae.extra["b_mag"] / sae.state.target_scale}
    return weights


def sparsity(sae: SAE) -> Float[Tensor, " latents"] | None:
    """log10 of the share of tokens on which each latent fires [d_sae]; None where it was not counted."""
    return sae.latent_stats.density.clamp_min(1e-10).log10() if int(sae.state.stat_tokens) else None


def model_name(sae: SAE) -> str | None:
    """The model as the hub names it: `sae.metadata["model_name"]` where that was set, else by the name that it was loaded with;
    None where all that is known is its class."""
    given = sae.metadata.get("model_name")
    return given if given is not None else provided("hub_name")(sae.metadata.get("model"))


def saelens_config(sae: SAE) -> dict[str, Any]:
    """SAELens' `cfg.json`."""
    site = sae.metadata.get("site")
    return {
        **_shape(sae),
        **({"rescale_acts_by_decoder_norm": unit_rows(sae)} if "k" in sae.cfg.to_saelens() else {}),
        "device": "cpu",
        "apply_b_dec_to_input": sae.cfg.centres_input,
        "normalize_activations": _NORMALISED.get(str(sae.cfg.input_scale), "none"),
        "reshape_activations": "hook_z" if site and site.endswith("hook_z") else "none",
        "metadata": {
            "sae_lens_version": "6.54.12",  # the version whose layout this is: readers choose their parser by it
            "model_name": model_name(sae),
            "hook_name": site,
            **({} if sae.cfg.centres_input else {"hook_name_out": sae.metadata.get("target_site")}),
            "context_size": sae.metadata.get("context_length"),
            "prepend_bos": bool(sae.metadata.get("prepend_bos")),
            "dataset_path": sae.metadata.get("corpus"),
        },
    }


def unit_rows(sae: SAE) -> bool:
    """Whether decoder rows have length 1 up to rounding.

    Then weighing by it is no change, and SAELens folds only what is weighed (SAEDashboard's first act).
    """
    lengths = torch.linalg.vector_norm(sae.W_dec.detach().float(), dim=1)
    return bool(((lengths - 1).abs() < max(1e-5, torch.finfo(sae.dtype).eps)).all())


def _shape(sae: SAE) -> dict[str, Any]:
    return {
        **sae.cfg.to_saelens(),
        "d_in": sae.d_in,
        "d_sae": sae.d_sae,
        "dtype": str(sae.dtype).removeprefix("torch."),
        **({} if sae.cfg.centres_input else {"d_out": sae.d_out}),
    }
