"""The programs as custom operators of torch, which `torch.compile` takes as they are. Shapes as in `programs.py`."""

import torch
import triton
from jaxtyping import Float, Int64
from torch import Tensor

from saelab.kernels.gpu import programs

LONGEST = 512  # entries of a bag that one program sums; the sums of parts of a longer one are added in a second pass
TILE = 1024  # latents of which one program finds the largest


def bags(
    indices: Int64[Tensor, " nnz"],
    table_FD: Float[Tensor, "f d"],
    offsets: Int64[Tensor, " ends"],
    weights: Float[Tensor, " nnz"],
) -> Float[Tensor, "n d"]:
    """The weighted sum [bags, d] of the rows of each bag, in fp32, whatever the precision of the table; not differentiable.

    `indices` [nnz] are rows of the table [f, d], `weights` [nnz] are theirs; bag i holds the entries from offsets[i] to
    offsets[i + 1].
    """
    return _bags(indices, table_FD, offsets, weights)


def sampled_product(
    x_ND: Float[Tensor, "n d"], W_FD: Float[Tensor, "f d"], rows: Int64[Tensor, " nnz"], indices: Int64[Tensor, " nnz"]
) -> Float[Tensor, " nnz"]:
    """x[rows[e]] . W[indices[e]] [nnz] of x [n, d] and W [f, d] in IEEE fp32; not differentiable."""
    return _sampled_product(x_ND, W_FD, rows, indices)


def largest(scores_NF: Float[Tensor, "n f"], k: int) -> Int64[Tensor, "n k"]:
    """The places [n, k] of the k largest positive fp32 scores [n, f] of each row, of equal ones the lower; k is 256 at most."""
    return _largest(scores_NF, k)


def _block(D: int) -> int:
    return min(256, triton.next_power_of_2(D))


@torch.library.custom_op("saelab::bags", mutates_args=())
def _bags(
    indices: Tensor,
    table_FD: Tensor,
    offsets: Tensor,
    weights: Tensor,
) -> Tensor:
    n, D, nnz = len(offsets) - 1, table_FD.shape[1], len(indices)
    out = torch.empty(n, D, dtype=torch.float32, device=table_FD.device)
    block, table_FD = _block(D), table_FD.contiguous()
    columns = triton.cdiv(D, block)
    if n:
        programs.bags_program[(n, columns)](
            indices, weights, offsets, table_FD, out, D, LONGEST, BLOCK_D=block, BLOCK_E=8
        )
    if rest := nnz // LONGEST:  # no batch has more parts than that beyond the first of each bag
        first_part = torch.zeros_like(offsets)
        torch.cumsum((offsets.diff() - 1).clamp_min(0) // LONGEST, 0, out=first_part[1:])
        part = torch.arange(rest, device=offsets.device)
        bag = (torch.searchsorted(first_part, part, right=True) - 1).clamp_max(n - 1)
        starts = offsets[bag] + LONGEST * (1 + part - first_part[bag])
        parts = torch.empty(rest, D, dtype=torch.float32, device=out.device)
        programs.rest_program[(rest, columns)](
            indices, weights, offsets, bag, starts, table_FD, parts, D, LONGEST, BLOCK_D=block, BLOCK_E=8
        )
        programs.join_program[(n, columns)](first_part, parts, out, D, BLOCK_D=block)
    return out


@_bags.register_fake
def _(indices: Tensor, table_FD: Tensor, offsets: Tensor, weights: Tensor) -> Tensor:
    return table_FD.new_empty(len(offsets) - 1, table_FD.shape[1], dtype=torch.float32)


@torch.library.custom_op("saelab::sampled_product", mutates_args=())
def _sampled_product(x_ND: Tensor, W_FD: Tensor, rows: Tensor, indices: Tensor) -> Tensor:
    out = torch.empty(len(indices), dtype=torch.float32, device=x_ND.device)
    if len(indices):
        programs.sampled_program[(triton.cdiv(len(indices), 16),)](
            x_ND.contiguous(),
            W_FD.contiguous(),
            rows,
            indices,
            out,
            len(indices),
            x_ND.shape[1],
            BLOCK_E=16,
            BLOCK_D=64,
        )
    return out


@_sampled_product.register_fake
def _(x_ND: Tensor, W_FD: Tensor, rows: Tensor, indices: Tensor) -> Tensor:
    return x_ND.new_empty(len(indices), dtype=torch.float32)


@torch.library.custom_op("saelab::largest", mutates_args=())
def _largest(scores_NF: Tensor, k: int) -> Tensor:
    n, F = scores_NF.shape
    kept = triton.next_power_of_2(k)
    tile = max(kept, min(TILE, triton.next_power_of_2(F)))
    tiles = triton.cdiv(F, tile)
    keys = torch.empty(n, tiles * kept, dtype=torch.int64, device=scores_NF.device)
    if n:
        programs.top_program[(n, tiles)](scores_NF.contiguous(), keys, F, K=kept, BLOCK_F=tile)
    return F - keys.topk(k, dim=1).values.bitwise_and_(2**32 - 1)


@_largest.register_fake
def _(scores_NF: Tensor, k: int) -> Tensor:
    return scores_NF.new_empty(len(scores_NF), k, dtype=torch.int64)
