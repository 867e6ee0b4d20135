"""Streaming least squares: first and second moments of regressors and targets, in float64.

Shapes: N rows, D regressors, M targets. What is kept is [D, D] and [D, M], however many rows went by.
"""

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

_SMALLEST = 1e-12  # of the eigenvalues of the correlations, relative to the largest: below it a direction is not fitted


class LinearFit(NamedTuple):
    """y is about x @ map + bias: `map` [d, m], `bias` [m], both float64."""

    map: Tensor
    bias: Tensor

    def __call__(self, x_ND: Float[Tensor, "*n d"]) -> Float[Tensor, "*n m"]:
        """The prediction [n, m], in the dtype of x."""
        return x_ND @ self.map.to(x_ND) + self.bias.to(x_ND)


class Spread:
    """Number, mean [d] and sum of squared deviations [d] of rows, added chunk by chunk, in float64.

    Each chunk is centred on its own mean and merged (Chan, Golub, LeVeque 1979): with a large mean sum x^2 - n mean^2
    cancels.

    >>> spread = Spread(1)
    >>> spread.add(torch.tensor([[0.0]], dtype=torch.float64))
    >>> spread.add(torch.tensor([[2.0], [4.0]], dtype=torch.float64))
    >>> spread.n, spread.mean, spread.squares
    (3, tensor([2.], dtype=torch.float64), tensor([8.], dtype=torch.float64))
    """

    def __init__(self, d: int) -> None:
        self.n = 0
        self.mean, self.squares = (torch.zeros(d, dtype=torch.float64) for _ in range(2))

    def add(self, x_ND: Float[Tensor, "n d"]) -> None:
        """Add rows."""
        if len(x_ND):
            mean = x_ND.mean(0)
            self.merge(len(x_ND), mean, (x_ND - mean).square_().sum(0))

    def merge(self, n: int, mean_D: Float[Tensor, " d"], squares_D: Float[Tensor, " d"]) -> None:
        """Add the rows of which these are the figures."""
        if not n:
            return
        shift = mean_D - self.mean
        self.squares += squares_D + shift.square() * (self.n * n / (self.n + n))
        self.n += n
        self.mean = self.mean + shift * (n / self.n)


class Moments:
    """Moments of rows (x [n, d], y [n, m]) around their means, added chunk by chunk; two streams merge.

    Chunks are centred on their own mean and merged (Chan, Golub, LeVeque 1979): raw second moments of activations, whose
    mean is many times their spread in a few dimensions, would cancel.

    Attributes: `n` rows; `mean_x` [d], `mean_y` [m]; `xx` [d, d], `xy` [d, m] sums of products of deviations; `yy` [m] sums of
    squared deviations of each target.

    >>> import torch
    >>> moments = Moments(1, 1)
    >>> moments.add(torch.tensor([[0.0], [1.0]]), torch.tensor([[1.0], [3.0]]))
    >>> fit = moments.fit()
    >>> round(fit.map.item(), 6), round(fit.bias.item(), 6), moments.r2(fit).item()
    (2.0, 1.0, 1.0)
    """

    def __init__(self, d: int, m: int, device: str | torch.device = "cpu") -> None:
        self.n = 0
        self.mean_x, self.mean_y = (torch.zeros(width, dtype=torch.float64, device=device) for width in (d, m))
        self.xx = torch.zeros(d, d, dtype=torch.float64, device=device)
        self.xy = torch.zeros(d, m, dtype=torch.float64, device=device)
        self.yy = torch.zeros(m, dtype=torch.float64, device=device)

    def add(self, x_ND: Float[Tensor, "n d"], y_NM: Float[Tensor, "n m"]) -> None:
        """Add rows."""
        if not len(x_ND):
            return
        x, y = x_ND.to(self.xx), y_NM.to(self.xx)
        mean_x, mean_y = x.mean(0), y.mean(0)
        x, y = x - mean_x, y - mean_y
        self._shift(len(x), mean_x, mean_y)
        self.xx.addmm_(x.T, x)
        self.xy.addmm_(x.T, y)
        self.yy += y.square_().sum(0)

    def merge(self, other: "Moments") -> None:
        """Add the rows that another one saw."""
        if not other.n:
            return
        self._shift(other.n, other.mean_x.to(self.xx), other.mean_y.to(self.xx))
        self.xx += other.xx.to(self.xx)
        self.xy += other.xy.to(self.xx)
        self.yy += other.yy.to(self.xx)

    def _shift(self, n: int, mean_x: Tensor, mean_y: Tensor) -> None:
        """Move the means for n more rows, and add what lies between the old and the new rows' means."""
        dx, dy = mean_x - self.mean_x, mean_y - self.mean_y
        weight = self.n * n / (self.n + n)
        self.xx.addr_(dx, dx, alpha=weight)
        self.xy.addr_(dx, dy, alpha=weight)
        self.yy += weight * dy.square()
        self.n += n
        self.mean_x = self.mean_x + dx * (n / self.n)
        self.mean_y = self.mean_y + dy * (n / self.n)

    def fit(self, bias: bool = True) -> LinearFit:
        """The least-squares map from x to y over these rows, with or without a bias; the shortest where several fit."""
        if bias:
            solved = _solve(self.xx, self.xy)
            return LinearFit(solved, self.mean_y - self.mean_x @ solved)
        raw_xx = self.xx + self.n * torch.outer(self.mean_x, self.mean_x)
        raw_xy = self.xy + self.n * torch.outer(self.mean_x, self.mean_y)
        return LinearFit(_solve(raw_xx, raw_xy), torch.zeros_like(self.mean_y))

    def residual(self, fit: LinearFit) -> Float[Tensor, " m"]:
        """The sums [m] of squared residuals y - fit(x) over these rows, of whatever rows the fit was made."""
        centred = self.yy - 2 * (fit.map * self.xy).sum(0) + (fit.map * (self.xx @ fit.map)).sum(0)
        offset = self.mean_y - self.mean_x @ fit.map - fit.bias
        return centred.clamp(min=0) + self.n * offset.square()

    def r2(self, fit: LinearFit) -> Float[Tensor, " m"]:
        """1 - residual / (sum of squares around the mean of these rows), per target [m]; NaN where a target is constant."""
        return torch.where(self.yy > 0, 1 - self.residual(fit) / self.yy, torch.nan)

    def r2_pooled(self, fit: LinearFit) -> float:
        """1 - sum of the residuals of all targets / sum of their squares around the mean of these rows."""
        return 1 - divided(float(self.residual(fit).sum()), float(self.yy.sum()))

    @property
    def squares(self) -> float:
        """sum |y|^2."""
        return float(self.yy.sum()) + self.n * float(self.mean_y.square().sum())

    def combined(self, a: float | Float[Tensor, "*d"], b: float, shift: Float[Tensor, " d"] | None = None) -> "Moments":
        """The moments with the targets a x + b y + shift in place of y; d and m must be equal."""
        new = Moments(len(self.mean_x), len(self.mean_y), self.xx.device)
        new.n, new.mean_x, new.xx = self.n, self.mean_x, self.xx
        new.mean_y = a * self.mean_x + b * self.mean_y + (0 if shift is None else shift)
        new.xy = a * self.xx + b * self.xy
        new.yy = a**2 * self.xx.diag() + 2 * a * b * self.xy.diag() + b**2 * self.yy
        return new


