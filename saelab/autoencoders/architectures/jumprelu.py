"""JumpReLU SAEs: a latent fires above its own threshold, which is learnt (Rajamanoharan et al. 2024b).

Only what fires, or lies within the window of a threshold, has a gradient: training computes with these entries alone.
Shapes: N tokens, D inputs, F latents, E entries, C cells of the histogram.
"""

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float, Int64
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from saelab.autoencoders import penalty
from saelab.autoencoders.allocation import PreActivations
from saelab.autoencoders.architecture import Architecture, Batch, Codes, Params, Recipe, State, Tensors, Terms
from saelab.base import checks
from saelab.base import processes as distributed
from saelab.base.codes import SparseCodes
from saelab.kernels import sparse

INTEGRAL, PROPORTIONAL = 20.0, 1.0  # log-price gained a run, and at once, by a unit of log(L0 / target)
CALIBRATE_FROM, HALF_LIFE = 0.8, 0.02  # of the run
REACH, CELLS = 2.0, 2000  # of the calibration: shifts of t from -REACH to REACH
_PART = 512  # latents of which all scores are held at once


@dataclass(frozen=True)
class JumpPreActivations(PreActivations):
    """Pre-activations with the threshold [d_sae] of each latent."""

    theta_F: Float[Tensor, " d_sae"]

    def near(self, width: float) -> SparseCodes:
        """Those above the lower edge of their threshold's window, differentiable; computed once."""
        return self.once(f"near {width}", lambda: self.above(self.theta_F.detach() - width / 2, floor=-math.inf))

    def missing(self, latents: Int64[Tensor, " m"]) -> Float[Tensor, ""]:
        """What these latents miss of their thresholds, summed over them, on average over the tokens."""
        return (self.theta_F[latents] - self.of(latents)).relu().sum(1).mean()


