"""Products with sparse codes that never make a dense [n_tokens, n_latents] matrix.

Two operations and their gradients, all at the entries (n, f) that fire:

    decode       x_hat[n]  = sum_f values[n, f] W[f]
    encode_at    values[n, f] = x[n] . W[f] + b[f]

Both gradients of a weight matrix are the same sum, grad_W[f] = sum_n c[n, f] v[n], a bag of rows grouped by
latent, so one sort of the indices serves them both. Shapes: N tokens, D inputs, F latents. The dense twins, in
plain autograd, are in `saelab.kernels.dense`.
"""

import warnings
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable

from saelab.base.codes import SparseCodes
from saelab.kernels import gpu, mixed

_GATHERED = 2**27  # numbers that are gathered at once


def decode(codes: SparseCodes, W_FD: Float[Tensor, "f d"]) -> Float[Tensor, "n d"]:
    """Sum of the rows of `W_FD` [n_latents, d] weighted by the codes: [n, d]; differentiable in both.

    >>> import torch
    >>> codes = SparseCodes.from_dense(torch.tensor([[0.0, 2.0], [1.0, 0.0]]))
    >>> decode(codes, torch.tensor([[1.0, 0.0], [0.0, 3.0]]))
    tensor([[0., 6.],
            [1., 0.]])
    """
    return _Decode.apply(codes.values, W_FD, codes)


def encode_at(
    x_ND: Float[Tensor, "n d"], W_FD: Float[Tensor, "f d"], b_F: Float[Tensor, " f"], codes: SparseCodes
) -> SparseCodes:
    """The codes at the same places with the values x . W[f] + b[f], differentiable in x, W and b.

    The values of `codes` are taken to be these products already; only their gradients are added.
    """
    values = _EncodeAt.apply(x_ND, W_FD, b_F, codes.values, codes)
    return codes.with_values(values.relu() if codes.padded else values)  # what pads has no gradient


def sampled_product(
    x_ND: Float[Tensor, "n d"], W_FD: Float[Tensor, "f d"], codes: SparseCodes
) -> Float[Tensor, " nnz"]:
    """x[n] . W[f] [nnz] at the entries (n, f) of the codes."""
    if gpu.serves(x_ND):
        from saelab.kernels.gpu import launch

        return launch.sampled_product(x_ND, W_FD, codes.rows(), codes.indices)
    if x_ND.device.type == "cpu" and x_ND.dtype == W_FD.dtype in (torch.float32, torch.float64):
        pattern = _csr(codes.offsets, codes.indices, x_ND.new_zeros(len(codes.indices)), (len(x_ND), len(W_FD)))
        return torch.sparse.sampled_addmm(pattern, x_ND, W_FD.T).values()
    rows, out = codes.rows(), x_ND.new_empty(len(codes.indices))
    step = max(1, _GATHERED // x_ND.shape[1])
    for start in range(0, len(out), step):
        part = slice(start, start + step)
        torch.sum(x_ND[rows[part]] * W_FD[codes.indices[part]], 1, out=out[part])
    return out


def sum_by_latent(
    values: Float[Tensor, " nnz"], v_ND: Float[Tensor, "n d"], codes: SparseCodes
) -> Float[Tensor, "f d"]:
    """sum_n values[n, f] v[n]: [n_latents, d], the gradient of either weight matrix."""
    order, offsets = codes.by_latent()
    return mixed.bags(codes.rows()[order], v_ND, offsets, values[order])


def _csr(offsets: Tensor, indices: Tensor, values: Tensor, shape: tuple[int, int]) -> Tensor:
    with warnings.catch_warnings():  # torch announces once a process that its CSR tensors are in beta
        warnings.simplefilter("ignore")
        return torch.sparse_csr_tensor(offsets, indices, values, shape, check_invariants=False)


class _Decode(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, W_FD: Tensor, codes: SparseCodes) -> Tensor:
        ctx.codes = codes
        ctx.save_for_backward(values, W_FD)
        return mixed.bags(codes.indices, W_FD, codes.offsets, values)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_ND: Tensor) -> tuple[Tensor | None, ...]:
        values, W_FD = ctx.saved_tensors
        grad_ND = grad_ND.contiguous()
        grad_values = sampled_product(grad_ND, W_FD, ctx.codes) if ctx.needs_input_grad[0] else None
        grad_W = sum_by_latent(values, grad_ND, ctx.codes) if ctx.needs_input_grad[1] else None
        return grad_values, grad_W, None


class _EncodeAt(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_ND: Tensor, W_FD: Tensor, b_F: Tensor, values: Tensor, codes: SparseCodes) -> Tensor:
        ctx.codes = codes
        ctx.save_for_backward(x_ND, W_FD)
        return values.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x_ND, W_FD = ctx.saved_tensors
        codes = ctx.codes
        grad_x = mixed.bags(codes.indices, W_FD, codes.offsets, grad) if ctx.needs_input_grad[0] else None
        grad_W = sum_by_latent(grad, x_ND, codes) if ctx.needs_input_grad[1] else None
        grad_b = None
        if ctx.needs_input_grad[2]:
            grad_b = grad.new_zeros(codes.n_latents).index_add_(0, codes.indices, grad)
        return grad_x, grad_W, grad_b, None, None