class TargetMoments:
    """More targets for rows whose own moments are known already, in a second pass: `add` them, then `moments()`.

    Spares the [d, d] products, which are most of the work.
    """

    def __init__(self, known: Moments, m: int) -> None:
        self.known = known
        self.n = 0
        self.cross = known.xx.new_zeros(len(known.mean_x), m)
        self.sum, self.squares = known.xx.new_zeros(m), known.xx.new_zeros(m)
        self.shift: Tensor | None = None  # the first rows' mean, so that squares do not cancel

    def add(self, x_ND: Float[Tensor, "n d"], y_NM: Float[Tensor, "n m"]) -> None:
        """Add rows of the known stream with the new targets."""
        if not len(x_ND):
            return
        x, y = x_ND.to(self.cross) - self.known.mean_x, y_NM.to(self.cross)
        self.shift = y.mean(0) if self.shift is None else self.shift
        y = y - self.shift
        self.cross.addmm_(x.T, y)
        self.sum += y.sum(0)
        self.squares += y.square().sum(0)
        self.n += len(y)

    def moments(self) -> Moments:
        """The moments of all rows with the new targets."""
        new = Moments(len(self.known.mean_x), len(self.sum), self.cross.device)
        new.n, new.mean_x, new.xx = self.known.n, self.known.mean_x, self.known.xx
        if self.shift is not None:
            new.mean_y = self.shift + self.sum / self.n
            new.xy, new.yy = self.cross, (self.squares - self.sum.square() / self.n).clamp(min=0)
        return new


def merged(first: Moments, second: Moments) -> Moments:
    """The moments of both streams' rows."""
    both = Moments(len(first.mean_x), len(first.mean_y), first.xx.device)
    both.merge(first)
    both.merge(second)
    return both


def divided(a: float, b: float) -> float:
    """a / b, NaN where b is not positive."""
    return a / b if b > 0 else float("nan")


def _solve(xx: Tensor, xy: Tensor) -> Tensor:
    """xx^-1 xy, regressors scaled to unit length first; by the pseudo-inverse where they are dependent."""
    length = xx.diag().sqrt()
    length = torch.where(length > 0, length, 1.0)
    correlation, target = xx / torch.outer(length, length), xy / length[:, None]
    factor, failed = torch.linalg.cholesky_ex(correlation)
    # the diagonal's squares are what each regressor adds to those before it
    if not int(failed) and float(factor.diag().square().min()) > 1e4 * _SMALLEST:
        return torch.cholesky_solve(target, factor) / length[:, None]
    values, vectors = torch.linalg.eigh(correlation)
    kept = values > _SMALLEST * values.max().clamp(min=1e-300)
    inverse = torch.where(kept, 1 / torch.where(kept, values, 1.0), 0.0)
    return vectors @ (inverse[:, None] * (vectors.T @ target)) / length[:, None]
