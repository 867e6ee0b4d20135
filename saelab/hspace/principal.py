"""Unsupervised directions: principal components of h over samples, at each timestep or jointly (Haas et al. 2024, section 3.3).

Shapes: N samples, S steps, D = C h w entries of h, K components.
"""

import dataclasses
from collections.abc import Iterable

import torch
from jaxtyping import Float
from torch import Tensor

from saelab.base.errors import ConfigError, DataError
from saelab.hspace.directions import Directions, unit
from saelab.hspace.trajectory import Trajectory

SPARE = 4  # directions kept for each one asked for, while samples stream past


def pca(
    trajectory: Trajectory | Iterable[Trajectory], components: int, joint: bool = False, align: bool = True
) -> Directions:
    """Principal components of h over the samples of a trajectory.

    By default one PCA a timestep, as our notes of the paper have it; strength 1 is one standard deviation. There the j-th
    components of all timesteps are paired. On small models the j-th component of one step is not that of the next, so with
    `align` (our choice) each step's components are matched to those of the step before by the assignment that makes the sum of
    |cosine| largest, and turned to point the same way; `details["alignment"]` [K, S] has the cosines. Without, the paper's
    rule: order of variance, signs turned towards the first step. `joint` is one PCA of all steps together.

    Args:
        trajectory: one, or an iterable of them (of equal steps) where the samples do not fit into memory at once. Then 4 K
            components are carried along and merged with each trajectory's samples: exact while the samples seen so far
            span no more than that, close to it later.
        components: K.

    Returns: `Directions`; `explained` [K, S], the share of the variance at each step ([K, 1] where joint).

    Raises `ConfigError` for more components than samples less one, or than entries of h; `DataError` for a trajectory
    without h, or trajectories that differ in timesteps, site or denoiser.

    >>> import saelab
    >>> trajectory = saelab.hspace.sample(saelab.load_denoiser("digits-unet"), n=8, steps=3, seed=0)
    >>> saelab.hspace.pca(trajectory, components=2)
    Directions(2 by pca, [64, 4, 4] at 3 timesteps of mid_block)
    """
    whole = isinstance(trajectory, Trajectory)
    first: Trajectory | None = None
    seen: list[_Spectrum] = []
    for part in [trajectory] if isinstance(trajectory, Trajectory) else trajectory:
        h = h_of(part)
        if first is None:
            first = part
            width = h[0].numel() if joint else h[0, 0].numel()
            seen = [_Spectrum.empty(width, h.device) for _ in range(1 if joint else h.shape[1])]
        check_alike(first, part)
        rows = [h.flatten(1)] if joint else list(h.flatten(2).unbind(1))
        seen = [
            spectrum.merged(X_ND, None if whole else SPARE * components)
            for spectrum, X_ND in zip(seen, rows, strict=True)
        ]
    if first is None:
        raise DataError("no trajectory to analyse: the iterable was empty")
    n, shape = seen[0].n, h_of(first).shape[1:]
    most = min(n - 1, seen[0].mean_D.numel())
    if not 1 <= components <= most:
        raise ConfigError(f"{components} components of {n} samples with {seen[0].mean_D.numel():,} entries: there are "
                          f"{max(most, 0)}; sample more, or ask for fewer")  # fmt: skip
    std_TK = torch.stack([spectrum.std[:components] for spectrum in seen])
    basis_TKD = torch.stack([spectrum.basis_RD[:components] for spectrum in seen])
    explained_TK = std_TK**2 * (n - 1) / torch.tensor([max(some.total, 1e-300) for some in seen])[:, None].to(std_TK)
    alignment_TK = _align(basis_TKD, std_TK, explained_TK, reorder=align)
    raw = (std_TK[:, :, None] * basis_TKD).transpose(0, 1).reshape(components, *shape)
    vectors, scales = unit(raw)
    return Directions(
        vectors.float(), scales.float(), first.timesteps.clone(), first.site, first.denoiser, "joint pca" if joint else "pca",
        explained=explained_TK.T.float(), details={} if joint else {"alignment": alignment_TK.T.float()},
    )  # fmt: skip


def h_of(trajectory: Trajectory) -> Float[Tensor, "N S C h w"]:
    """The recorded h. Raises `DataError` where it was not recorded, or is not finite."""
    if not isinstance(trajectory, Trajectory):
        raise ConfigError(
            f"this is {type(trajectory).__name__}, no trajectory: make one with hspace.sample(denoiser, n=...)"
        )
    if trajectory.h is None:
        raise DataError('this trajectory has no h: sample it with record=("h", ...)')
    if not bool(torch.isfinite(trajectory.h.sum())):
        raise DataError(
            "h of this trajectory has entries that are not finite: the denoiser overflowed, or the file is damaged"
        )
    return trajectory.h


