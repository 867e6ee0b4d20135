"""Llama Scope: JumpReLU SAEs and transcoders of Llama 3.1 (He et al. 2024), and those of its distillate to DeepSeek-R1.

They read s x, s = sqrt(d) / (average norm of x), and write s' y; biases and thresholds are of the scaled vectors. All is
folded, and codes are for raw vectors: b_enc and threshold divided by s, b_dec by s', W_dec times s / s', W_enc as it is.
(SAELens multiplies the threshold by s, which is another SAE unless s is 1.)
"""

from pathlib import Path
from typing import Any

import torch

from saelab.autoencoders.architectures.jumprelu import JumpReLU
from saelab.autoencoders.sae import SAE
from saelab.base.errors import FormatError
from saelab.base.manifests import FLAG, FLOATS, NUMBER, TEXT, held, read_json
from saelab.interop.assembly import Parts, assembled
from saelab.interop.given import SCALE, Given
from saelab.interop.weights import read

_CONFIG = {
    "act_fn?": TEXT, "jump_relu_threshold?": SCALE, "dataset_average_activation_norm?": {"in": SCALE, "out": SCALE},
    "top_k?": NUMBER.or_null(), "hook_point_in?": TEXT.or_null(), "hook_point_out?": TEXT.or_null(),
    "sparsity_include_decoder_norm?": FLAG, "apply_decoder_bias_to_pre_encoder?": FLAG,
}  # fmt: skip
_LAYOUT = {
    "encoder.weight": (FLOATS, "sae in"), "encoder.bias": (FLOATS, "sae"), "decoder.weight": (FLOATS, "out sae"),
    "decoder.bias": (FLOATS, "out"),
}  # fmt: skip


def load_llama_scope(folder: Path, given: Given) -> SAE:
    """The SAE or transcoder in a folder of Llama Scope (`hyperparams.json`, `checkpoints/final.safetensors`).

    With `sparsity_include_decoder_norm` latents are chosen by p times the length of their decoder row, which is brought to 1.
    It is a transcoder where `hook_point_in` and `hook_point_out` differ. Raises `FormatError` for another activation function
    than JumpReLU and for broken files.
    """
    config = read_json(held(folder, "hyperparams.json"), _CONFIG)
    if "jump_relu_threshold" not in config or "dataset_average_activation_norm" not in config:
        raise FormatError(
            f"{folder}/hyperparams.json has no jump_relu_threshold, or no dataset_average_activation_norm"
        )
    found = read(held(folder, "checkpoints/final.safetensors"), _LAYOUT)
    return _loaded(folder, config, found, torch.tensor(float(config["jump_relu_threshold"])), given)


def load_llama_scope_r1(folder: Path, given: Given) -> SAE:
    """The SAE in a folder of Llama Scope R1 Distill (`config.json`, `sae_weights.safetensors`): a threshold of each latent."""
    config = read_json(held(folder, "config.json"), _CONFIG)
    found = read(held(folder, "sae_weights.safetensors"), _LAYOUT | {"log_jumprelu_threshold": (FLOATS, "sae")})
    if "dataset_average_activation_norm" not in config and given.input_scale is None:
        raise FormatError(
            f"{folder}/config.json has no dataset_average_activation_norm: load it by its release's name, which knows it"
        )
    return _loaded(folder, config, found, found["log_jumprelu_threshold"].exp(), given)


def _loaded(folder: Path, config: dict[str, Any], found: dict[str, Any], threshold: torch.Tensor, given: Given) -> SAE:
    if (activation := config.get("act_fn", "jumprelu")).lower() != "jumprelu":
        raise FormatError(f"{folder} has the activation function {activation!r}: only JumpReLU is read")
    reads, writes = config.get("hook_point_in"), config.get("hook_point_out")
    parts = Parts(
        found["encoder.weight"], found["encoder.bias"], found["decoder.weight"], found["decoder.bias"],
        centres=config.get("apply_decoder_bias_to_pre_encoder", False) and writes == reads, threshold=threshold,
    )  # fmt: skip
    if config.get("sparsity_include_decoder_norm"):
        parts.unit_rows()
    d_sae, d_in = parts.W_enc.shape
    norms = config.get("dataset_average_activation_norm")
    s_in = d_in**0.5 / norms["in"] if norms else float(given.input_scale or 1)
    s_out = parts.W_dec.shape[1] ** 0.5 / norms["out"] if norms else s_in
    parts.b_enc /= s_in
    parts.threshold = threshold / s_in
    parts.W_dec *= s_in / s_out
    parts.b_dec /= s_out
    l0 = config.get("top_k")
    metadata: dict[str, Any] = {"site": reads, "target_site": writes if writes != reads else None}
    metadata = {name: site for name, site in metadata.items() if site is not None} | given.known()
    cfg = JumpReLU(target_l0=l0 if l0 and 0 < l0 <= d_sae else d_sae, d_sae=d_sae)
    return assembled(cfg, parts, metadata, folder)
