"""LowRank: ordered directions of a linear autoencoder (Maestro's LoD, Horvath et al., ICML 2024)."""

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from saelab.autoencoders.allocation import PreActivations
from saelab.autoencoders.architecture import Architecture, Batch, Codes, Params, Recipe, State, Terms
from saelab.base import processes as distributed
from saelab.base.codes import SparseCodes
from saelab.base.errors import ConfigError


@dataclass(frozen=True, repr=False, kw_only=True)
class LowRank(Architecture):
    """A linear autoencoder whose first b directions are the best b, for every b: what sparse dictionaries are compared with.

    Of r = d_sae / 2 directions, s = (x - b_dec) U^T and x_hat_b = b_dec + sum over i <= b of s_i d_i; the loss is the mean over
    b = 1 ... r of |x - x_hat_b|^2 over the variance: the exact expectation of Maestro's ordered dropout (Horvath et al., ICML
    2024, section 3; they draw b). Its minimum are the principal components in their order (their theorem on linear encoders).
    Their penalty that takes ranks away is not offered.

    As codes are not negative, a direction has two latents: i fires by s_i, r + i, whose encoder and decoder are those of i with
    the sign turned, by -s_i. All fire: this is a dense dictionary.

    Args:
        d_sae: number of latents, two a direction: even.
        input_scale: as for `TopK`.

    Raises `ConfigError` for an odd d_sae.

    >>> LowRank(d_sae=64).rank
    32
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.d_sae % 2:
            raise ConfigError(f"d_sae={self.d_sae:,} is odd, and a direction has two latents: give an even one")

    @property
    def rank(self) -> int:
        """How many directions there are."""
        return self.d_sae // 2

    def scores(self, params: Params, batch: Batch) -> PreActivations:
        W, b = params.W_enc[: self.rank], params.b_enc[: self.rank]
        return PreActivations(params.centred(batch.x), torch.cat([W, -W]), torch.cat([b, -b]))

    def allocate(self, scores: PreActivations, state: State, progress: float) -> Codes:
        return scores.dense().relu()

    def select(self, scores: PreActivations, state: State) -> SparseCodes:
        return scores.above(scores.b_F.new_zeros(()))

    def losses(
        self, batch: Batch, codes: Codes, x_hat: Float[Tensor, "n d_out"], params: Params, state: State
    ) -> Terms:
        assert isinstance(codes, Tensor)
        r = self.rank
        s_Nr, W_rD = codes[:, :r] - codes[:, r:], params.W_dec[:r]
        y_ND = batch.target - params.base(batch.x)
        # of the b that a direction is within
        share_r = torch.arange(r, 0, -1, device=s_Nr.device, dtype=s_Nr.dtype) / r
        explained = (share_r * s_Nr * (y_ND @ W_rD.T)).sum()
        size = (torch.minimum(share_r[:, None], share_r) * (s_Nr.T @ s_Nr) * (W_rD @ W_rD.T)).sum()
        error = y_ND.square().sum() - 2 * explained + size
        centre = distributed.mean(batch.target.mean(0))
        variance = distributed.mean((batch.target - centre).square().sum())
        return {"ordered_fvu": error / torch.where(variance > 0, variance, 1.0)}

    def prepare(self, params: Params, batch: Batch, state: State) -> None:
        self._turn(params)

    def observe(self, batch: Batch, codes: Codes, params: Params, state: State) -> Int64[Tensor, " m"] | None:
        self._turn(params)
        return None

    def _turn(self, params: Params) -> None:
        """Make the second half of the latents the first with its sign turned."""
        for weights in (params.W_enc, params.b_enc, params.W_dec):
            weights[self.rank :] = -weights[: self.rank]

    @property
    def recipe(self) -> Recipe:
        """1e-3 (our choice): directions that are nearly as good as each other take long to find their order."""
        return Recipe(learning_rate=1e-3)

    def to_saelens(self) -> dict[str, Any]:
        """It fires as a ReLU SAE does."""
        return {"architecture": "standard"}
