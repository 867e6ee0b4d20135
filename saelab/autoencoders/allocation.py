"""Which token-latent pairs fire: rules that spend a budget over the score matrix [n_tokens, d_sae]."""

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from saelab.autoencoders.codes import SparseCodes, refuse_dense
from saelab.kernels import columns, selection, sparse, threshold


@dataclass(frozen=True)
class PreActivations:
    """x W_enc + b_enc, computed only as far as an allocation rule asks for.

    `x_ND` [n, d_in] has b_dec subtracted already; `W_FD` [d_sae, d_in] and `b_F` [d_sae] are the encoder.
    """

    x_ND: Tensor
    W_FD: Tensor
    b_F: Tensor

    def per_token(self, k: int) -> SparseCodes:
        """The k largest positive ones of each token (TopK: Gao et al. 2024, section 2.3), differentiable.

        Ties go to the lower index; a token with fewer than k positive ones gets only those.
        """
        chosen = selection.top_k(self.x_ND.detach(), self.W_FD.detach(), self.b_F.detach(), k)
        return sparse.encode_at(self.x_ND, self.W_FD, self.b_F, chosen)

    def per_batch(self, budget: int) -> SparseCodes:
        """The `budget` largest positive ones of all tokens together (Mutual Choice: Ayonrinde 2024), differentiable.

        Ties go to the lower token, then to the lower index.
        """
        chosen = threshold.top_total(self.x_ND.detach(), self.W_FD.detach(), self.b_F.detach(), budget)
        return sparse.encode_at(self.x_ND, self.W_FD, self.b_F, chosen)

    def per_latent(self, budgets: Tensor) -> SparseCodes:
        """The `budgets[f]` [d_sae] largest positive ones of each latent (Feature Choice: Ayonrinde 2024), differentiable.

        Ties go to the lower token; a latent with fewer positive ones gets only those.
        """
        chosen = columns.per_latent(self.x_ND.detach(), self.W_FD.detach(), self.b_F.detach(), budgets)
        return sparse.encode_at(self.x_ND, self.W_FD, self.b_F, chosen)

    def above(self, cut: Tensor, floor: float = 0.0) -> SparseCodes:
        """Those above a threshold, one for all latents or one each [d_sae], and above `floor`, differentiable."""
        chosen = threshold.above(self.x_ND.detach(), self.W_FD.detach(), self.b_F.detach(), cut, floor=floor)
        return sparse.encode_at(self.x_ND, self.W_FD, self.b_F, chosen)

    def of(self, latents: Tensor) -> Tensor:
        """All of these latents [m]: [n, m], differentiable."""
        return torch.nn.functional.linear(self.x_ND, self.W_FD[latents], self.b_F[latents])

    def dense(self) -> Tensor:
        """All of them, [n, d_sae], differentiable, computed once; `ConfigError` where that would not fit."""
        return self._dense

    @cached_property
    def _dense(self) -> Tensor:
        refuse_dense(len(self.x_ND), len(self.W_FD), self.x_ND.element_size())
        return torch.nn.functional.linear(self.x_ND, self.W_FD, self.b_F)
