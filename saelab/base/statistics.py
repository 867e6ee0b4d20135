"""Figures that several rooms take of their numbers."""

import math
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor


def kl(p_NV: Float[Tensor, "*n V"], q_NV: Float[Tensor, "*n V"]) -> Float[Tensor, "*n"]:
    """KL(p || q) in nats, float64, of the distributions with these logits; taken in their dtype and summed in float64.

    >>> kl(torch.zeros(1, 2), torch.zeros(1, 2))
    tensor([0.], dtype=torch.float64)
    """
    log_p_NV, log_q_NV = p_NV.log_softmax(-1), q_NV.log_softmax(-1)
    return (log_p_NV.exp() * (log_p_NV - log_q_NV)).sum(-1, dtype=torch.float64)


def spearman(x: Any, y: Any) -> float:
    """Rank correlation of two sequences, ties at their mean rank; NaN for fewer than two points or a constant.

    >>> spearman([1, 2, 3], [1, 4, 9])
    1.0
    """
    import pandas

    ranks = pandas.DataFrame({"x": x, "y": y}).astype(float).rank()
    if len(ranks) < 2 or ranks.x.nunique() < 2 or ranks.y.nunique() < 2:
        return math.nan
    return round(float(ranks.x.corr(ranks.y)), 12)


def mean_interval(values: Any, resamples: int = 1000) -> tuple[float, float]:
    """95% percentile bootstrap interval of the mean of what was drawn independently; NaN for fewer than two values.

    >>> mean_interval([1.0, 1.0, 1.0])
    (1.0, 1.0)
    """
    import numpy as np

    values = np.asarray(values, dtype=np.float64)
    if len(values) < 2:
        return math.nan, math.nan
    picks = np.random.default_rng(0).integers(len(values), size=(resamples, len(values)))
    low, high = np.percentile(values[picks].mean(1), [2.5, 97.5])
    return float(low), float(high)
