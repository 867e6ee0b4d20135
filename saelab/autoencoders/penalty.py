"""The price of a code, for rules without a budget: the units that it is given in, and how it rises.

A coefficient lambda is meant for inputs with E|x| = sqrt(d_in) and scales with them, so that the same one means the same at
every site. Shapes: N tokens, D inputs, F latents.
"""

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

from saelab.autoencoders.architecture import Batch, Params, State, Tensors

_ROWS = 1024


def buffers() -> Tensors:
    """What the state keeps: E|x| / sqrt(d_in) of the scaled input (a transcoder: of its centred target), and the share of
    the price that was asked last."""
    return {"input_norm": torch.ones(()), "price_share": torch.zeros(())}


def measure(batch: Batch, state: State) -> None:
    """Set the unit of the price from a sample of rows."""
    rows_ND = batch.x if batch.target is batch.x else batch.target - batch.target.mean(0)
    norm = torch.linalg.vector_norm(rows_ND, dim=1).mean() / rows_ND.shape[1] ** 0.5
    state.input_norm.copy_(torch.where(norm > 0, norm, 1.0))


def shrink_encoder(params: Params, batch: Batch, decode: Callable[[Batch], Float[Tensor, "n d_out"]]) -> float:
    """Multiply the encoder by the one number that makes the first reconstruction best (our choice), and say which.

    Tied unit rows, of which many fire, would reconstruct several times the input; Adam would remember these gradients long
    after. `decode` gives what the codes of some rows decode to, without b_dec.
    """
    rows = Batch(batch.x[:_ROWS], batch.target[:_ROWS])
    wanted_ND, found_ND = rows.target - params.base(rows.x), decode(rows)
    factor = (wanted_ND * found_ND).sum() / found_ND.square().sum()
    if not bool(torch.isfinite(factor)) or float(factor) <= 0:
        return 1.0
    params.W_enc.mul_(factor)
    return float(factor)


def share(batch: Batch, state: State, ramp: float) -> Float[Tensor, ""]:
    """The share of the price that is asked: it rises to the whole over the first `ramp` of the run; an SAE that is trained on
    has risen already."""
    return state.price_share.clamp(min=min(1.0, batch.progress / ramp))


def squared_error(batch: Batch, x_hat_ND: Float[Tensor, "n d_out"]) -> Float[Tensor, ""]:
    """sum |x - x_hat|^2 / n: the mean over tokens of the squared distance."""
    return (batch.target - x_hat_ND).square().sum() / len(x_hat_ND)
