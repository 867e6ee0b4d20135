"""What the architectures that spend a budget of latents share: its size, and the loss of TopK."""

import math
from dataclasses import dataclass

from jaxtyping import Bool, Float
from torch import Tensor

from saelab.autoencoders import objectives
from saelab.autoencoders.architecture import Architecture, Batch, Codes, Params, State, Terms
from saelab.base import checks


@dataclass(frozen=True, repr=False, kw_only=True)
class Budgeted(Architecture, registered=False):
    """k latents a token; the loss is FVU + aux_coefficient * aux-k (Gao et al. 2024, section A.2). `TopK` says more."""

    k: int
    aux_coefficient: float = 1 / 32
    aux_k: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check(
            k=checks.count("k", self.k, most=self.d_sae, of="d_sae"),
            aux_coefficient=checks.number("aux_coefficient", self.aux_coefficient, least=0),
            aux_k=checks.maybe(checks.count, "aux_k", self.aux_k),
        )

    def losses(
        self, batch: Batch, codes: Codes, x_hat: Float[Tensor, "n d_out"], params: Params, state: State
    ) -> Terms:
        terms = super().losses(batch, codes, x_hat, params, state)
        if self.aux_coefficient:
            k = self.aux_k or 2 ** round(math.log2(max(batch.x.shape[1] / 2, 1)))
            revived, aux = batch.lists.of("revived", lambda: self.revived(state)), x_hat.new_zeros(())
            if len(revived):
                error_ND, x_ND = (batch.target - x_hat).detach(), params.centred(batch.x).detach()
                aux = objectives.aux_k(error_ND, x_ND, params.W_enc, params.b_enc, params.W_dec, revived, k)
            terms["aux"] = self.aux_coefficient * aux
        return terms

    def revived(self, state: State) -> Bool[Tensor, " d_sae"]:
        """The latents that aux-k is over: the dead ones."""
        return state.dead
