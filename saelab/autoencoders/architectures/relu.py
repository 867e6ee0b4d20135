"""ReLU SAEs with an L1 penalty: every positive pre-activation fires, and pays by its size.

(Bricken et al. 2023, "Towards monosemanticity": unit decoder rows, resampling; Conerly et al. 2024, "Update on how we train
SAEs": free rows whose length enters the price.) Shapes: N tokens, D inputs, F latents.
"""

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from saelab.autoencoders import penalty
from saelab.autoencoders.allocation import PreActivations
from saelab.autoencoders.architecture import Architecture, Batch, Codes, Params, Recipe, State, Tensors, Terms
from saelab.base import checks
from saelab.base import processes as distributed
from saelab.base.codes import SparseCodes
from saelab.base.errors import ConfigError

RAMP = 0.05  # of the run, over which the price rises from 0 (Conerly et al. 2024)
RESAMPLE_AT = (0.2, 0.4, 0.6, 0.8)
ENCODER_SHARE = 0.2  # length of a resampled encoder row, in mean lengths of those alive
RESTART_FROM, RESTART_SHARE = 0.1, 0.02  # the rate after resampling, and the share of the run over which it climbs back


@dataclass(frozen=True, repr=False, kw_only=True)
class ReLU(Architecture):
    """A ReLU SAE: f = relu((x - b_dec) W_enc + b_enc), loss = |x - x_hat|^2 + l1 * sum_i f_i |d_i|, means over tokens.

    `l1` is for inputs with E|x| = sqrt(d_in) and scales with them; it rises over the first 5% of the run, and the rate falls
    over the last 20% (Conerly et al. 2024). The encoder starts tied to the decoder, times one number fitted to a sample (ours).

    By default decoder rows are free, and their lengths |d_i| are in the price. With `unit_decoder=True, resample=True` it is
    the older recipe: at 20, 40, 60 and 80% of the run each dead latent gets the direction of a row of the batch, drawn with a
    chance proportional to its squared loss, an encoder 0.2 times the mean length of those alive, no bias and no past in
    Adam. (The papers resample at fixed steps from a separate sample of some 400,000 rows; the batch instead, and at most one
    row a latent, is our choice. Dead is what the schedule calls dead.)

    Args:
        l1: price of a unit of activation; 0 or more.
        d_sae: number of latents.
        unit_decoder: keep decoder rows at length 1.
        resample: give dead latents new weights four times a run.
        warm_restarts: after each resampling, let the learning rate climb from a tenth of itself by a cosine over 2% of the
            run (1,000 steps in Kissane et al. 2024; the share is ours).
        betas: Adam's.
        input_scale: as for `TopK`.

    Raises `ConfigError` when l1 is negative or a beta is not in [0, 1).

    >>> ReLU(l1=5.0, d_sae=4096)
    ReLU(l1=5.0, d_sae=4096)
    >>> ReLU.attention_output(l1=1.0, d_sae=4096).betas
    (0.0, 0.9999)
    """

    l1: float
    unit_decoder: bool = False
    resample: bool = False
    warm_restarts: bool = False
    betas: tuple[float, float] = (0.9, 0.999)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check(l1=checks.number("l1", self.l1, least=0), betas=checks.betas(self.betas))
        if self.warm_restarts and not self.resample:
            raise ConfigError("warm_restarts=True needs resample=True: the rate restarts where latents are resampled")

    @classmethod
    def attention_output(cls, l1: float, d_sae: int) -> "ReLU":
        """The recipe of Kissane et al. 2024 for attention outputs, to be trained with `lr=1.2e-3`.

        Unit decoder rows, betas (0, 0.9999), resampling and warm restarts. Their lambdas, .8 to 3 on GPT-2, are for raw
        inputs: ours is theirs over E|x| / sqrt(d_in). They neither decay the rate nor tie the start, as we do.
        """
        return cls(l1=l1, d_sae=d_sae, unit_decoder=True, resample=True, warm_restarts=True, betas=(0.0, 0.9999))

    @property
    def recipe(self) -> Recipe:
        plain = replace(super().recipe, betas=self.betas, unit_decoder=self.unit_decoder)
        return replace(plain, lr_factor=restarting) if self.warm_restarts else plain

    def buffers(self) -> Tensors:
        return {**penalty.buffers(), "seen_progress": torch.zeros((), dtype=torch.float64)}

    def prepare(self, params: Params, batch: Batch, state: State) -> None:
        penalty.measure(batch, state)
        penalty.shrink_encoder(params, batch, lambda rows: self.scores(params, rows).dense().relu() @ params.W_dec)

    def rescale(self, params: Params, state: State, ratio: float) -> None:
        state.input_norm.mul_(ratio)

    def allocate(self, scores: PreActivations, state: State, progress: float) -> Float[Tensor, "n d_sae"]:
        return scores.dense().relu()

    def select(self, scores: PreActivations, state: State) -> SparseCodes:
        return scores.above(scores.b_F.new_zeros(()))

    def losses(
        self, batch: Batch, codes: Codes, x_hat: Float[Tensor, "n d_out"], params: Params, state: State
    ) -> Terms:
        assert isinstance(codes, Tensor)
        paid_N = codes.sum(1) if self.unit_decoder else codes @ torch.linalg.vector_norm(params.W_dec, dim=1)
        price = self.l1 * state.input_norm * penalty.share(batch, state, RAMP)
        return {"squared_error": penalty.squared_error(batch, x_hat), "l1": price * paid_N.mean()}

    def observe(self, batch: Batch, codes: Codes, params: Params, state: State) -> Int64[Tensor, " m"] | None:
        assert isinstance(codes, Tensor)
        state.price_share.copy_(penalty.share(batch, state, RAMP))
        passed = [i for i, at in enumerate(RESAMPLE_AT) if float(state.seen_progress) < at <= batch.progress]
        state.seen_progress.fill_(batch.progress)
        return resample(params, batch, codes, state, seed=passed[-1]) if self.resample and passed else None

    def to_saelens(self) -> dict[str, Any]:
        return {"architecture": "standard"}


