"""TopK: the k largest pre-activations of each token fire (Gao et al. 2024, "Scaling and evaluating sparse autoencoders")."""

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from saelab.autoencoders import objectives
from saelab.autoencoders.allocation import PreActivations
from saelab.autoencoders.architecture import Architecture, Batch, Params, State
from saelab.base import checks
from saelab.base.codes import SparseCodes


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
        self.check(k=checks.count("k", self.k, most=self.d_sae, of="d_sae"), **objectives.checked_aux(self))

    def allocate(self, scores: PreActivations, state: State, progress: float) -> SparseCodes:
        return scores.per_token(self.k)

    def select(self, scores: PreActivations, state: State) -> SparseCodes:
        return scores.per_token(self.k)

    def losses(self, batch: Batch, codes: Any, x_hat: Tensor, params: Params, state: State) -> dict[str, Tensor]:
        return objectives.reconstruction(self, batch, x_hat, params, state)

    def to_saelens(self) -> dict[str, Any]:
        return {"architecture": "topk", "k": self.k, "rescale_acts_by_decoder_norm": False}
