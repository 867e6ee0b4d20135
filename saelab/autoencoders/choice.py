"""Mutual Choice: the budget of a batch goes to its largest pre-activations, whatever token they belong to.

(Ayonrinde 2024, "Adaptive sparse allocation with Mutual Choice and Feature Choice sparse autoencoders"; the same selection
as BatchTopK, Bussmann et al. 2024.)
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from saelab.autoencoders import objectives
from saelab.autoencoders.allocation import PreActivations
from saelab.autoencoders.architecture import Architecture, Batch, Params, State
from saelab.autoencoders.codes import SparseCodes
from saelab.errors import ConfigError

HALF_LIFE = 0.02  # of the threshold's average, in shares of the run
LEARN_FROM = 0.2  # thresholds of earlier weights say little about the last ones


@dataclass(frozen=True, repr=False, kw_only=True)
class MutualChoice(Architecture):
    """A Mutual Choice SAE: a batch of n tokens spends k n latents, on whichever tokens score highest.

    In training f keeps the k n largest of relu((x - b_dec) W_enc + b_enc) over the whole batch. At inference a latent fires
    above one threshold for all: the average of the batches' cuts from 20% of the run on, with a half-life of 2% of it,
    bias-corrected (BatchTopK uses such an average; its rates, relative to the run, are our choice). The loss is TopK's.

    Args:
        k: latents a token on average; 1 to d_sae.
        d_sae: number of latents.
        aux_coefficient, aux_k, input_scale: as for `TopK`.

    Raises `ConfigError` when k is not between 1 and d_sae.

    >>> MutualChoice(k=16, d_sae=1024)
    MutualChoice(k=16, d_sae=1024)
    """

    k: int
    aux_coefficient: float = 1 / 32
    aux_k: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.k, int) or not 1 <= self.k <= self.d_sae:
            raise ConfigError(f"k is {self.k!r} and d_sae is {self.d_sae:,}: k must be a whole number from 1 to d_sae")
        objectives.check_aux(self.aux_coefficient, self.aux_k)

    def buffers(self) -> dict[str, Tensor]:
        return {"cut_sum": torch.zeros(()), "cut_weight": torch.zeros(()), "cut_progress": torch.zeros(())}

    def rescale(self, params: Params, state: State, ratio: float) -> None:
        state.cut_sum.mul_(ratio)

    def thresholds(self, state: State) -> Tensor | None:
        return state.cut_sum / state.cut_weight if bool(state.cut_weight > 0) else None

    def allocate(self, scores: PreActivations, state: State, progress: float) -> SparseCodes:
        codes = scores.per_batch(self.k * len(scores.x_ND))
        if progress >= LEARN_FROM and len(codes.values):
            decay = 0.5 ** ((progress - float(state.cut_progress)) / HALF_LIFE)
            state.cut_sum.mul_(decay).add_(codes.values.detach().amin())
            state.cut_weight.mul_(decay).add_(1)
            state.cut_progress.fill_(progress)
        return codes

    def select(self, scores: PreActivations, state: State) -> SparseCodes:
        threshold = self.thresholds(state)
        if threshold is None:
            raise ConfigError("this SAE has learnt no threshold yet: it fires by one after 20% of its training")
        return scores.above(threshold)

    def losses(self, batch: Batch, codes: Any, x_hat: Tensor, params: Params, state: State) -> dict[str, Tensor]:
        return objectives.reconstruction(self, batch, x_hat, params, state)

    def to_saelens(self) -> dict[str, Any]:
        return {"architecture": "jumprelu"}


BatchTopK = MutualChoice
