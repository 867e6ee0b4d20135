"""Sparse links between features and hidden units: Erdos-Renyi start, products, updates, pruning and growth.

Shapes: D features, H hidden units, B samples, L links. Both layers are kept by feature, as [D, H] in compressed rows, so
that one set of kernels serves them: `to_hidden` is W^T x, `to_features` is W h, and the gradient of a link is a dot product
over the samples. Nothing of size D x H is ever made; `saelab.selection.dense_twin` is the slow twin.

The kernels are those of sparse codes (`saelab.kernels.sparse`), the fastest of those at hand. Nanoseconds per link for 100
samples in fp32 on one core, at 500 and at 20,000 features (`benchmarks/quickselection.py kernels`):

    to the features        embedding_bag   3.3,  3.0    SciPy's CSR product   8.7,  9.0    torch's   7.5, 14.8
    to the hidden units    embedding_bag   5.2,  7.5    SciPy's               8.7, 13.1    torch's   7.7,  9.8
    gradient of the links  sampled_addmm   7.4,  6.8    gathers and einsum   77.3, 72.3
"""

from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Shaped
from torch import Tensor

from saelab.base.codes import SparseCodes
from saelab.kernels.sparse import decode, sampled_product

VALUE_STD = 0.1  # of new links; by our notes the paper says "standard normal", and its code divides by 10


class Links:
    """Weighted links [d, h], ascending by (feature, hidden unit), and the momentum of each.

    >>> links = Links.random(d=50, h=20, epsilon=2.0, rng=np.random.default_rng(0))
    >>> links.to_hidden(torch.ones(50, 3)).shape, links.to_features(torch.ones(20, 3)).shape
    (torch.Size([20, 3]), torch.Size([50, 3]))
    """

    def __init__(
        self,
        keys: np.ndarray,
        values: Float[Tensor, " links"],
        momentum: Float[Tensor, " links"],
        shape: tuple[int, int],
    ) -> None:
        self.keys, self.values, self.momentum, self.shape = keys, values, momentum, shape
        d, h = shape
        offsets = np.searchsorted(keys, np.arange(d + 1) * h)
        self.codes = SparseCodes(values, torch.from_numpy(keys % h), torch.from_numpy(offsets), h)
        self.order_L, offsets_H = self.codes.by_latent()
        self.by_hidden = SparseCodes(values, self.codes.rows()[self.order_L], offsets_H, d)

    @classmethod
    def random(cls, d: int, h: int, epsilon: float, rng: np.random.Generator) -> "Links":
        """floor(epsilon (d + h)) pairs drawn uniformly with replacement, those drawn twice once (by our notes of the code)."""
        keys = np.unique(rng.integers(0, d * h, int(epsilon * (d + h))))
        return cls(keys, _new_values(len(keys), rng), torch.zeros(len(keys)), (d, h))

    def __len__(self) -> int:
        return len(self.keys)

    def to_hidden(self, x_DB: Float[Tensor, "d batch"]) -> Float[Tensor, "h batch"]:
        return decode(self.by_hidden.with_values(self.values[self.order_L]), x_DB)

    def to_features(self, h_HB: Float[Tensor, "h batch"]) -> Float[Tensor, "d batch"]:
        return decode(self.codes, h_HB)

    def update(
        self,
        left_DB: Float[Tensor, "d batch"],
        right_HB: Float[Tensor, "h batch"],
        lr: float,
        momentum: float,
        decay: float,
    ) -> None:
        """A step along minus the mean over the samples of left x right at each link; decay is not scaled by lr."""
        gradient_L = sampled_product(left_DB, right_HB, self.codes).div_(left_DB.shape[1])
        heavy_ball(self.values, self.momentum, gradient_L, lr, momentum, decay)

    def pruned(self, zeta: float) -> "Links":
        """Without the share `zeta` of the positive weights nearest zero, and of the negative ones."""
        values = self.values.numpy()
        keep = np.ones(len(values), dtype=bool)
        for signed in (np.flatnonzero(values > 0), np.flatnonzero(values < 0)):
            nearest = np.argsort(np.abs(values[signed]), kind="stable")[: int(zeta * len(signed))]
            keep[signed[nearest]] = False
        kept = torch.from_numpy(keep)
        return Links(self.keys[keep], self.values[kept], self.momentum[kept], self.shape)

    def grown(self, n: int, rng: np.random.Generator) -> "Links":
        """With `n` more links at uniformly random empty places, of random value and no momentum."""
        new = np.empty(0, dtype=np.int64)
        while len(new) < n:
            drawn = rng.integers(0, self.shape[0] * self.shape[1], int(1.1 * (n - len(new))) + 16)
            new = _first_occurrences(np.concatenate([new, drawn[~_contains(self.keys, drawn)]]))
        keys = np.concatenate([self.keys, new[:n]])
        order = np.argsort(keys, kind="stable")
        values = torch.cat([self.values, _new_values(n, rng)])[order]
        return Links(keys[order], values, torch.cat([self.momentum, torch.zeros(n)])[order], self.shape)

    def strength(self) -> np.ndarray:
        """Sum over a feature's links of the absolute weight: [d]."""
        return np.bincount(self._features(), np.abs(self.values.numpy()), minlength=self.shape[0])

    def degree(self) -> np.ndarray:
        """Number of links of a feature: [d]."""
        return np.bincount(self._features(), minlength=self.shape[0]).astype(float)

    def _features(self) -> np.ndarray:
        return self.keys // self.shape[1]

    def to_scipy(self) -> Any:
        """The weights as a SciPy CSR array [d, h]."""
        from scipy.sparse import csr_array

        indices, offsets = self.codes.indices.numpy(), self.codes.offsets.numpy()
        return csr_array((self.values.numpy().copy(), indices, offsets), shape=self.shape)

    def state(self) -> dict[str, Shaped[Tensor, "..."]]:
        return {"keys": torch.from_numpy(self.keys), "values": self.values, "momentum": self.momentum}

    @classmethod
    def from_state(cls, state: dict[str, Shaped[Tensor, "..."]], shape: tuple[int, int]) -> "Links":
        return cls(state["keys"].numpy().copy(), state["values"].clone(), state["momentum"].clone(), shape)


def heavy_ball(
    values: Float[Tensor, "*shape"],
    momentum: Float[Tensor, "*shape"],
    gradient: Float[Tensor, "*shape"],
    lr: float,
    momentum_factor: float,
    decay: float,
) -> None:
    """In place: m <- momentum m - lr g, then W <- W + m - decay W."""
    momentum.mul_(momentum_factor).add_(gradient, alpha=-lr)
    values.mul_(1 - decay).add_(momentum)


def _new_values(n: int, rng: np.random.Generator) -> Tensor:
    return torch.from_numpy(rng.standard_normal(n, dtype=np.float32)).mul_(VALUE_STD)


def _contains(sorted_keys: np.ndarray, keys: np.ndarray) -> np.ndarray:
    if len(sorted_keys) == 0:
        return np.zeros(len(keys), dtype=bool)
    places = np.searchsorted(sorted_keys, keys).clip(max=len(sorted_keys) - 1)
    return sorted_keys[places] == keys


def _first_occurrences(keys: np.ndarray) -> np.ndarray:
    return keys[np.sort(np.unique(keys, return_index=True)[1])]
