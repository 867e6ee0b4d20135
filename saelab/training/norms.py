"""High-norm tokens: which rows are left out, and what share of the variance goes with them.

A few tokens have norms many times the median and hold half of the variance (the attention sinks). They are left out of
training above `max_norm` times the running median norm; what they were is counted.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float, Shaped
from torch import Tensor

from saelab.base import processes as distributed
from saelab.base.errors import DataError

_PER_OCTAVE, _LOWEST, _OCTAVES = 64, -64, 128


class NormFilter:
    """A running median of row norms, from a histogram of log norms in steps of 1.1%.

    >>> import torch
    >>> norms = NormFilter(max_norm=4.0, width=1)
    >>> x = torch.tensor([[1.0]] * 9 + [[50.0]])
    >>> norms.see(x)
    >>> int(norms.keep(x).sum()), round(norms.median, 1)
    (9, 1.0)
    """

    def __init__(self, max_norm: float | None, width: int) -> None:
        self.max_norm = max_norm
        self.histogram = torch.zeros(_PER_OCTAVE * _OCTAVES, dtype=torch.int64)
        # rows, sum of squares and sum of the rows, of the kept ([0]) and the left out ([1])
        self.moments = torch.zeros(2, 2 + width, dtype=torch.float64)

    def see(self, x_ND: Float[Tensor, "n d"]) -> None:
        """Count these rows in the median."""
        logs = torch.linalg.vector_norm(x_ND.detach().float(), dim=1).log2().clamp(_LOWEST, _LOWEST + _OCTAVES).cpu()
        bins = ((logs - _LOWEST) * _PER_OCTAVE).long().clamp_max(len(self.histogram) - 1)
        self.histogram += torch.bincount(bins, minlength=len(self.histogram))
        beyond = int(self.histogram[-1])
        if beyond and (self.max_norm is None or 2 * beyond > int(self.histogram.sum())):
            raise DataError(
                f"{beyond:,} of {int(self.histogram.sum()):,} rows have norms of 2^{_LOWEST + _OCTAVES} (1.8e19) or more, too "
                "large to be squared: divide the activations by a constant, or look for an overflow"
                + ("" if self.max_norm is not None else "; max_norm=4.0 leaves out single ones")
            )

    def keep(self, x_ND: Float[Tensor, "n d"]) -> Bool[Tensor, " n"]:
        """Which rows [n] are within the limit as it stands; both kinds are counted."""
        x_ND = x_ND.detach().float()
        norms = torch.linalg.vector_norm(x_ND, dim=1)
        keep = norms <= self.limit
        for i, part in enumerate((keep, ~keep)):
            if bool(part.any()):
                rows = x_ND if bool(part.all()) else x_ND[part]
                self.moments[i, 0] += len(rows)
                squares = norms[part].double().square().sum()
                self.moments[i, 1] += float(squares if bool(squares.isfinite()) else rows.double().square().sum())
                self.moments[i, 2:] += rows.sum(0, dtype=torch.float64).cpu()
        return keep

    @property
    def median(self) -> float:
        """The median norm of the rows seen so far."""
        total = int(self.histogram.sum())
        middle = int((self.histogram.cumsum(0) >= (total + 1) // 2).nonzero()[0]) if total else 0
        return 2.0 ** (_LOWEST + (middle + 0.5) / _PER_OCTAVE)

    @property
    def limit(self) -> float:
        """The largest norm that is kept."""
        return float("inf") if self.max_norm is None else self.max_norm * self.median

    def report(self) -> dict[str, float | None]:
        """Median, limit, and the share of the rows and of the variance that was left out."""
        rows, squares, sums = self.moments[:, 0], self.moments[:, 1], self.moments[:, 2:]
        n = float(rows.sum()) or 1.0
        mean = sums.sum(0) / n
        deviation = squares - 2 * sums @ mean + rows * mean.dot(mean)
        return {
            "median_norm": self.median,
            "norm_limit": None if self.max_norm is None else self.limit,
            "high_norm_fraction": float(rows[1]) / n,
            "high_norm_variance_share": float(deviation[1] / deviation.sum().clamp_min(1e-300)),
        }

    def settle(self, lanes: Sequence["NormFilter"]) -> None:
        """Take up what the filters of the lanes of all processes have seen since they were settled, and tell them."""
        seen = [lane.histogram - self.histogram for lane in lanes]
        self.histogram += distributed.sum_(torch.stack(seen).sum(0))
        self.moments += distributed.sum_(torch.stack([lane.moments for lane in lanes]).sum(0))
        for lane in lanes:
            lane.histogram.copy_(self.histogram)
            lane.moments.zero_()

    def state_dict(self) -> dict[str, Shaped[Tensor, "..."]]:
        return {"norms.histogram": self.histogram, "norms.moments": self.moments}

    def load_state_dict(self, state: dict[str, Shaped[Tensor, "..."]]) -> None:
        self.histogram.copy_(state["norms.histogram"])
        self.moments.copy_(state["norms.moments"])
