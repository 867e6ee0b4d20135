"""The steps of a run: timesteps, noise levels and the coefficients of the update, in float64, and the update itself.

With a = `alphas_cumprod`, primes for the level after the step: P = (x - sqrt(1 - a) e) / sqrt(a),
x' = sqrt(a') P + sqrt(1 - a' - sigma^2) e + sigma z, sigma = eta sqrt((1 - a')/(1 - a)) sqrt(1 - a/a') (Song et al. 2021,
eq. 12 and 16; Haas et al. 2024). S steps.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor

from saelab.base.errors import ConfigError
from saelab.base.seeds import named_generator
from saelab.models.denoiser import Denoiser
from saelab.models.solvers import Move, Solver, solves

Mode = Literal["symmetric", "asymmetric"]
MODES = ("symmetric", "asymmetric")


@dataclass(frozen=True)
class Steps:
    """Timesteps [S], highest noise first; `alpha` and `alpha_next` [S] before and after each; `sigma` of the noise added.

    >>> import saelab
    >>> steps = steps_of(saelab.load_denoiser("digits-unet"), 4)
    >>> steps.timesteps, steps.alpha_next[-1], bool((steps.alpha_next[:-1] == steps.alpha[1:]).all())
    (tensor([750, 500, 250,   0]), tensor(1., dtype=torch.float64), True)
    """

    timesteps: Int[Tensor, " S"]
    eta: Float[Tensor, " S"]
    alpha: Float[Tensor, " S"]
    alpha_next: Float[Tensor, " S"]

    def __len__(self) -> int:
        return len(self.timesteps)

    @property
    def sigma(self) -> Float[Tensor, " S"]:
        """Standard deviation of the noise that each step adds."""
        return self.eta * ((1 - self.alpha_next) / (1 - self.alpha)).sqrt() * (1 - self.alpha / self.alpha_next).sqrt()

    @property
    def direction(self) -> Float[Tensor, " S"]:
        """sqrt(1 - a' - sigma^2): the weight of epsilon in what points back to x_t."""
        return (1 - self.alpha_next - self.sigma**2).clamp(min=0).sqrt()

    def gain(self, mode: Mode = "symmetric") -> Float[Tensor, " S"]:
        """What a change of epsilon by one does to x after each step, to first order.

        Symmetric sqrt(1 - a' - sigma^2) - sqrt(a'/a) sqrt(1 - a); asymmetric (Asyrp, Kwon et al. 2023, Theorem 1, where the
        first term is not changed) without the first term. In y = x / sqrt(a) the symmetric gain at eta 0 is the fall of the
        noise sqrt((1 - a)/a), so that over a run it adds up to minus the first noise level however many steps there are; the
        asymmetric one grows with their number.
        """
        fall = (self.alpha_next / self.alpha).sqrt() * (1 - self.alpha).sqrt()
        return -fall if mode == "asymmetric" else self.direction - fall


def steps_of(denoiser: Denoiser, steps: int, eta: float = 0.0, boost_below: int | None = None) -> Steps:
    """The steps of a run; eta is 1 at timesteps below `boost_below` (quality boosting, Asyrp's).

    The level after a step is what the scheduler's own `step` takes: for DDIM that of t - T // steps, whatever the spacing,
    for others that of the next timestep. Raises `ConfigError` for eta outside [0, 1], noise in the steps of a solver (see
    `saelab.models.solvers`) or an impossible number of steps.
    """
    if not 0 <= eta <= 1:
        raise ConfigError(f"eta is {eta}: give 0 (DDIM, no noise) to 1 (as much as DDPM)")
    if solves(denoiser.scheduler) and (eta or boost_below is not None):
        raise ConfigError(
            f"{type(denoiser.scheduler).__name__} adds no noise: give eta=0 and no boost_below, or load the denoiser with "
            "scheduler=DDIMScheduler.from_config(scheduler.config)"
        )
    timesteps = denoiser.timesteps(steps)
    a = denoiser.alphas_cumprod
    if type(denoiser.scheduler).__name__ == "DDIMScheduler":
        following = timesteps - len(a) // steps
    else:
        following = torch.cat([timesteps[1:], torch.tensor([-1])])
    alpha_next = torch.where(following >= 0, a[following.clamp(min=0)], denoiser.final_alpha)
    etas = torch.full((steps,), float(eta), dtype=torch.float64)
    if boost_below is not None:
        etas[timesteps < boost_below] = 1.0
    return Steps(timesteps, etas, a[timesteps], alpha_next)


def advance(
    plan: Steps,
    step: int,
    x0: Float[Tensor, "n C H W"],
    epsilon: Float[Tensor, "n C H W"],
    noise: Float[Tensor, "n C H W"] | None,
) -> Float[Tensor, "n C H W"]:
    """x' from the predicted clean image, the epsilon that points back to x_t, and noise.

    Coefficients are worked out in the precision of `x0`, as the schedulers do: to the bit `DDIMScheduler.step`.
    """
    exact = torch.promote_types(x0.dtype, torch.float32)
    a, following = plan.alpha[step].to(exact), plan.alpha_next[step].to(exact)
    sigma = float(plan.eta[step]) * ((1 - following) / (1 - a) * (1 - a / following)) ** 0.5
    x = following**0.5 * x0 + (1 - following - sigma**2).clamp(min=0) ** 0.5 * epsilon
    return x + sigma * noise if noise is not None and sigma > 0 else x


def mover(denoiser: Denoiser, plan: Steps) -> Move:
    """x after a step, of (step, x, x0, epsilon, noise), for the steps of one batch's run in their order: `advance`, or the
    scheduler's own step where it is a solver."""
    if solves(denoiser.scheduler):
        return Solver(denoiser, len(plan))
    return lambda step, x, x0, epsilon, noise: advance(plan, step, x0, epsilon, noise)


def draws(denoiser: Denoiser, n: int, seed: int, use: str, count: int) -> Float[Tensor, "n count C H W"]:
    """Normal numbers, each sample's from a generator of its own; of another use or seed they are independent."""
    rows = []
    for i in range(n):
        generator = named_generator(f"hspace {use} {seed} {i}")
        # on the processor and in fp32 whatever the denoiser: the same sample on every device
        rows.append(torch.randn(count, *denoiser.sample_shape, generator=generator))
    return torch.stack(rows).to(denoiser.device, denoiser.dtype)


@torch.no_grad()
def ddim(
    denoiser: Denoiser, start: Float[Tensor, "n C H W"], steps: int, cond: Shaped[Tensor, "..."] | None = None
) -> Float[Tensor, "n C H W"]:
    """The samples to which x_T leads without noise (DDIM, or the scheduler's own solver): of a run of `hspace.sample` at eta 0
    only the end.

    >>> import saelab
    >>> denoiser = saelab.load_denoiser("digits-unet")
    >>> ddim(denoiser, draws(denoiser, 2, 0, "start", 1)[:, 0], steps=4).shape
    torch.Size([2, 1, 8, 8])
    """
    plan, x = steps_of(denoiser, steps), start
    move = mover(denoiser, plan)
    for step, t in enumerate(plan.timesteps.tolist()):
        epsilon, x0 = denoiser.both(x, t, cond)
        x = move(step, x, x0, epsilon, None)
    return x
