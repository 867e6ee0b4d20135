"""Transcoders: latents read at one site and predict another, such as an MLP's output from its input (Dunefsky et al. 2024)."""

from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from saelab.autoencoders.allocation import PreActivations
from saelab.autoencoders.architecture import Architecture, Batch, Params, State
from saelab.base.codes import SparseCodes
from saelab.base.errors import ConfigError

_SAELENS = {"standard": "transcoder", "jumprelu": "jumprelu_transcoder"}


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

    def __repr__(self) -> str:
        return f"Transcoder(of={self.of!r}{', skip=True' if self.skip else ''})"

    @property
    def learning_rate(self) -> float:
        return self.of.learning_rate

    @property
    def unit_decoder(self) -> bool:
        return self.of.unit_decoder

    @property
    def betas(self) -> tuple[float, float]:
        return self.of.betas

    @property
    def saelens_bias(self) -> str:  # type: ignore[override]
        return self.of.saelens_bias

    def lr_factor(self, progress: float, base: float) -> float:
        return self.of.lr_factor(progress, base)

    def extra_parameters(self, d_in: int, d_out: int) -> dict[str, Tensor]:
        skip = {"W_skip": torch.zeros(d_out, d_in)} if self.skip else {}
        return self.of.extra_parameters(d_in, d_out) | skip

    def rate_factor(self, name: str) -> float:
        return self.of.rate_factor(name) if name != "W_skip" else 1.0

    def prepare(self, params: Params, batch: Batch, state: State) -> None:
        self.of.prepare(params, batch, state)

    def rescale(self, params: Params, state: State, ratio: float) -> None:
        self.of.rescale(params, state, ratio)

    def after_step(
        self, params: Params, batch: Batch, codes: "SparseCodes | Tensor", state: State, progress: float
    ) -> Tensor | None:
        return self.of.after_step(params, batch, codes, state, progress)

    def buffers(self) -> dict[str, Tensor]:
        return self.of.buffers()

    def thresholds(self, state: State) -> Tensor | None:
        return self.of.thresholds(state)

    def usable(self, state: State) -> bool:
        return self.of.usable(state)

    def scores(self, params: Params, batch: Batch) -> PreActivations:
        return self.of.scores(params, batch)

    def allocate(self, scores: PreActivations, state: State, progress: float) -> SparseCodes | Tensor:
        return self.of.allocate(scores, state, progress)

    def observe(self, codes: "SparseCodes | Tensor", scores: PreActivations, state: State, progress: float) -> None:
        self.of.observe(codes, scores, state, progress)

    def select(self, scores: PreActivations, state: State) -> SparseCodes:
        return self.of.select(scores, state)

    def losses(self, batch: Batch, codes: Any, x_hat: Tensor, params: Params, state: State) -> dict[str, Tensor]:
        return self.of.losses(batch, codes, x_hat, params, state)

    def to_saelens(self) -> dict[str, Any]:
        """SAELens has transcoders that fire by ReLU or by thresholds. Of the others it refuses the name, and so the folder,
        rather than to read it as something else."""
        entries = self.of.to_saelens()
        name = _SAELENS.get(entries["architecture"], f"{entries['architecture']}_transcoder")
        return entries | {"architecture": name.replace("transcoder", "skip_transcoder") if self.skip else name}

    def saelens_tensors(self, params: Params, state: State) -> dict[str, Tensor]:
        return self.of.saelens_tensors(params, state)

    def to_dict(self) -> dict[str, Any]:
        return {"class": "Transcoder", "of": self.of.to_dict(), "skip": self.skip}

    @classmethod
    def from_fields(cls, fields: dict[str, Any]) -> "Transcoder":
        return cls(of=Architecture.from_dict(fields["of"]), skip=fields["skip"])
