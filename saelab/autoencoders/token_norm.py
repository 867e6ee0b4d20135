"""SAEs of vectors that are normalised each by itself (`input_scale`): what goes in, and what comes out again.

* "layer_norm": z = (x - m) / (s + 1e-5) with the vector's own mean m and standard deviation s (over d - 1), and y = s z + m.
  SAELens' `layer_norm`; OpenAI's TopK autoencoders (Gao et al. 2024, `sparse_autoencoder/model.py`).
* "token_norm": z = x sqrt(d) / |x| and y = z |x| / sqrt(d). SAELens' `constant_norm_rescale`.

Codes are those of z. A latent's share of the output is its code times its decoder row times the size (s, or |x| / sqrt(d)) of
the vector that it was read from. A transcoder's output is not scaled back: it is another vector.
"""

import math

import torch
from jaxtyping import Float
from torch import Tensor

PER_TOKEN = ("layer_norm", "token_norm")
_EPSILON = 1e-5


def normalised(x: Float[Tensor, "*rows d"], how: str | None) -> Float[Tensor, "*rows d"]:
    """z, what the SAE reads; of a vector of zeros, zeros.

    >>> normalised(torch.tensor([[3.0, 4.0]]), "token_norm")
    tensor([[0.8485, 1.1314]])
    """
    size = sizes(x, how)
    return (x - x.mean(-1, keepdim=True)) / (size + _EPSILON) if how == "layer_norm" else x / _positive(size)


def restored(z: Float[Tensor, "*rows d"], x: Float[Tensor, "*rows d"], how: str | None) -> Float[Tensor, "*rows d"]:
    """y, the output for x where the SAE's own is z.

    >>> x = torch.tensor([[3.0, 4.0]])
    >>> restored(normalised(x, "token_norm"), x, "token_norm").round()
    tensor([[3., 4.]])
    """
    scaled = z * sizes(x, how)
    return scaled + x.mean(-1, keepdim=True) if how == "layer_norm" else scaled


def sizes(x: Float[Tensor, "*rows d"], how: str | None) -> Float[Tensor, "*rows 1"]:
    """What a code and its decoder row are multiplied by in the output for each vector."""
    if how == "layer_norm":
        return x.std(-1, keepdim=True)
    return torch.linalg.vector_norm(x, dim=-1, keepdim=True) / math.sqrt(x.shape[-1])


def _positive(size: Tensor) -> Tensor:
    return torch.where(size > 0, size, torch.ones_like(size))
