"""Feature Choice: each latent has a budget of tokens, and fires on those of a batch where it scores highest.

(Ayonrinde 2024, "Adaptive sparse allocation with Mutual Choice and Feature Choice sparse autoencoders". What the paper does
not say is ours; see the docstring.)
"""

import warnings
from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Float, Int64, UInt8
from torch import Tensor

from saelab.autoencoders.allocation import PreActivations
from saelab.autoencoders.architecture import Batch, Codes, Params, State, Tensors
from saelab.autoencoders.architectures import zipf
from saelab.autoencoders.architectures.mutual_choice import MutualChoice
from saelab.autoencoders.averages import average_
from saelab.base import checks
from saelab.base import processes as distributed
from saelab.base.codes import SparseCodes
from saelab.base.errors import ConfigError
from saelab.kernels import columns

CALIBRATE_FROM, CALIBRATION_HALF_LIFE = 0.9, 0.03
REVISE_EVERY, FLOOR = 0.05, 0.02  # of the run; of the mean budget
_EVERY = 4  # a token of so many tells what Mutual Choice would do
_LEARNT = ("density", "zipf")
_PER_OCTAVE, _LOWEST, _OCTAVES = 8, -10, 24  # of the histograms of log2 scores


class _Plan(NamedTuple):
    """What a batch's budgets come from: each latent's rate, the law's a and b, whole budgets, the next rounding's state."""

    rates: Float[Tensor, " d_sae"]
    law: Float[Tensor, "2"]
    budgets: Int64[Tensor, " d_sae"]
    rounding_state: UInt8[Tensor, " bytes"]


