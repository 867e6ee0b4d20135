"""How much of a stream of activations a reconstruction keeps: float64 sums, divided once at the end."""

import torch
from jaxtyping import Float
from torch import Tensor

from saelab.base.moments import Spread


class Reconstruction:
    """Streaming explained variance, FVU and squared error of reconstructions.

    Sum, then divide: explained variance is 1 - sum ||x - x_hat||^2 / sum ||x - mean||^2, over all rows and dimensions
    that were added, the mean over all rows. Averaging the ratios of batches would be another, wrong number.

    >>> part = Reconstruction(2)
    >>> part.add(torch.tensor([[0.0, 0.0]]), torch.tensor([[0.0, 0.0]]))
    >>> part.add(torch.tensor([[2.0, 4.0]]), torch.tensor([[2.0, 3.0]]))
    >>> part.explained_variance, part.fvu, part.mse, part.explained_variance_median
    (0.9, 0.1, 0.25, 0.9375)
    """

    def __init__(self, d: int) -> None:
        self.x = Spread(d)
        self._error = torch.zeros(d, dtype=torch.float64)

    def add(self, x: Float[Tensor, "n d"], x_hat: Float[Tensor, "n d"]) -> None:
        """Add rows: both [n, d]."""
        x = x.to("cpu", torch.float64)
        self.x.add(x)
        self._error += (x - x_hat.to("cpu", torch.float64)).square_().sum(0)

    @property
    def n(self) -> int:
        """Rows that were added."""
        return self.x.n

    @property
    def fvu(self) -> float:
        """Fraction of the variance that is not explained; NaN where nothing varies."""
        return float(self._error.sum() / self.x.squares.sum()) if self.x.squares.any() else float("nan")

    @property
    def explained_variance(self) -> float:
        """1 - `fvu`."""
        return 1.0 - self.fvu

    @property
    def explained_variance_median(self) -> float:
        """The median over dimensions of each one's explained variance; dimensions that never vary are left out.

        Where one dimension holds most of the variance, this says how the others fare.
        """
        varying = self.x.squares > 0
        shares = 1.0 - self._error[varying] / self.x.squares[varying]
        return float(shares.quantile(0.5)) if len(shares) else float("nan")

    @property
    def mse(self) -> float:
        """Mean squared error over rows and dimensions, in squared units of the activation."""
        return float(self._error.mean() / self.n) if self.n else float("nan")
