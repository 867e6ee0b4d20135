"""The sampler: DDIM to DDPM by eta, with an edit of h on the way and every random number kept.

For DDIM and DDPM our own update rather than the scheduler's `step`, which cannot tell the predicted clean image P from the
direction D back to x_t (Asyrp edits only P) and does not show the noise it draws; equal to `DDIMScheduler.step` and
`DDPMScheduler.step`. Solvers, which remember earlier steps and draw nothing, take their own (`saelab.models.solvers`).
n samples, S steps.
"""

import contextlib
import dataclasses
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float, Shaped
from torch import Tensor

from saelab.base import checks
from saelab.base.errors import ConfigError
from saelab.base.progress import progress_bar
from saelab.hspace.trajectory import READINGS, Injection, Trajectory
from saelab.models.denoiser import Denoiser, Moment
from saelab.models.denoising import Steps, advance, draws, mover, steps_of
from saelab.models.unet_sites import AFTER

if TYPE_CHECKING:
    from saelab.hspace.editing import Edit

BATCH = 64
EDICT_MIX = 0.93  # p of EDICT (Wallace et al. 2023)


def sample(
    denoiser: Denoiser,
    n: int,
    steps: int = 50,
    eta: float = 0.0,
    seed: int = 0,
    edit: "Edit | None" = None,
    cond: Shaped[Tensor, "..."] | None = None,
    record: Sequence[str] = ("h", "x", "x0"),
    *,
    site: str = AFTER,
    boost_below: int | None = None,
    batch_size: int = BATCH,
    progress: bool = True,
) -> Trajectory:
    """Draw `n` samples and keep what it takes to draw them again.

    Args:
        n: samples.
        steps: steps of denoising.
        eta: 0 is DDIM, which draws no noise, 1 DDPM, which has more to find directions in; a solver has none.
        seed: sample i takes x_T and noise from two streams of its own, seeded by (seed, i): it does not depend on `n`, and to
            the bit not within batches of one size.
        cond: as in `Denoiser.epsilon`, one row or n.
        record: what is read at each step: "h" at `site` (before any edit), "x", "x0", "epsilon".
        site: where h is.
        boost_below: below this timestep eta is 1 (Asyrp's quality boosting).
        batch_size: samples a forward pass.
        progress: show a bar with the rate and the time left.

    Raises `ConfigError` for arguments that cannot work, `SiteError` for an unknown site.

    >>> import saelab
    >>> trajectory = sample(saelab.load_denoiser("digits-unet"), n=2, steps=4, eta=1.0, seed=0)
    >>> trajectory.x.shape, trajectory.x0.shape, trajectory.noise.shape
    (torch.Size([2, 5, 1, 8, 8]), torch.Size([2, 4, 1, 8, 8]), torch.Size([2, 4, 1, 8, 8]))
    """
    checks.denoiser("denoiser", denoiser)
    n, batch_size, seed = checks.count("n", n), checks.count("batch_size", batch_size), checks.seed(seed)
    steps, eta = checks.count("steps", steps), checks.number("eta", eta, least=0)
    plan = steps_of(denoiser, steps, eta, boost_below)
    path = denoiser.site(site)
    start = draws(denoiser, n, seed, "start", 1)[:, 0]
    noise = draws(denoiser, n, seed, "noise", steps) if bool((plan.eta > 0).any()) else None
    bare = Trajectory(
        start, start, plan.timesteps, plan.eta, denoiser.digest, path, batch_size, seed, noise=noise, cond=cond
    )
    if edit is not None:
        bare = dataclasses.replace(bare, injection=edit.injection(denoiser, bare))
    return run(denoiser, bare, record, progress)


def replay(
    denoiser: Denoiser, trajectory: Trajectory, record: Sequence[str] | None = None, *, progress: bool = True
) -> Trajectory:
    """Make a run again, to the bit on the same machine: same x_T, noise, edit and batches.

    `record` is what to read this time (default: what the trajectory has). Raises `ConfigError` for another denoiser.

    >>> import saelab
    >>> denoiser = saelab.load_denoiser("digits-unet")
    >>> trajectory = sample(denoiser, n=2, steps=4, eta=1.0)
    >>> torch.equal(replay(denoiser, trajectory).samples, trajectory.samples)
    True
    """
    if not denoiser.made(trajectory.denoiser):
        raise ConfigError(f"the trajectory is of the denoiser {trajectory.denoiser[:12]}, this one ({denoiser.name}) is "
                          f"{denoiser.digest[:12]}: load the one that made it")  # fmt: skip
    return run(denoiser, trajectory, trajectory.recorded if record is None else record, progress)


