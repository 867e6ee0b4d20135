"""OpenAI's autoencoders of GPT-2 (Gao et al. 2024): a PyTorch file in Linear layout, `pre_bias` taken from the input.

TopK ones read vectors of which each has its own mean taken away and is divided by its own standard deviation.
"""

from pathlib import Path
from typing import Any

from saelab.autoencoders.architecture import Architecture
from saelab.autoencoders.architectures.relu import ReLU
from saelab.autoencoders.architectures.topk import TopK
from saelab.autoencoders.sae import SAE
from saelab.base.errors import FormatError
from saelab.base.manifests import ALL, FLOATS, SIZE, check, exactly
from saelab.interop.assembly import Parts, assembled
from saelab.interop.given import Given
from saelab.interop.weights import plain_values, read

_LAYOUT = {
    "encoder.weight": (FLOATS, "sae in"), "latent_bias": (FLOATS, "sae"), "decoder.weight": (FLOATS, "in sae"),
    "pre_bias": (FLOATS, "in"),
    **{f"{name}?": (ALL, "...") for name in ("stats_last_nonzero", "latents_activation_frequency", "latents_mean_square")},
}  # fmt: skip


def load_openai(file: Path, given: Given) -> SAE:
    """The autoencoder in a file of OpenAI's. Raises `FormatError` for other functions, tied ones and broken files."""
    told = plain_values(file)
    found = read(file, _LAYOUT)
    parts = Parts(
        found["encoder.weight"], found["latent_bias"], found["decoder.weight"], found["pre_bias"], centres=True
    )
    return assembled(_architecture(told, len(parts.b_enc), file), parts, given.known(), file)


def _architecture(told: dict[str, Any], d_sae: int, file: Path) -> Architecture:
    """What the file says of its activation function; the library takes TopK to mean normalised vectors, too."""
    activation, more = told.get("activation", "ReLU"), told.get("activation_state_dict", {})
    if activation == "ReLU":
        return ReLU(l1=0.0, d_sae=d_sae)
    if activation != "TopK":
        raise FormatError(f"{file} has the activation function {activation!r}, and ReLU and TopK are read")
    check(more, {"k": SIZE, "postact_fn?": exactly("ReLU")}, f"{file}, the activation of TopK")
    if more["k"] > d_sae:
        raise FormatError(f"{file} has {d_sae:,} latents and chooses {more['k']:,} of them")
    return TopK(k=more["k"], d_sae=d_sae, input_scale="layer_norm")
