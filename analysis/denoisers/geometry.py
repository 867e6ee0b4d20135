"""The geometry of a denoiser: the Jacobian of its posterior mean along the noise levels, its basis, its score.

With y = x + sigma n and f(y) the denoised y, the best f has grad f = I + sigma^2 grad^2 log p = Cov[x | y] / sigma^2:
symmetric, positive, with trace the effective dimension (Kadkhodaie, Guth, Simoncelli, Mallat, ICLR 2024; Wang et al.,
arXiv:2409.02426). For an epsilon-network at x_t: y = x_t / sqrt(alpha_bar), sigma^2 = (1 - alpha_bar) / alpha_bar, f =
predicted x0. Jacobians at high noise are dominated by the noise in small networks: do not read them.

Shapes: D dimensions, N points.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor

from saelab.base import checks
from saelab.base.errors import ConfigError, DataError
from saelab.base.linear_maps import LinearMap, SingularVectors, singular_vectors

if TYPE_CHECKING:
    from pandas import DataFrame

    from saelab.hspace.trajectory import Trajectory
    from saelab.models.denoiser import Denoiser

LARGEST = 4096  # entries of a point whose whole Jacobian is formed
BLOCK = 64
OVERSAMPLE = 4
ENERGY = 0.99


@dataclasses.dataclass(frozen=True)
class Basis:
    """The eigenvectors of the symmetrised Jacobian of a denoiser at one point, in which it shrinks.

    `values` [D] descending and `vectors` [D, D] (rows) of (J + J^T) / 2; `singular` [D] of J itself. A trained network's
    Jacobian is only roughly symmetric: `asymmetry` is |J - J^T| / |J|, `negative` the share of the absolute eigenvalues
    below 0.
    """

    values: Float[Tensor, " D"]
    vectors: Float[Tensor, "D D"]
    singular: Float[Tensor, " D"]
    asymmetry: float
    negative: float

    @property
    def effective_dimension(self) -> float:
        """The sum of the eigenvalues: of the best denoiser its mean square error over sigma^2."""
        return float(self.values.sum())

    @property
    def participation_ratio(self) -> float:
        """(sum s^2)^2 / sum s^4 of the singular values: how many count about equally."""
        squares = self.singular.square()
        return float(squares.sum() ** 2 / squares.square().sum().clamp(min=1e-300))

    def rank(self, energy: float = ENERGY) -> int:
        """The least r for which the root of the share of the r largest squared singular values is above `energy`."""
        share = self.singular.square().cumsum(0) / self.singular.square().sum().clamp(min=1e-300)
        return min(int((share.sqrt() <= energy).sum()) + 1, len(share))


def jacobian_basis(
    denoise: Callable[[Float[Tensor, "N *shape"]], Float[Tensor, "N *shape"]], y: Float[Tensor, "*shape"]
) -> Basis:
    """The `Basis` of a denoiser at y: `denoise` maps a batch of points to a batch, row by row on its own.

    Raises `ConfigError` for a point of more than 4,096 entries, whose Jacobian would not be formed in reason.

    >>> basis = jacobian_basis(lambda y: y * torch.tensor([0.9, 0.5, 0.0]), torch.ones(3))
    >>> basis.values, basis.rank(), round(basis.effective_dimension, 3)
    (tensor([0.9000, 0.5000, 0.0000]), 2, 1.4)
    """
    if y.numel() > LARGEST:
        raise ConfigError(f"a point of {y.numel():,} entries has a Jacobian of {y.numel() ** 2:,}: at most {LARGEST:,}; "
                          "leading_directions gives its leading part")  # fmt: skip
    linear = LinearMap(denoise, y, min(BLOCK, y.numel()))
    J_DD = linear.push(torch.eye(linear.inputs).to(y)).T
    values, vectors = torch.linalg.eigh((J_DD + J_DD.T) / 2)
    size = J_DD.norm().clamp(min=torch.finfo(y.dtype).tiny)
    return Basis(
        values.flip(0), vectors.T.flip(0), torch.linalg.svdvals(J_DD), float((J_DD - J_DD.T).norm() / size),
        float(-values.clamp(max=0).sum() / values.abs().sum().clamp(min=1e-300)),
    )  # fmt: skip


def leading_directions(
    denoise: Callable[[Float[Tensor, "N *shape"]], Float[Tensor, "N *shape"]],
    y: Float[Tensor, "*shape"],
    k: int,
    *,
    tol: float = 1e-3,
    max_iter: int = 30,
) -> SingularVectors:
    """The k leading singular values and vectors of a denoiser's Jacobian at y, which is never formed: for any size of image.

    Block subspace iteration (`saelab.base.linear_maps.singular_vectors`, whose `residuals` say what has converged). The right
    vectors are directions of y that change the denoised image most: at the timestep of least rank the semantic ones of Wang et
    al. `right` and `left` are [k, D].

    Raises `ConfigError` for a k that is not from 1 to D.

    >>> leading_directions(lambda y: y * torch.tensor([0.9, 0.5, 0.0]), torch.ones(3), k=2).values
    tensor([0.9000, 0.5000], dtype=torch.float64)
    """
    k = checks.count("k", k, most=y.numel(), of="the entries of a point")
    block = min(k + OVERSAMPLE, y.numel())
    return singular_vectors(LinearMap(denoise, y, block), k, oversample=OVERSAMPLE, tol=tol, max_iter=max_iter)


def posterior_mean(
    denoiser: "Denoiser", t: int
) -> tuple[Callable[[Float[Tensor, "N *shape"]], Float[Tensor, "N *shape"]], float]:
    """(f, sigma): predicted x0 as a function of y = x_t / sqrt(alpha_bar_t), whose noise is sigma."""
    alpha = float(denoiser.alphas_cumprod[t])
    return lambda y: denoiser.x0(y * math.sqrt(alpha), t), math.sqrt((1 - alpha) / alpha)


def jacobian_spectrum(
    denoiser: "Denoiser", trajectory: "Trajectory", steps: Sequence[int] | None = None, energy: float = ENERGY
) -> "DataFrame":
    """Rank, effective dimension and symmetry of the posterior mean's Jacobian along the steps of a trajectory.

    A row a step, means over the trajectory's samples: `t`, `sigma`, `rank` (at root energy .99, Wang et al.), `participation`,
    `effective_dimension`, `asymmetry`, `negative`. The rank is expected to have its minimum at middling noise.

    Raises `DataError` where x was not recorded, `ConfigError` for images of more than 4,096 entries.

    >>> import saelab
    >>> denoiser = saelab.load_denoiser("digits-unet")
    >>> trajectory = saelab.hspace.sample(denoiser, n=1, steps=4, seed=0)
    >>> jacobian_spectrum(denoiser, trajectory, steps=[2])["t"].tolist() == [int(trajectory.timesteps[2])]
    True
    """
    import pandas

    if trajectory.x is None:
        raise DataError('the spectrum reads x_t: sample with record=("x", ...)')
    rows = []
    for step in range(len(trajectory.timesteps)) if steps is None else steps:
        t = int(trajectory.timesteps[step])
        denoise, sigma = posterior_mean(denoiser, t)
        found = [jacobian_basis(denoise, x * math.sqrt(1 + sigma**2)) for x in trajectory.x[:, step]]
        row: dict[str, list[float]] = {
               "rank": [one.rank(energy) for one in found], "participation": [one.participation_ratio for one in found],
               "effective_dimension": [one.effective_dimension for one in found],
               "asymmetry": [one.asymmetry for one in found], "negative": [one.negative for one in found]}  # fmt: skip
        rows.append({"t": t, "sigma": sigma, **{name: sum(some) / len(some) for name, some in row.items()}})
    return pandas.DataFrame(rows)


@torch.no_grad()
def homogeneity_error(
    denoise: Callable[[Float[Tensor, "N *shape"]], Float[Tensor, "N *shape"]],
    y: Float[Tensor, "N *shape"],
    factor: float = 2.0,
) -> float:
    """|f(a y) - a f(y)| / |a f(y)|: 0 for a network without additive constants (bias-free).

    >>> homogeneity_error(lambda y: y.clamp(min=0), torch.tensor([[1.0, -2.0]]))
    0.0
    """
    scaled = factor * denoise(y)
    return float((denoise(factor * y) - scaled).norm() / scaled.norm())


def sure(
    denoise: Callable[[Float[Tensor, "N *shape"]], Float[Tensor, "N *shape"]],
    y: Float[Tensor, "N *shape"],
    sigma: float,
    probes: int = 4,
    seed: int = 0,
) -> float:
    """Stein's unbiased estimate of the mean square error a point, E |x - f(y)|^2, from noisy points alone.

    2 sigma^2 tr grad f(y) + |y - f(y)|^2 - sigma^2 D, the trace by Hutchinson's estimator with random signs.

    >>> y = 2 * torch.randn(4000, 3, generator=torch.Generator().manual_seed(0))  # x of variance 3: the best is 3 y / 4
    >>> abs(sure(lambda y: 0.75 * y, y, sigma=1.0) - 3 * 0.75) < 0.1
    True
    """
    generator = torch.Generator().manual_seed(seed)
    trace = 0.0
    for _ in range(probes):
        with torch.inference_mode(False), torch.enable_grad():
            signs = (torch.randint(0, 2, y.shape, generator=generator) * 2 - 1).to(y)
            at = y.detach().clone().requires_grad_()
            (along,) = torch.autograd.grad((denoise(at) * signs).sum(), at)
        trace += float((along * signs).sum()) / probes
    with torch.no_grad():
        residual = float((y - denoise(y)).square().sum())
    return (2 * sigma**2 * trace + residual) / len(y) - sigma**2 * y[0].numel()


def score_error(
    denoise: Callable[[Float[Tensor, "N D"]], Float[Tensor, "N D"]],
    score: Callable[[Float[Tensor, "N D"]], Float[Tensor, "N D"]],
    y: Float[Tensor, "N D"],
    sigma: float,
) -> dict[str, float]:
    """How far (f(y) - y) / sigma^2 is from a known score: `relative` error and mean `cosine`.

    Exact for any sigma when f is the posterior mean (Miyasawa 1961; Alain and Bengio, JMLR 2014, for small sigma).

    >>> from saelab.analysis.denoisers.oracles import Gaussian
    >>> oracle = Gaussian(torch.diag(torch.tensor([4.0, 1.0])))
    >>> score_error(lambda y: oracle.denoise(y, 0.5), lambda y: oracle.score(y, 0.5), oracle.sample(8), 0.5)["relative"] < 1e-5
    True
    """
    with torch.no_grad():
        ours, known = (denoise(y) - y) / sigma**2, score(y)
    return {
        "relative": float((ours - known).norm() / known.norm()),
        "cosine": float(torch.cosine_similarity(ours.flatten(1), known.flatten(1)).mean()),
    }
