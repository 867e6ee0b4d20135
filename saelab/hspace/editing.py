"""Edits: directions added to h while a run is made again.

K directions, n samples, S steps, h of C x h x w.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Shaped
from torch import Tensor

from saelab.base.errors import ConfigError
from saelab.hspace.sampling import replay
from saelab.hspace.trajectory import Injection, Trajectory
from saelab.models.denoiser import Denoiser
from saelab.models.denoising import MODES
from saelab.models.solvers import solves

# The steps that a direction with one vector for every timestep is taken to be made at (our choice).
REFERENCE_STEPS = 50


class Edit:
    """What `hspace.edit` does, to be given to `hspace.sample(edit=...)`; the arguments are explained there.

    Raises `ConfigError` for a mode or window that cannot be.
    """

    def __init__(
        self,
        directions: Any,
        strength: Any = 1.0,
        *,
        mode: str = "symmetric",
        window: tuple[float, float] | None = None,
        mask: Shaped[Tensor, "..."] | None = None,
        normalize_gain: bool = False,
    ) -> None:
        self.directions = list(directions) if isinstance(directions, Sequence) else [directions]
        if not self.directions:
            raise ConfigError("there is no direction to edit along: give one, or a list")
        if mode not in MODES:
            raise ConfigError(f"mode {mode!r} is neither of {' and '.join(MODES)}")
        if window is not None and window[0] < window[1]:
            raise ConfigError(f"the window {window} is (high, low): runs go from high timesteps to low ones")
        self.strength, self.mode, self.window = strength, mode, window
        self.mask, self.normalize_gain = mask, normalize_gain

    def injection(self, denoiser: Denoiser, trajectory: Trajectory) -> Injection:
        """The edit for the steps and samples of a run. Raises `ConfigError` where it does not fit them."""
        if self.mode == "asymmetric" and solves(denoiser.scheduler):
            raise ConfigError(
                f"the step of {type(denoiser.scheduler).__name__} does not tell the predicted image from the direction "
                "back, and an asymmetric edit changes only the first: use symmetric, or DDIMScheduler"
            )
        shape = denoiser.site_shape(trajectory.site)
        deltas = []
        for direction in self.directions:
            self._check(direction, denoiser, trajectory, shape)
            delta = direction.delta(trajectory.timesteps).to(trajectory.start)
            if self.normalize_gain and self.mode == "asymmetric":
                made = REFERENCE_STEPS if direction.timesteps is None else len(direction.timesteps)
                delta = delta * made / trajectory.steps
            deltas.append(delta)
        t = trajectory.timesteps
        high, low = self.window or (float("inf"), float("-inf"))
        active = (t <= high) & (t >= low)
        if not bool(active.any()):
            raise ConfigError(f"no timestep of the run ({int(t[0])} to {int(t[-1])}, {len(t)} steps) is in the window "
                              f"{self.window}: widen it")  # fmt: skip
        strength = self._strengths(len(trajectory)).to(trajectory.start)
        return Injection(torch.stack(deltas), strength, self._mask(shape, trajectory), self.mode, active)

    def _check(self, direction: Any, denoiser: Denoiser, trajectory: Trajectory, shape: tuple[int, ...]) -> None:
        if not denoiser.made(direction.denoiser):
            raise ConfigError(f"the direction was made with the denoiser {direction.denoiser[:12]}, this one "
                              f"({denoiser.name}) is {denoiser.digest[:12]}: make it again with this one")  # fmt: skip
        if direction.site != trajectory.site:
            raise ConfigError(f"the direction is of the site {direction.site!r}, the trajectory of {trajectory.site!r}: "
                              "use one site for both (site= of hspace.sample)")  # fmt: skip
        if tuple(direction.vector.shape[1:]) != shape:
            own = list(direction.vector.shape[1:])
            raise ConfigError(
                f"the direction is {own} and h is {list(shape)} at {trajectory.site}: make it from this h"
            )

    def _strengths(self, n: int) -> Tensor:
        K = len(self.directions)
        several = isinstance(self.strength, list | tuple)
        if several and len(self.strength) != K:
            raise ConfigError(f"{len(self.strength)} strengths for {K} directions: give one, or one a direction")
        parts = [torch.as_tensor(s, dtype=torch.float64) for s in (self.strength if several else [self.strength] * K)]
        for part in parts:
            if part.ndim > 1 or part.numel() not in (1, n):
                raise ConfigError(
                    f"a strength of shape {list(part.shape)} for {n} samples: give a number, or one a sample [n]"
                )
        return torch.stack([part.reshape(-1).expand(n) for part in parts])

    def _mask(self, shape: tuple[int, ...], trajectory: Trajectory) -> Tensor | None:
        if self.mask is None:
            return None
        mask = self.mask if self.mask.ndim == 3 else self.mask[None]
        if mask.ndim != 3 or tuple(mask.shape[1:]) != shape[1:] or len(mask) not in (1, len(trajectory)):
            raise ConfigError(f"a mask of {list(self.mask.shape)}: give {list(shape[1:])}, the places of {trajectory.site}, or "
                              f"[{len(trajectory)}, {shape[1]}, {shape[2]}], one a sample")  # fmt: skip
        return mask.to(trajectory.start)

    def __repr__(self) -> str:
        return f"Edit({len(self.directions)} directions, strength {self.strength}, {self.mode}, window {self.window})"


def edit(
    denoiser: Denoiser,
    trajectory: Trajectory,
    direction_or_list: Any,
    strength: Any = 1.0,
    *,
    mode: str = "symmetric",
    window: tuple[float, float] | None = None,
    mask: Shaped[Tensor, "..."] | None = None,
    normalize_gain: bool = False,
    record: Sequence[str] | None = None,
    progress: bool = True,
) -> Trajectory:
    """Make the run again from the same x_T and noise with strength * scale * direction added to h at every step (of a guided
    denoiser in both branches).

    Steps take the vector of the nearest timestep; several directions add up. An earlier edit of the trajectory is not kept:
    give its direction along.

    Args:
        strength: in units of the direction's scale: a number, a tensor [n] with one a sample, or a list with one such a
            direction.
        mode: "symmetric" (Haas et al. 2024) uses the edited epsilon throughout the step; "asymmetric" (Asyrp, Kwon et al. 2023)
            only in the predicted clean image, at the cost of a second pass of the network.
        window: (high, low) edits at timesteps high >= t >= low.
        mask: [h, w] or [n, h, w], weighs the places of h.
        normalize_gain: divide an asymmetric edit, whose effect grows with the number of steps, by (steps of this run) / (steps
            that the direction was made at, 50 for one without); a symmetric edit has about the same effect at any number of
            steps and is left alone.
        record: what is read, by default what the trajectory has.
        progress: show a bar with the rate and the time left.

    Raises `ConfigError` for directions of another denoiser, site or shape, and for arguments that cannot work.

    >>> import saelab
    >>> from saelab import hspace
    >>> denoiser = saelab.load_denoiser("digits-unet")
    >>> trajectory = hspace.sample(denoiser, n=8, steps=4, eta=1.0)
    >>> edited = edit(denoiser, trajectory, hspace.pca(trajectory, components=1)[0], strength=2.0)
    >>> bool((edited.samples - trajectory.samples).abs().amax() > 0.1)
    True
    """
    how = Edit(direction_or_list, strength, mode=mode, window=window, mask=mask, normalize_gain=normalize_gain)
    bare = dataclasses.replace(trajectory, injection=how.injection(denoiser, trajectory))
    return replay(denoiser, bare, trajectory.recorded if record is None else record, progress=progress)
