"""Classifier-free guidance: a second pass without the condition, and which of the two a hook sees.

Ho and Salimans (2022), eq. 6, in the form of the pipelines of diffusers: e = e_u + scale (e_c - e_u).
"""

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from jaxtyping import Shaped
from torch import Tensor

from saelab.base import checks
from saelab.base.errors import ConfigError
from saelab.models.diffusion import blank

if TYPE_CHECKING:
    from saelab.models.denoiser import Denoiser

_unconditional: ContextVar[bool] = ContextVar("unconditional", default=False)


@dataclass(frozen=True)
class Guidance:
    """How far from the prediction without the condition to go, and what stands for it (one row or n)."""

    scale: float
    unconditional: Shaped[Tensor, "..."]


def guidance_of(denoiser: "Denoiser", scale: float, unconditional: Shaped[Tensor, "..."] | None) -> Guidance:
    """See `Denoiser.guided`."""
    scale = checks.number("scale", scale)
    if not denoiser.conditional:
        raise ConfigError("this denoiser is not conditioned on anything, so there is nothing to guide it by")
    null = getattr(denoiser.unet.config, "num_embeds_ada_norm", None)
    if unconditional is None and null is not None:
        unconditional = torch.tensor([null], device=denoiser.device)
    if unconditional is None:
        shape = list(blank(denoiser.unet).shape)  # type: ignore[union-attr]  # conditional: there is one
        raise ConfigError(
            f"guidance compares with the prediction without the condition: give unconditional=, of the shape of a cond "
            f"({shape} or longer), as the encoded empty prompt or the label that training dropped to"
        )
    return Guidance(scale, unconditional.to(denoiser.device))


@contextlib.contextmanager
def without_condition() -> Iterator[None]:
    """Around the pass of the branch without the condition."""
    token = _unconditional.set(True)
    try:
        yield
    finally:
        _unconditional.reset(token)


def in_unconditional_branch() -> bool:
    """Whether the pass that a hook sees is that of the branch without the condition."""
    return _unconditional.get()
