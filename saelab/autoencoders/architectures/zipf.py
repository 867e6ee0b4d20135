"""Budgets of latents: the Zipf-Mandelbrot law of their densities, caps, and whole numbers that add up.

The papers say that the budgets of Feature Choice follow a Zipf law; the fit, the cap and both roundings are ours, not the
paper's. Shapes: F latents; a rate is the share of tokens on which a latent fires.
"""

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from saelab.base.errors import ConfigError

_OFFSETS = 64
_LEFT_OUT = 0.1  # of the ranks, the lowest: real densities fall below the law there


def fit(density_F: Float[Tensor, " f"]) -> tuple[float, float]:
    """(a, b) of the law density ~ (rank + b)^-a: least squares of the logarithms, without the lowest 10% of the ranks and
    the silent latents; b is the best of 64 values from 0 to F. (0, 0), the uniform law, where fewer than 3 are left.

    >>> import torch
    >>> a, b = fit(torch.arange(1, 101) ** -1.5)
    >>> round(a, 6), b
    (1.5, 0.0)
    """
    n_latents = len(density_F)
    ranked = density_F.double().sort(descending=True).values[: n_latents - int(_LEFT_OUT * n_latents)]
    y = ranked[ranked > 0].log()
    if len(y) < 3:
        return 0.0, 0.0
    rank = torch.arange(1, len(y) + 1, dtype=torch.float64, device=y.device)
    y = y - y.mean()
    offsets = torch.logspace(-1, torch.tensor(float(n_latents)).log10().item(), _OFFSETS - 1).tolist()
    best = (torch.inf, 0.0, 0.0)
    for b in [0.0, *offsets]:
        x = (rank + b).log()
        x = x - x.mean()
        slope = float((x @ y) / (x @ x))
        best = min(best, (float((y - slope * x).square().sum()), slope, b))
    return max(0.0, -best[1]), best[2]


def law(a: float, b: float, n_latents: int) -> Float[Tensor, " f"]:
    """The shares (rank + b)^-a [F] of the ranks 1 to F, which sum to 1."""
    shares = (torch.arange(1, n_latents + 1, dtype=torch.float64) + b) ** -a
    return shares / shares.sum()


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
    left = total - int(whole_F.sum())
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
