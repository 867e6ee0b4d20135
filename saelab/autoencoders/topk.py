"""TopK: the k largest pre-activations of each token fire (Gao et al. 2024, "Scaling and evaluating sparse autoencoders")."""

import math
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from saelab.autoencoders import objectives
from saelab.autoencoders.allocation import PreActivations
from saelab.autoencoders.architecture import Architecture, Batch, Params, State
from saelab.autoencoders.codes import SparseCodes
from saelab.errors import ConfigError


@dataclass(frozen=True, repr=False, kw_only=True)
class TopK(Architecture):
    """A TopK SAE: each token spends a budget of k latents.

    f = top_k(relu((x - b_dec) W_enc + b_enc)), x_hat = f W_dec + b_dec, loss = FVU + aux_coefficient * aux-k
    (Gao et al. 2024, sections 2.3 and A.2; coefficient 1/32).

    Args:
        k: latents a token at most; 1 to d_sae.
        d_sae: number of latents.
        aux_coefficient: weight of the loss that revives dead latents; 0 turns it off.
        aux_k: dead latents a token that share it; None is the power of two nearest to d_in / 2.
        input_scale: "rms" trains on inputs of unit mean square (rounded to a power of two, so that folding the scale
            away is exact); None trains on raw ones.

    Raises `ConfigError` when k is not between 1 and d_sae.

    >>> TopK(k=32, d_sae=4096)
    TopK(k=32, d_sae=4096)
    """

    k: int
    aux_coefficient: float = 1 / 32
    aux_k: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.k, int) or not 1 <= self.k <= self.d_sae:
            raise ConfigError(f"k is {self.k!r} and d_sae is {self.d_sae:,}: k must be a whole number from 1 to d_sae")
        if not self.aux_coefficient >= 0:
            raise ConfigError(f"aux_coefficient is {self.aux_coefficient!r}; it must be 0 or more")
        if self.aux_k is not None and self.aux_k < 1:
            raise ConfigError(f"aux_k is {self.aux_k!r}; it must be 1 or more, or None for half of d_in")

    def allocate(self, scores: PreActivations, state: State, progress: float) -> SparseCodes:
        return scores.per_token(self.k)

    def losses(
        self, batch: Batch, codes: SparseCodes, x_hat: Tensor, params: Params, state: State
    ) -> dict[str, Tensor]:
        terms = {"fvu": objectives.fraction_of_variance_unexplained(batch.target, x_hat)}
        if self.aux_coefficient:
            aux_k = self.aux_k or 2 ** round(math.log2(max(batch.x.shape[1] / 2, 1)))
            terms["aux"] = self.aux_coefficient * objectives.aux_k(
                (batch.target - x_hat).detach(),
                (batch.x - params.b_dec).detach(),
                params.W_enc,
                params.b_enc,
                params.W_dec,
                state.dead,
                aux_k,
            )
        return terms

    def to_saelens(self) -> dict[str, Any]:
        return {"architecture": "topk", "k": self.k, "rescale_acts_by_decoder_norm": False}
