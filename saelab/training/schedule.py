"""Schedules, all relative to the length of the run: no default counts absolute steps."""

from dataclasses import dataclass

WARMUP_STEPS, WARMUP_SHARE, DECAY_SHARE = 1000, 0.05, 0.2
DEAD_TOKENS, DEAD_SHARE, DEAD_BATCHES = 10_000_000, 0.1, 8
STATISTICS_FROM = 0.8
LONG_RUN_STEPS = 16_000


@dataclass(frozen=True)
class Schedule:
    """What depends on how far a run has come.

    The learning rate warms up linearly over min(1,000 steps, 5% of them) and decays linearly to zero over the last 20%. A
    latent is dead after min(10M tokens, 10% of the run) without firing, at least 8 batches. (Gao et al. 2024 use 10M
    tokens, dictionary_learning 1,000 steps of warm-up; the shares are our choice, for runs of 50 to 500,000 steps.)

    >>> schedule = Schedule(tokens=100_000, batch_size=1000)
    >>> schedule.steps, schedule.lr_factor(0), schedule.lr_factor(50), schedule.lr_factor(90)
    (100, 0.2, 1.0, 0.5)
    """

    tokens: int
    batch_size: int
    lanes: int = 1  # of rows, that each batch has as many of

    @property
    def steps(self) -> int:
        return -(-self.tokens // self.batch_size)

    def tokens_before(self, step: int) -> int:
        """Tokens that the steps before this one have used."""
        return self.tokens // self.lanes * step // self.steps * self.lanes

    def rows(self, step: int) -> int:
        """Rows in the batch of this step: batches are as equal as they can be, so that no small one is left over."""
        return self.tokens_before(step + 1) - self.tokens_before(step)

    def progress(self, step: int) -> float:
        return step / self.steps

    def lr_factor(self, step: int) -> float:
        warmup = max(1, min(WARMUP_STEPS, round(WARMUP_SHARE * self.steps)))
        decay = max(1, round(DECAY_SHARE * self.steps))
        return min(1.0, (step + 1) / warmup, (self.steps - step) / decay)

    @property
    def short_run_boost(self) -> float:
        """How many times the architecture's rate a run this short takes: sqrt(16,000 / steps), between 1 and 8.

        Our choice: the literature's rates are for long runs. It was chosen where it was measured, on 244 steps at blocks.3 of
        SmolLM2: an explained variance of 0.897 at the literature's rate, 0.944 at 8 and at 24 times it.
        """
        return min(8.0, max(1.0, (LONG_RUN_STEPS / self.steps) ** 0.5))

    @property
    def dead_after(self) -> int:
        """Tokens without firing after which a latent counts as dead."""
        return max(min(DEAD_TOKENS, int(DEAD_SHARE * self.tokens)), DEAD_BATCHES * self.batch_size)

    @property
    def statistics_from(self) -> int:
        """First step of the span, the decay, over which latent statistics are kept: the weights hardly move there."""
        return int(STATISTICS_FROM * self.steps)

    @property
    def covariance_every(self) -> int:
        """Every how many steps of that span a batch enters the covariance: about 32 of them in all."""
        return max(1, (self.steps - self.statistics_from) // 32)
