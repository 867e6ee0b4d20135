"""SAELens: folders of version 6 (`cfg.json`, `sae_weights.safetensors`) and of before, and its training checkpoints.

The encoder reads x, or x - b_dec where `apply_b_dec_to_input` says so; `threshold` is raw. `rescale_acts_by_decoder_norm`
chooses by, and gives, pre-activations times the length of the decoder row: rows are brought to length 1, which is the same.
A scale or whitening of the input is in the weights of a finished SAE; beside a checkpoint it is in files of its own. What is
normalised vector by vector no weights can hold: it is the `input_scale` of ours.
"""

import re
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

from saelab.autoencoders.architecture import Architecture
from saelab.autoencoders.architectures.gated import Gated
from saelab.autoencoders.architectures.jumprelu import JumpReLU
from saelab.autoencoders.architectures.matryoshka import Matryoshka
from saelab.autoencoders.architectures.mutual_choice import MutualChoice
from saelab.autoencoders.architectures.relu import ReLU
from saelab.autoencoders.architectures.topk import TopK
from saelab.autoencoders.sae import SAE
from saelab.base.errors import FormatError
from saelab.base.manifests import FLOATS, NUMBER, SIZE, check, held, read_json
from saelab.interop.assembly import Parts, assembled
from saelab.interop.given import SCALE, Given
from saelab.interop.sae_lens_config import metadata_of, read_config
from saelab.interop.weights import read

_PER_TOKEN = {"layer_norm": "layer_norm", "constant_norm_rescale": "token_norm"}  # our `input_scale`
_PLAIN = {"W_enc": (FLOATS, "in sae"), "b_enc": (FLOATS, "sae"), "W_dec": (FLOATS, "sae in"), "b_dec": (FLOATS, "in")}
_OUT = {"W_dec": (FLOATS, "sae out"), "b_dec": (FLOATS, "out")}
_OF_LATENTS = (FLOATS, "sae")


def load_sae_lens(folder: Path, given: Given) -> SAE:
    """The SAE or transcoder in a folder of SAELens.

    Raises `FormatError` for what saelab has no architecture for (matching pursuit, temporal, signed TopK), one head of several,
    and files that are broken or contradict each other.
    """
    config = read_config(folder)
    name = config["architecture"]
    transcodes, kind = name.endswith("transcoder"), re.sub("_?(skip_)?transcoder$", "", name) or "standard"
    layout = dict(_PLAIN) | (_OUT if transcodes else {}) | ({"W_skip": (FLOATS, "out in")} if "skip_" in name else {})
    if kind == "gated":
        layout |= {"b_gate": _OF_LATENTS, "b_mag": _OF_LATENTS, "r_mag": _OF_LATENTS}
        del layout["b_enc"]
    elif kind == "jumprelu":
        layout |= {"threshold?": _OF_LATENTS, "log_threshold?": _OF_LATENTS}
    elif kind.endswith("batchtopk"):
        layout |= {"topk_threshold": (FLOATS, "")}
    found = read(held(folder, "sae_weights.safetensors"), layout | {"scaling_factor?": (FLOATS, "sae")})
    if "scaling_factor" in found and not bool((found["scaling_factor"] == 1).all()):
        raise FormatError(f"{folder} has a scaling_factor of each latent, from fine-tuning, which is not read")
    if list(found["W_enc"].shape) != [config["d_sae"], config["d_in"]]:
        raise FormatError(
            f"{folder}: cfg.json says d_in {config['d_in']:,} and d_sae {config['d_sae']:,}, and W_enc is "
            f"{list(found['W_enc'].T.shape)}: the files do not belong together"
        )
    threshold = found.get("threshold", found.get("topk_threshold"))
    if "log_threshold" in found:
        threshold = found["log_threshold"].exp()
    parts = Parts(
        found["W_enc"], found["b_gate" if kind == "gated" else "b_enc"], found["W_dec"], found["b_dec"],
        centres=not transcodes and config.get("apply_b_dec_to_input", True), threshold=threshold,
        W_skip=found.get("W_skip"), r_mag=found.get("r_mag"), b_mag=found.get("b_mag"),
    )  # fmt: skip
    by_length = kind.endswith("topk") and config.get("rescale_acts_by_decoder_norm", False)
    how = given.normalised or config.get("normalize_activations") or "none"
    _fold_normalisation(folder, how, parts, given, by_length)
    cfg = _architecture(kind, config, parts, folder)
    if how in _PER_TOKEN:
        cfg = replace(cfg, input_scale=_PER_TOKEN[how])
    metadata = metadata_of(config["metadata"], transcodes) | given.known()
    return assembled(cfg, parts, metadata, folder)


