"""Multi-TopK: a TopK SAE that also has to reconstruct with four times its budget (Gao et al. 2024, section 5)."""

from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

from saelab.autoencoders import objectives
from saelab.autoencoders.architecture import Batch, Codes, Params, State, Terms
from saelab.autoencoders.architectures.topk import TopK
from saelab.kernels import sparse

WIDER, WEIGHT = 4, 1 / 8


@dataclass(frozen=True, repr=False, kw_only=True)
class MultiTopK(TopK):
    """A TopK SAE with loss FVU(k) + FVU(4k) / 8, so that it also works with other budgets than k.

    At inference it is a TopK SAE. aux-k is as in `TopK`, on the reconstruction with k; 4k is at most d_sae (our choice).

    Args:
        k: latents a token at most; 1 to d_sae.
        d_sae: number of latents.
        aux_coefficient, aux_k, input_scale: as for `TopK`.

    Raises `ConfigError` when k is not between 1 and d_sae.

    >>> MultiTopK(k=32, d_sae=4096)
    MultiTopK(k=32, d_sae=4096)
    """

    def losses(
        self, batch: Batch, codes: Codes, x_hat: Float[Tensor, "n d_out"], params: Params, state: State
    ) -> Terms:
        wide = batch.scores.per_token(min(WIDER * self.k, self.d_sae))
        x_hat_wide = sparse.decode(wide, params.W_dec) + params.base(batch.x)
        fvu_wide = objectives.fraction_of_variance_unexplained(batch.target, x_hat_wide)
        return {**super().losses(batch, codes, x_hat, params, state), "fvu_4k": WEIGHT * fvu_wide}
