"""SAEs of saelab in the layouts of other libraries. Shapes: D inputs, F latents, O outputs.

Each format is written from the same weights, in units of the raw activation and in fp32, and holds some rules by which
latents fire; what it cannot hold is refused with what and why. A folder gets a `manifest.json` with the digests of its files
beside them, by which the next call knows that they may be replaced; the libraries do not read it.
"""

import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Shaped
from torch import Tensor

from saelab.autoencoders import serialization
from saelab.autoencoders.architectures.matryoshka import Matryoshka
from saelab.autoencoders.architectures.mutual_choice import MutualChoice
from saelab.autoencoders.architectures.transcoder import Transcoder
from saelab.autoencoders.sae import SAE
from saelab.base import checks
from saelab.base.errors import ConfigError
from saelab.base.files import whole_folder
from saelab.base.tensors import save_tensors
from saelab.base.version import __version__

UNIT = 1e-5  # how far from 1 a decoder row's length is taken for rounding: dictionary_learning's own tolerance


@dataclass
class Exported:
    """The weights of an SAE: W_enc [F, D], W_dec [F, O], W_skip [O, D], the others [F] or, b_dec, [O].

    `rule` is "standard" (fires where positive), "topk", "jumprelu" (above `threshold`) or "gated"; a transcoder takes no b_dec
    from its input.
    """

    sae: SAE
    rule: str
    W_enc: Tensor
    b_enc: Tensor
    W_dec: Tensor
    b_dec: Tensor
    threshold: Tensor | None = None
    r_mag: Tensor | None = None
    b_mag: Tensor | None = None
    W_skip: Tensor | None = None

    @property
    def of(self) -> Any:
        """The architecture of the latents."""
        return self.sae.cfg.of if isinstance(self.sae.cfg, Transcoder) else self.sae.cfg

    @property
    def transcodes(self) -> bool:
        return not self.sae.cfg.centres_input

    def by_thresholds(self) -> "Exported":
        """A gated SAE as the JumpReLU SAE that it is: it fires where e^r p_mag is above b_mag - e^r b_gate, and above 0."""
        if self.rule != "gated" or self.r_mag is None or self.b_mag is None:
            return self
        gain = self.r_mag.exp()
        threshold = (self.b_mag - gain * self.b_enc).clamp_min(0)
        weights: dict[str, Any] = {"W_enc": self.W_enc * gain[:, None], "b_enc": self.b_mag, "threshold": threshold}
        return replace(self, rule="jumprelu", r_mag=None, b_mag=None, **weights)

    def uncentred(self) -> Float[Tensor, " latents"]:
        """The encoder's bias [F] for x instead of x - b_dec."""
        return (self.b_enc.double() - self.W_enc.double() @ self.b_dec.double()).float()

    def tensors(self) -> dict[str, Shaped[Tensor, "..."]]:
        """By SAELens' names, W_enc turned to [D, F]."""
        bias = "b_gate" if self.rule == "gated" else "b_enc"
        named = {"W_enc": self.W_enc.T, bias: self.b_enc, "W_dec": self.W_dec, "b_dec": self.b_dec,
                 "threshold": self.threshold, "r_mag": self.r_mag, "b_mag": self.b_mag, "W_skip": self.W_skip}  # fmt: skip
        return {name: tensor for name, tensor in named.items() if tensor is not None}


def exported(sae: SAE) -> Exported:
    """The weights to write. Raises `ConfigError` for an SAE that has not learnt the thresholds that it fires by."""
    if not sae.cfg.usable(sae.state):
        raise ConfigError(f"{sae!r} has learnt no thresholds yet, so that nothing else could use it: train it on")
    found = {name: tensor.detach().cpu().float() for name, tensor in serialization.saelens_tensors(sae).items()}
    bias = found.pop("b_gate" if "b_gate" in found else "b_enc")
    of = sae.cfg.of if isinstance(sae.cfg, Transcoder) else sae.cfg
    W_enc = found.pop("W_enc").T
    return Exported(sae, of.to_saelens()["architecture"], W_enc=W_enc, b_enc=bias, **found)