@dataclass(frozen=True, repr=False, kw_only=True)
class JumpReLU(Architecture):
    """A JumpReLU SAE whose price is steered until a token fires `target_l0` latents on average.

    f = p 1[p > theta] of p = (x - b_dec) W_enc + b_enc, unit decoder rows, loss = |x - x_hat|^2 + price * sum 1[p > theta],
    means over tokens. Thresholds get straight-through gradients by a rectangle of width eps, K(u) = 1[|u| < 1/2]:
    df/dtheta = -(theta / eps) K((p - theta) / eps), d1/dtheta = -(1 / eps) K((p - theta) / eps). So far the paper by
    our notes of it, where the price is fixed. Ours, because in runs of a few hundred steps thresholds hardly move otherwise:

    * t = log theta is the parameter, in fp32, with ten times the learning rate;
    * it starts where each latent fires target_l0 / d_sae of the time on a sample, the price at the mean of theta^2, the
      encoder tied, times one number fitted to the sample (without it a dense start reconstructs worse to the end);
    * a controller moves the log of the price by log(L0 / target): at once, and 20 times as much a run as it adds up (no ramp);
    * at the end all t shift by the one constant that gives the target on the batches of the decay (half-life 2% of the run).

    Latents that are dead pay 3e-6 (theta - p) on each token where that is positive (Anthropic's update of January 2025).

    Args:
        target_l0: latents a token on average; above 0, at most d_sae.
        d_sae: number of latents.
        bandwidth: eps, for inputs with E|x| = sqrt(d_in); it scales with them. (The paper's .001 is for E|x|^2 = 1; eps = 2 in
            Anthropic's update.)
        start_factor: how many times the target fires at the start.
        dead_coefficient: of the dead latents' payment; 0 turns it off.
        betas: Adam's; (0, .999) as our notes of the paper have it.
        input_scale: as for `TopK`.

    Raises `ConfigError` when target_l0 is not above 0 and at most d_sae, or another number is out of range.

    >>> JumpReLU(target_l0=16, d_sae=4096)
    JumpReLU(target_l0=16, d_sae=4096)
    """

    target_l0: float
    bandwidth: float = 1.0
    start_factor: float = 1.0
    dead_coefficient: float = 3e-6
    betas: tuple[float, float] = (0.0, 0.999)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check(
            target_l0=checks.number("target_l0", self.target_l0, above=0, most=self.d_sae),
            bandwidth=checks.number("bandwidth", self.bandwidth, above=0),
            start_factor=checks.number("start_factor", self.start_factor, above=0),
            dead_coefficient=checks.number("dead_coefficient", self.dead_coefficient, least=0),
            betas=checks.betas(self.betas),
        )

    def extra_parameters(self, d_in: int, d_out: int) -> Tensors:
        return {"log_threshold": torch.zeros(self.d_sae)}

    @property
    def recipe(self) -> Recipe:
        return replace(super().recipe, betas=self.betas, rates={"log_threshold": 10.0})

    def buffers(self) -> Tensors:
        return {
            "threshold": torch.ones(self.d_sae),  # exp(t) after the last step
            "input_norm": torch.ones(()),
            "log_price": torch.zeros(()),  # in units of the normalised input, as are thresholds
            "excess": torch.zeros(()),
            "seen_progress": torch.zeros((), dtype=torch.float64),
            "histogram": torch.zeros(CELLS, dtype=torch.float64),
            "histogram_rows": torch.zeros((), dtype=torch.float64),
        }

    def prepare(self, params: Params, batch: Batch, state: State) -> None:
        penalty.measure(batch, state)
        scores = super().scores(params, batch)

        def decode(rows: Batch) -> Tensor:
            return sparse.decode(super(JumpReLU, self).scores(params, rows).above(theta_F), params.W_dec)

        firing = min(1.0, self.start_factor * self.target_l0 / self.d_sae)
        theta_F = quantiles(scores, firing).clamp_min(1e-3 * state.input_norm)
        if params.centres:  # the encoder is tied
            theta_F *= penalty.shrink_encoder(params, batch, decode)
        params.extra["log_threshold"].copy_(theta_F.log())
        state.threshold.copy_(params.extra["log_threshold"].exp())
        state.log_price.copy_((theta_F / state.input_norm).square().mean().log())

    def rescale(self, params: Params, state: State, ratio: float) -> None:
        params.extra["log_threshold"].add_(math.log(ratio))
        state.threshold.mul_(ratio)
        state.input_norm.mul_(ratio)

    def thresholds(self, state: State) -> Float[Tensor, "*d_sae"]:
        return state.threshold

    def scores(self, params: Params, batch: Batch) -> JumpPreActivations:
        p = super().scores(params, batch)
        return JumpPreActivations(p.x_ND, p.W_FD, p.b_F, params.extra["log_threshold"].exp())

    def allocate(self, scores: PreActivations, state: State, progress: float) -> SparseCodes:
        """The codes, with zeros where a latent does not fire but its threshold learns."""
        assert isinstance(scores, JumpPreActivations)
        width = self.bandwidth * float(state.input_norm)
        return jump(scores.near(width), scores.theta_F, width)

    def losses(
        self, batch: Batch, codes: Codes, x_hat: Float[Tensor, "n d_out"], params: Params, state: State
    ) -> Terms:
        scores = batch.scores
        assert isinstance(scores, JumpPreActivations)
        unit = state.input_norm
        price = (state.log_price + PROPORTIONAL * state.excess).exp() * unit.square()
        width = self.bandwidth * float(unit)
        fired = count(scores.near(width), scores.theta_F, width)
        terms = {"squared_error": penalty.squared_error(batch, x_hat), "l0_price": price * fired / len(batch.x)}
        if self.dead_coefficient:
            parts = batch.lists.of("dead", lambda: state.dead).split(_PART)
            missing = [
                checkpoint(scores.missing, part, use_reentrant=False, preserve_rng_state=False) for part in parts
            ]
            terms["dead_price"] = self.dead_coefficient * unit * torch.stack(missing).sum()
        return terms

    def observe(self, batch: Batch, codes: Codes, params: Params, state: State) -> None:
        assert isinstance(codes, SparseCodes)
        progress = batch.progress
        share = progress - float(state.seen_progress)  # of the run that a step takes
        state.seen_progress.fill_(progress)
        if share < 0:  # a new run of an SAE that was trained before
            state.histogram_rows.zero_()
            share = 0.0
        fired = distributed.sum_((codes.values > 0).sum().float()) / (len(codes) * distributed.world_size())
        state.excess.copy_((fired.clamp_min(1e-6) / self.target_l0).log().clamp(-2, 2))
        state.log_price.add_(INTEGRAL * share * state.excess)
        t_F = params.extra["log_threshold"]
        state.threshold.copy_(t_F.exp())
        if progress >= CALIBRATE_FROM or progress + 1.5 * share > 1:
            self._tally(self.scores(params, batch), state, 0.5 ** (share / HALF_LIFE))
        if progress + 1.5 * share > 1:  # the last step
            state.threshold.copy_(t_F.add_(self._shift(state)).exp())

    def _tally(self, scores: PreActivations, state: State, decay: float) -> None:
        """Add a batch to the histogram of log p - t, by which L0 is known as a function of a shift of all t."""
        counts_C = torch.zeros_like(state.histogram)
        for p_NF in scores.parts():
            ratio_NF = p_NF / state.threshold
            if ratio_NF.device.type == "cpu":  # elsewhere the histogram leaves them out: to look for them is to wait
                ratio_NF = ratio_NF[ratio_NF > math.exp(-REACH)]
            logs = ratio_NF.log().nan_to_num(-math.inf).clamp_max(REACH)
            counts_C += torch.histc(logs.float(), CELLS, -REACH, REACH)
        state.histogram.mul_(decay if float(state.histogram_rows) else 0.0).add_(distributed.sum_(counts_C))
        state.histogram_rows.mul_(decay).add_(distributed.total(len(scores.x_ND)))

    def _shift(self, state: State) -> float:
        """The shift of all t after which `target_l0` fire."""
        above_C = state.histogram.flip(0).cumsum(0).flip(0) / state.histogram_rows  # at the lower edge of each cell
        cell = max(0, int((above_C >= self.target_l0).sum()) - 1)
        here = float(above_C[cell])
        below = float(above_C[cell + 1]) if cell + 1 < CELLS else 0.0
        inside = (here - self.target_l0) / (here - below) if here > below else 0.0
        return -REACH + 2 * REACH / CELLS * (cell + min(max(inside, 0.0), 1.0))

    def to_saelens(self) -> dict[str, Any]:
        return {"architecture": "jumprelu"}