def restarting(progress: float, scheduled: float) -> float:
    """The schedule's factor, times what climbs by a cosine from a tenth to 1 after each resampling.

    >>> restarting(0.1, 0.5), restarting(0.2, 0.5)
    (0.5, 0.05)
    """
    since = [progress - at for at in RESAMPLE_AT if at <= progress]
    if not since:
        return scheduled
    climbed = (1 - math.cos(math.pi * min(1.0, since[-1] / RESTART_SHARE))) / 2
    return scheduled * (RESTART_FROM + (1 - RESTART_FROM) * climbed)


def resample(
    params: Params, batch: Batch, codes_NF: Float[Tensor, "n d_sae"], state: State, seed: int
) -> Int64[Tensor, " m"] | None:
    """Point dead latents, in place, at rows of the batch that are badly reconstructed; which latents those were."""
    dead_F, target_ND, x_ND = state.dead, batch.target - params.base(batch.x), params.centred(batch.x)
    loss_N = (target_ND - codes_NF @ params.W_dec).square().sum(1)
    (loss_N, _), (target_ND, _), (x_ND, _) = map(distributed.gathered, (loss_N, target_ND, x_ND))
    chance_N = (loss_N / loss_N.amax().clamp_min(torch.finfo(loss_N.dtype).tiny)).square()
    dead = dead_F.nonzero().squeeze(1)[: int((chance_N > 0).sum())]
    if not len(dead):
        return None
    generator = torch.Generator().manual_seed(seed)
    chosen = chance_N.double().cpu().multinomial(len(dead), generator=generator).to(dead.device)
    alive_F = ~dead_F if not bool(dead_F.all()) else dead_F
    for W_FD, rows_ND, share in ((params.W_dec, target_ND, 1.0), (params.W_enc, x_ND, ENCODER_SHARE)):
        directions = torch.nn.functional.normalize(rows_ND[chosen], dim=1)
        W_FD[dead] = directions * share * torch.linalg.vector_norm(W_FD[alive_F], dim=1).mean()
    params.b_enc[dead] = 0
    return dead