def save_as(saes: SAE | Sequence[SAE], path: str | os.PathLike[str], format: str) -> None:
    """Write an SAE in another library's layout; "circuit-tracer" takes several, a transcoder for each layer.

    * "saelens": what SAELens v6 reads and nothing of ours; gated transcoders as the JumpReLU ones that they are. No
      transcoders that choose by a budget of each token.
    * "dictionary_learning": every autoencoder: TopK as `AutoEncoderTopK`, Mutual Choice as `BatchTopKSAE`, Matryoshka
      as `MatryoshkaBatchTopKSAE`, thresholds of each latent as `JumpReluAutoEncoder`, ReLU as `AutoEncoder` (decoder
      rows of length 1) or `AutoEncoderNew`, Gated as `GatedAutoEncoder`. No transcoders. `ae.pt` is a pickle of
      tensors, as the library has it.
    * "sparsify": what chooses by a budget of each token (TopK and its kin), also transcoders of equal widths. The library
      looks for the folder by the name of a module ("layers.3").
    * "circuit-tracer": transcoders of equal widths that fire where positive or above thresholds, gated ones as such, from
      layer 0 on without a gap, at sites that differ in the layer only.

    Raises `ConfigError` for what a format cannot hold, `CheckpointError` where nothing can be written or the folder holds
    something else.

    >>> import tempfile, saelab
    >>> sae = SAE(saelab.TopK(k=2, d_sae=8), 4)
    >>> save_as(sae, tempfile.mkdtemp() + "/layers.3", "sparsify")
    >>> save_as(sae, tempfile.mkdtemp() + "/sae", "circuit-tracer")
    Traceback (most recent call last):
    saelab.base.errors.ConfigError: circuit-tracer replaces MLPs and reads transcoders only: TopK(k=2, d_sae=8) is none
    """
    write = FORMATS[checks.choice("format", format, tuple(FORMATS))]
    weights = [exported(sae) for sae in ([saes] if isinstance(saes, SAE) else saes)]
    if write is not _saelens and (by_token := [it.sae for it in weights if it.sae.cfg.per_token]):
        raise ConfigError(
            f"{format} has no SAEs of vectors normalised one by one, and {by_token[0]!r} is one: format='saelens' holds it"
        )
    if not weights or (len(weights) > 1 and write is not _circuit_tracer):
        raise ConfigError(f"{format} has one SAE in a folder, and {len(weights)} were given")
    files = write(weights)
    with whole_folder(path, {"format": format, "saelab": __version__}) as folder:
        for name, content in files.items():
            _write(folder / name, content)


def _write(path: Path, content: Any) -> None:
    if isinstance(content, str):
        path.write_text(content, encoding="utf-8")
    elif path.suffix == ".pt":
        torch.save(content, path)
    else:
        save_tensors(path, content)


def _saelens(weights: list[Exported]) -> dict[str, Any]:
    config, tensors = saelens(weights[0])
    files = {serialization.CONFIG: json.dumps(config, indent=2), serialization.WEIGHTS: tensors}
    sparsity = serialization.sparsity(weights[0].sae)
    return files if sparsity is None else files | {serialization.SPARSITY: {"sparsity": sparsity}}


def saelens(it: Exported) -> tuple[dict[str, Any], dict[str, Shaped[Tensor, "..."]]]:
    """The configuration and tensors of SAELens v6; `ConfigError` where it has no class for them."""
    if it.transcodes and it.rule == "topk":
        raise ConfigError(
            f"SAELens has transcoders that fire where positive or above thresholds, and {it.sae.cfg!r} chooses by a budget of "
            "each token: format='sparsify' holds it, and save(path) writes saelab's own folder"
        )
    config = serialization.saelens_config(it.sae) | {"dtype": "float32"}
    if it.transcodes and it.rule == "gated":
        config["architecture"] = config["architecture"].replace("gated", "jumprelu")
        it = it.by_thresholds()
    return config, it.tensors()


