"""Products of rows with weights of a lower precision, which are taken to that of the rows a few latents at a time.

No copy of a whole matrix is made. Where both have one precision, each is torch's own product, to the bit. Shapes: N tokens,
D inputs, F latents.
"""

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from saelab.kernels import gpu

_LATENTS = 4096


def linear(
    x_ND: Float[Tensor, "n d"], W_FD: Float[Tensor, "f d"], b_F: Float[Tensor, " f"] | None = None
) -> Float[Tensor, "n f"]:
    """x W^T + b; differentiable.

    >>> import torch
    >>> linear(torch.tensor([[1.0, 1 + 2**-20]]), torch.eye(2).bfloat16()) - 1
    tensor([[0.0000e+00, 9.5367e-07]])
    """
    if W_FD.dtype == x_ND.dtype:
        return torch.nn.functional.linear(x_ND, W_FD, b_F)
    weights = W_FD.split(_LATENTS)
    biases = [None] * len(weights) if b_F is None else b_F.split(_LATENTS)
    parts = [torch.nn.functional.linear(x_ND, W.to(x_ND.dtype), b) for W, b in zip(weights, biases, strict=True)]
    return torch.cat(parts, dim=1)


def linear_into(
    out: Float[Tensor, "n f"], x_ND: Float[Tensor, "n d"], W_FD: Float[Tensor, "f d"], b_F: Float[Tensor, " f"]
) -> Float[Tensor, "n f"]:
    """The same, written there; not differentiable."""
    if W_FD.dtype == x_ND.dtype:
        return torch.addmm(b_F, x_ND, W_FD.T, out=out)
    return out.copy_(linear(x_ND, W_FD, b_F))


def combine(codes: Float[Tensor, "*n f"], W_FD: Float[Tensor, "f d"]) -> Float[Tensor, "*n d"]:
    """codes W, of dense codes; differentiable."""
    if W_FD.dtype == codes.dtype:
        return codes @ W_FD
    pairs = zip(codes.split(_LATENTS, dim=-1), W_FD.split(_LATENTS), strict=True)
    return torch.stack([part @ W.to(codes.dtype) for part, W in pairs]).sum(0)


def row_norms(W_FD: Float[Tensor, "f d"], dtype: torch.dtype) -> Float[Tensor, " f"]:
    """The lengths of the rows in that precision."""
    if W_FD.dtype == dtype:
        return torch.linalg.vector_norm(W_FD, dim=1)
    return torch.cat([torch.linalg.vector_norm(W.to(dtype), dim=1) for W in W_FD.split(_LATENTS)])


def bags(
    indices: Int64[Tensor, " nnz"],
    table_FD: Float[Tensor, "f d"],
    offsets: Int64[Tensor, " ends"],
    weights: Float[Tensor, " nnz"],
) -> Float[Tensor, "n d"]:
    """The weighted sum of the rows of each bag; bag i holds the entries from offsets[i] to offsets[i + 1]."""
    if gpu.serves(weights):
        from saelab.kernels.gpu import launch

        return launch.bags(indices, table_FD, offsets, weights)
    if len(indices) == 0:  # embedding_bag refuses an empty list on some back ends
        return weights.new_zeros(len(offsets) - 1, table_FD.shape[1])
    if table_FD.dtype == weights.dtype:
        return torch.nn.functional.embedding_bag(
            indices, table_FD, offsets[:-1], per_sample_weights=weights, mode="sum"
        )
    found, first = [], 0
    for count in (offsets[:-1] // _LATENTS).unique_consecutive(return_counts=True)[1].tolist():
        ends = offsets[first : first + count + 1]
        part = slice(int(ends[0]), int(ends[-1]))
        used, places = indices[part].unique(return_inverse=True)
        found.append(bags(places, table_FD[used].to(weights.dtype), ends - ends[0], weights[part]))
        first += count
    return torch.cat(found)
