"""dictionary_learning: `ae.pt`, the state of one of its classes in torch's Linear layout, and `config.json` beside it.

Which class a file is of its tensors say. All but `AutoEncoderNew` and `JumpReluAutoEncoder` take the decoder's bias from the
input. `AutoEncoder` is brought to decoder rows of length 1, as the library does when it loads one.
"""

from pathlib import Path
from typing import Any

import torch

from saelab.autoencoders.architecture import Architecture
from saelab.autoencoders.architectures.gated import Gated
from saelab.autoencoders.architectures.jumprelu import JumpReLU
from saelab.autoencoders.architectures.matryoshka import Matryoshka
from saelab.autoencoders.architectures.mutual_choice import MutualChoice
from saelab.autoencoders.architectures.relu import ReLU
from saelab.autoencoders.architectures.topk import TopK
from saelab.autoencoders.sae import SAE
from saelab.base.errors import FormatError
from saelab.base.manifests import COUNT, FLOATS, NUMBER, TABLE, TEXT, WHOLE, held, read_json
from saelab.interop.assembly import Parts, assembled
from saelab.interop.given import Given
from saelab.interop.weights import names, read

_F = (FLOATS, "sae")
_LINEAR = {"encoder.weight": (FLOATS, "sae in"), "decoder.weight": (FLOATS, "in sae")}
_MATRICES = {"W_enc": (FLOATS, "in sae"), "b_enc": _F, "W_dec": (FLOATS, "sae in"), "b_dec": (FLOATS, "in")}
_CHOICE = _LINEAR | {"encoder.bias": _F, "b_dec": (FLOATS, "in"), "k": (WHOLE, ""), "threshold": (FLOATS, "")}
_CLASSES: dict[str, dict[str, Any]] = {
    "AutoEncoder": _LINEAR | {"encoder.bias": _F, "bias": (FLOATS, "in")},
    "AutoEncoderNew": _LINEAR | {"encoder.bias": _F, "decoder.bias": (FLOATS, "in")},
    "GatedAutoEncoder": _LINEAR
    | {name: _F for name in ("gate_bias", "mag_bias", "r_mag")}
    | {"decoder_bias": (FLOATS, "in")},
    "AutoEncoderTopK": _CHOICE,
    "BatchTopKSAE": _CHOICE,
    "JumpReluAutoEncoder": _MATRICES | {"threshold": _F},
    "MatryoshkaBatchTopKSAE": _MATRICES
    | {"k": (WHOLE, ""), "threshold": (FLOATS, ""), "group_sizes": (WHOLE, "groups")},
}
_SITES = {
    "resid_post": "blocks.{}.hook_resid_post",
    "mlp_out": "blocks.{}.hook_mlp_out",
    "attn_out": "blocks.{}.hook_attn_out",
}
_TEXT, _LAYER = TEXT.or_null(), COUNT.or_null()
_CONFIG = {
    "trainer": {
        "dict_class?": _TEXT, "lm_name?": _TEXT, "submodule_name?": _TEXT, "layer?": _LAYER, "k?": NUMBER.or_null(),
        "l1_penalty?": NUMBER.or_null(), "target_l0?": NUMBER.or_null(),
    },
    "buffer?": TABLE,
}  # fmt: skip


def load_dictionary_learning(file: Path, given: Given) -> SAE:
    """The SAE in an `ae.pt` of dictionary_learning, with what its `config.json` says where there is one.

    TopK and BatchTopK have the same tensors: `dict_class` of the configuration decides. A threshold that was never learnt (-1)
    is none: such an SAE fires once `saelab.calibrate` gave it one. Raises `FormatError` for other files.
    """
    path = file.with_name("config.json")
    config = read_json(held(file.parent, path.name), _CONFIG) if path.exists() else {"trainer": {}}
    trainer = config["trainer"]
    name = _class_of(file, trainer.get("dict_class"))
    found = read(file, _CLASSES[name])
    matrices = "W_enc" in found
    biases = [b for b in ("b_dec", "bias", "decoder_bias", "decoder.bias") if b in found]
    b_enc = next(found[b] for b in ("b_enc", "encoder.bias", "gate_bias") if b in found)
    threshold = found.get("threshold")
    if threshold is not None and "k" in found and float(threshold) < 0:
        threshold = None
    parts = Parts(
        found["W_enc" if matrices else "encoder.weight"], b_enc, found["W_dec" if matrices else "decoder.weight"],
        found[biases[0]], centres=name not in ("AutoEncoderNew", "JumpReluAutoEncoder"), threshold=threshold,
        r_mag=found.get("r_mag"), b_mag=found.get("mag_bias"),
    )  # fmt: skip
    if name == "AutoEncoder":
        parts.unit_rows()
    cfg = _architecture(name, found, trainer, file)
    return assembled(cfg, parts, _metadata(trainer, config.get("buffer") or {}) | given.known(), file)


def _class_of(file: Path, told: str | None) -> str:
    there = set(names(file))
    fitting = [name for name, layout in _CLASSES.items() if set(layout) == there]
    if not fitting:
        raise FormatError(
            f"{file} has the tensors {', '.join(sorted(there))}, which are no class of dictionary_learning"
        )
    if told in fitting:
        return told
    if told is not None:
        raise FormatError(
            f"config.json says that {file} is a {told}, and its tensors are those of {' or '.join(fitting)}"
        )
    if len(fitting) > 1:
        raise FormatError(
            f"{file} may be an {' or a '.join(fitting)}, and there is no config.json beside it that says which: write one, "
            f'{{"trainer": {{"dict_class": "{fitting[0]}"}}}}'
        )
    return fitting[0]


def _architecture(name: str, found: dict[str, torch.Tensor], trainer: dict[str, Any], file: Path) -> Architecture:
    d_sae = found["W_enc" if "W_enc" in found else "encoder.weight"].shape[0]
    if "k" in found:
        k = int(found["k"])
        if not 1 <= k <= d_sae or trainer.get("k") not in (None, k):
            raise FormatError(f"{file} has k = {k}, and {trainer.get('k', f'from 1 to {d_sae:,}')} was expected")
        if name == "AutoEncoderTopK":
            return TopK(k=k, d_sae=d_sae)
        if name == "BatchTopKSAE":
            return MutualChoice(k=k, d_sae=d_sae)
        sizes = found["group_sizes"].tolist()
        if sum(sizes) != d_sae or min(sizes) < 1:
            raise FormatError(f"{file} has groups of {sizes} latents, which do not add up to {d_sae:,}")
        return Matryoshka(k=k, d_sae=d_sae, groups=tuple(size / d_sae for size in sizes))
    if name == "JumpReluAutoEncoder":
        l0 = trainer.get("target_l0")
        return JumpReLU(target_l0=l0 if l0 and 0 < l0 <= d_sae else d_sae, d_sae=d_sae)
    l1 = max(0.0, float(trainer.get("l1_penalty") or 0))
    return Gated(l1=l1, d_sae=d_sae) if name == "GatedAutoEncoder" else ReLU(l1=l1, d_sae=d_sae)


def _metadata(trainer: dict[str, Any], buffer: dict[str, Any]) -> dict[str, Any]:
    named, layer = trainer.get("submodule_name") or "", trainer.get("layer")
    site = next((place.format(layer) for part, place in _SITES.items() if named.startswith(part)), None)
    length = buffer.get("ctx_len")
    return {
        "site": site if layer is not None else None,
        "model": trainer.get("lm_name"),
        "context_length": length if COUNT.holds(length) else None,
    }
