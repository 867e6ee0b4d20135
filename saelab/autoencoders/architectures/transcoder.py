"""Transcoders: latents read at one site and predict another, such as an MLP's output from its input (Dunefsky et al. 2024)."""

from dataclasses import dataclass, field
from operator import attrgetter
from typing import Any, ClassVar

import torch

from saelab.autoencoders.architecture import Architecture, Tensors
from saelab.base.errors import ConfigError

_SAELENS = {"standard": "transcoder", "jumprelu": "jumprelu_transcoder"}


def _of(member: str) -> Any:
    """What the architecture of the latents has by this name."""
    return property(attrgetter(f"of.{member}"))


@dataclass(frozen=True, repr=False, kw_only=True)
class Transcoder(Architecture):
    """A transcoder whose latents fire as those of `of` do: y_hat = f(x W_enc + b_enc) W_dec + b_dec [+ x W_skip^T].

    Unlike in an autoencoder nothing is taken from the input and the encoder is not tied to the decoder at the start. b_dec
    starts at the target's mean, W_skip [d_out, d_in] at zero (Paulo et al. 2025). Loss, allocation and thresholds are those
    of `of`, over the target y; codes, and prices of L1, are in units of the target.

    Train it with `site=` and `target_site=`, or on a pair (inputs, targets); `lm.splice` reads at the one and writes at the
    other, and `evaluate` scores the target.

    Args:
        of: the architecture of the latents, with their number: any but `GradientTopK`.
        skip: whether a linear map of the input is learnt beside the latents.

    Raises `ConfigError` for an `of` that is no such architecture.

    >>> from saelab.autoencoders.architectures.topk import TopK
    >>> Transcoder(of=TopK(k=32, d_sae=4096), skip=True)
    Transcoder(of=TopK(k=32, d_sae=4096), skip=True)
    """

    of: Architecture
    skip: bool = False
    d_sae: int = field(init=False)
    input_scale: str | None = field(init=False)

    centres_input: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if not isinstance(self.of, Architecture) or isinstance(self.of, Transcoder):
            raise ConfigError(f"of is {self.of!r}; it must be an architecture such as TopK(k=32, d_sae=4096)")
        if self.of.needs_gradients:
            raise ConfigError(
                f"a transcoder cannot be made of {self.of!r}: its gradients are those at the input, and decoder rows lie at "
                "the target; use TopK"
            )
        object.__setattr__(self, "d_sae", self.of.d_sae)
        object.__setattr__(self, "input_scale", self.of.input_scale)

    scores, allocate, select, losses = _of("scores"), _of("allocate"), _of("select"), _of("losses")
    observe, buffers, thresholds = _of("observe"), _of("buffers"), _of("thresholds")
    prepare, rescale, recipe, by_rank = _of("prepare"), _of("rescale"), _of("recipe"), _of("by_rank")

    def extra_parameters(self, d_in: int, d_out: int) -> Tensors:
        skip = {"W_skip": torch.zeros(d_out, d_in)} if self.skip else {}
        return self.of.extra_parameters(d_in, d_out) | skip

    def to_saelens(self) -> dict[str, Any]:
        """SAELens has transcoders that fire by ReLU or by thresholds; of the others it refuses the name."""
        entries = self.of.to_saelens()
        name = _SAELENS.get(entries["architecture"], f"{entries['architecture']}_transcoder")
        return entries | {"architecture": name.replace("transcoder", "skip_transcoder") if self.skip else name}
