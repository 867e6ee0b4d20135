"""The slow twin of `saelab.selection.links`: a dense [d, h] matrix, masked to the same links or not at all.

Without a mask it is the fully connected autoencoder that the paper calls FCAE (`topology="dense"`); with one it is the usual
way to simulate sparse training, for tests and for the benchmark. Shapes: D features, H hidden units, B samples.
"""

from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Shaped
from torch import Tensor

from saelab.selection.links import VALUE_STD, Links, heavy_ball


class DenseLinks:
    """Weights, momentum and (where there is one) mask, [d, h] each; the same verbs as `Links`."""

    def __init__(
        self,
        weights_DH: Float[Tensor, "d h"],
        momentum_DH: Float[Tensor, "d h"],
        mask_DH: Float[Tensor, "d h"] | None = None,
    ) -> None:
        self.weights_DH, self.momentum_DH, self.mask_DH = weights_DH, momentum_DH, mask_DH
        self.shape = tuple(weights_DH.shape)

    @classmethod
    def random(cls, d: int, h: int, density: float, rng: np.random.Generator) -> "DenseLinks":
        """Fully connected, with the variance of a sum over links that a sparse layer of this density has (our choice)."""
        weights_DH = torch.from_numpy(rng.standard_normal((d, h), dtype=np.float32)).mul_(VALUE_STD * density**0.5)
        return cls(weights_DH, torch.zeros(d, h))

    @classmethod
    def like(cls, links: Links) -> "DenseLinks":
        """The same links, values and momentum, masked."""

        def dense(values: Tensor) -> Tensor:
            return torch.zeros(links.shape).index_put_((links.codes.rows(), links.codes.indices), values)

        return cls(dense(links.values), dense(links.momentum), dense(torch.ones(len(links))))

    def __len__(self) -> int:
        return self.weights_DH.numel()

    def to_hidden(self, x_DB: Float[Tensor, "d batch"]) -> Float[Tensor, "h batch"]:
        return self.weights_DH.T @ x_DB

    def to_features(self, h_HB: Float[Tensor, "h batch"]) -> Float[Tensor, "d batch"]:
        return self.weights_DH @ h_HB

    def update(
        self,
        left_DB: Float[Tensor, "d batch"],
        right_HB: Float[Tensor, "h batch"],
        lr: float,
        momentum: float,
        decay: float,
    ) -> None:
        gradient_DH = (left_DB @ right_HB.T).div_(left_DB.shape[1])
        if self.mask_DH is not None:
            gradient_DH.mul_(self.mask_DH)
        heavy_ball(self.weights_DH, self.momentum_DH, gradient_DH, lr, momentum, decay)

    def strength(self) -> np.ndarray:
        return self.weights_DH.abs().sum(1).double().numpy()

    def degree(self) -> np.ndarray:
        return (self.weights_DH != 0).sum(1).double().numpy()

    def to_scipy(self) -> Any:
        from scipy.sparse import csr_array

        return csr_array(self.weights_DH.numpy())

    def state(self) -> dict[str, Shaped[Tensor, "..."]]:
        return {"weights": self.weights_DH, "momentum": self.momentum_DH}

    @classmethod
    def from_state(cls, state: dict[str, Shaped[Tensor, "..."]], shape: tuple[int, int]) -> "DenseLinks":
        return cls(state["weights"].clone(), state["momentum"].clone())
