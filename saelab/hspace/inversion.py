"""From real images to runs that end in them: DDIM's ascent, edit-friendly noise, EDICT.

n images, S steps. Levels go from `alpha_next` up to `alpha` of each step, the last step first.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Literal

import torch
from jaxtyping import Float, Shaped
from torch import Tensor

from saelab.base.errors import ConfigError, DataError
from saelab.hspace.sampling import BATCH, EDICT_MIX, Bottleneck, run
from saelab.hspace.trajectory import Trajectory
from saelab.models.denoiser import Denoiser
from saelab.models.denoising import Steps, advance, draws, steps_of
from saelab.models.solvers import solves
from saelab.models.unet_sites import AFTER

METHODS = ("edit-friendly", "ddim", "edict")


def invert(
    denoiser: Denoiser,
    images: Float[Tensor, "n C H W"],
    method: Literal["edit-friendly", "ddim", "edict"] = "edit-friendly",
    steps: int = 50,
    eta: float = 1.0,
    seed: int = 0,
    cond: Shaped[Tensor, "..."] | None = None,
    record: Sequence[str] = ("h", "x", "x0"),
    *,
    site: str = AFTER,
    batch_size: int = BATCH,
    progress: bool = True,
) -> Trajectory:
    """A run that ends in the images: its start and noise are found, then it is made like any other, and read.

    "ddim" (Song et al. 2021) climbs the deterministic path, with epsilon taken at the lower level, so that the way down misses
    the image by what epsilon changes over a step. "edit-friendly" (Huberman-Spiegelglas et al. 2024) draws every x_t
    independently and solves each step for its noise; the last step's rest is kept as `residual`, and each x_t is set again
    from its solved noise, so that the run ends in the image but for rounding. "edict" (Wallace et al. 2023) is deterministic
    and exact but for rounding; its two sequences are held in float64 whatever the network's precision. `eta` is used by
    "edit-friendly" alone (above 0), the other two have none. `.errors` of the result are the reconstruction errors;
    `denoiser.to(torch.float64)` brings them from rounding in float32 to rounding in float64. ||x_T||^2 / d, which is near 1
    for drawn samples, says how far an inversion's start is from what the denoiser expects.

    Raises `ConfigError` for an unknown method, eta 0 where noise is needed, or a solver's steps; `DataError` for images of
    another shape.

    >>> import saelab
    >>> denoiser = saelab.load_denoiser("digits-unet")
    >>> images, labels = denoiser.examples()
    >>> trajectory = invert(denoiser, images[:2], steps=10)
    >>> bool((trajectory.errors < 1e-5).all())
    True
    """
    if method not in METHODS:
        raise ConfigError(f"no inversion {method!r}: known are {', '.join(METHODS)}")
    if method == "edit-friendly" and eta <= 0:
        raise ConfigError("eta is 0, and edit-friendly inversion solves for the noise of each step: give eta above 0")
    x0 = _checked(denoiser, images)
    plan = steps_of(denoiser, steps, eta if method == "edit-friendly" else 0.0)
    path = denoiser.site(site)
    exact = x0.double() if method == "edict" else x0
    bare = Trajectory(exact, exact, plan.timesteps, plan.eta, denoiser.digest, path, batch_size, seed, method, cond=cond,
                      images=images)  # fmt: skip
    find = {"ddim": _ddim, "edit-friendly": _edit_friendly, "edict": _edict}[method]
    with torch.no_grad():
        bare = find(denoiser, plan, bare)
    return run(denoiser, bare, record, progress)


@torch.no_grad()
def ascend(
    denoiser: Denoiser,
    images: Float[Tensor, "n C H W"],
    steps: int = 50,
    cond: Shaped[Tensor, "..."] | None = None,
    batch_size: int = BATCH,
) -> Float[Tensor, "n S_1 C H W"]:
    """DDIM's path from the images up to x_T, in the order of a trajectory's `x`: x_T first, the images last.

    Epsilon is taken at the lower level's x and the upper level's timestep, as `DDIMInverseScheduler` does.

    >>> import saelab
    >>> denoiser = saelab.load_denoiser("digits-unet")
    >>> ascend(denoiser, denoiser.examples()[0][:2], steps=5).shape
    torch.Size([2, 6, 1, 8, 8])
    """
    x0 = _checked(denoiser, images)
    plan = steps_of(denoiser, steps)
    path = x0.new_empty(len(x0), steps + 1, *x0.shape[1:])
    path[:, -1] = x0
    for rows, net in _batches(denoiser, len(x0), batch_size, cond):
        for step in reversed(range(steps)):
            a, b = _affine(plan, step)
            epsilon, _ = net.both(path[rows, step + 1], int(plan.timesteps[step]))
            path[rows, step] = (path[rows, step + 1] - b * epsilon) / a
    return path


def _affine(plan: Steps, step: int) -> tuple[float, float]:
    """(a, b) of a step without noise, x' = a x + b epsilon."""
    alpha, following = float(plan.alpha[step]), float(plan.alpha_next[step])
    a = (following / alpha) ** 0.5
    return a, (1 - following) ** 0.5 - a * (1 - alpha) ** 0.5


