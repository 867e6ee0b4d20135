"""Gated SAEs: one encoder decides which latents fire, and how strongly (Rajamanoharan et al. 2024a). Shapes as in `relu.py`."""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from saelab.autoencoders import penalty
from saelab.autoencoders.allocation import PreActivations
from saelab.autoencoders.architecture import Architecture, Batch, Params, State
from saelab.base import checks
from saelab.base.codes import SparseCodes

RAMP = 0.2  # of the run, over which the price rises from 0: our choice


@dataclass(frozen=True)
class GatePreActivations(PreActivations):
    """The gate's pre-activations pi, and what makes magnitudes of them: e^r (pi - b_gate) + b_mag."""

    r_F: Tensor
    b_mag_F: Tensor


@dataclass(frozen=True, repr=False, kw_only=True)
class Gated(Architecture):
    """A Gated SAE, whose price of firing does not shrink what fires.

    pi = (x - b_dec) W_enc + b_gate, f = 1[pi > 0] relu(e^r (x - b_dec) W_enc + b_mag), with unit decoder rows, and
    loss = |x - x_hat|^2 + l1 * sum relu(pi) + |x - relu(pi) W_dec - b_dec|^2, means over tokens, the decoder held fixed in
    the last term. `b_gate` is the SAE's `b_enc`; `r` and `b_mag` start at 0.

    `l1` is for inputs with E|x| = sqrt(d_in) and scales with them, rising over the first 20% of the run; that, and the start
    of the encoder (tied, times one number fitted to a sample), are our choices.

    Args:
        l1: price of a unit of pi; 0 or more.
        d_sae: number of latents.
        input_scale: as for `TopK`.

    Raises `ConfigError` when l1 is negative.

    >>> Gated(l1=5.0, d_sae=4096)
    Gated(l1=5.0, d_sae=4096)
    """

    l1: float

    saelens_bias: ClassVar[str] = "b_gate"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check(l1=checks.number("l1", self.l1, least=0))

    def extra_parameters(self, d_in: int, d_out: int) -> dict[str, Tensor]:
        return {"r_mag": torch.zeros(self.d_sae), "b_mag": torch.zeros(self.d_sae)}

    def buffers(self) -> dict[str, Tensor]:
        return penalty.buffers()

    def prepare(self, params: Params, batch: Batch, state: State) -> None:
        penalty.measure(batch, state)
        penalty.shrink_encoder(self, params, batch)

    def rescale(self, params: Params, state: State, ratio: float) -> None:
        params.extra["b_mag"].mul_(ratio)
        state.input_norm.mul_(ratio)

    def scores(self, params: Params, batch: Batch) -> GatePreActivations:
        gate = super().scores(params, batch)
        return GatePreActivations(gate.x_ND, gate.W_FD, gate.b_F, params.extra["r_mag"], params.extra["b_mag"])

    def allocate(self, scores: PreActivations, state: State, progress: float) -> Tensor:
        assert isinstance(scores, GatePreActivations)
        pi_NF = scores.dense()
        return (pi_NF > 0) * ((pi_NF - scores.b_F) * scores.r_F.exp() + scores.b_mag_F).relu()

    def observe(self, codes: Any, scores: PreActivations, state: State, progress: float) -> None:
        penalty.rise(state, progress, RAMP)

    def select(self, scores: PreActivations, state: State) -> SparseCodes:
        assert isinstance(scores, GatePreActivations)
        pi = scores.above(scores.b_F.new_zeros(()))
        at = pi.indices
        codes = pi.with_values((pi.values - scores.b_F[at]) * scores.r_F[at].exp() + scores.b_mag_F[at])
        return codes.where(codes.values > 0)

    def losses(self, batch: Batch, codes: Any, x_hat: Tensor, params: Params, state: State) -> dict[str, Tensor]:
        gate_NF = (batch.scores or self.scores(params, batch)).dense().relu()
        price = self.l1 * state.input_norm * state.price_share
        by_gate_ND = gate_NF @ params.W_dec.detach() + params.base(batch.x).detach()
        return {
            "squared_error": penalty.squared_error(batch, x_hat),
            "l1": price * gate_NF.sum(1).mean(),
            "aux": penalty.squared_error(batch, by_gate_ND),
        }

    def to_saelens(self) -> dict[str, Any]:
        return {"architecture": "gated"}

    def saelens_tensors(self, params: Params, state: State) -> dict[str, Tensor]:
        return {"r_mag": params.extra["r_mag"], "b_mag": params.extra["b_mag"] / state.target_scale}
