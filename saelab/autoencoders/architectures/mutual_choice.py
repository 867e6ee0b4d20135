"""Mutual Choice: the budget of a batch goes to its largest pre-activations, whatever token they belong to.

(Ayonrinde 2024, "Adaptive sparse allocation with Mutual Choice and Feature Choice sparse autoencoders"; the same selection
as BatchTopK, Bussmann et al. 2024.)
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from saelab.autoencoders.allocation import PreActivations
from saelab.autoencoders.architecture import Batch, Codes, Params, State, Tensors
from saelab.autoencoders.architectures import zipf
from saelab.autoencoders.averages import average_
from saelab.autoencoders.budgeted import Budgeted
from saelab.base import checks
from saelab.base import processes as distributed
from saelab.base.codes import SparseCodes

HALF_LIFE = 0.02  # of the threshold's average, in shares of the run
LEARN_FROM = 0.2  # thresholds of earlier weights say little about the last ones
DENSITY_HALF_LIFE = 0.05
TARGETS_FROM, TARGETS_EVERY = 0.05, 0.01


@dataclass(frozen=True, repr=False, kw_only=True)
class MutualChoice(Budgeted):
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

    aux: str = "k"
    tau: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check(
            aux=checks.choice("aux", self.aux, ("k", "zipf")),
            tau=checks.number("tau", self.tau, least=0),
        )

    @property
    def tracks_density(self) -> bool:
        """Whether the state keeps an average density of each latent."""
        return self.aux == "zipf"

    def buffers(self) -> Tensors:
        buffers = {"cut_sum": torch.zeros(()), "cut_weight": torch.zeros(()), "cut_progress": torch.zeros(())}
        if self.tracks_density:
            buffers["density_sum"] = torch.zeros(self.d_sae, dtype=torch.float64)
            buffers |= {"density_weight": torch.zeros((), dtype=torch.float64), "density_progress": torch.zeros(())}
            buffers |= {"target": torch.zeros(self.d_sae, dtype=torch.float64), "target_progress": torch.zeros(())}
        return buffers

    def rescale(self, params: Params, state: State, ratio: float) -> None:
        state.cut_sum.mul_(ratio)

    def thresholds(self, state: State) -> Float[Tensor, "*d_sae"]:
        return torch.where(state.cut_weight > 0, state.cut_sum / state.cut_weight, math.nan)

    def allocate(self, scores: PreActivations, state: State, progress: float) -> SparseCodes:
        return scores.per_batch(self.k * len(scores.x_ND))

    def revived(self, state: State) -> Bool[Tensor, " d_sae"]:
        if self.aux == "k":
            return state.dead
        return zipf.aux_zipf_latents(state.dead, self.density(state), state.target, self.tau)

    def observe(self, batch: Batch, codes: Codes, params: Params, state: State) -> None:
        assert isinstance(codes, SparseCodes)
        self.learn_cut(codes, state, batch.progress)
        if self.tracks_density:
            self.learn_density(codes, state, batch.progress)

    def learn_cut(self, codes: SparseCodes, state: State, progress: float) -> None:
        """Add the least of a batch's codes to the average that is the threshold."""
        if progress < LEARN_FROM:
            return
        values = codes.values.detach()
        cut = -distributed.max_(-values.amin() if len(values) else values.new_tensor(-math.inf))
        cut = torch.where(cut < math.inf, cut, 0)  # a batch on which nothing fires
        average_(state.cut_sum, state.cut_weight, state.cut_progress, progress, HALF_LIFE, cut)

    def learn_density(self, codes: SparseCodes, state: State, progress: float, each: int = 1) -> None:
        """Count on what share of the tokens each latent fires, and renew what the law makes of it; a token counts as `each`."""
        fires = each * distributed.sum_(codes.by_latent().offsets.diff())
        last, tokens = state.density_progress, each * distributed.total(len(codes))
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

    def density(self, state: State) -> Float[Tensor, " d_sae"]:
        """Average share of the tokens [d_sae] on which each latent fires of late."""
        return state.density_sum / state.density_weight.clamp_min(1)

    def expected_density(self, state: State, order: Int64[Tensor, " d_sae"]) -> Float[Tensor, " d_sae"]:
        """What the law fitted to the densities gives each latent [d_sae]; `order` has the latents by rank."""
        a, b, _ = zipf.fit(self.density(state))
        expected = torch.empty_like(state.density_sum)
        expected[order] = self.k * zipf.law(a, b, self.d_sae).to(expected.device)
        return expected

    def to_saelens(self) -> dict[str, Any]:
        return {"architecture": "jumprelu"}


BatchTopK = MutualChoice