def _ddim(denoiser: Denoiser, plan: Steps, bare: Trajectory) -> Trajectory:
    path = ascend(denoiser, bare.start, len(plan), bare.cond, bare.batch_size)
    return dataclasses.replace(bare, start=path[:, 0].clone())


def _edit_friendly(denoiser: Denoiser, plan: Steps, bare: Trajectory) -> Trajectory:
    x0, seed = bare.start, bare.seed or 0
    free = draws(denoiser, len(x0), seed, "edit-friendly", len(plan))
    a = plan.alpha.to(x0).view(1, -1, 1, 1, 1)
    # independent at every level: that is what makes them editable
    levels = a.sqrt() * x0[:, None] + (1 - a).sqrt() * free
    noise, residual = torch.zeros_like(levels), torch.zeros_like(x0)
    for rows, net in _batches(denoiser, len(x0), bare.batch_size, bare.cond):
        x = levels[rows, 0]
        for step, t in enumerate(plan.timesteps.tolist()):
            epsilon, clean_image = net.both(x, t)
            mean = advance(plan, step, clean_image, epsilon, None)
            target = x0[rows] if step + 1 == len(plan) else levels[rows, step + 1]
            if plan.sigma[step] > 0:
                noise[rows, step] = (target - mean) / float(plan.sigma[step])
            x = advance(plan, step, clean_image, epsilon, noise[rows, step])  # set again: what the run will come to
        residual[rows] = x0[rows] - x
    return dataclasses.replace(bare, start=levels[:, 0].clone(), noise=noise, residual=residual)


def _edict(denoiser: Denoiser, plan: Steps, bare: Trajectory) -> Trajectory:
    start, partner = torch.empty_like(bare.start), torch.empty_like(bare.start)
    p = EDICT_MIX
    for rows, net in _batches(denoiser, len(bare), bare.batch_size, bare.cond):
        x = y = bare.start[rows]
        for step in reversed(range(len(plan))):
            t, (a, b) = int(plan.timesteps[step]), _affine(plan, step)
            y = (y - (1 - p) * x) / p
            x = (x - (1 - p) * y) / p
            y = (y - b * net.both(x, t)[0]) / a
            x = (x - b * net.both(y, t)[0]) / a
        start[rows], partner[rows] = x, y
    return dataclasses.replace(bare, start=start, partner=partner)


def _batches(denoiser: Denoiser, n: int, batch_size: int, cond: Tensor | None) -> Iterator[tuple[slice, Bottleneck]]:
    """(rows, the denoiser over them) for the batches of a run."""
    for first in range(0, n, batch_size):
        rows = slice(first, min(first + batch_size, n))
        yield rows, Bottleneck(denoiser, AFTER, cond if cond is None or len(cond) == 1 else cond[rows], hooked=False)


def _checked(denoiser: Denoiser, images: Tensor) -> Tensor:
    if solves(denoiser.scheduler):
        raise ConfigError(
            f"inversion undoes DDIM's update, and the step of {type(denoiser.scheduler).__name__} remembers earlier ones: "
            "load the denoiser with scheduler=DDIMScheduler.from_config(scheduler.config)"
        )
    if tuple(images.shape[1:]) != denoiser.sample_shape or not images.is_floating_point():
        raise DataError(f"images are [n, {', '.join(map(str, denoiser.sample_shape))}] of floating point for this denoiser; "
                        f"these are {list(images.shape)} of {images.dtype}")  # fmt: skip
    return images.detach().to(denoiser.device, denoiser.dtype)
