"""Linear probes and what they tell right, with bootstrap intervals over texts. Shapes: N texts, M columns, R resamples."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Bool, Float

from saelab.base.surroundings import OwnRandomness
from saelab.evaluation.scores import Score

RESAMPLES = 500


@dataclass(frozen=True)
class Probe:
    """A linear function of columns [m] of a matrix: it says yes where it is above 0."""

    weights: Float[np.ndarray, " m"]
    bias: float

    def __call__(self, x: Float[np.ndarray, "n m"]) -> Float[np.ndarray, " n"]:
        return x @ self.weights + self.bias


def fitted(x: Float[np.ndarray, "n m"], y: Bool[np.ndarray, " n"], k: int | None = None, even: bool = False) -> Probe:
    """Logistic regression with C = 1 on standardised columns: all, or the k whose class means differ most.

    The difference is taken before standardisation; a column that is constant has no weight. With more columns than rows the
    same solution is found in the space that the rows span. `even`: both classes weigh the same, however many each has.

    >>> probe = fitted(np.array([[0.0, 5.0], [1.0, 5.0], [0.1, 5.0], [0.9, 5.0]]), np.array([False, True, False, True]))
    >>> (probe(np.array([[0.0, 5.0], [1.0, 5.0]])) > 0).tolist(), float(probe.weights[1])
    ([False, True], 0.0)
    """
    with OwnRandomness(0):  # scikit-learn's first import draws from Python's generator
        from sklearn.linear_model import LogisticRegression

    x = np.asarray(x, dtype=np.float64)
    if k is None or k >= x.shape[1]:
        chosen = np.arange(x.shape[1])
    else:
        chosen = np.argsort(-np.abs(x[y].mean(0) - x[~y].mean(0)), kind="stable")[:k]
    part = x[:, chosen]
    middle, spread = part.mean(0), part.std(0)
    varies = spread > 1e-12 * np.abs(part).max(initial=1e-300)
    inverse = np.where(varies, 1 / np.where(varies, spread, 1), 0)
    rows = (part - middle) * inverse
    basis = _span(rows) if rows.shape[1] > len(rows) else None
    model = LogisticRegression(C=1.0, tol=1e-6, max_iter=5000, class_weight="balanced" if even else None)
    model.fit(rows if basis is None else rows @ basis, y)
    slope = model.coef_[0] if basis is None else basis @ model.coef_[0]
    weights = np.zeros(x.shape[1])
    weights[chosen] = slope * inverse
    return Probe(weights, float(model.intercept_[0] - (middle * inverse) @ slope))


def _span(rows: np.ndarray) -> np.ndarray:
    """An orthonormal basis [m, rank] of what the rows span."""
    values, vectors = np.linalg.eigh(rows @ rows.T)
    there = values > 1e-10 * values.max(initial=1e-300)
    return np.asarray((rows.T @ vectors[:, there]) / np.sqrt(values[there]))


def resampled(n: int, seed: int = 0) -> Float[np.ndarray, "r n"]:
    """How often each of n texts counts: once in the first row, in each other as a bootstrap draws them.

    >>> resampled(3).shape, resampled(3)[0].tolist(), set(resampled(3).sum(1))
    ((501, 3), [1.0, 1.0, 1.0], {np.float64(3.0)})
    """
    drawn = np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), size=RESAMPLES)
    return np.concatenate([np.ones((1, n)), drawn])


def accuracy(right: Bool[np.ndarray, " n"], weights: Float[np.ndarray, "r n"]) -> Float[np.ndarray, " r"]:
    """Share that is right, of each weighting; NaN where nothing is left."""
    total = weights.sum(1)
    return np.divide(weights @ right, total, out=np.full(len(weights), np.nan), where=total > 0)


def auroc(
    said: Float[np.ndarray, " n"], y: Bool[np.ndarray, " n"], weights: Float[np.ndarray, "r n"]
) -> Float[np.ndarray, " r"]:
    """Share of pairs of a positive and a negative of which the positive has more, ties half; NaN where there is no pair.

    >>> float(auroc(np.array([0.1, 0.4, 0.4, 0.9]), np.array([False, False, True, True]), np.ones((1, 4)))[0])
    0.875
    """
    order = np.argsort(said, kind="stable")
    starts = np.flatnonzero(np.diff(said[order], prepend=-np.inf))
    positive, negative = (np.add.reduceat(weights[:, order] * of[order], starts, axis=1) for of in (y, ~y))
    below = negative.cumsum(1) - negative / 2
    pairs = positive.sum(1) * negative.sum(1)
    return np.divide((positive * below).sum(1), pairs, out=np.full(len(weights), np.nan), where=pairs > 0)


def interval(figure: str, values: Any, n: int, of: str = "", source: str = "sae") -> Score:
    """A figure of what `resampled` gives: the first of the values, and between which 95% of the others lie."""
    values = np.asarray(values, dtype=np.float64)
    low, high = np.nanpercentile(values[1:], [2.5, 97.5]) if np.isfinite(values[1:]).any() else (np.nan, np.nan)
    return Score(figure, float(values[0]), float(low), float(high), n, of, source)
