"""Mutual Choice: the budget of a batch goes to its largest pre-activations, whatever token they belong to.

(Ayonrinde 2024, "Adaptive sparse allocation with Mutual Choice and Feature Choice sparse autoencoders"; the same selection
as BatchTopK, Bussmann et al. 2024.)
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from saelab.autoencoders import objectives
from saelab.autoencoders.allocation import PreActivations
from saelab.autoencoders.architecture import Architecture, Batch, Params, State
from saelab.autoencoders.architectures import zipf
from saelab.autoencoders.averages import average_
from saelab.base import checks
from saelab.base import processes as distributed
from saelab.base.codes import SparseCodes
from saelab.base.errors import ConfigError

HALF_LIFE = 0.02  # of the threshold's average, in shares of the run
LEARN_FROM = 0.2  # thresholds of earlier weights say little about the last ones
DENSITY_HALF_LIFE = 0.05
TARGETS_FROM, TARGETS_EVERY = 0.05, 0.01


@dataclass(frozen=True, repr=False, kw_only=True)
class MutualChoice(Architecture):
    """A Mutual Choice SAE: a batch of n tokens spends k n latents, on whichever tokens score highest.

    In training f keeps the k n largest of relu((x - b_dec) W_enc + b_enc) over the whole batch. At inference a latent fires
    above one threshold for all: the average of the batches' cuts from 20% of the run on, with a half-life of 2% of it,
    bias-corrected (BatchTopK uses such an average; its rates, relative to the run, are our choice). The loss is TopK's.

    With `aux="zipf"` the auxiliary loss revives under-used latents too: those of the lower half of the ranks that fire on
    less than tau times what a Zipf-Mandelbrot law fitted to all densities gives their rank (`zipf.aux_zipf_latents`). The
    densities are averages with a half-life of 5% of the run, the law is fitted every 1% from 5% on. The paper names the
    loss and its purpose; formula, tau and schedule are ours and not the paper's.

    Args:
        k: latents a token on average; 1 to d_sae.
        d_sae: number of latents.
        aux_coefficient, aux_k, input_scale: as for `TopK`.
        aux: "k" revives dead latents, "zipf" under-used ones as well.
        tau: of aux "zipf"; at 0 it is aux-k exactly.

    Raises `ConfigError` when k is not between 1 and d_sae, `aux` is unknown or tau negative.

    >>> MutualChoice(k=16, d_sae=1024)
    MutualChoice(k=16, d_sae=1024)
    """

    k: int
    aux_coefficient: float = 1 / 32
    aux_k: int | None = None
    aux: str = "k"
    tau: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check(
            k=checks.count("k", self.k, most=self.d_sae, of="d_sae"),
            aux=checks.choice("aux", self.aux, ("k", "zipf")),
            tau=checks.number("tau", self.tau, least=0),
            **objectives.checked_aux(self),
        )

    @property
    def tracks_density(self) -> bool:
        """Whether the state keeps an average density of each latent."""
        return self.aux == "zipf"

    def buffers(self) -> dict[str, Tensor]:
        buffers = {"cut_sum": torch.zeros(()), "cut_weight": torch.zeros(()), "cut_progress": torch.zeros(())}
        if self.tracks_density:
            buffers["density_sum"] = torch.zeros(self.d_sae, dtype=torch.float64)
            buffers |= {"density_weight": torch.zeros((), dtype=torch.float64), "density_progress": torch.zeros(())}
            buffers |= {"target": torch.zeros(self.d_sae, dtype=torch.float64), "target_progress": torch.zeros(())}
        return buffers

    def rescale(self, params: Params, state: State, ratio: float) -> None:
        state.cut_sum.mul_(ratio)

    def thresholds(self, state: State) -> Tensor | None:
        return state.cut_sum / state.cut_weight if bool(state.cut_weight > 0) else None

    def usable(self, state: State) -> bool:
        return self.thresholds(state) is not None

    def allocate(self, scores: PreActivations, state: State, progress: float) -> SparseCodes:
        return scores.per_batch(self.k * len(scores.x_ND))

    def observe(self, codes: Any, scores: PreActivations, state: State, progress: float) -> None:
        if progress < LEARN_FROM:
            return
        values = codes.values.detach()
        cut = -distributed.max_(-values.amin() if len(values) else values.new_tensor(-math.inf))
        cut = torch.where(cut < math.inf, cut, 0)  # a batch on which nothing fires
        average_(state.cut_sum, state.cut_weight, state.cut_progress, progress, HALF_LIFE, cut)

    def select(self, scores: PreActivations, state: State) -> SparseCodes:
        threshold = self.thresholds(state)
        if threshold is None:
            raise ConfigError("this SAE has learnt no threshold yet: it fires by one after 20% of its training")
        return scores.above(threshold)

    def losses(self, batch: Batch, codes: Any, x_hat: Tensor, params: Params, state: State) -> dict[str, Tensor]:
        revived = None
        if self.aux == "zipf":
            revived = zipf.aux_zipf_latents(state.dead, self.density(state), state.target, self.tau)
        return objectives.reconstruction(self, batch, x_hat, params, state, revived)

    def after_step(self, params: Params, batch: Batch, codes: Any, state: State, progress: float) -> None:
        if not self.tracks_density:
            return
        fires = distributed.sum_(codes.by_latent().offsets.diff())
        last, tokens = state.density_progress, distributed.total(len(codes))
        average_(state.density_sum, state.density_weight, last, progress, DENSITY_HALF_LIFE, fires, tokens)
        if self.aux == "zipf":
            since = progress - float(state.target_progress)
            if progress < TARGETS_FROM:
                state.target.zero_()
                state.target_progress.zero_()
            elif since < 0 or since >= TARGETS_EVERY:
                order = self.density(state).argsort(descending=True, stable=True)
                state.target.copy_(self.expected_density(state, order))
                state.target[order[: self.d_sae - self.d_sae // 2]] = 0
                state.target_progress.fill_(progress)

    def density(self, state: State) -> Tensor:
        """Average share of the tokens [d_sae] on which each latent fires of late."""
        return state.density_sum / state.density_weight.clamp_min(1)

    def expected_density(self, state: State, order: Tensor) -> Tensor:
        """What the law fitted to the densities gives each latent [d_sae]; `order` has the latents by rank."""
        a, b = zipf.fit(self.density(state))
        expected = torch.empty_like(state.density_sum)
        expected[order] = self.k * zipf.law(a, b, self.d_sae).to(expected.device)
        return expected

    def to_saelens(self) -> dict[str, Any]:
        return {"architecture": "jumprelu"}


BatchTopK = MutualChoice
