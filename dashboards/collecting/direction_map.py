"""Where decoder directions lie: a plane of two principal components, and one that keeps neighbours together.

Deterministic, and a function of the weights alone. L latents, D width.
"""

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from saelab.base.surroundings import OwnRandomness

NEIGHBOURS_UP_TO = 8_192  # t-SNE of so many takes half a minute of one processor
_COMPONENTS = 30  # that t-SNE sees
_LEAST = 8  # directions, below which there is nothing to lay out


def principal_plane(W_LD: Float[Tensor, "L D"], components: int = 2) -> Float[np.ndarray, "L k"]:
    """Coordinates of unit directions on their first principal components; the largest loading of each is positive.

    >>> principal_plane(torch.eye(3), 2).shape
    (3, 2)
    """
    unit = torch.nn.functional.normalize(W_LD.detach().cpu().double(), dim=1)
    centred = unit - unit.mean(0)
    axes = torch.linalg.eigh(centred.T @ centred).eigenvectors.flip(1)[:, :components]
    axes = axes * axes.gather(0, axes.abs().argmax(0, keepdim=True)).sign()
    return (centred @ axes).numpy()


def neighbour_plane(W_LD: Float[Tensor, "L D"]) -> "Float[np.ndarray, 'L 2'] | None":
    """t-SNE of the directions (scikit-learn), begun at their principal plane; None without scikit-learn, of under 8
    directions and of more than `NEIGHBOURS_UP_TO`.
    """
    try:
        with OwnRandomness(0):  # scikit-learn's first import draws from Python's generator
            from sklearn.manifold import TSNE
    except ImportError:
        return None
    if not _LEAST <= len(W_LD) <= NEIGHBOURS_UP_TO:
        return None
    rows = principal_plane(W_LD, min(_COMPONENTS, *W_LD.shape)).astype(np.float32)
    perplexity = min(30.0, (len(rows) - 1) / 3)
    found: np.ndarray = TSNE(
        2, perplexity=perplexity, init="pca", max_iter=500, random_state=0, n_jobs=1
    ).fit_transform(rows)
    return found


def planes(W_LD: Float[Tensor, "L D"]) -> dict[str, Float[np.ndarray, "L 2"]]:
    """The planes that there are, "pca" and "neighbours", each over its own largest coordinate: -1 to 1."""
    found = {"pca": principal_plane(W_LD), "neighbours": neighbour_plane(W_LD)}
    return {name: plane / max(np.abs(plane).max(), 1e-12) for name, plane in found.items() if plane is not None}
