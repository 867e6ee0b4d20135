"""OpenAI's autoencoders of GPT-2 (Gao et al. 2024): a PyTorch file in Linear layout, `pre_bias` taken from the input.

TopK ones read vectors of which each has its own mean taken away and is divided by its own standard deviation.
"""

from pathlib import Path

from saelab.autoencoders.architectures.relu import ReLU
from saelab.autoencoders.sae import SAE
from saelab.base.errors import FormatError
from saelab.base.manifests import ALL, FLOATS
from saelab.interop.assembly import Parts, assembled
from saelab.interop.given import Given
from saelab.interop.weights import plain_values, read

_LAYOUT = {
    "encoder.weight": (FLOATS, "sae in"), "latent_bias": (FLOATS, "sae"), "decoder.weight": (FLOATS, "in sae"),
    "pre_bias": (FLOATS, "in"),
    **{f"{name}?": (ALL, "...") for name in ("stats_last_nonzero", "latents_activation_frequency", "latents_mean_square")},
}  # fmt: skip


def load_openai(file: Path, given: Given) -> SAE:
    """The autoencoder in a file of OpenAI's. Raises `FormatError` for the normalised ones, tied ones and broken files."""
    told = plain_values(file)
    activation = told.get("activation", "ReLU")
    if activation == "TopK":
        raise FormatError(f"{file} reads activations normalised token by token, which no weights can hold")
    if activation != "ReLU":
        raise FormatError(f"{file} has the activation function {activation!r}, and ReLU and TopK are read")
    found = read(file, _LAYOUT)
    parts = Parts(
        found["encoder.weight"], found["latent_bias"], found["decoder.weight"], found["pre_bias"], centres=True
    )
    return assembled(ReLU(l1=0.0, d_sae=len(parts.b_enc)), parts, given.known(), file)
