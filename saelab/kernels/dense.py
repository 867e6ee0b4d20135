"""The slow twins of the other files here: dense, obvious, in plain autograd. Tests hold them equal."""

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from saelab.base.codes import SparseCodes


def decode(codes: SparseCodes, W_FD: Float[Tensor, "f d"]) -> Float[Tensor, "n d"]:
    """codes @ W through the dense matrix."""
    return codes.to_dense() @ W_FD


def encode_at(
    x_ND: Float[Tensor, "n d"], W_FD: Float[Tensor, "f d"], b_F: Float[Tensor, " f"], codes: SparseCodes
) -> SparseCodes:
    """The dense pre-activations, read at the entries of the codes."""
    scores_NF = torch.nn.functional.linear(x_ND, W_FD, b_F)
    return codes.with_values(scores_NF[codes.rows(), codes.indices])


def top_k(x_ND: Float[Tensor, "n d"], W_FD: Float[Tensor, "f d"], b_F: Float[Tensor, " f"], k: int) -> SparseCodes:
    """The k largest positive pre-activations of each token; of equal ones, the lower index."""
    scores_NF = torch.nn.functional.linear(x_ND, W_FD, b_F)
    indices_NK = scores_NF.sort(dim=1, descending=True, stable=True).indices[:, :k].sort(dim=1).values
    return SparseCodes.from_rows(scores_NF.gather(1, indices_NK), indices_NK, len(W_FD))


def top_total(
    x_ND: Float[Tensor, "n d"], W_FD: Float[Tensor, "f d"], b_F: Float[Tensor, " f"], budget: int
) -> SparseCodes:
    """The `budget` largest positive pre-activations of the flattened matrix; of equal ones, the first."""
    scores_NF = torch.nn.functional.linear(x_ND, W_FD, b_F)
    chosen = scores_NF.flatten().sort(descending=True, stable=True).indices[:budget]
    kept = torch.zeros_like(scores_NF).flatten().index_fill(0, chosen, 1.0).view_as(scores_NF)
    return SparseCodes.from_dense(scores_NF * kept)


def per_latent(
    x_ND: Float[Tensor, "n d"], W_FD: Float[Tensor, "f d"], b_F: Float[Tensor, " f"], m_F: Int64[Tensor, " f"]
) -> SparseCodes:
    """The `m_F[f]` largest positive pre-activations of each latent; of equal ones, the lower token."""
    scores_NF = torch.nn.functional.linear(x_ND, W_FD, b_F)
    ranks_NF = scores_NF.sort(dim=0, descending=True, stable=True).indices.argsort(dim=0)
    return SparseCodes.from_dense(scores_NF * (ranks_NF < m_F))


def top_k_weighted(
    x_ND: Float[Tensor, "n d"],
    W_FD: Float[Tensor, "f d"],
    b_F: Float[Tensor, " f"],
    gradient_ND: Float[Tensor, "n d"],
    W_dec_FD: Float[Tensor, "f d"],
    strength: float,
    k: int,
) -> SparseCodes:
    """The pre-activations z at the k largest relu(z) (1 + strength |gradient W_dec^T|) of each token."""
    scores_NF = torch.nn.functional.linear(x_ND, W_FD, b_F)
    weighted_NF = scores_NF.relu() * (1 + strength * (gradient_ND @ W_dec_FD.T).abs())
    indices_NK = weighted_NF.sort(dim=1, descending=True, stable=True).indices[:, :k].sort(dim=1).values
    return SparseCodes.from_rows(scores_NF.gather(1, indices_NK), indices_NK, len(W_FD))