@dataclass(frozen=True, repr=False, kw_only=True)
class FeatureChoice(MutualChoice):
    """A Feature Choice SAE: latent i spends a budget of m_i tokens a batch, and the budgets of n tokens add up to k n.

    Training begins as Mutual Choice and tracks how often each latent fires. At `mutual_share` of the run these densities become
    budgets: latent i fires on the m_i tokens of the batch with its largest positive scores (all of them, if it has fewer:
    `unspent_share` says how much of the budget was left). Budgets are real numbers; systematic rounding makes whole numbers of
    them that add up to k n exactly, with the right mean for latents of less than one token a batch too.

    With `budgets="density"` each latent has its own density, smoothed over a tenth of its rank. Every 5% of the run, until
    90% of it, the budgets are revised by what they do not set themselves: how often each latent is among the k n largest
    scores of every fourth token, as in Mutual Choice. In the first half of that span no latent has less than 2% of the mean
    budget, so that a silent one is tried; in the second half those that still fire less get what they fire. `shrinkage` draws
    the budgets towards a law density ~ (rank + b)^-a (Zipf-Mandelbrot), fitted to all densities by likelihood, and
    `budgets="zipf"` are the law itself. Where the law does not hold (more than 5% of the firings are off it) a warning says
    so, and the densities serve.

    At inference latent i fires above its own threshold, the score that it exceeds on its budget's share of the tokens. The
    thresholds come from histograms of each latent's largest scores over the last 10% of the run (half-life 3%). They are as
    good as that span is long: it should have 20 tokens or more for each firing of the rarest latent. Earlier in the run the
    one threshold of Mutual Choice serves.

    That the budgets follow a Zipf law is the paper's; the two phases and their lengths, budgets by density and their revision,
    the fit, the cap, the rounding and the thresholds are ours and not the paper's.

    Args:
        k: latents a token on average; 1 to cap * d_sae.
        d_sae: number of latents.
        budgets: "density"; "zipf"; "uniform"; or `d_sae` positive numbers in proportion to which the budget is shared out, the
            first to the latent that fires most at the end of the Mutual Choice phase (without that phase, to the first one).
        rounding: "systematic", or "remainder" for the largest remainders, which leave rare latents without a budget.
        shrinkage: of the densities towards the law, from 0 (the densities) to 1 (the law).
        mutual_share: share of the run that is Mutual Choice; 0 to 0.8, 0 only for budgets that are not learnt in it.
        cap: largest share of the tokens that a latent's budget may be.
        seed: of the rounding.
        aux_coefficient, aux_k, input_scale, aux, tau: as for `MutualChoice`.

    Raises `ConfigError` when a number is out of its range, or d_sae latents under the cap cannot spend k a token.

    >>> FeatureChoice(k=16, d_sae=1024)
    FeatureChoice(k=16, d_sae=1024)
    """

    budgets: str | tuple[float, ...] = "density"
    shrinkage: float = 0.0
    rounding: str = "systematic"
    mutual_share: float = 0.7
    cap: float = 0.5
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check(
            cap=checks.number("cap", self.cap, above=0, most=1),
            mutual_share=checks.number("mutual_share", self.mutual_share, least=0, most=0.8),
            rounding=checks.choice("rounding", self.rounding, ("systematic", "remainder")),
            seed=checks.seed(self.seed),
            shrinkage=checks.number("shrinkage", self.shrinkage, least=0, most=1),
        )
        if self.k > self.cap * self.d_sae:
            raise ConfigError(
                f"k is {self.k:,} and {self.d_sae:,} latents that fire on at most {self.cap:g} of the tokens can spend "
                f"{self.cap * self.d_sae:,g}: lower k, or raise d_sae or cap"
            )
        if isinstance(self.budgets, str):
            if self.budgets not in (*_LEARNT, "uniform"):
                raise ConfigError(
                    f"budgets are {self.budgets!r}; use 'density', 'zipf', 'uniform' or {self.d_sae:,} numbers"
                )
            if self.budgets in _LEARNT and not self.mutual_share:
                raise ConfigError(
                    f"budgets={self.budgets!r} are learnt in the Mutual Choice phase: mutual_share must be above 0"
                )
            return
        self.check(budgets=tuple(float(share) for share in self.budgets))  # JSON makes it a list
        least = min(self.budgets, default=0.0)
        if len(self.budgets) != self.d_sae or not least > 0 or max(self.budgets) == float("inf"):
            raise ConfigError(
                f"{len(self.budgets):,} budgets were given, the least of them {least}: give d_sae = {self.d_sae:,}, "
                "each finite and above 0"
            )

    @property
    def tracks_density(self) -> bool:
        return True

    def buffers(self) -> Tensors:
        f, count = self.d_sae, torch.zeros((), dtype=torch.int64)
        return super().buffers() | {
            "rates": torch.zeros(
                f, dtype=torch.float64
            ),  # budgets as shares of the tokens; 0 in the Mutual Choice phase
            "zipf": torch.zeros(2, dtype=torch.float64),  # a and b of the law
            "offered": count,  # budget so far, and how much of it found no positive score
            "unspent": count.clone(),
            "rounding_state": torch.Generator().manual_seed(self.seed).get_state(),
            "histogram": torch.zeros(f, _PER_OCTAVE * _OCTAVES),
            "histogram_weight": torch.zeros((), dtype=torch.float64),
            "histogram_progress": torch.zeros(()),
            "latent_cut": torch.zeros(f),
        }

    def rescale(self, params: Params, state: State, ratio: float) -> None:
        super().rescale(params, state, ratio)
        state.latent_cut.mul_(ratio)

    def thresholds(self, state: State) -> Float[Tensor, "*d_sae"]:
        return state.latent_cut if bool(state.histogram_weight > 0) else super().thresholds(state)

    def unspent_share(self, state: State) -> float:
        """Share of the Feature Choice phase's budget that found no positive score to be spent on."""
        return int(state.unspent) / max(int(state.offered), 1)

    def allocate(self, scores: PreActivations, state: State, progress: float) -> SparseCodes:
        if progress < self.mutual_share:
            return super().allocate(scores, state, progress)
        budgets = self._plan(scores, state, progress).budgets
        if progress < CALIBRATE_FROM:
            return scores.per_latent(budgets)
        return columns.keep_largest(self._wide(scores, state, progress), budgets)

    def observe(self, batch: Batch, codes: Codes, params: Params, state: State) -> None:
        progress, scores = batch.progress, batch.scores
        assert isinstance(codes, SparseCodes)
        if progress == 0 or progress < self.mutual_share:  # a run that goes on with a trained SAE fits its own budgets
            state.rates.zero_()
            state.offered.zero_()
            state.unspent.zero_()
        if progress < self.mutual_share:
            self.learn_cut(codes, state, progress)
            self.learn_density(codes, state, progress)
            return
        plan = self._plan(scores, state, progress)
        state.rates.copy_(plan.rates)
        state.zipf.copy_(plan.law)
        state.rounding_state.copy_(plan.rounding_state)
        if progress >= CALIBRATE_FROM:
            self._calibrate(self._wide(scores, state, progress), state, progress)
        offered = distributed.total(self.k * len(scores.x_ND))
        state.offered += offered
        state.unspent += offered - distributed.total(len(codes.values))
        if self.budgets in _LEARNT:
            self._revise(batch.x[::_EVERY], params, state, progress)
        else:
            self.learn_density(codes, state, progress)

    def _revise(self, x_ND: Float[Tensor, "n d_in"], params: Params, state: State, progress: float) -> None:
        """Learn what Mutual Choice would do with these tokens, and now and then share the budget out anew by it."""
        codes = super().allocate(self.scores(params, Batch(x_ND, x_ND)), state, progress)
        before, now = (int((at - self.mutual_share) / REVISE_EVERY) for at in (float(state.density_progress), progress))
        self.learn_cut(codes, state, progress)
        self.learn_density(codes, state, progress, each=_EVERY)
        if now > before and progress < CALIBRATE_FROM:
            rates, law = self._share_out(state, progress)
            state.rates.copy_(rates)
            state.zipf.copy_(law)

    def whole_budgets(
        self, rates: Float[Tensor, " d_sae"], rounding_state: UInt8[Tensor, " bytes"], n: int
    ) -> tuple[Int64[Tensor, " d_sae"], UInt8[Tensor, " bytes"]]:
        """How many tokens of n each latent [d_sae] may fire on; the sum is k n. Systematic rounding draws a number: the second
        is the state of its generator afterwards."""
        if self.rounding == "remainder":
            return zipf.largest_remainder(rates, n, self.k * n), rounding_state
        generator = torch.Generator()
        generator.set_state(rounding_state.cpu())
        u = float(torch.rand((), generator=generator, dtype=torch.float64))
        return zipf.systematic(rates, n, self.k * n, u), generator.get_state()

    def _plan(self, scores: PreActivations, state: State, progress: float) -> "_Plan":
        """The rates, fitted where the Mutual Choice phase has just ended, and what they give this batch."""

        def make() -> _Plan:
            known = progress > 0 and bool(state.rates.any())
            rates, law = (state.rates, state.zipf) if known else self._share_out(state, progress)
            n = distributed.total(len(scores.x_ND))
            return _Plan(rates, law, *self.whole_budgets(rates, state.rounding_state, n))

        return scores.once("plan", make)

    def _wide(self, scores: PreActivations, state: State, progress: float) -> SparseCodes:
        """A batch's scores above each latent's threshold: it seldom has more than this many (Poisson: 1 in 1,000)."""
        plan, n = self._plan(scores, state, progress), distributed.total(len(scores.x_ND))
        wanted = torch.maximum((2 * n * plan.rates).ceil().long() + 4, plan.budgets).clamp_max(n)
        return scores.once("wide", lambda: scores.per_latent(wanted))

    def expected_density(self, state: State, order: Int64[Tensor, " d_sae"]) -> Float[Tensor, " d_sae"]:
        return state.rates if bool(state.rates.any()) else super().expected_density(state, order)

    def by_rank(self, state: State) -> Tensors:
        if not bool(state.rates.any()):
            return {}
        density, budget = (each.sort(descending=True).values for each in (self.density(state), state.rates))
        curves = {"density": density, "budget": budget}
        if self.budgets in _LEARNT:
            a, b = state.zipf.tolist()
            curves["law"] = self.k * zipf.law(a, b, self.d_sae)
        return curves

    def _share_out(self, state: State, progress: float) -> tuple[Tensor, Tensor]:
        """The rate of each latent [d_sae], by its rank in Mutual Choice, and the law's a and b."""
        law = state.zipf
        order = torch.arange(self.d_sae, device=state.rates.device)
        if self.mutual_share:
            order = self.density(state).argsort(descending=True, stable=True)
        if self.budgets in _LEARNT:
            shares, law = self._learnt(
                self.density(state)[order].cpu(), first=not bool(state.rates.any()), progress=progress
            )
        elif self.budgets == "uniform":
            shares = torch.ones(self.d_sae)
        else:
            shares = torch.tensor(self.budgets, dtype=torch.float64)
        rates = torch.zeros_like(state.rates)
        rates[order] = zipf.spread(shares, self.k, self.cap).to(rates.device)
        return rates, law

    def _learnt(self, ranked: Float[Tensor, " d_sae"], first: bool, progress: float) -> tuple[Tensor, Tensor]:
        """The shares [d_sae] of the budget that falling densities give, and a and b of the law fitted to them."""
        fitted = zipf.fit(ranked)
        weight = 1.0 if self.budgets == "zipf" else self.shrinkage
        if weight and not fitted.holds:
            weight = 0.0
            if first:
                warnings.warn(
                    f"the latents' densities follow no Zipf law: {fitted.off:.0%} of the firings are off the likeliest one "
                    f"(a = {fitted.a:.3g}, b = {fitted.b:.3g}), so the densities themselves become budgets; budgets='density' "
                    "asks for that",
                    stacklevel=2,
                )
        own = zipf.smoothed(ranked)
        own = own / own.sum().clamp_min(torch.finfo(torch.float64).tiny)
        tried = progress < (self.mutual_share + CALIBRATE_FROM) / 2
        if tried or self.k > self.cap * int((own > 0).sum()):
            own = own.clamp_min(FLOOR / self.d_sae)
        shares = weight * zipf.law(fitted.a, fitted.b, self.d_sae) + (1 - weight) * own
        return shares, torch.tensor([fitted.a, fitted.b], dtype=torch.float64)

    def _calibrate(self, codes: SparseCodes, state: State, progress: float) -> None:
        """Count a batch's largest scores of each latent, and put the thresholds where the counts say."""
        bins = ((codes.values.detach().float().log2() - _LOWEST) * _PER_OCTAVE).long()
        place = codes.indices * state.histogram.shape[1] + bins.clamp(0, state.histogram.shape[1] - 1)
        seen = torch.zeros_like(state.histogram)
        seen.view(-1).index_add_(0, place, seen.new_ones(len(place)))
        last, tokens = state.histogram_progress, distributed.total(len(codes))
        distributed.sum_(seen)
        average_(state.histogram, state.histogram_weight, last, progress, CALIBRATION_HALF_LIFE, seen, tokens)
        state.latent_cut.copy_(exceeded(state.histogram, state.rates * state.histogram_weight))