def _dictionary_learning(weights: list[Exported]) -> dict[str, Any]:
    it = weights[0]
    sae, metadata = it.sae, it.sae.metadata
    if it.transcodes:
        raise ConfigError(
            f"dictionary_learning has no class for transcoders, and {sae.cfg!r} is one: other formats hold some"
        )
    name, state = _dictionary(it)
    trainer = {
        "trainer_class": "saelab", "dict_class": name, "activation_dim": sae.d_in, "dict_size": sae.d_sae,
        "lm_name": serialization.model_name(sae), "submodule_name": metadata.get("site"),
        "layer": _layer(metadata.get("site")), "seed": metadata.get("seed"),
        **({"k": int(state["k"])} if "k" in state else {}),
    }  # fmt: skip
    buffer = {"d_submodule": sae.d_in, "io": "out", "ctx_len": metadata.get("context_length")}
    return {
        "ae.pt": {key: value.clone(memory_format=torch.contiguous_format) for key, value in state.items()},
        "config.json": json.dumps({"trainer": trainer, "buffer": buffer}, indent=2),
    }


def _dictionary(it: Exported) -> tuple[str, dict[str, Tensor]]:
    """The class of dictionary_learning, and its state_dict."""
    of, linear = it.of, {"encoder.weight": it.W_enc, "encoder.bias": it.b_enc, "decoder.weight": it.W_dec.T}
    plain = {"W_enc": it.W_enc.T, "b_enc": it.b_enc, "W_dec": it.W_dec, "b_dec": it.b_dec}
    if it.r_mag is not None and it.b_mag is not None:
        gates = {"gate_bias": linear.pop("encoder.bias"), "mag_bias": it.b_mag, "r_mag": it.r_mag}
        return "GatedAutoEncoder", linear | gates | {"decoder_bias": it.b_dec}
    if it.rule == "standard" and _unit(it.W_dec):
        return "AutoEncoder", linear | {"bias": it.b_dec}
    if it.rule == "standard":  # the other class would be rescaled when it is loaded
        return "AutoEncoderNew", linear | {"encoder.bias": it.uncentred(), "decoder.bias": it.b_dec}
    threshold = torch.tensor([-1.0]) if it.threshold is None else it.threshold
    if it.rule == "jumprelu" and not (isinstance(of, MutualChoice) and bool((threshold == threshold[0]).all())):
        return "JumpReluAutoEncoder", plain | {"b_enc": it.uncentred(), "threshold": threshold}
    budget = {"k": torch.tensor(of.k, dtype=torch.int32), "threshold": threshold[0]}
    if isinstance(of, Matryoshka):
        return "MatryoshkaBatchTopKSAE", plain | budget | {"group_sizes": torch.tensor((0, *of.widths)).diff()}
    return "AutoEncoderTopK" if it.rule == "topk" else "BatchTopKSAE", linear | budget | {"b_dec": it.b_dec}


