"""The denoising autoencoder: features -> hidden units -> features, one sparse layer each way.

Shapes: D features, H hidden units, B samples of a batch. Source: Atashgahi et al., Machine Learning 111 (2022), and the
authors' code, by our notes. One of its slips is not followed: the derivative of a tanh output is taken where it belongs.
Another is, since
the ranking lives on it: a hidden unit that dropout left out gets the gradient of its input all the same. With the exact
gradient, features that vary in few samples take the top: on 2,000 MNIST images, in 100 epochs of batches of 20, 50 of the 50
best pixels are on in under 1 % of the images, against 4.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Shaped
from torch import Tensor

from saelab.selection.dense_twin import DenseLinks
from saelab.selection.links import Links, heavy_ball
from saelab.selection.streams import GROWTH, INIT, stream
from saelab.training.checkpoint import part


@dataclass(frozen=True)
class Recipe:
    """Optimiser and regularisation; `zeta` is the share of links that an epoch replaces, None for a fixed topology."""

    lr: float
    momentum: float
    weight_decay: float
    dropout: float
    tanh: bool
    zeta: float | None


class Autoencoder:
    """Two layers, both [d, h]: the first reads the features, the second writes them."""

    def __init__(self, layers: list[Any], d: int, h: int) -> None:
        self.layers = layers  # Links for a sparse autoencoder, DenseLinks for its twins
        self.bias_H1, self.bias_D1 = torch.zeros(h, 1), torch.zeros(d, 1)
        self.momentum_H1, self.momentum_D1 = torch.zeros(h, 1), torch.zeros(d, 1)

    @classmethod
    def sparse(cls, d: int, h: int, epsilon: float, seed: int) -> "Autoencoder":
        return cls([Links.random(d, h, epsilon, stream(seed, INIT, layer)) for layer in (0, 1)], d, h)

    @classmethod
    def dense(cls, d: int, h: int, epsilon: float, seed: int) -> "Autoencoder":
        """Fully connected; its start has the scale of the sparse one's."""
        density = min(1.0, epsilon * (d + h) / (d * h))
        return cls([DenseLinks.random(d, h, density, stream(seed, INIT, layer)) for layer in (0, 1)], d, h)

    def n_parameters(self) -> int:
        return sum(map(len, self.layers)) + len(self.bias_H1) + len(self.bias_D1)

    def train_epoch(
        self,
        batches: Iterable[tuple[Float[Tensor, "d batch"], Float[Tensor, "d batch"]]],
        recipe: Recipe,
        dropouts: np.random.Generator,
    ) -> float:
        """One pass over (clean, noisy) batches [d, batch]; the mean loss of a batch."""
        losses = [self.step(clean_DB, noisy_DB, recipe, dropouts) for clean_DB, noisy_DB in batches]
        return sum(losses) / len(losses)

    def step(
        self,
        clean_DB: Float[Tensor, "d batch"],
        noisy_DB: Float[Tensor, "d batch"],
        recipe: Recipe,
        dropouts: np.random.Generator,
    ) -> float:
        """One batch; the loss 1/2 ||x - x_hat||^2, summed over features and averaged over samples."""
        h_HB = torch.sigmoid_(self.layers[0].to_hidden(noisy_DB).add_(self.bias_H1))
        slope_HB = h_HB * (1 - h_HB)  # of units that dropout leaves out too
        if recipe.dropout:
            kept_HB = torch.from_numpy(dropouts.random(h_HB.shape, dtype=np.float32)) >= recipe.dropout
            h_HB.mul_(kept_HB)  # not scaled up by 1 / (1 - dropout), as in the code
        y_DB = self.layers[1].to_features(h_HB).add_(self.bias_D1)
        if recipe.tanh:
            y_DB.tanh_()
        error_DB = y_DB - clean_DB if recipe.tanh else y_DB.sub_(clean_DB)
        loss = float(error_DB.flatten().dot(error_DB.flatten())) / (2 * error_DB.shape[1])
        if recipe.tanh:
            error_DB.mul_(1 - y_DB * y_DB)
        back_HB = self.layers[1].to_hidden(error_DB).mul_(slope_HB)

        rates = (recipe.lr, recipe.momentum, recipe.weight_decay)
        self.layers[1].update(error_DB, h_HB, *rates)
        self.layers[0].update(noisy_DB, back_HB, *rates)
        heavy_ball(self.bias_D1, self.momentum_D1, error_DB.mean(1, keepdim=True), *rates)
        heavy_ball(self.bias_H1, self.momentum_H1, back_HB.mean(1, keepdim=True), *rates)
        return loss

    def evolve(self, recipe: Recipe, seed: int, epoch: int, kind: str) -> np.ndarray:
        """Prune and regrow each layer (SET); the neuron strength of the features, read between the two.

        That is when the authors' code, by our notes, saves the matrix it ranks by: links that were just drawn do not count. A
        fixed topology is left as it is.
        """
        if recipe.zeta is None:
            return self.strength(kind)
        sizes = [len(layer) for layer in self.layers]
        self.layers = [layer.pruned(recipe.zeta) for layer in self.layers]
        strength_D = self.strength(kind)
        self.layers = [
            layer.grown(size - len(layer), stream(seed, GROWTH, epoch, i))
            for i, (layer, size) in enumerate(zip(self.layers, sizes, strict=True))
        ]
        return strength_D

    def strength(self, kind: str) -> np.ndarray:
        """Of one of the kinds that `QuickSelection` describes: [d]."""
        if kind == "degree":
            return self.layers[0].degree()
        read = {"input": self.layers[:1], "output": self.layers[1:], "both": self.layers}[kind]
        return np.sum([layer.strength() for layer in read], axis=0)

    def state(self) -> dict[str, Shaped[Tensor, "..."]]:
        """Everything that training goes on from."""
        own = {name: tensor for name, tensor in vars(self).items() if isinstance(tensor, Tensor)}
        return own | {f"{i}.{name}": t for i, layer in enumerate(self.layers) for name, t in layer.state().items()}

    def load_state(self, state: dict[str, Shaped[Tensor, "..."]]) -> None:
        for name, tensor in vars(self).items():
            if isinstance(tensor, Tensor):
                tensor.copy_(state[name])
        self.layers = [layer.from_state(part(state, f"{i}."), layer.shape) for i, layer in enumerate(self.layers)]
