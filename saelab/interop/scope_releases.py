"""Gemma Scope and Llama Scope: JumpReLU SAEs and transcoders published for Gemma 2 and Llama 3.1, from files that a user has.

They encode without taking b_dec from the input: p = x W_enc + b_enc fires above its threshold. As saelab's SAEs do take it,
b_dec W_enc is added to an SAE's bias, which is exact; a transcoder's is as it is. Codes are in units of the raw activation.
A transcoder's file is like an SAE's: which one it is its folder says, or whoever calls. Nothing is downloaded.
"""

import math
import os
import re
import zipfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from saelab.autoencoders.architectures.jumprelu import JumpReLU
from saelab.autoencoders.architectures.transcoder import Transcoder
from saelab.autoencoders.sae import SAE
from saelab.base.errors import FormatError
from saelab.base.files import user_path
from saelab.base.manifests import FLOATS, NUMBER, TEXT, Kind, check_finite, plain_file, read_json, read_tensors

_NAMES = ("w_enc", "b_enc", "w_dec", "b_dec", "threshold")
# Weights cannot be packed much tighter than this; what claims to be is a bomb.
_DENSEST = 20


def load_gemma_scope(
    path: str | os.PathLike, *, site: str | None = None, target_site: str | None = None, model: str | None = None
) -> SAE:
    """The SAE or transcoder in a `params.npz` of Gemma Scope (or the folder that holds it; Lieberum et al. 2024).

    Arrays `W_enc` [d, f], `b_enc`, `W_dec` [f, d], `b_dec`, `threshold` [f], in either case. `site`, `target_site` and `model`
    go to the metadata; attention SAEs sit on `hook_z`. It is a transcoder where `target_site` is given or a folder is named so
    ("gemma-scope-2b-pt-transcoders", "layer_3"), of `blocks.3.ln2.hook_normalized` and `blocks.3.hook_mlp_out` unless sites are
    given. `cfg.target_l0`, which inference does not read, is the L0 of the folder's name where it has one ("average_l0_82"),
    else d_sae.

    Raises `FormatError` for a file that is missing, is no such archive or holds NaN, whose shapes do not fit, that is an SAE of
    the embedding (it reads another multiple of it than models give), and where the input of an MLP is the only site.

    >>> load_gemma_scope("layer_12/width_16k/average_l0_82", site="blocks.12.hook_resid_post")  # doctest: +SKIP
    """
    file = _inside(path, "params.npz")
    folders = [part.lower() for part in file.absolute().parts]
    if "embedding" in folders or site == "hook_embed":
        raise FormatError(
            f"{file} is an SAE of the embedding, whose rows Gemma multiplies by the square root of their width before its "
            "first block: it is not read, because no site says on which side of that it is. Use the residual stream's (layer_0)"
        )
    transcodes = target_site is not None or any(re.search(r"transcoders?$", part) for part in folders)
    layer = next((found[1] for part in folders if (found := re.fullmatch(r"layer_(\d+)", part))), None)
    if transcodes:
        site = site or (f"blocks.{layer}.ln2.hook_normalized" if layer else None)
        target_site = target_site or (f"blocks.{layer}.hook_mlp_out" if layer else None)
        if site is None or target_site is None:
            raise FormatError(f"{file} is a transcoder and no folder says of which layer: give site= and target_site=")
    elif site is not None and re.search(r"ln2|mlp_in|hook_in$", site):
        raise FormatError(
            f"{site} is the input of an MLP, from which Gemma Scope has transcoders and no SAEs: give target_site= too, the "
            "site that it predicts (blocks.N.hook_mlp_out)"
        )
    weights = _arrays(file)
    named = re.search(r"average_l0_(\d+)", str(file))
    l0 = int(named[1]) if named else None
    return _sae(file, *weights, l0=l0, site=site, target_site=target_site, model=model)


def load_llama_scope(
    path: str | os.PathLike, *, site: str | None = None, target_site: str | None = None, model: str | None = None
) -> SAE:
    """The SAE or transcoder in a folder of Llama Scope (`hyperparams.json`, `checkpoints/final.safetensors`; He et al. 2024).

    It was trained on s x with s = sqrt(d) / dataset_average_activation_norm, its threshold is one number for p(s x). Both are
    folded: b_enc, b_dec and threshold divided by s (of input and output), W_enc and W_dec as they are. (SAELens multiplies
    the threshold by s, which is another SAE unless s is 1.) With `sparsity_include_decoder_norm` p is weighed by the length of
    the decoder's rows, which are brought to length 1. It is a transcoder where the configuration's `hook_point_in` and
    `hook_point_out` differ, which then are its sites unless others are given, or where `target_site` is given.

    Raises `FormatError` for a missing or unreadable file, another activation function than JumpReLU, NaN, or shapes that do not
    fit.

    >>> load_llama_scope("Llama3_1-8B-Base-L15R-8x", site="blocks.15.hook_resid_post")  # doctest: +SKIP
    """
    folder = user_path(path)
    try:
        config = read_json(folder / "hyperparams.json", _LLAMA)
        found, _ = read_tensors(
            folder / "checkpoints" / "final.safetensors",
            {"encoder.weight": (FLOATS, "f d"), "encoder.bias": (FLOATS, "f"), "decoder.weight": (FLOATS, "o f"),
             "decoder.bias": (FLOATS, "o")},
        )  # fmt: skip
    except FormatError as error:
        raise FormatError(f"{folder} is not an SAE of Llama Scope: {error}") from error
    if config["act_fn"].lower() != "jumprelu":
        raise FormatError(f"{folder} has the activation function {config['act_fn']!r}: only JumpReLU is read")
    reads, writes = config.get("hook_point_in"), config.get("hook_point_out")
    if target_site is None and writes is not None and writes != reads:
        site, target_site = site or reads, writes
    W_DF, b_F, W_FO, b_O = (
        found["encoder.weight"].float().T, found["encoder.bias"].float(), found["decoder.weight"].float().T,
        found["decoder.bias"].float(),
    )  # fmt: skip
    norms = config["dataset_average_activation_norm"]
    s_in, s_out = W_DF.shape[0] ** 0.5 / norms["in"], W_FO.shape[1] ** 0.5 / norms["out"]
    if config.get("sparsity_include_decoder_norm"):
        lengths_F = torch.linalg.vector_norm(W_FO, dim=1)
        W_DF, b_F, W_FO = W_DF * lengths_F, b_F * lengths_F, W_FO / lengths_F[:, None]
    threshold_F = torch.full_like(b_F, config["jump_relu_threshold"] / s_in)
    weights = (W_DF, b_F / s_in, W_FO * (s_in / s_out), b_O / s_out, threshold_F)
    return _sae(folder, *weights, l0=config.get("top_k"), site=site, target_site=target_site, model=model)


