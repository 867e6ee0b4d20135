"""TopK: the k largest pre-activations of each token fire (Gao et al. 2024, "Scaling and evaluating sparse autoencoders")."""

from dataclasses import dataclass
from typing import Any

from saelab.autoencoders.allocation import PreActivations
from saelab.autoencoders.architecture import State
from saelab.autoencoders.budgeted import Budgeted
from saelab.base.codes import SparseCodes


@dataclass(frozen=True, repr=False, kw_only=True)
class TopK(Budgeted):
    """A TopK SAE: each token spends a budget of k latents.

    f = top_k(relu((x - b_dec) W_enc + b_enc)), x_hat = f W_dec + b_dec, loss = FVU + aux_coefficient * aux-k
    (Gao et al. 2024, sections 2.3 and A.2; coefficient 1/32).

    Args:
        k: latents a token at most; 1 to d_sae.
        d_sae: number of latents.
        aux_coefficient: weight of the loss that revives dead latents; 0 turns it off.
        aux_k: dead latents a token that share it; None is the power of two nearest to d_in / 2.
        input_scale: "rms" trains on inputs of unit mean square (rounded to a power of two, so that folding the scale
            away is exact); None trains on raw ones; "layer_norm" and "token_norm" normalise each vector by itself
            (`saelab.autoencoders.token_norm`): codes are then of those, and `decode` needs x too.

    Raises `ConfigError` when k is not between 1 and d_sae.

    >>> TopK(k=32, d_sae=4096)
    TopK(k=32, d_sae=4096)
    """

    def allocate(self, scores: PreActivations, state: State, progress: float) -> SparseCodes:
        return scores.per_token(self.k)

    def select(self, scores: PreActivations, state: State) -> SparseCodes:
        return scores.per_token(self.k)

    def to_saelens(self) -> dict[str, Any]:
        return {"architecture": "topk", "k": self.k}
