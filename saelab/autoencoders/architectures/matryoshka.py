"""Matryoshka SAEs: the first latents must reconstruct on their own, then the first few more (Bussmann et al. 2025)."""

from dataclasses import dataclass
from itertools import accumulate

import torch
from jaxtyping import Float
from torch import Tensor

from saelab.autoencoders import objectives
from saelab.autoencoders.architecture import Batch, Codes, Params, State, Terms
from saelab.autoencoders.architectures.mutual_choice import MutualChoice
from saelab.base import checks
from saelab.base.codes import SparseCodes, counted
from saelab.base.errors import ConfigError
from saelab.kernels import sparse


@dataclass(frozen=True, repr=False, kw_only=True)
class Matryoshka(MutualChoice):
    """A Matryoshka SAE: codes chosen as by `MutualChoice`, each prefix of the latents a dictionary of its own.

    With w_1 < ... < w_G = d_sae, x_hat_g = b_dec + sum over i < w_g of f_i d_i, and loss = the mean over g of
    FVU(x, x_hat_g), plus aux-k on the whole reconstruction. (By our notes the authors' code counts b_dec alone as one more
    prefix and takes squared errors; leaving it out and dividing by the variance are our choices. Groups drawn anew each batch,
    as in their paper, are not offered.) Thresholds are learnt as in `MutualChoice`.

    Args:
        k: latents a token on average, of all groups together; 1 to d_sae.
        d_sae: number of latents.
        groups: shares of the latents, adding up to 1; each edge is rounded, and groups left without a latent are dropped.
        aux_coefficient, aux_k, input_scale: as for `TopK`.

    Raises `ConfigError` when k is not between 1 and d_sae, or the groups do not add up to 1.

    >>> Matryoshka(k=16, d_sae=1000).widths
    (62, 125, 250, 500, 1000)
    """

    groups: tuple[float, ...] = (1 / 16, 1 / 16, 1 / 8, 1 / 4, 1 / 2)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check(
            groups=tuple(checks.number("a share of groups", share, above=0) for share in self.groups)
        )  # JSON has lists
        if not self.groups or abs(sum(self.groups) - 1) > 1e-6:
            raise ConfigError(
                f"groups is {self.groups!r}, adding up to {sum(self.groups):g}: they must be shares above 0 that add up to 1"
            )

    @property
    def widths(self) -> tuple[int, ...]:
        """How many latents each prefix holds, ascending."""
        edges = {round(share * self.d_sae) for share in accumulate(self.groups)}
        return tuple(sorted(edges - {0, self.d_sae})) + (self.d_sae,)

    def losses(
        self, batch: Batch, codes: Codes, x_hat: Float[Tensor, "n d_out"], params: Params, state: State
    ) -> Terms:
        assert isinstance(codes, SparseCodes)
        terms = super().losses(batch, codes, x_hat, params, state)
        prefixes = [
            objectives.fraction_of_variance_unexplained(batch.target, x)
            for x in self.prefixes(codes, params, params.base(batch.x))
        ]
        whole = terms.pop("fvu")
        return {"prefix_fvu": torch.stack([*prefixes, whole]).mean(), **terms}

    def prefixes(
        self, codes: SparseCodes, params: Params, base: Float[Tensor, "*n d_out"]
    ) -> list[Float[Tensor, "n d_out"]]:
        """The reconstructions [n, d_out] by each prefix but the whole, on top of `base`: every entry is decoded once."""
        found: list[Tensor] = []
        x_hat, starts = base, (0, *self.widths[:-1])
        parts = params.W_dec.split([stop - start for start, stop in zip(starts, self.widths, strict=True)])
        edges = torch.tensor(starts[1:]).to(codes.indices.device, non_blocking=True)
        group_E = torch.bucketize(codes.indices, edges, right=True)
        order, rows = group_E.argsort(stable=True), codes.rows()
        groups = order.split(counted(group_E, len(parts)).cpu().tolist())
        for start, W_dec, group in zip(starts[:-1], parts[:-1], groups[:-1], strict=True):
            offsets = torch.searchsorted(rows[group], torch.arange(len(codes) + 1, device=rows.device))
            inside = SparseCodes(codes.values[group], codes.indices[group] - start, offsets, len(W_dec))
            x_hat = x_hat + sparse.decode(inside, W_dec)
            found.append(x_hat)
        return found
