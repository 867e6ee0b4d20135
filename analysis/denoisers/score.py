"""Scores of denoisers: Tweedie's formulas for three kinds of noise, a blind choice of their parameter, and sampling.

The score is the gradient of log p at y, where p is the density of the *noisy* y (Miyasawa 1961; Alain and Bengio, JMLR 2014;
Noise2Score, Kim and Ye, NeurIPS 2021). Shapes: N points.
"""

from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from saelab.base import checks

FAMILIES = ("gaussian", "poisson", "gamma")
# Gauss-Legendre on [0, 1]: exact along a segment for a score that is a polynomial of degree 5
_NODES, _WEIGHTS = (0.5 - 0.15**0.5, 0.5, 0.5 + 0.15**0.5), (5 / 18, 8 / 18, 5 / 18)


def score_of(
    denoise: Callable[[Float[Tensor, "N *shape"]], Float[Tensor, "N *shape"]], sigma: float
) -> Callable[[Float[Tensor, "N *shape"]], Float[Tensor, "N *shape"]]:
    """The score of y = x + sigma n from any denoising autoencoder r: (r(y) - y) / sigma^2.

    Exact for each sigma where r is the posterior mean; what a small sigma gives is that of clean x but for o(1) (Alain and
    Bengio). Of a diffusion denoiser, r and sigma are `geometry.posterior_mean`'s. An autoencoder that was trained on
    standardised inputs has its score in these units, and only at the sigma of its training.

    >>> score_of(lambda y: 0.8 * y, sigma=0.5)(torch.ones(1, 2))
    tensor([[-0.8000, -0.8000]])
    """
    sigma = checks.number("sigma", sigma, above=0)
    return lambda y: (denoise(y) - y) / sigma**2


def tweedie(
    y: Float[Tensor, "N *shape"], score: Float[Tensor, "N *shape"], family: str, parameter: float
) -> Float[Tensor, "N *shape"]:
    """The clean x from noisy y and its score (Noise2Score).

    - "gaussian", y = x + sigma n: y + sigma^2 s, the posterior mean exactly.
    - "poisson", y = zeta z with z Poisson of mean x / zeta: (y + zeta / 2) exp(zeta s); p(z + 1) / p(z) is taken to be exp of
      the slope at z, so that it is right for counts that are not small.
    - "gamma", y = x g with g Gamma of shape k and mean 1: k y / (k - 1 - y s), which is 1 / E[1 / x | y] exactly.

    `parameter` is sigma, zeta or k. Raises `ConfigError` for another family, or a parameter that is not above 0 (k: above 1).

    >>> tweedie(torch.tensor([[2.0]]), torch.tensor([[-1.0]]), "gaussian", 0.5)
    tensor([[1.7500]])
    """
    checks.choice("family", family, FAMILIES)
    parameter = checks.number("parameter", parameter, above=1 if family == "gamma" else 0)
    if family == "gaussian":
        return y + parameter**2 * score
    if family == "poisson":
        return (y + parameter / 2) * (parameter * score).exp()
    return parameter * y / (parameter - 1 - y * score)


def total_variation(images: Float[Tensor, "N C H W"]) -> float:
    """The mean absolute difference between neighbouring pixels, along both axes.

    >>> total_variation(torch.tensor([[[[0.0, 1.0], [0.0, 1.0]]]]))
    0.5
    """
    down, across = images.diff(dim=2).abs(), images.diff(dim=3).abs()
    return float((down.sum() + across.sum()) / (down.numel() + across.numel()))


def blind_parameter(
    y: Float[Tensor, "N C H W"],
    score: Float[Tensor, "N C H W"],
    family: str,
    grid: Sequence[float],
    quality: Callable[[Float[Tensor, "N C H W"]], float] = total_variation,
) -> float:
    """The parameter of the grid for which Tweedie's estimate is cleanest: where `quality` is least.

    After Noise2Score, which takes a measure of this kind; plain total variation is our choice.

    Too small a sigma leaves noise in, too large a one puts it in with its sign turned; both vary more than the clean image.
    Of images that vary much themselves total variation prefers too large a one: give another `quality`.

    >>> y = 3 + 0.5 * torch.randn(4, 1, 16, 16, generator=torch.Generator().manual_seed(0))
    >>> blind_parameter(y, (3 - y) / 0.25, "gaussian", [0.3, 0.4, 0.5, 0.6])
    0.5
    """
    return min(grid, key=lambda parameter: quality(tweedie(y, score, family, parameter)))


@torch.no_grad()
def langevin(
    score: Callable[[Float[Tensor, "N *shape"]], Float[Tensor, "N *shape"]],
    start: Float[Tensor, "N *shape"],
    step: float,
    steps: int,
    *,
    metropolis: bool = True,
    seed: int = 0,
) -> tuple[Float[Tensor, "N *shape"], float]:
    """N chains of Langevin sampling from a score: y <- y + step^2 / 2 s(y) + step n; and the share of the moves accepted.

    With `metropolis` each move is accepted or not as Metropolis and Hastings have it, which takes away what the length of the
    step adds. The ratio of the densities, which a score does not give, is its integral along the segment between the two
    points (Alain and Bengio), by three points of Gauss and Legendre (our choice): exact for Gaussians, and only as good as the
    score is a gradient.

    >>> y, accepted = langevin(lambda y: -y, torch.zeros(500, 2), step=1.0, steps=50)
    >>> bool((y.var(0) - 1).abs().max() < 0.3), 0.8 < accepted < 1
    (True, True)
    """
    step, steps = checks.number("step", step, above=0), checks.count("steps", steps)
    generator = torch.Generator().manual_seed(checks.seed(seed))
    y, accepted = start.clone(), 0.0
    s = score(y)
    for _ in range(steps):
        noise = torch.randn(y.shape, generator=generator, dtype=torch.float64).to(y)
        chance = torch.rand(len(y), generator=generator, dtype=torch.float64)
        moved = y + step**2 / 2 * s + step * noise
        s_moved = score(moved)
        if metropolis:
            back = (y - moved - step**2 / 2 * s_moved).flatten(1).double().square().sum(1)
            there = noise.flatten(1).double().square().sum(1) * step**2
            odds = _log_ratio(score, y, moved) - (back - there) / (2 * step**2)
            kept = (chance.log().to(odds) < odds).view(-1, *[1] * (y.ndim - 1))
            y, s = torch.where(kept, moved, y), torch.where(kept, s_moved, s)
            accepted += float(kept.double().mean()) / steps
        else:
            y, s, accepted = moved, s_moved, 1.0
    return y, accepted


def _log_ratio(score: Callable[[Tensor], Tensor], start: Tensor, end: Tensor) -> Float[Tensor, " N"]:
    """log p(end) - log p(start)."""
    along = end - start
    parts = [w * (score(start + u * along) * along).flatten(1).double() for u, w in zip(_NODES, _WEIGHTS, strict=True)]
    return torch.stack(parts).sum(0).sum(1)