def step_of(trajectory: Trajectory, step: int) -> int:
    """The step, counted from 0, the noisiest; given a negative one, from the end. Raises `ConfigError` where there is none."""
    steps = len(trajectory.timesteps)
    if not -steps <= step < steps:
        raise ConfigError(f"there is no step {step}: the trajectory has {steps}, from 0 (the noisiest) on")
    return step % steps


def check_alike(one: Trajectory, other: Trajectory) -> None:
    """Raise `DataError` unless both trajectories are of one denoiser, one site and the same timesteps."""
    if one.denoiser != other.denoiser or one.site != other.site:
        raise DataError("the trajectories are of different denoisers or sites: analyse each on its own")
    if not torch.equal(one.timesteps, other.timesteps):
        raise DataError(f"the trajectories have other timesteps ({len(one.timesteps)} and {len(other.timesteps)} steps): "
                        "sample them with the same steps")  # fmt: skip


@dataclasses.dataclass(frozen=True)
class _Spectrum:
    """The leading principal components of the rows seen so far, in float64."""

    n: int
    total: float  # sum of squares about the mean
    mean_D: Tensor
    singular_R: Tensor
    basis_RD: Tensor

    @classmethod
    def empty(cls, width: int, device: torch.device) -> "_Spectrum":
        zeros = torch.zeros(0, width, dtype=torch.float64, device=device)
        return cls(0, 0.0, zeros.new_zeros(width), zeros.new_zeros(0), zeros)

    @property
    def std(self) -> Tensor:
        return self.singular_R / max(self.n - 1, 1) ** 0.5

    def merged(self, X_ND: Tensor, keep: int | None) -> "_Spectrum":
        """With more rows: the SVD of what is kept, stacked on the new rows about their mean and on the difference of the
        means."""
        X_ND = X_ND.double()
        m, mean_D = len(X_ND), X_ND.mean(0)
        between_D = (self.n * m / (self.n + m)) ** 0.5 * (self.mean_D - mean_D)
        rows_MD = torch.cat([self.singular_R[:, None] * self.basis_RD, X_ND - mean_D, between_D[None]])
        total = self.total + float(rows_MD[len(self.singular_R) :].square().sum())
        singular_R, basis_RD = leading(rows_MD)
        keep = len(singular_R) if keep is None else min(keep, len(singular_R))
        return _Spectrum(
            self.n + m, total, (self.n * self.mean_D + m * mean_D) / (self.n + m), singular_R[:keep], basis_RD[:keep]
        )


def leading(rows_MD: Float[Tensor, "M D"]) -> tuple[Float[Tensor, " R"], Float[Tensor, "R D"]]:
    """Singular values and right singular vectors, through the smaller of the two Gram matrices; the largest entry of each
    vector is positive. Exact to sqrt(eps) of the largest value: enough in float64."""
    M, D = rows_MD.shape
    if M <= D:
        squares, left = torch.linalg.eigh(rows_MD @ rows_MD.T)
        right_RD = left.T @ rows_MD
    else:
        squares, right = torch.linalg.eigh(rows_MD.T @ rows_MD)
        right_RD = right.T
    order = torch.arange(len(squares) - 1, -1, -1, device=rows_MD.device)
    singular_R = squares[order].clamp(min=0).sqrt()
    right_RD = right_RD[order]
    right_RD = right_RD / torch.linalg.vector_norm(right_RD, dim=1, keepdim=True).clamp(min=1e-300)
    largest = right_RD.gather(1, right_RD.abs().argmax(1, keepdim=True))
    return singular_R, torch.where(largest < 0, -right_RD, right_RD)


def _align(basis_TKD: Tensor, std_TK: Tensor, explained_TK: Tensor, reorder: bool) -> Tensor:
    """In place, bring each step in line with the one before, or with the first where the order stays; the cosines [T, K]."""
    for step in range(1, len(basis_TKD)):
        order, sign = _matched(basis_TKD[step - 1 if reorder else 0], basis_TKD[step], reorder)
        basis_TKD[step] = sign[:, None] * basis_TKD[step, order]
        std_TK[step], explained_TK[step] = std_TK[step, order], explained_TK[step, order]
    cosines_TK = (basis_TKD[:-1] * basis_TKD[1:]).sum(2)
    return torch.cat([torch.ones_like(std_TK[:1]), cosines_TK])


def _matched(before_KD: Tensor, now_KD: Tensor, reorder: bool) -> tuple[Tensor, Tensor]:
    """(order, sign) that bring the rows of `now_KD` in line with those of `before_KD`."""
    cosine_KK = before_KD @ now_KD.T
    order = torch.arange(len(now_KD), device=now_KD.device)
    if reorder:
        from scipy.optimize import linear_sum_assignment

        order = torch.as_tensor(linear_sum_assignment(cosine_KK.abs().cpu().numpy(), maximize=True)[1]).to(order)
    paired = cosine_KK.gather(1, order[:, None])[:, 0]
    return order, torch.where(paired < 0, -1.0, 1.0).to(paired)
