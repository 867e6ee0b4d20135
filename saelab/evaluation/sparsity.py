"""How often latents fire, over a stream of sparse codes."""

from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor

if TYPE_CHECKING:
    from saelab.base.codes import SparseCodes

SMALLEST_DENSITY = 1e-4
ENOUGH = round(10 / SMALLEST_DENSITY)  # tokens after which a latent of that density would have fired about ten times


class Firing:
    """Streaming count of firings: `n` rows seen, `counts` int64 [n_latents].

    >>> from saelab.base.codes import SparseCodes
    >>> firing = Firing(3)
    >>> firing.add(SparseCodes(torch.ones(3), torch.tensor([0, 2, 2]), torch.tensor([0, 2, 3]), 3))
    >>> firing.density, firing.l0, firing.silent_fraction
    (tensor([0.5000, 0.0000, 1.0000], dtype=torch.float64), 1.5, 0.3333333333333333)
    """

    def __init__(self, n_latents: int) -> None:
        self.n = 0
        self.counts = torch.zeros(n_latents, dtype=torch.int64)

    def add(self, codes: "SparseCodes") -> None:
        """Add the codes of some rows."""
        self.n += len(codes.offsets) - 1
        self.counts += torch.bincount(codes.indices.flatten().cpu().long(), minlength=len(self.counts))

    @property
    def density(self) -> Float[Tensor, " latents"]:
        """Share of the rows on which each latent fired, float64 [n_latents]."""
        return self.counts.double() / self.n

    @property
    def l0(self) -> float:
        """Mean number of latents that fire on a row."""
        return int(self.counts.sum()) / self.n if self.n else float("nan")

    @property
    def silent_fraction(self) -> float:
        """Share of the latents that fired on no row. They are dead only if there were `ENOUGH` rows."""
        return float((self.counts == 0).double().mean())