_ABOVE_0 = Kind("a number above 0", lambda value: NUMBER.holds(value) and value > 0)
_LLAMA = {
    "act_fn": TEXT, "jump_relu_threshold": NUMBER, "dataset_average_activation_norm": {"in": _ABOVE_0, "out": _ABOVE_0},
    "top_k?": NUMBER.or_null(), "hook_point_in?": TEXT.or_null(), "hook_point_out?": TEXT.or_null(),
}  # fmt: skip


def _inside(path: str | os.PathLike, name: str) -> Path:
    given = user_path(path)
    return given / name if given.is_dir() else given


def _arrays(file: Path) -> list[Tensor]:
    """The five arrays of a params.npz, in the order of `_NAMES`; each is as large as its entry says before it is made."""
    from numpy.lib import format as npy

    try:
        size, found = plain_file(file), {}
        with zipfile.ZipFile(file) as archive:
            if sum(entry.file_size for entry in archive.infolist()) > _DENSEST * size:
                raise FormatError(f"it unpacks to more than {_DENSEST} times its {size:,} bytes, which no weights do")
            for entry in archive.infolist():
                with archive.open(entry) as stream:
                    version = npy.read_magic(stream)
                    header = {(1, 0): npy.read_array_header_1_0, (2, 0): npy.read_array_header_2_0}[version]
                    shape, _, dtype = header(stream)
                    if dtype.kind != "f" or math.prod(shape) * dtype.itemsize != entry.file_size - stream.tell():
                        raise FormatError(f"{entry.filename} is {dtype} {list(shape)} in {entry.file_size:,} bytes")
                with archive.open(entry) as stream:
                    array = npy.read_array(stream, allow_pickle=False)
                found[entry.filename.removesuffix(".npy").lower()] = torch.from_numpy(array).float()
        if set(found) != set(_NAMES):
            raise FormatError(f"it has the arrays {', '.join(sorted(found))}, not {', '.join(_NAMES)}")
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, EOFError, zipfile.BadZipFile) as error:
        raise FormatError(f"{file} is not an SAE of Gemma Scope: {error}") from error
    return [found[name] for name in _NAMES]


def _sae(
    path: Path, W_DF: Tensor, b_F: Tensor, W_FO: Tensor, b_O: Tensor, threshold_F: Tensor, *,
    l0: Any, site: str | None, target_site: str | None, model: str | None,
) -> SAE:  # fmt: skip
    shapes = [list(weight.shape) for weight in (W_DF, b_F, W_FO, b_O, threshold_F)]
    d, f, o = (*shapes[0], 0, 0)[:2] + tuple(shapes[3][:1] or [0])
    if shapes != [[d, f], [f], [f, o], [o], [f]] or not d * f * o:
        raise FormatError(
            f"{path}: W_enc, b_enc, W_dec, b_dec and threshold have the shapes {shapes}, which do not fit"
        )
    if d != o and target_site is None:
        raise FormatError(
            f"{path} turns vectors of width {d:,} into {o:,}: a transcoder. Give target_site=, what it predicts"
        )
    check_finite(dict(zip(_NAMES, (W_DF, b_F, W_FO, b_O, threshold_F), strict=True)), f"{path}")
    jump = JumpReLU(target_l0=l0 if l0 and 0 < l0 <= f else f, d_sae=f, input_scale=None)
    given = {"site": site, "target_site": target_site, "model": model, "source": str(path)}
    metadata = {name: value for name, value in given.items() if value is not None}
    sae = SAE(jump if target_site is None else Transcoder(of=jump), d, metadata, d_out=o)
    with torch.no_grad():
        sae.encoder_weight.copy_(W_DF.T)
        sae.encoder_bias.copy_(b_F + b_O @ W_DF if sae.cfg.centres_input else b_F)
        sae.W_dec.copy_(W_FO)
        sae.decoder_bias.copy_(b_O)
        sae.state.threshold.copy_(threshold_F)
        sae.extra["log_threshold"].copy_(threshold_F.clamp(min=1e-30).log())
    return sae
