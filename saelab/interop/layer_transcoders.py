"""Transcoders of circuit-tracer: `layer_3.safetensors` of each layer and `config.yaml`, as those of mwhanna for Qwen 3.

The encoder is [d_sae, d_in], nothing is taken from the input, and a latent fires by ReLU or above its own threshold. Where its
configuration does not say otherwise a transcoder reads `blocks.3.mlp.hook_in`, the norm's gain included (a model loaded without
folding), and writes `blocks.3.hook_mlp_out`.
"""

import itertools
import re
from pathlib import Path
from typing import Any

import yaml

from saelab.autoencoders.architecture import Architecture
from saelab.autoencoders.architectures.jumprelu import JumpReLU
from saelab.autoencoders.architectures.relu import ReLU
from saelab.autoencoders.sae import SAE
from saelab.base.errors import FormatError
from saelab.base.manifests import DEEPEST, FLOATS, TEXT, check, held, read_text
from saelab.interop.assembly import CROSS_LAYER, Parts, assembled
from saelab.interop.given import Given
from saelab.interop.weights import read

_LAYOUT = {
    "W_enc": (FLOATS, "sae in"), "b_enc": (FLOATS, "sae"), "W_dec": (FLOATS, "sae out"), "b_dec": (FLOATS, "out"),
    "W_skip?": (FLOATS, "out in"), "activation_function.threshold?": (FLOATS, "sae"),
}  # fmt: skip
_CONFIG = {
    f"{name}?": TEXT.or_null() for name in ("model_name", "model_kind", "feature_input_hook", "feature_output_hook")
}


def load_layer_transcoder(file: Path, given: Given) -> SAE:
    """The transcoder in a `layer_3.safetensors`, at the sites that `config.yaml` beside it names.

    Raises `FormatError` for parts of a cross-layer transcoder, broken files, and where nothing says of which layer it is.
    """
    path = file.with_name("config.yaml")
    config = _yaml(held(file.parent, path.name)) if path.exists() else {}
    if config.get("model_kind") == "cross_layer_transcoder":
        raise FormatError(f"{file} {CROSS_LAYER}")
    layer = re.fullmatch(r"layer_(\d+)\.safetensors", file.name)
    metadata: dict[str, Any] = {"model": config.get("model_name")}
    if layer is not None:
        ends = config.get("feature_input_hook") or "mlp.hook_in", config.get("feature_output_hook") or "hook_mlp_out"
        metadata |= dict(zip(("site", "target_site"), (f"blocks.{layer[1]}.{end}" for end in ends), strict=True))
    metadata |= given.known()
    if "target_site" not in metadata or "site" not in metadata:
        raise FormatError(f"{file} is a transcoder and its name says of no layer: give site= and target_site=")
    found = read(file, _LAYOUT)
    threshold, d_sae = found.get("activation_function.threshold"), len(found["b_enc"])
    parts = Parts(
        found["W_enc"], found["b_enc"], found["W_dec"], found["b_dec"], centres=False, threshold=threshold,
        W_skip=found.get("W_skip"),
    )  # fmt: skip
    cfg: Architecture = ReLU(l1=0.0, d_sae=d_sae) if threshold is None else JumpReLU(target_l0=d_sae, d_sae=d_sae)
    return assembled(cfg, parts, metadata, file)


def _yaml(path: Path) -> dict[str, Any]:
    text = read_text(path)
    opened = itertools.accumulate((character in "[{") - (character in "]}") for character in text)
    if max(opened, default=0) > DEEPEST:  # the parser takes the square of the depth
        raise FormatError(f"{path} is nested more than {DEEPEST} deep: no configuration is")
    try:
        if any(isinstance(event, yaml.AliasEvent) for event in yaml.parse(text, Loader=yaml.SafeLoader)):
            raise FormatError(f"{path} has aliases, of which a small file can make a large one: it is not read")
        config = yaml.safe_load(text) or {}
    except (yaml.YAMLError, RecursionError) as error:
        raise FormatError(f"{path} is no readable YAML: {error}") from error
    check(config, _CONFIG, str(path))
    return dict(config)
