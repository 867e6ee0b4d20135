"""Which token-latent pairs fire: rules that spend a budget over the score matrix [n_tokens, d_sae]."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TypeVar, cast

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from saelab.base import processes as distributed
from saelab.base.codes import SparseCodes, refuse_dense
from saelab.kernels import columns, mixed, selection, sparse, threshold

Made = TypeVar("Made")


@dataclass(frozen=True)
class PreActivations:
    """x W_enc + b_enc, computed only as far as an allocation rule asks for.

    `x_ND` [n, d_in] has b_dec subtracted already; `W_FD` [d_sae, d_in] and `b_F` [d_sae] are the encoder.
    """

    x_ND: Float[Tensor, "n d_in"]
    W_FD: Float[Tensor, "d_sae d_in"]
    b_F: Float[Tensor, " d_sae"]
    _made: dict[str, object] = field(default_factory=dict, init=False, repr=False, compare=False)

    def once(self, name: str, make: Callable[[], Made]) -> Made:
        """What allocation worked out and `observe` or a loss needs again: made once a batch."""
        if name not in self._made:
            self._made[name] = make()
        return cast(Made, self._made[name])

    def per_token(self, k: int) -> SparseCodes:
        """The k largest positive ones of each token (TopK: Gao et al. 2024, section 2.3), differentiable.

        Ties go to the lower index; a token with fewer than k positive ones gets only those.
        """
        chosen = selection.top_k(self.x_ND.detach(), self.W_FD.detach(), self.b_F.detach(), k)
        return sparse.encode_at(self.x_ND, self.W_FD, self.b_F, chosen)

    def per_batch(self, budget: int) -> SparseCodes:
        """The `budget` largest positive ones of all tokens together (Mutual Choice: Ayonrinde 2024), differentiable.

        Ties go to the lower token, then to the lower index. Processes that train together spend the sum of their budgets on
        the largest of all their tokens.
        """
        budget = distributed.total(budget)
        chosen = threshold.top_total(self.x_ND.detach(), self.W_FD.detach(), self.b_F.detach(), budget)
        values, own = distributed.gathered(chosen.values)
        if len(values) > budget:
            keep = torch.zeros_like(values, dtype=torch.bool)
            keep[values.argsort(descending=True, stable=True)[:budget]] = True
            chosen = chosen.where(keep[own])
        return sparse.encode_at(self.x_ND, self.W_FD, self.b_F, chosen)

    def per_latent(self, budgets: Int64[Tensor, " d_sae"]) -> SparseCodes:
        """The `budgets[f]` [d_sae] largest positive ones of each latent (Feature Choice: Ayonrinde 2024), differentiable.

        Ties go to the lower token; a latent with fewer positive ones gets only those. The budgets are those of all processes
        that train together.
        """
        chosen = columns.per_latent(
            self.x_ND.detach(), self.W_FD.detach(), self.b_F.detach(), budgets.clamp_max(len(self.x_ND))
        )
        if distributed.world_size() > 1:
            chosen = columns.keep_largest(chosen, budgets)
        return sparse.encode_at(self.x_ND, self.W_FD, self.b_F, chosen)

    def above(self, cut: Float[Tensor, "*d_sae"], floor: float = 0.0) -> SparseCodes:
        """Those above a threshold, one for all latents or one each [d_sae], and above `floor`, differentiable."""
        chosen = threshold.above(self.x_ND.detach(), self.W_FD.detach(), self.b_F.detach(), cut, floor=floor)
        return sparse.encode_at(self.x_ND, self.W_FD, self.b_F, chosen)

    def of(self, latents: Int64[Tensor, " m"]) -> Float[Tensor, "n m"]:
        """All of these latents [m]: [n, m], differentiable."""
        return mixed.linear(self.x_ND, self.W_FD[latents], self.b_F[latents])

    def parts(self) -> Iterator[Float[Tensor, "m d_sae"]]:
        """All of them a few rows at a time, [m, d_sae], in the same memory: use one before the next. Not differentiable."""
        with torch.no_grad():
            for _, scores_MF in selection.products(self.x_ND, self.W_FD, self.b_F):
                yield scores_MF

    def dense(self) -> Float[Tensor, "n d_sae"]:
        """All of them, [n, d_sae], differentiable, computed once; `ConfigError` where that would not fit."""
        refuse_dense(len(self.x_ND), len(self.W_FD), self.x_ND.element_size())
        return self.once("dense", lambda: mixed.linear(self.x_ND, self.W_FD, self.b_F))
