"""Samplers that remember earlier steps, by the scheduler's own `step`: PNDM, DPM-Solver and its kin, Euler.

PNDM (Liu et al., ICLR 2022), DPM-Solver++ (Lu et al. 2022), UniPC (Zhao et al. 2023), DEIS (Zhang and Chen 2023), Euler in
sigma (Karras et al. 2022, algorithm 1 without churn). x is what the network reads, sqrt(a) x_0 + sqrt(1 - a) e, also where the
scheduler itself keeps x_0 + sigma e. n samples, S steps.
"""

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from saelab.base.errors import ConfigError

SOLVERS = (
    "PNDMScheduler", "DPMSolverMultistepScheduler", "UniPCMultistepScheduler", "DEISMultistepScheduler",
    "EulerDiscreteScheduler",
)  # fmt: skip
OWN = ("DDIMScheduler", "DDPMScheduler")  # whose update is `denoising.advance`
# Noise levels that are no timestep's, so that x_t at timestep t is not what the network was trained on there.
RESPACED = ("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas", "use_lu_lambdas", "use_flow_sigmas")

Move = Callable[[int, Tensor, Tensor, Tensor, Tensor | None], Tensor]


def solves(scheduler: Any) -> bool:
    """Whether runs use the scheduler's own step."""
    return type(scheduler).__name__ in SOLVERS


def at_start(scheduler: Any, steps: int) -> Any:
    """A copy of the scheduler at the start of a run of so many passes of the network.

    Raises `ConfigError` for one whose step is not known, draws noise of its own, or leaves the trained noise levels.
    """
    kind, config = type(scheduler).__name__, scheduler.config
    way_out = "pass scheduler=DDIMScheduler.from_config(scheduler.config)"
    if kind not in (*SOLVERS, *OWN):
        raise ConfigError(
            f"the step of a {kind} is not known here (known are {', '.join((*OWN, *SOLVERS))}): {way_out}"
        )
    respaced = [name for name in RESPACED if config.get(name)]
    respaced += ["interpolation_type"] if config.get("interpolation_type", "linear") != "linear" else []
    respaced += ["timestep_type"] if config.get("timestep_type", "discrete") != "discrete" else []
    if respaced:
        raise ConfigError(
            f"{kind} with {', '.join(respaced)} has noise levels between those of the timesteps: {way_out}"
        )
    if str(config.get("algorithm_type")).startswith("sde"):
        raise ConfigError(
            f"{kind} with {config.algorithm_type} draws noise that it does not show, so that no run could be made again: "
            f"{way_out}, which has eta=1 for it"
        )
    fresh = type(scheduler).from_config(config)
    fresh.set_timesteps(max(1, steps - _more_passes(scheduler)))
    return fresh


def _more_passes(scheduler: Any) -> int:
    """The passes of a run over diffusers' `num_inference_steps`: PNDM starts by Heun's method, or three Runge-Kutta steps."""
    if type(scheduler).__name__ != "PNDMScheduler":
        return 0
    return 1 if scheduler.config.skip_prk_steps else 9


class Solver:
    """One batch's run by the scheduler's own steps.

    >>> import diffusers, saelab
    >>> from saelab.models.denoising import draws
    >>> scheduler = diffusers.PNDMScheduler(skip_prk_steps=True)
    >>> denoiser = saelab.load_denoiser(saelab.load_denoiser("digits-unet").unet, scheduler)
    >>> solver, x = Solver(denoiser, 4), draws(denoiser, 2, 0, "start", 1)[:, 0]
    >>> with torch.no_grad():
    ...     solver(0, x, *reversed(denoiser.both(x, int(denoiser.timesteps(4)[0])))).shape
    torch.Size([2, 1, 8, 8])
    """

    def __init__(self, denoiser: Any, steps: int) -> None:
        self.denoiser, self.scheduler = denoiser, at_start(denoiser.scheduler, steps)
        self.state: Tensor | None = None  # x as the scheduler keeps it

    def __call__(
        self,
        step: int,
        x: Float[Tensor, "n C H W"],
        x0: Float[Tensor, "n C H W"],
        epsilon: Float[Tensor, "n C H W"],
        noise: Float[Tensor, "n C H W"] | None = None,
    ) -> Float[Tensor, "n C H W"]:
        """x after a step; the steps of a run come in order."""
        t = self.scheduler.timesteps[step]
        if self.state is None:
            self.state = x / self.scheduler.scale_model_input(torch.ones_like(x), t)
        self.state = self.scheduler.step(self._output(int(t), x0, epsilon), t, self.state).prev_sample
        return self.scheduler.scale_model_input(self.state, t)

    def _output(self, t: int, x0: Tensor, epsilon: Tensor) -> Tensor:
        """What the network said, in the scheduler's own terms."""
        if self.denoiser.prediction == "epsilon":
            return epsilon
        if self.denoiser.prediction == "sample":
            return x0
        a = float(self.denoiser.alphas_cumprod[t])
        return a**0.5 * epsilon - (1 - a) ** 0.5 * x0


def timesteps(scheduler: Any, steps: int) -> Int[Tensor, "steps"]:
    """The scheduler's timesteps for a run of so many passes, [steps] int64, falling (PNDM repeats some)."""
    total = len(scheduler.alphas_cumprod)
    if not 1 <= steps <= total:
        raise ConfigError(f"{steps} steps: give 1 to {total}, the timesteps that the denoiser was trained on")
    found = at_start(scheduler, steps).timesteps.detach().cpu()
    repeats = type(scheduler).__name__ == "PNDMScheduler"
    rising = found.diff() > 0 if repeats else found.diff() >= 0
    if len(found) != steps or bool((found != found.round()).any()) or bool(rising.any()):
        spacing = scheduler.config.get("timestep_spacing")
        raise ConfigError(
            f"the {steps} steps of {type(scheduler).__name__} (spacing {spacing!r}) are {len(found)} timesteps that are not "
            "whole numbers that fall: give another timestep_spacing ('leading') or number of steps, or pass "
            "scheduler=DDIMScheduler.from_config(scheduler.config)"
        )
    return found.long()
