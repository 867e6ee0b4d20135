"""Reconstruction and auxiliary losses. Shapes: N tokens, D outputs."""

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from saelab.autoencoders.allocation import PreActivations
from saelab.base import processes as distributed
from saelab.kernels import sparse


def fraction_of_variance_unexplained(
    target_ND: Float[Tensor, "n d"], x_hat_ND: Float[Tensor, "n d"]
) -> Float[Tensor, ""]:
    """sum |x - x_hat|^2 / sum |x - mean|^2 over the batch: the MSE in units of the variance (Gao et al. 2024, app. A).

    The error itself where the rows do not vary. Of several processes the mean of theirs is that of the whole batch.

    >>> import torch
    >>> x = torch.tensor([[1.0], [3.0]])
    >>> fraction_of_variance_unexplained(x, torch.tensor([[1.0], [2.0]]))
    tensor(0.5000)
    """
    variance = distributed.mean(torch.linalg.vector_norm(target_ND - distributed.mean(target_ND.mean(0))).square())
    error = torch.linalg.vector_norm(target_ND - x_hat_ND).square()  # without a matrix of squares, here and backwards
    return error / torch.where(variance > 0, variance, 1.0)


def aux_k(
    error_ND: Float[Tensor, "n d_out"],
    x_ND: Float[Tensor, "n d_in"],
    W_enc_FD: Float[Tensor, "f d_in"],
    b_enc_F: Float[Tensor, " f"],
    W_dec_FD: Float[Tensor, "f d_out"],
    dead: Int64[Tensor, " m"],
    k: int,
) -> Float[Tensor, ""]:
    """The share of the error's variance that the k strongest of the dead latents leave unexplained (Gao et al. 2024, A.2).

    `error_ND` is detached and holds no b_dec, so none is added to the auxiliary reconstruction. With fewer than k
    dead latents the loss is scaled by their number over k (our choice, as in SAELens). Zero when none is dead.
    """
    n_dead = len(dead)
    if n_dead == 0:
        return error_ND.new_zeros(())
    scores = PreActivations(x_ND, W_enc_FD[dead], b_enc_F[dead])
    if n_dead <= 4 * k:  # few enough columns for a dense product to be the faster one
        acts_NA = scores.dense().relu()
        if n_dead > k:
            acts_NA = acts_NA * (acts_NA >= acts_NA.detach().topk(k, dim=1).values[:, -1:])
        error_hat_ND = acts_NA @ W_dec_FD[dead]
    else:
        error_hat_ND = sparse.decode(scores.per_token(k), W_dec_FD[dead])
    loss = fraction_of_variance_unexplained(error_ND, error_hat_ND) * min(1.0, n_dead / k)
    return loss.nan_to_num(0.0)