def _fold_normalisation(folder: Path, how: Any, parts: Parts, given: Given, by_length: bool) -> None:
    """Put the scale or whitening of the input, and with `by_length` the lengths of decoder rows, into the weights."""
    how = "expected_average_only_in" if how is True else how
    if how not in ("none", "expected_average_only_in", "covariance_whitening", *_PER_TOKEN):
        raise FormatError(f"{folder}/cfg.json: normalize_activations is {how!r}, which is not known here")
    scaler, whitening = folder / "activation_scaler.json", folder / "activation_whitening.safetensors"
    factor = given.input_scale
    if factor is None and how == "expected_average_only_in" and scaler.exists():
        factor = read_json(held(folder, scaler.name), {"scaling_factor": SCALE})["scaling_factor"]
    if factor is not None:
        parts.scale_input(float(factor))
        if by_length and parts.threshold is not None:
            parts.threshold /= factor
    if by_length:
        parts.unit_rows()
    if how == "covariance_whitening" and whitening.exists():
        layout = {name: (FLOATS, "in in") for name in ("matrix", "inverse_matrix")} | {"mean": (FLOATS, "in")}
        parts.whiten(**read(held(folder, whitening.name), layout))
    elif how not in ("none", *_PER_TOKEN) and factor is None:
        warnings.warn(
            f"{folder} was trained on normalised activations ({how}) and does not say how they were scaled: it is read as if "
            "that were in its weights, as SAELens does. If not, its codes mean nothing",
            stacklevel=5,
        )


def _architecture(kind: str, config: dict[str, Any], parts: Parts, folder: Path) -> Architecture:
    d_sae, told = config["d_sae"], config["metadata"]
    details = told.get("training_architecture_details") or {}
    details = details | {name: config[name] for name in ("k", "matryoshka_widths") if config.get(name) is not None}
    trained = told.get("training_architecture") if kind == "jumprelu" else kind
    k: Any = details.get("k")
    if trained in ("topk", "batchtopk", "matryoshka_batchtopk") and not (NUMBER.holds(k) and 1 <= k <= d_sae):
        raise FormatError(f"{folder}/cfg.json: k is {k!r}, not a number from 1 to {d_sae:,}")
    if kind == "topk":
        return TopK(k=int(k), d_sae=d_sae)
    price: Any = details.get("l1_coefficient", config.get("l1_coefficient"))
    l1 = float(price) if NUMBER.holds(price) and price >= 0 else 0.0
    if kind == "standard":
        return ReLU(l1=l1, d_sae=d_sae)
    if kind == "gated":
        return Gated(l1=l1, d_sae=d_sae)
    one = parts.threshold is not None and bool((parts.threshold == parts.threshold.reshape(-1)[0]).all())
    if one and parts.threshold is not None and trained in ("batchtopk", "matryoshka_batchtopk"):
        parts.threshold = parts.threshold.reshape(-1)[0]
        check(details, {"matryoshka_widths?": [SIZE]}, f"{folder}/cfg.json")
        widths = details.get("matryoshka_widths")
        if trained == "batchtopk" or not widths:
            return MutualChoice(k=max(1, round(k)), d_sae=d_sae)
        edges = [0, *(w for w in widths if w < d_sae), d_sae]
        return Matryoshka(
            k=max(1, round(k)),
            d_sae=d_sae,
            groups=tuple((b - a) / d_sae for a, b in zip(edges, edges[1:], strict=False)),
        )
    l0 = told.get("l0")
    return JumpReLU(target_l0=l0 if NUMBER.holds(l0) and 0 < l0 <= d_sae else d_sae, d_sae=d_sae)
