"""Gated SAEs: one encoder decides which latents fire, and how strongly (Rajamanoharan et al. 2024a). Shapes as in `relu.py`."""

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from saelab.autoencoders import penalty
from saelab.autoencoders.allocation import PreActivations
from saelab.autoencoders.architecture import Architecture, Batch, Codes, Params, State, Tensors, Terms
from saelab.base import checks
from saelab.base.codes import SparseCodes

RAMP = 0.2  # of the run, over which the price rises from 0: our choice


@dataclass(frozen=True)
class GatePreActivations(PreActivations):
    """The gate's pre-activations pi, and what makes magnitudes of them: e^r (pi - b_gate) + b_mag."""

    r_F: Float[Tensor, " d_sae"]
    b_mag_F: Float[Tensor, " d_sae"]


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

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check(l1=checks.number("l1", self.l1, least=0))

    def extra_parameters(self, d_in: int, d_out: int) -> Tensors:
        return {"r_mag": torch.zeros(self.d_sae), "b_mag": torch.zeros(self.d_sae)}

    def buffers(self) -> Tensors:
        return penalty.buffers()

    def prepare(self, params: Params, batch: Batch, state: State) -> None:
        penalty.measure(batch, state)
        penalty.shrink_encoder(params, batch, lambda rows: self.scores(params, rows).dense().relu() @ params.W_dec)

    def rescale(self, params: Params, state: State, ratio: float) -> None:
        params.extra["b_mag"].mul_(ratio)
        state.input_norm.mul_(ratio)

    def scores(self, params: Params, batch: Batch) -> GatePreActivations:
        gate = super().scores(params, batch)
        return GatePreActivations(gate.x_ND, gate.W_FD, gate.b_F, params.extra["r_mag"], params.extra["b_mag"])

    def allocate(self, scores: PreActivations, state: State, progress: float) -> Float[Tensor, "n d_sae"]:
        assert isinstance(scores, GatePreActivations)
        pi_NF = scores.dense()
        return (pi_NF > 0) * ((pi_NF - scores.b_F) * scores.r_F.exp() + scores.b_mag_F).relu()

    def select(self, scores: PreActivations, state: State) -> SparseCodes:
        assert isinstance(scores, GatePreActivations)
        pi = scores.above(scores.b_F.new_zeros(()))
        at = pi.indices
        codes = pi.with_values((pi.values - scores.b_F[at]) * scores.r_F[at].exp() + scores.b_mag_F[at])
        return codes.where(codes.values > 0)

    def losses(
        self, batch: Batch, codes: Codes, x_hat: Float[Tensor, "n d_out"], params: Params, state: State
    ) -> Terms:
        gate_NF = batch.scores.dense().relu()
        price = self.l1 * state.input_norm * penalty.share(batch, state, RAMP)
        by_gate_ND = gate_NF @ params.W_dec.detach() + params.base(batch.x).detach()
        return {
            "squared_error": penalty.squared_error(batch, x_hat),
            "l1": price * gate_NF.sum(1).mean(),
            "aux": penalty.squared_error(batch, by_gate_ND),
        }

    def observe(self, batch: Batch, codes: Codes, params: Params, state: State) -> None:
        state.price_share.copy_(penalty.share(batch, state, RAMP))

    def to_saelens(self) -> dict[str, Any]:
        return {"architecture": "gated"}