def _sparsify(weights: list[Exported]) -> dict[str, Any]:
    it = weights[0]
    sae = it.sae
    if it.rule != "topk":
        raise ConfigError(
            f"sparsify has SAEs that spend a budget of k latents on each token, and {sae.cfg!r} does not choose so: use "
            f"format={'saelens' if it.transcodes else 'dictionary_learning'!r}"
        )
    _equal_widths("sparsify", sae)
    config = {
        "activation": "topk", "expansion_factor": max(1, sae.d_sae // sae.d_in), "normalize_decoder": _unit(it.W_dec),
        "num_latents": sae.d_sae, "k": it.of.k, "multi_topk": False,  # with it the library's forward decodes 4k
        "skip_connection": it.W_skip is not None, "transcode": it.transcodes, "d_in": sae.d_in,
    }  # fmt: skip
    tensors = {"encoder.weight": it.W_enc, "encoder.bias": it.b_enc, "W_dec": it.W_dec, "b_dec": it.b_dec}
    skip = {} if it.W_skip is None else {"W_skip": it.W_skip}
    return {"sae.safetensors": tensors | skip, "cfg.json": json.dumps(config, indent=2)}


def _circuit_tracer(weights: list[Exported]) -> dict[str, Any]:
    files: dict[str, Any] = {}
    hooks = set()
    for it in weights:
        sae = it.sae
        if not it.transcodes:
            raise ConfigError(f"circuit-tracer replaces MLPs and reads transcoders only: {sae.cfg!r} is none")
        if it.rule == "topk":
            raise ConfigError(
                f"circuit-tracer has no latents that share a budget of each token: {sae.cfg!r} is not held"
            )
        _equal_widths("circuit-tracer", sae)
        layer, hook = _in_layer(sae, "site"), _in_layer(sae, "target_site")
        hooks.add((layer[1], hook[1]))
        name = f"layer_{layer[0]}.safetensors"
        if name in files or layer[0] != hook[0]:
            raise ConfigError(
                f"circuit-tracer has one transcoder a layer, within it: {sae!r} is another one of {layer[0]}"
            )
        tensors = it.by_thresholds().tensors()
        tensors["W_enc"] = tensors["W_enc"].T
        if "threshold" in tensors:  # it does not clip what is negative
            tensors["activation_function.threshold"] = tensors.pop("threshold").clamp_min(0)
        files[name] = tensors
    missing = [str(i) for i in range(len(weights)) if f"layer_{i}.safetensors" not in files]
    if missing:
        raise ConfigError(
            f"circuit-tracer needs a transcoder of every layer from 0 on, and there is none of {', '.join(missing)}: give "
            "all at once, saelab.interop.save_as([...], path, 'circuit-tracer')"
        )
    if len(hooks) > 1 or len({it.sae.d_sae for it in weights}) > 1:
        raise ConfigError(f"circuit-tracer needs the same sites and number of latents in every layer: {sorted(hooks)}")
    reads, writes = hooks.pop()
    config = {"model_name": serialization.model_name(weights[0].sae), "model_kind": "transcoder_set",
              "feature_input_hook": reads, "feature_output_hook": writes}  # fmt: skip
    lines = "".join(f"{key}: {json.dumps(value)}\n" for key, value in config.items())
    return files | {"config.yaml": lines}


FORMATS: dict[str, Callable[[list[Exported]], dict[str, Any]]] = {
    "saelens": _saelens, "dictionary_learning": _dictionary_learning, "sparsify": _sparsify, "circuit-tracer": _circuit_tracer,
}  # fmt: skip


def _unit(W_FO: Tensor) -> bool:
    return bool(((torch.linalg.vector_norm(W_FO, dim=1) - 1).abs() < UNIT).all())


def _equal_widths(library: str, sae: SAE) -> None:
    if sae.d_in != sae.d_out:
        raise ConfigError(
            f"{library} has one width for input and output, and {sae!r} reads {sae.d_in:,} and writes {sae.d_out:,}"
        )


def _layer(site: str | None) -> int | None:
    parts = (site or "").split(".")
    return int(parts[1]) if len(parts) > 2 and parts[0] == "blocks" and parts[1].isdigit() else None


def _in_layer(sae: SAE, which: str) -> tuple[int, str]:
    site = sae.metadata.get(which)
    layer = _layer(site)
    if site is None or layer is None:
        raise ConfigError(
            f"circuit-tracer has to know the layer, and {which} is {site!r}: set sae.metadata[{which!r}], as in "
            "'blocks.3.hook_mlp_out'"
        )
    return layer, site.split(".", 2)[2]
