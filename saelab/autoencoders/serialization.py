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
from pathlib import Path
from typing import Any

from safetensors.torch import load_file

from saelab.autoencoders.architecture import Architecture
from saelab.autoencoders.sae import SAE
from saelab.errors import ConfigError, FormatError
from saelab.files import current, sha256, user_path, verify_file, whole_folder
from saelab.tensors import save_tensors

CONFIG, WEIGHTS, SPARSITY, OURS = "cfg.json", "sae_weights.safetensors", "sparsity.safetensors", "saelab.safetensors"
FORMAT = 1


def save(sae: SAE, path: str | os.PathLike) -> None:
    """See `SAE.save`."""
    with whole_folder(path, listed=listed, what="an SAE folder") as folder:
        weights = {"W_enc": sae.W_enc, sae.cfg.saelens_bias: sae.b_enc, "W_dec": sae.W_dec, "b_dec": sae.b_dec}
        if sae.W_skip is not None:
            weights["W_skip"] = sae.W_skip
        weights |= sae.cfg.saelens_tensors(sae.params(), sae.state)
        save_tensors(folder / WEIGHTS, weights)
        ours = {name: tensor for name, tensor in sae.state_dict().items() if name.startswith(("state.", "extra."))}
        save_tensors(folder / OURS, ours)
        names = [WEIGHTS, OURS]
        if int(sae.state.stat_tokens):
            density = sae.latent_stats.density.clamp_min(1e-10)
            save_tensors(folder / SPARSITY, {"sparsity": density.log10()})
            names.append(SPARSITY)
        files = {name: {"bytes": (folder / name).stat().st_size, "sha256": sha256(folder / name)} for name in names}
        (folder / CONFIG).write_text(json.dumps(_config(sae, files), indent=2))


def listed(folder: Path) -> list[str] | None:
    """The files that saelab has written into an SAE's folder, by its `cfg.json`; None where that is not ours."""
    try:
        names = json.loads((folder / CONFIG).read_text())["metadata"]["saelab"]["files"]
        return [name for name in (WEIGHTS, OURS, SPARSITY) if name in names] + [CONFIG]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None


def load(path: str | os.PathLike) -> SAE:
    """See `SAE.load`."""
    folder = user_path(path)
    try:
        config = json.loads(current(folder, CONFIG).read_text())
        metadata = dict(config["metadata"])
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise FormatError(f"{folder} holds no readable {CONFIG}: it is not an SAE folder") from error
    ours = metadata.pop("saelab", None)
    if ours is None:
        raise FormatError(
            f"{folder} was not written by saelab (architecture {config.get('architecture')!r}): "
            "folders of other libraries are not read yet"
        )
    if ours.get("format") != FORMAT:
        raise FormatError(f"{folder} has format {ours.get('format')!r}; this version of saelab reads {FORMAT}")
    for name, expected in ours["files"].items():
        verify_file(current(folder, name), expected["bytes"], expected["sha256"])
    weights, rest = load_file(current(folder, WEIGHTS)), load_file(current(folder, OURS))
    try:
        cfg = Architecture.from_dict(ours["config"])
    except (ConfigError, TypeError) as error:
        raise FormatError(f"{folder / CONFIG}: {error}") from error
    sae = SAE(cfg, weights["W_enc"].shape[0], ours["metadata"], d_out=weights["W_dec"].shape[1])
    sae.to(weights["W_dec"].dtype)
    try:
        scale = rest.setdefault("state.target_scale", rest["state.scale"])  # older files have one scale for both
        sae.load_state_dict(
            {
                "encoder_weight": weights["W_enc"].T * (scale / rest["state.scale"]),
                "W_dec": weights["W_dec"],
                "encoder_bias": weights[cfg.saelens_bias] * scale,
                "decoder_bias": weights["b_dec"] * scale,
                **rest,
            }
        )
    except (RuntimeError, KeyError) as error:
        raise FormatError(f"{folder / WEIGHTS} does not fit its {CONFIG}: {error}") from error
    return sae


def _config(sae: SAE, files: dict[str, Any]) -> dict[str, Any]:
    site = sae.metadata.get("site")
    return {
        **sae.cfg.to_saelens(),
        "d_in": sae.d_in,
        "d_sae": sae.d_sae,
        "dtype": str(sae.dtype).removeprefix("torch."),
        "device": "cpu",
        **({} if sae.cfg.centres_input else {"d_out": sae.d_out}),
        "apply_b_dec_to_input": sae.cfg.centres_input,
        "normalize_activations": "none",
        "reshape_activations": "hook_z" if site and site.endswith("hook_z") else "none",
        "metadata": {
            "sae_lens_version": "6.54.12",  # the version whose layout this is: readers choose their parser by it
            "model_name": sae.metadata.get("model"),
            "hook_name": site,
            **({} if sae.cfg.centres_input else {"hook_name_out": sae.metadata.get("target_site")}),
            "context_size": sae.metadata.get("context_length"),
            "prepend_bos": bool(sae.metadata.get("prepend_bos")),
            "dataset_path": sae.metadata.get("corpus"),
            "saelab": {
                "format": FORMAT,
                "config": sae.cfg.to_dict(),
                "metadata": sae.metadata,
                "files": files,
            },
        },
    }
