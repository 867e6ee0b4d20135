"""Between the latents of a latent diffusion pipeline and pixels, by its autoencoder (Rombach et al., CVPR 2022, 3.1)."""

from typing import Any

from jaxtyping import Float
from torch import Tensor

from saelab.base.errors import ConfigError


def to_latents(autoencoder: Any, images: Float[Tensor, "n C H W"]) -> Float[Tensor, "n c h w"]:
    """The latents that the denoiser sees: the mean of the encoder's distribution, shifted and scaled as in training."""
    scale, shift = _affine(autoencoder)
    encoded = autoencoder.encode(images)
    latents = encoded.latent_dist.mode() if hasattr(encoded, "latent_dist") else encoded.latents
    return (latents - shift) * scale


def to_pixels(autoencoder: Any, latents: Float[Tensor, "n c h w"]) -> Float[Tensor, "n C H W"]:
    """The images of latents; a VQ autoencoder rounds each place to its nearest code on the way."""
    scale, shift = _affine(autoencoder)
    return autoencoder.decode(latents / scale + shift).sample


def _affine(autoencoder: Any) -> tuple[float, float]:
    if autoencoder is None:
        raise ConfigError("this denoiser has no autoencoder: its images are what it denoises. Load the whole latent diffusion "
                          "pipeline (an object, a folder or a name) to get from latents to pixels")  # fmt: skip
    config = autoencoder.config
    return float(config.get("scaling_factor") or 1.0), float(config.get("shift_factor") or 0.0)