def exceeded(histogram: Float[Tensor, "d_sae bins"], count: Float[Tensor, " d_sae"]) -> Float[Tensor, " d_sae"]:
    """The scores [d_sae] that `count` [d_sae] entries of each latent's histogram exceed, the logarithm interpolated in its
    bin; 0 where the histogram has fewer entries than that.

    >>> import torch
    >>> counts = torch.zeros(1, _PER_OCTAVE * _OCTAVES)
    >>> counts[0, -_LOWEST * _PER_OCTAVE :][:_PER_OCTAVE] = 10  # 80 scores from 1 to 2
    >>> exceeded(counts, torch.tensor([40.0])), exceeded(counts, torch.tensor([90.0]))
    (tensor([1.4142]), tensor([0.]))
    """
    falling = histogram.double().flip(1)
    above = falling.cumsum(1)
    place = (above < count[:, None]).sum(1)
    inside = place.clamp_max(falling.shape[1] - 1)[:, None]
    here, reached = falling.gather(1, inside).squeeze(1), above.gather(1, inside).squeeze(1)
    part = 1 - (reached - count) / here.clamp_min(torch.finfo(torch.float64).tiny)
    logs = _LOWEST + (falling.shape[1] - place - part) / _PER_OCTAVE
    return torch.where(place < falling.shape[1], logs.exp2(), 0).float()
