"""Reconstruction and auxiliary losses. Shapes: N tokens, D outputs."""

import math
from typing import Any

import torch
from torch import Tensor

from saelab.autoencoders.allocation import PreActivations
from saelab.autoencoders.architecture import Batch, Params, State
from saelab.base import checks
from saelab.base import processes as distributed
from saelab.kernels import sparse


def fraction_of_variance_unexplained(target_ND: Tensor, x_hat_ND: Tensor) -> Tensor:
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
    error_ND: Tensor, x_ND: Tensor, W_enc_FD: Tensor, b_enc_F: Tensor, W_dec_FD: Tensor, dead_F: Tensor, k: int
) -> Tensor:
    """The share of the error's variance that the k strongest dead latents leave unexplained (Gao et al. 2024, app. A.2).

    `error_ND` is detached and holds no b_dec, so none is added to the auxiliary reconstruction. With fewer than k
    dead latents the loss is scaled by their number over k (our choice, as in SAELens). Zero when none is dead.
    """
    n_dead = int(dead_F.sum())
    if n_dead == 0:
        return error_ND.new_zeros(())
    dead = dead_F.nonzero().squeeze(1)
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


def reconstruction(
    cfg: Any, batch: Batch, x_hat_ND: Tensor, params: Params, state: State, revived_F: Tensor | None = None
) -> dict[str, Tensor]:
    """FVU, and aux-k weighted by `cfg.aux_coefficient` where that is not 0: the losses of the TopK family.

    `cfg.aux_k` None means the power of two nearest to d_in / 2. `revived_F` are the latents that aux-k is over, by default
    the dead ones.
    """
    terms = {"fvu": fraction_of_variance_unexplained(batch.target, x_hat_ND)}
    if cfg.aux_coefficient:
        k = cfg.aux_k or 2 ** round(math.log2(max(batch.x.shape[1] / 2, 1)))
        revived_F = state.dead if revived_F is None else revived_F
        aux = x_hat_ND.new_zeros(())
        if bool(revived_F.any()):
            error_ND, x_ND = (batch.target - x_hat_ND).detach(), params.centred(batch.x).detach()
            aux = aux_k(error_ND, x_ND, params.W_enc, params.b_enc, params.W_dec, revived_F, k)
        terms["aux"] = cfg.aux_coefficient * aux
    return terms


def checked_aux(cfg: Any) -> dict[str, Any]:
    """The weight and the size of an auxiliary loss, checked; `ConfigError` for one that cannot be."""
    coefficient = checks.number("aux_coefficient", cfg.aux_coefficient, least=0)
    return {"aux_coefficient": coefficient, "aux_k": checks.maybe(checks.count, "aux_k", cfg.aux_k)}
