"""Budgets of latents: the Zipf-Mandelbrot law of their densities, caps, and whole numbers that add up.

The papers say that the budgets of Feature Choice follow a Zipf law; the fit, the smoothing, the cap and both roundings are
ours, not the paper's. Shapes: F latents; a rate is the share of tokens on which a latent fires.
"""

import math
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from saelab.base.errors import ConfigError

_STEPS, _HALVINGS, _PRECISION = 200, 20, 1e-13  # of the maximisation, the last in nats a firing
_LARGEST = 10.0  # b in units of the number of latents: beyond, the law is an exponential of the rank
_OFF = 0.05


class Fit(NamedTuple):
    """A law density ~ (rank + b)^-a, and how far the densities are `off` it: the share of all firings that it gives to other
    ranks than the densities do (their total variation distance)."""

    a: float
    b: float
    off: float

    @property
    def holds(self) -> bool:
        """Whether at most 5% of the firings are off the law (our limit)."""
        return self.off <= _OFF


def fit(density_F: Float[Tensor, " f"]) -> Fit:
    """The law under which the firings, ranked by their latents' densities, are likeliest: a multinomial over all F ranks, with
    a >= 0 and b > -1. A silent latent is a rank that got no firing, and counts as such.

    Scoring by Fisher's information, steps halved until they help, on the logarithm of b + 1, so that b = 0 is no edge. b at
    its limit, 10 F, is no Zipf law but an exponential one: `off` is 1 then, as it is where nothing fires (a = b = 0).

    >>> import torch
    >>> found = fit((torch.arange(1, 101) + 2.0) ** -1.5)
    >>> round(found.a, 3), round(found.b, 3), found.holds
    (1.5, 2.0, True)
    >>> fit((torch.arange(100) < 50).float()).holds
    False
    """
    share_F = density_F.double().cpu().sort(descending=True).values
    if not bool(share_F[0] > 0):
        return Fit(0.0, 0.0, 1.0)
    share_F = share_F / share_F.sum()
    rank_F = torch.arange(len(share_F), dtype=torch.float64)

    def surprise(at: Tensor) -> float:
        log_F = (rank_F + at[1].exp()).log()
        return float(at[0] * (share_F @ log_F) + torch.logsumexp(-at[0] * log_F, 0))

    last = math.log(_LARGEST * len(share_F) + 1)
    at = torch.ones(2, dtype=torch.float64)  # a, and the logarithm of b + 1
    now = surprise(at)
    for _ in range(_STEPS):
        places_F = rank_F + at[1].exp()
        law_F = torch.softmax(-at[0] * places_F.log(), 0)
        slopes_2F = torch.stack([-places_F.log(), -at[0] * at[1].exp() / places_F])
        centred_2F = slopes_2F - (slopes_2F @ law_F)[:, None]
        information = (centred_2F * law_F) @ centred_2F.T
        information += torch.diag(1e-9 * information.diag() + torch.finfo(torch.float64).tiny)
        step = torch.linalg.solve(information, slopes_2F @ (share_F - law_F))
        tried = (at + step / 2**i for i in range(_HALVINGS))
        better = (new for new in tried if new[0] > 0 and abs(new[1]) < last and surprise(new) < now - _PRECISION)
        if (found := next(better, None)) is None:
            break
        at, now = found, surprise(found)
    off = float((share_F - torch.softmax(-at[0] * (rank_F + at[1].exp()).log(), 0)).abs().sum()) / 2
    a, b = float(at[0]), float(at[1].exp()) - 1
    return Fit(a, b, 1.0 if b > 0.99 * _LARGEST * len(share_F) else off)


def law(a: float, b: float, n_latents: int) -> Float[Tensor, " f"]:
    """The shares (rank + b)^-a [F] of the ranks 1 to F, which sum to 1."""
    return torch.softmax(-a * (torch.arange(1, n_latents + 1, dtype=torch.float64) + b).log(), 0)


