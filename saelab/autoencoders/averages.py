"""Averages that forget at a rate given in shares of the run, so that runs of every length do the same."""

from torch import Tensor


def forgetting(last: Tensor, progress: float, half_life: float) -> float:
    """What is left, from 0 to 1, of a sum that was last added to at the progress `last`, which is set to `progress`.

    0 where the progress has gone back: a new run began, and its average begins anew. Divided by a sum of weights that is
    forgotten alike, the average is free of the bias of its start.

    >>> import torch
    >>> forgetting(torch.tensor(0.25), 0.5, half_life=0.125), forgetting(torch.tensor(0.9), 0.0, half_life=0.1)
    (0.25, 0.0)
    """
    before = float(last)
    last.fill_(progress)
    return 0.0 if progress < before else 0.5 ** ((progress - before) / half_life)
