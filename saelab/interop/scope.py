"""Gemma Scope and Llama Scope: JumpReLU SAEs published for Gemma 2 and Llama 3.1, from files that a user has.

Both encode without taking b_dec from the input: p = x W_enc + b_enc fires above its threshold. As saelab's encoders do take it,
b_dec W_enc is added to the bias, which is exact. Codes are in units of the raw activation. Nothing is downloaded.
"""

import json
import os
import re
import zipfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from saelab.autoencoders.jumprelu import JumpReLU
from saelab.autoencoders.sae import SAE
from saelab.errors import FormatError
from saelab.files import user_path


def load_gemma_scope(path: str | os.PathLike, *, site: str | None = None, model: str | None = None) -> SAE:
    """The SAE in a `params.npz` of Gemma Scope (or the folder that holds it; Lieberum et al. 2024).

    Arrays `W_enc` [d, f], `b_enc`, `W_dec` [f, d], `b_dec`, `threshold` [f], in either case. `site` and `model` go to the
    metadata; attention SAEs sit on `hook_z`. `cfg.target_l0`, which inference does not read, is the L0 of the folder's name
    where it has one ("average_l0_82"), else d_sae.

    Raises `FormatError` for a file that is missing, is no such archive, or whose shapes do not fit.

    >>> load_gemma_scope("layer_12/width_16k/average_l0_82", site="blocks.12.hook_resid_post")  # doctest: +SKIP
    """
    import numpy

    file = _inside(path, "params.npz")
    try:
        with open(file, "rb") as opened, numpy.load(opened, allow_pickle=False) as arrays:
            found = {name.lower(): torch.from_numpy(arrays[name]).float() for name in arrays.files}
        weights = [found[name] for name in ("w_enc", "b_enc", "w_dec", "b_dec", "threshold")]
    except (OSError, ValueError, KeyError, TypeError, AttributeError, zipfile.BadZipFile) as error:
        raise FormatError(f"{file} is not an SAE of Gemma Scope: {error!r}") from error
    named = re.search(r"average_l0_(\d+)", str(file))
    return _sae(file, *weights, l0=int(named[1]) if named else None, site=site, model=model)


def load_llama_scope(path: str | os.PathLike, *, site: str | None = None, model: str | None = None) -> SAE:
    """The SAE in a folder of Llama Scope (`hyperparams.json`, `checkpoints/final.safetensors`; He et al. 2024).

    It was trained on s x with s = sqrt(d) / dataset_average_activation_norm, its threshold is one number for p(s x). Both are
    folded: b_enc, b_dec and threshold divided by s (of input and output), W_enc and W_dec as they are. (SAELens multiplies
    the threshold by s, which is another SAE unless s is 1.) With `sparsity_include_decoder_norm` p is weighed by the length of
    the decoder's rows, which are brought to length 1.

    Raises `FormatError` for a missing or unreadable file, another activation function than JumpReLU, or shapes that do not
    fit.

    >>> load_llama_scope("Llama3_1-8B-Base-L15R-8x", site="blocks.15.hook_resid_post")  # doctest: +SKIP
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    folder = user_path(path)
    try:
        config = json.loads((folder / "hyperparams.json").read_text())
        found = load_file(folder / "checkpoints" / "final.safetensors")
        kind = str(config["act_fn"]).lower()
        theta, norms = float(config["jump_relu_threshold"]), config["dataset_average_activation_norm"]
        W_DF, b_F = found["encoder.weight"].float().T, found["encoder.bias"].float()
        W_FD, b_D = found["decoder.weight"].float().T, found["decoder.bias"].float()
        s_in, s_out = (W_DF.shape[0] ** 0.5 / float(norms[name]) for name in ("in", "out"))
    except (OSError, ValueError, KeyError, TypeError, ZeroDivisionError, SafetensorError) as error:
        raise FormatError(f"{folder} is not an SAE of Llama Scope: {error!r}") from error
    if kind != "jumprelu":
        raise FormatError(f"{folder} has the activation function {kind!r}: only JumpReLU is read")
    if config.get("sparsity_include_decoder_norm"):
        lengths_F = torch.linalg.vector_norm(W_FD, dim=1)
        W_DF, b_F, W_FD = W_DF * lengths_F, b_F * lengths_F, W_FD / lengths_F[:, None]
    threshold_F = torch.full_like(b_F, theta / s_in)
    weights = (W_DF, b_F / s_in, W_FD * (s_in / s_out), b_D / s_out, threshold_F)
    return _sae(folder, *weights, l0=config.get("top_k"), site=site, model=model)


def _inside(path: str | os.PathLike, name: str) -> Path:
    given = user_path(path)
    return given / name if given.is_dir() else given


def _sae(
    path: Path, W_DF: Tensor, b_F: Tensor, W_FD: Tensor, b_D: Tensor, threshold_F: Tensor, *,
    l0: Any, site: str | None, model: str | None,
) -> SAE:  # fmt: skip
    shapes = [list(weight.shape) for weight in (W_DF, b_F, W_FD, b_D, threshold_F)]
    d, f = (*shapes[0], 0, 0)[:2]
    if shapes != [[d, f], [f], [f, d], [d], [f]] or not d * f:
        raise FormatError(
            f"{path}: W_enc, b_enc, W_dec, b_dec and threshold have the shapes {shapes}, which do not fit"
        )
    cfg = JumpReLU(target_l0=min(l0 or f, f), d_sae=f, input_scale=None)
    given = {"site": site, "model": model, "source": str(path)}
    sae = SAE(cfg, d, {name: value for name, value in given.items() if value is not None})
    with torch.no_grad():
        sae.encoder_weight.copy_(W_DF.T)
        sae.encoder_bias.copy_(b_F + b_D @ W_DF)
        sae.W_dec.copy_(W_FD)
        sae.decoder_bias.copy_(b_D)
        sae.state.threshold.copy_(threshold_F)
        sae.extra["log_threshold"].copy_(threshold_F.clamp(min=1e-30).log())
    return sae