def run(denoiser: Denoiser, bare: Trajectory, record: Sequence[str], progress: bool = True) -> Trajectory:
    """Carry out the run that a trajectory describes (its start, noise, steps, edit), reading what is asked."""
    unknown = set(record) - set(READINGS)
    if unknown:
        raise ConfigError(f"cannot record {', '.join(sorted(unknown))}: known are {', '.join(READINGS)}")
    if bare.cond is not None and len(bare.cond) not in (1, len(bare)):
        raise ConfigError(f"cond has {len(bare.cond)} rows for {len(bare)} samples: give one row, or one a sample")
    if "h" in record and len(denoiser.site_shape(bare.site)) != 3:
        raise ConfigError(f'{bare.site} has tokens and no feature map, which h is: leave "h" out of record, or read it with '
                          "denoiser.record")  # fmt: skip
    plan = dataclasses.replace(steps_of(denoiser, bare.steps), eta=bare.eta)
    if not torch.equal(plan.timesteps, bare.timesteps):
        raise ConfigError("the trajectory's timesteps are not the scheduler's: use the scheduler that it was made with")
    readings: dict[str, Tensor] = {}
    n, S = len(bare), bare.steps

    def keep(name: str, rows: slice, step: int, value: Tensor) -> None:
        if name not in record:
            return
        if name not in readings:
            count = S + 1 if name == "x" else S
            readings[name] = value.new_empty(n, count, *value.shape[1:])
        readings[name][rows, step] = value

    samples = torch.empty_like(bare.start)
    with torch.no_grad(), progress_bar(S * -(-n // bare.batch_size), "denoising", "step", progress) as bar:
        for first in range(0, n, bare.batch_size):
            rows = slice(first, min(first + bare.batch_size, n))
            cond = bare.cond if bare.cond is None or len(bare.cond) == 1 else bare.cond[rows]
            with Bottleneck(denoiser, bare.site, cond, "h" in record or bare.injection is not None) as net:
                walk = _edict if bare.method == "edict" else _single
                samples[rows] = walk(net, plan, bare, rows, keep, bar)
    found: dict[str, Any] = {name: readings.get(name) for name in READINGS}
    return dataclasses.replace(bare, samples=samples, **found)


class Bottleneck:
    """The denoiser over one batch, with one hook on the site that reads h and adds to it."""

    def __init__(self, denoiser: Denoiser, site: str, cond: Shaped[Tensor, "..."] | None, hooked: bool) -> None:
        self.denoiser, self.cond = denoiser, cond
        self.h: Tensor | None = None
        self._added: Tensor | None = None
        self._hook: Any = denoiser.intervene(site, self._touch) if hooked else contextlib.nullcontext()

    def __enter__(self) -> "Bottleneck":
        self._hook.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._hook.__exit__(*error)

    def _touch(self, h: Tensor, where: Moment) -> Tensor:
        if not where.unconditional:
            self.h = h
        return h if self._added is None else h + self._added.to(h)

    def both(
        self, x: Float[Tensor, "n C H W"], t: int, added: Float[Tensor, "n c h w"] | None = None
    ) -> tuple[Float[Tensor, "n C H W"], Float[Tensor, "n C H W"]]:
        """(epsilon, x0) with `added` on h, in the precision of `x` whatever the network's."""
        self._added = added
        epsilon, x0 = self.denoiser.both(x.to(self.denoiser.dtype), t, self.cond)
        return epsilon.to(x.dtype), x0.to(x.dtype)

    def predict(
        self, x: Float[Tensor, "n C H W"], t: int, edit: Injection | None, step: int, rows: slice
    ) -> tuple[Float[Tensor, "n C H W"], Float[Tensor, "n C H W"], Float[Tensor, "n C H W"]]:
        """(epsilon, x0, the epsilon of the direction back to x_t): the last is the first unless an edit is asymmetric."""
        added = None if edit is None else edit.at(step, rows)
        seen, x0 = self.both(x, t, added)
        if added is None or edit is None or edit.mode == "symmetric":
            return seen, x0, seen
        h = self.h
        plain, _ = self.both(x, t)
        self.h = h
        return seen, x0, plain


def clean(
    plan: Steps, step: int, x: Float[Tensor, "n C H W"], epsilon: Float[Tensor, "n C H W"]
) -> Float[Tensor, "n C H W"]:
    """The predicted clean image P = (x - sqrt(1 - a) e) / sqrt(a)."""
    a = plan.alpha[step].to(torch.promote_types(x.dtype, torch.float32))
    return (x - (1 - a) ** 0.5 * epsilon) / a**0.5


Keep = Callable[[str, slice, int, Tensor], None]


def _single(net: Bottleneck, plan: Steps, bare: Trajectory, rows: slice, keep: Keep, bar: Any) -> Tensor:
    x, move = bare.start[rows], mover(net.denoiser, plan)
    for step, t in enumerate(plan.timesteps.tolist()):
        keep("x", rows, step, x)
        seen, x0, plain = net.predict(x, t, bare.injection, step, rows)
        if net.h is not None:
            keep("h", rows, step, net.h)
        keep("epsilon", rows, step, seen)
        keep("x0", rows, step, x0)
        x = move(step, x, x0, plain, None if bare.noise is None else bare.noise[rows, step])
        bar.update()
    if bare.residual is not None:
        x = x + bare.residual[rows]
    keep("x", rows, len(plan), x)
    return x


def _edict(net: Bottleneck, plan: Steps, bare: Trajectory, rows: slice, keep: Keep, bar: Any) -> Tensor:
    """EDICT (Wallace et al. 2023): two sequences, each moved by the other's epsilon and then mixed, so that every step can be
    undone exactly. Readings are those of the first sequence, h and epsilon at the second (our choice)."""
    assert bare.partner is not None
    x, y = bare.start[rows], bare.partner[rows]
    p = EDICT_MIX
    for step, t in enumerate(plan.timesteps.tolist()):
        keep("x", rows, step, x)
        seen, _, plain = net.predict(y, t, bare.injection, step, rows)
        x0 = clean(plan, step, x, seen)
        if net.h is not None:
            keep("h", rows, step, net.h)
        keep("epsilon", rows, step, seen)
        keep("x0", rows, step, x0)
        x_next = advance(plan, step, x0, plain, None)
        seen, _, plain = net.predict(x_next, t, bare.injection, step, rows)
        y_next = advance(plan, step, clean(plan, step, y, seen), plain, None)
        x = p * x_next + (1 - p) * y_next
        y = p * y_next + (1 - p) * x
        bar.update()
    keep("x", rows, len(plan), x)
    return x
