"""FVU = c + a W^-m over the widths W of a family of SAEs, with an interval, or the statement that it cannot be told.

For each exponent of a grid the best c >= 0 and a >= 0 have a closed form, so nothing is iterated (by our notes the paper's
own fit runs Adam on raw widths; that is ill-conditioned). Shapes: B bootstrap draws, W widths, M exponents.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Shaped
from torch import Tensor

from saelab.base.errors import ConfigError

EXPONENTS = torch.logspace(math.log10(0.02), math.log10(4.0), 241, dtype=torch.float64)
PARAMETERS = 3
WIDE = 2.0  # an interval of the exponent that spans more than this factor is printed with the reason (our choice)
WIDEST = 4.0  # one that spans more than this is not identified (our choice)
# t quantiles at .975, whose squares are F(1, df) at .95
_T = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)


@dataclass(frozen=True)
class PowerLaw:
    """FVU = floor + factor * width^-exponent.

    `exponent_profile` is the 95% interval of the exponent: those whose fit is not significantly worse than the best (F test on
    the residuals, with as many degrees of freedom as there are widths beyond the three parameters). The `..._bootstrap`
    intervals (95%, percentile) are of drawing the documents again with the SAEs as they are: they leave out how far the widths
    lie off the law and what another seed would have trained, and are no intervals of the law. `residual` is the root mean
    square distance of the widths from it.

    `identifiable` is False, and `reason` says why, when the data do not pin the exponent down: then floor and factor mean
    nothing either, as any of many curves passes through the widths at hand.
    """

    floor: float
    factor: float
    exponent: float
    floor_bootstrap: tuple[float, float]
    factor_bootstrap: tuple[float, float]
    exponent_bootstrap: tuple[float, float]
    exponent_profile: tuple[float, float]
    residual: float
    widths: tuple[int, ...]
    identifiable: bool
    reason: str

    def __call__(self, width: int | float | Shaped[Tensor, "*shape"]) -> Any:
        """The FVU of a width."""
        return self.floor + self.factor * width**-self.exponent

    @property
    def exponent_interval(self) -> tuple[float, float]:
        """The 95% interval of the exponent, which is the profile's."""
        return self.exponent_profile

    def __str__(self) -> str:
        if not self.identifiable:
            return f"not identifiable: {self.reason}"
        (low, high), (least, most) = self.exponent_profile, self.exponent_bootstrap
        wide = ""
        if high > WIDE * low:
            n, left = len(self.widths), len(self.widths) - PARAMETERS
            wide = f", wide because {n} widths leave {left} degrees of freedom to residuals of {self.residual:.2g}"
        law = f"FVU = {self.floor:.4f} + {self.factor:.4g} W^-{self.exponent:.3f}"
        return f"{law} (exponent {low:.3f} to {high:.3f}{wide}; from other documents alone {least:.3f} to {most:.3f})"


def fit_power_law(
    widths: list[int], fvu_W: Float[Tensor, " widths"], draws_BW: Float[Tensor, "draws widths"]
) -> PowerLaw:
    """Fit FVUs [w] of SAEs of these widths; `draws_BW` [b, w] are their bootstrap draws, paired between widths.

    Raises `ConfigError` unless there are more distinct widths than parameters plus one, that is five.

    >>> widths = [256, 512, 1024, 2048, 4096, 8192]
    >>> fvu = 0.1 + 2 * torch.tensor(widths, dtype=torch.float64) ** -0.5
    >>> law = fit_power_law(widths, fvu, fvu.expand(4, -1))
    >>> round(law.floor, 3), round(law.factor, 2), round(law.exponent, 3), law.identifiable
    (0.1, 2.0, 0.5, True)
    """
    distinct = len(set(widths))
    if distinct <= PARAMETERS + 1:
        raise ConfigError(
            f"{distinct} widths for a power law of {PARAMETERS} parameters: at least {PARAMETERS + 2} are needed, for example "
            "256, 512, 1024, 2048, 4096, 8192"
        )
    width_W = torch.tensor(widths, dtype=torch.float64)
    fvu_W = fvu_W.double()
    floor, factor, exponent, profile_M = (value[0] for value in _fits(width_W, fvu_W[None]))
    floor_B, factor_B, exponent_B, _ = _fits(width_W, draws_BW.double())
    bootstrap = [interval(values) for values in (floor_B, factor_B, exponent_B)]
    profile = _profile(profile_M, len(widths))
    reason = _unclear(float(floor), float(factor), bootstrap[2], profile)
    return PowerLaw(
        floor=float(floor),
        factor=float(factor),
        exponent=float(exponent),
        floor_bootstrap=bootstrap[0],
        factor_bootstrap=bootstrap[1],
        exponent_bootstrap=bootstrap[2],
        exponent_profile=profile,
        residual=float(profile_M.min().div(len(widths)).sqrt()),
        widths=tuple(widths),
        identifiable=not reason,
        reason=reason,
    )