def smoothed(ranked_F: Float[Tensor, " f"]) -> Float[Tensor, " f"]:
    """Falling densities [F], each the mean of those up to a tenth of its rank before and after it (fewer at the end); still
    falling.

    >>> import torch
    >>> smoothed(torch.tensor([9.0] * 9 + [6.0, 3.0]))[8:]
    tensor([9., 6., 3.], dtype=torch.float64)
    """
    rank_F = torch.arange(1, len(ranked_F) + 1, device=ranked_F.device)
    reach_F = torch.minimum(rank_F // 10, len(ranked_F) - rank_F)
    sums = torch.nn.functional.pad(ranked_F.double().cumsum(0), (1, 0))
    mean_F = (sums[rank_F + reach_F] - sums[rank_F - 1 - reach_F]) / (2 * reach_F + 1)
    return mean_F.clamp_min(0).cummin(0).values


def spread(shares_F: Float[Tensor, " f"], k: float, cap: float) -> Float[Tensor, " f"]:
    """Rates [F] that sum to k, in proportion to the shares but for those that would exceed the cap, which get the cap.

    Raises `ConfigError` when the latents with a share cannot hold k.

    >>> import torch
    >>> spread(torch.tensor([6.0, 1.0, 1.0]), k=1.0, cap=0.5)
    tensor([0.5000, 0.2500, 0.2500], dtype=torch.float64)
    """
    shares_F = shares_F.double()
    if k > cap * int((shares_F > 0).sum()):
        raise ConfigError(
            f"{int((shares_F > 0).sum()):,} latents that fire on at most {cap:.3g} of the tokens cannot spend k = {k:g} "
            "a token: lower k, or raise d_sae or the cap"
        )
    full_F = torch.zeros_like(shares_F, dtype=torch.bool)
    while True:
        left = shares_F.masked_fill(full_F, 0)
        scale = (k - cap * int(full_F.sum())) / left.sum().clamp_min(torch.finfo(torch.float64).tiny)
        rates_F = (left * scale).masked_fill(full_F, cap)
        over_F = (rates_F > cap) & ~full_F
        if not bool(over_F.any()):
            return rates_F
        full_F |= over_F


def systematic(rates_F: Float[Tensor, " f"], n: int, total: int, u: float) -> Int64[Tensor, " f"]:
    """Whole budgets [F] of n tokens that sum to `total`: floor(C_i + u) - floor(C_{i-1} + u), C the cumulated rates * n.

    For u uniform in [0, 1) each latent's mean is exactly rate * n, and it gets one of the two whole numbers about it.

    >>> import torch
    >>> systematic(torch.tensor([0.5, 0.25, 0.25]), n=10, total=10, u=0.6)
    tensor([5, 3, 2])
    """
    exact_F = rates_F.double() * n
    whole_F = exact_F.floor()
    rest_F = exact_F - whole_F
    left = total - whole_F.sum().long()
    reached_F = (rest_F.cumsum(0) + u).floor().long()
    # What rounding of the sums would break: at most one more a latent, and all of what is left in the end.
    room_F = (rest_F > 0).cumsum(0)
    reached_F = (reached_F.clamp_max(left) - room_F).cummin(0).values + room_F
    reached_F = reached_F.maximum(left - (room_F[-1] - room_F))
    return whole_F.long() + reached_F.diff(prepend=reached_F.new_zeros(1))


def largest_remainder(rates_F: Float[Tensor, " f"], n: int, total: int) -> Int64[Tensor, " f"]:
    """Whole budgets [F] of n tokens that sum to `total`: rates * n rounded down, and one more for the largest remainders.

    The same in each batch of the same size: a latent whose remainder is never among the largest never gets the one more.

    >>> import torch
    >>> largest_remainder(torch.tensor([0.5, 0.25, 0.25]), n=10, total=10)
    tensor([5, 3, 2])
    """
    exact_F = rates_F.double() * n
    whole_F = exact_F.floor()
    order = (exact_F - whole_F).argsort(descending=True, stable=True)
    budgets_F = whole_F.long()
    budgets_F[order[: max(0, total - int(budgets_F.sum()))]] += 1
    return budgets_F


def aux_zipf_latents(
    dead_F: Bool[Tensor, " f"], density_F: Float[Tensor, " f"], target_F: Float[Tensor, " f"], tau: float
) -> Bool[Tensor, " f"]:
    """Which latents [F] the loss aux_zipf revives: the dead, and the under-used that fire on less than tau of their target.

    aux_zipf is aux-k over these latents, so with tau = 0 it is aux-k itself. The paper (Ayonrinde 2024) says that its
    aux_zipf_loss helps under-used latents as well as dead ones; its formula is not public, and this one, its tau, its
    targets (of the lower half of the ranks only; 0 for the others) and when they are refreshed are ours, not the paper's.
    """
    return dead_F | (density_F < tau * target_F)