def quantiles(scores: PreActivations, firing: float) -> Float[Tensor, " d_sae"]:
    """The threshold [d_sae] that each pre-activation exceeds on the share `firing` of the rows."""
    n = len(scores.x_ND)
    rank = min(n, max(1, round(firing * n)))
    found = [
        torch.nn.functional.linear(W_PD, scores.x_ND).add_(b_P[:, None]).kthvalue(n - rank + 1, dim=1).values
        for W_PD, b_P in zip(scores.W_FD.split(_PART), scores.b_F.split(_PART), strict=True)
    ]
    return torch.cat(found)


def jump(near: SparseCodes, theta_F: Float[Tensor, " d_sae"], width: float) -> SparseCodes:
    """p where p > theta, else 0; the gradient of theta is the straight-through one of a rectangle of that width.

    >>> import torch
    >>> near = SparseCodes(torch.tensor([1.9, 3.0]), torch.tensor([0, 1]), torch.tensor([0, 2]), 2)
    >>> jump(near, torch.tensor([2.0, 2.0]), 0.5).values
    tensor([0., 3.])
    """
    return near.with_values(_Jump.apply(near.values, theta_F, near.indices, width))


def count(near: SparseCodes, theta_F: Float[Tensor, " d_sae"], width: float) -> Float[Tensor, ""]:
    """How many p > theta there are, with the straight-through gradient of theta and none of p.

    >>> import torch
    >>> near = SparseCodes(torch.tensor([1.9, 3.0]), torch.tensor([0, 1]), torch.tensor([0, 2]), 2)
    >>> count(near, torch.tensor([2.0, 2.0]), 0.5)
    tensor(1.)
    """
    return _Count.apply(near.values, theta_F, near.indices, width)


def _window_sum(values_E: Tensor, p_E: Tensor, theta_F: Tensor, indices_E: Tensor, width: float) -> Tensor:
    """The sum [F] of the values of the entries within the window of their latent's threshold."""
    inside_E = (p_E - theta_F[indices_E]).abs() < width / 2
    return torch.zeros_like(theta_F).index_add_(0, indices_E, (values_E * inside_E).to(theta_F.dtype))


class _Jump(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, p_E: Tensor, theta_F: Tensor, indices_E: Tensor, width: float) -> Tensor:
        ctx.save_for_backward(p_E, theta_F, indices_E)
        ctx.width = width
        return p_E * (p_E > theta_F[indices_E])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_E: Tensor) -> tuple[Tensor | None, ...]:
        p_E, theta_F, indices_E = ctx.saved_tensors
        grad_theta = -(theta_F / ctx.width) * _window_sum(grad_E, p_E, theta_F, indices_E, ctx.width)
        return grad_E * (p_E > theta_F[indices_E]), grad_theta, None, None


class _Count(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, p_E: Tensor, theta_F: Tensor, indices_E: Tensor, width: float) -> Tensor:
        ctx.save_for_backward(p_E, theta_F, indices_E)
        ctx.width = width
        return (p_E > theta_F[indices_E]).sum().to(p_E.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        p_E, theta_F, indices_E = ctx.saved_tensors
        ones_E = torch.ones_like(p_E)
        return None, -grad / ctx.width * _window_sum(ones_E, p_E, theta_F, indices_E, ctx.width), None, None