def _fits(width_W: Tensor, fvu_BW: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(floor, factor, exponent) [b] and the sums of squares [b, m] over the grid, refined once around the best."""
    *_, squares_BM = _over(width_W, fvu_BW, EXPONENTS.expand(len(fvu_BW), -1))
    best = squares_BM.argmin(1)
    low, high = EXPONENTS[(best - 1).clamp(min=0)], EXPONENTS[(best + 1).clamp(max=len(EXPONENTS) - 1)]
    fine_BM = low[:, None] + (high - low)[:, None] * torch.linspace(0, 1, 101, dtype=torch.float64)
    floor_BM, factor_BM, fine_squares_BM = _over(width_W, fvu_BW, fine_BM)
    place = fine_squares_BM.argmin(1, keepdim=True)
    floor, factor, exponent = (values.gather(1, place)[:, 0] for values in (floor_BM, factor_BM, fine_BM))
    return floor, factor, exponent, squares_BM


def _over(width_W: Tensor, fvu_BW: Tensor, exponent_BM: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The best (floor, factor), both non-negative, and the sum of squares for each exponent: [b, m]."""
    u_BMW = (width_W / width_W.min()) ** -exponent_BM[:, :, None]
    y_B1W = fvu_BW[:, None]
    u_mean, y_mean = u_BMW.mean(2), y_B1W.mean(2)
    spread = (u_BMW - u_mean[..., None]).square().sum(2)
    factor = ((u_BMW - u_mean[..., None]) * (y_B1W - y_mean[..., None])).sum(2) / spread
    floor = y_mean - factor * u_mean
    through_zero = (u_BMW * y_B1W).sum(2) / u_BMW.square().sum(2)
    factor, floor = torch.where(floor < 0, through_zero, factor), floor.clamp(min=0)
    floor = torch.where(factor < 0, y_mean, floor)
    factor = factor.clamp(min=0)
    squares = (y_B1W - floor[..., None] - factor[..., None] * u_BMW).square().sum(2)
    return floor, factor * width_W.min() ** exponent_BM, squares


def interval(values_B: Float[Tensor, " B"]) -> tuple[float, float]:
    """The 95% percentile interval of bootstrap draws."""
    low, high = values_B.quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return low, high


def _profile(squares_M: Tensor, n: int) -> tuple[float, float]:
    """Exponents whose sum of squares is within the F(1, n - 3) quantile of the smallest."""
    freedom = n - PARAMETERS
    quantile = (_T[freedom - 1] if freedom <= len(_T) else 1.96) ** 2
    best = squares_M.min()
    within = EXPONENTS[squares_M <= best * (1 + quantile / freedom) + 1e-24]
    return float(within.min()), float(within.max())


def _unclear(floor: float, factor: float, interval: tuple[float, float], profile: tuple[float, float]) -> str:
    lowest, highest = float(EXPONENTS[0]) * 1.001, float(EXPONENTS[-1]) * 0.999
    if factor <= 0:
        return "FVU does not fall with the width"
    if floor <= 0:
        return (
            "the floor comes out at its bound of 0: FVU falls too evenly over these widths to tell where it would end"
        )
    for name, (low, high) in (("bootstrap interval", interval), ("profile", profile)):
        if low <= lowest or high >= highest:
            return f"the {name} of the exponent, {low:.3g} to {high:.3g}, reaches the end of what is tried"
        if high > WIDEST * low:
            return f"the {name} of the exponent goes from {low:.3g} to {high:.3g}, more than a factor of {WIDEST:g}"
    return ""
