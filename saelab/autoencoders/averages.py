"""Averages that forget at a rate given in shares of the run, so that runs of every length do the same."""

from jaxtyping import Float, Int64
from torch import Tensor


def average_(
    total: Float[Tensor, "*shape"],
    weight: Float[Tensor, ""],
    last: Float[Tensor, ""],
    progress: float,
    half_life: float,
    new: Float[Tensor, "*shape"] | Int64[Tensor, "*shape"],
    by: float = 1,
) -> None:
    """Add to the sum and to its weight, in place, what is new at this progress, and forget what is old."""
    left = forgetting(last, progress, half_life)
    last.fill_(progress)
    total.mul_(left).add_(new)
    weight.mul_(left).add_(by)


def forgetting(last: Float[Tensor, ""], progress: float, half_life: float) -> float:
    """What is left, from 0 to 1, at this progress of a sum that was last added to at the progress `last`.

    0 where the progress has gone back: a new run began, and its average begins anew. Divided by a sum of weights that is
    forgotten alike, the average is free of the bias of its start.

    >>> import torch
    >>> forgetting(torch.tensor(0.25), 0.5, half_life=0.125), forgetting(torch.tensor(0.9), 0.0, half_life=0.1)
    (0.25, 0.0)
    """
    before = float(last)
    return 0.0 if progress < before else 0.5 ** ((progress - before) / half_life)
