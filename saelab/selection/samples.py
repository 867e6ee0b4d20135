"""The data as the autoencoder reads it: scaled by feature, in shuffled batches, with and without noise.

Shapes: N samples, D features, B samples of a batch. Batches are [D, B]: the sparse products run over links and keep
the samples of a link side by side.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from saelab.base.errors import DataError
from saelab.base.surroundings import OwnRandomness
from saelab.selection.streams import FRESH_NOISE, NOISE, ORDER, stream

FEATURES_AT_ONCE = 4096
NOISE_KEPT = 2**27  # values; above 512 MiB fixed noise is made again for each batch, to the same bits


class Samples:
    """Scaled samples [n, d], dense or sparse, and their noise.

    `scale` is "standard" (zero mean, unit variance), "minmax" ([0, 1]) or None; constant features, and those that vary by
    rounding only, become 0. The noise of a sample is drawn once and stays for all epochs, as in the authors' code by our
    notes, unless `resample`. Dense input is scaled once, into a float32 copy; sparse input stays sparse and is scaled batch by
    batch.
    """

    def __init__(
        self, X: Any, *, scale: str | None, noise_factor: float, resample: bool, batch_size: int, seed: int
    ) -> None:
        self.n, self.d = X.shape
        self.noise_factor, self.resample, self.batch_size, self.seed = noise_factor, resample, batch_size, seed
        self.sparse = not isinstance(X, np.ndarray)
        self.shift_D, self.gain_D, self.constant_D = (_scales_sparse if self.sparse else _scales)(X, scale)
        self.x_ND = X if self.sparse else self._scaled(X)
        self.noisy_ND: np.ndarray | None = None
        if not (self.sparse or resample) and X.size <= NOISE_KEPT:
            self.noisy_ND = self.x_ND + self._fixed_noise(np.arange(self.n))

    def batches(self, epoch: int) -> Iterator[tuple[Float[Tensor, "d batch"], Float[Tensor, "d batch"]]]:
        """The (clean, noisy) batches [d, batch] of an epoch; a last one that is not full is left out, as in the code."""
        order = stream(self.seed, ORDER, epoch).permutation(self.n)
        fresh = stream(self.seed, FRESH_NOISE, epoch)
        for start in range(0, self.n - self.batch_size + 1, self.batch_size):
            rows = order[start : start + self.batch_size]
            clean_BD = self._clean(rows)
            if self.noisy_ND is not None:
                noisy_BD = self.noisy_ND[rows]
            elif self.resample:
                noise_BD = fresh.standard_normal(clean_BD.shape, dtype=np.float32)
                noisy_BD = clean_BD + np.float32(self.noise_factor) * noise_BD
            else:
                noisy_BD = clean_BD + self._fixed_noise(rows)
            yield _by_feature(clean_BD), _by_feature(noisy_BD)

    def _clean(self, rows: np.ndarray) -> np.ndarray:
        if not self.sparse:
            return self.x_ND[rows]
        return ((self.x_ND[rows].toarray() - self.shift_D) * self.gain_D).astype(np.float32)

    def _scaled(self, X: np.ndarray) -> np.ndarray:
        scaled_ND = np.empty(X.shape, np.float32)
        for part in _parts(self.d):
            scaled_ND[:, part] = (X[:, part] - self.shift_D[part]) * self.gain_D[part]
        return scaled_ND

    def _fixed_noise(self, rows: np.ndarray) -> np.ndarray:
        noise_BD = np.empty((len(rows), self.d), np.float32)
        for noise_D, row in zip(noise_BD, rows, strict=True):
            stream(self.seed, NOISE, int(row)).standard_normal(dtype=np.float32, out=noise_D)
        noise_BD *= np.float32(self.noise_factor)
        return noise_BD


def check_samples(X: Any, names: np.ndarray | None) -> None:
    """Raise `DataError` for fewer than two samples, and for NaN or infinity, naming the first such feature."""
    values = X if isinstance(X, np.ndarray) else X.data
    with np.errstate(all="ignore"):
        suspect = not np.isfinite(values.sum())  # takes no memory; an overflow is told from NaN by the second look
    if suspect and not (finite := np.isfinite(values)).all():
        columns = np.unique(np.nonzero(~finite)[1] if values is X else X.indices[~finite])
        first = columns[0] if names is None else repr(names[columns[0]])
        raise DataError(
            f"X holds {(~finite).sum():,} NaN or infinite (inf) values in {len(columns):,} features, the first is {first}: "
            "impute them or leave those rows out"
        )
    if X.shape[0] < 2:
        raise DataError("QuickSelection cannot learn from 1 sample: give two or more, better hundreds")


def _by_feature(x_BD: np.ndarray) -> Tensor:
    return torch.from_numpy(x_BD).T.contiguous()


def _parts(d: int) -> list[slice]:
    return [slice(start, start + FEATURES_AT_ONCE) for start in range(0, d, FEATURES_AT_ONCE)]


def _scales(X: np.ndarray, scale: str | None) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(shift, gain, constant) [d] each, in float64 and a few features at a time."""
    of_parts = []
    for part in _parts(X.shape[1]):
        x = X[:, part].astype(np.float64)
        of_parts.append((x.mean(0), x.std(0), x.min(0), x.max(0)))
    mean_D, std_D, min_D, max_D = (np.concatenate(column) for column in zip(*of_parts, strict=True))
    return _affine(mean_D, std_D, min_D, max_D, scale, np.finfo(X.dtype).eps)


def _scales_sparse(X: Any, scale: str | None) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    with OwnRandomness(0):  # scikit-learn's first import draws from Python's generator
        from sklearn.utils.sparsefuncs import mean_variance_axis, min_max_axis

    eps, X = np.finfo(X.dtype).eps, X.astype(np.float64)
    mean_D, variance_D = mean_variance_axis(X, axis=0)
    min_D, max_D = min_max_axis(X, axis=0)
    return _affine(mean_D, np.sqrt(variance_D), min_D, max_D, scale, eps)


def _affine(
    mean_D: np.ndarray, std_D: np.ndarray, min_D: np.ndarray, max_D: np.ndarray, scale: str | None, eps: float
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    # decided on the extremes: rounding leaves the deviation of a constant above zero, and may differ by a bit in the data
    largest_D = np.maximum(np.abs(min_D), np.abs(max_D))
    constant_D = (max_D - min_D <= 4 * eps * largest_D) | (std_D == 0)
    shift_D, width_D = {
        "standard": (mean_D, std_D),
        "minmax": (min_D, max_D - min_D),
        None: (np.where(constant_D, mean_D, 0.0), np.ones_like(std_D)),
    }[scale]
    return shift_D, np.where(constant_D, 0.0, 1 / np.where(constant_D, 1.0, width_D)), constant_D
