"""What a run will take, told before it starts: a few batches are timed, bytes are counted."""

import dataclasses
import os
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from saelab.models.sites import Site, run_recording
from saelab.models.tokens import Tokens

if TYPE_CHECKING:
    from saelab.models.language import LanguageModel

TIMED_BATCHES = 2
# A training step over its encoder product alone, on a CPU (the project's own bar is 1.4).
STEP_OVER_PRODUCT = 1.4


@dataclasses.dataclass(frozen=True)
class Estimate:
    """Seconds and bytes by part; prints as one line.

    >>> print(Estimate({"model": 200.0, "autoencoder": 40.0}, memory={"buffer": 3 * 2**30}, available=2 * 2**30))
    about 4.0 min (model 3.3 min, autoencoder 40 s), 3.0 GiB (buffer 3.0 GiB) of 2.0 GiB: TOO MUCH
    """

    seconds: dict[str, float]
    memory: dict[str, int]
    available: int | None

    def __str__(self) -> str:
        total = sum(self.memory.values())
        time_parts = ", ".join(f"{part} {duration(s)}" for part, s in self.seconds.items())
        memory_parts = ", ".join(f"{part} {size(n)}" for part, n in self.memory.items())
        text = f"about {duration(sum(self.seconds.values()))} ({time_parts}), {size(total)} ({memory_parts})"
        if self.available is None:
            return text
        return f"{text} of {size(self.available)}{': TOO MUCH' if total > self.available else ''}"


def model_seconds(
    lm: "LanguageModel", contexts: Any, sites: Sequence[Site], tokens: int, gradients: bool = False
) -> float:
    """Seconds to read `tokens` tokens at all sites in one pass, from `TIMED_BATCHES` batches of 8 after one to warm up.

    With gradients, which take the whole model there and back, from one context alone.
    """
    if gradients:
        batch = torch.as_tensor(contexts.ids[:1]).long()
        tokens_read = Tokens(batch, torch.ones_like(batch, dtype=torch.bool))
        start = time.perf_counter()
        run_recording(lm, tokens_read, sites, gradients=True)
        return (time.perf_counter() - start) / batch.numel() * tokens
    batch, names = torch.as_tensor(contexts.ids[:8]).long(), [site.name for site in sites]
    lm.record(batch, names)
    start = time.perf_counter()
    for _ in range(TIMED_BATCHES):
        lm.record(batch, names)
    return (time.perf_counter() - start) / TIMED_BATCHES / batch.numel() * tokens


def step_seconds(d_in: int, d_sae: int, tokens: int, rows: int = 512) -> float:
    """Seconds to train on `tokens` tokens, from the time of the encoder's product on `rows` rows."""
    x, weights = torch.ones(rows, d_in), torch.ones(d_in, d_sae)
    x @ weights
    start = time.perf_counter()
    x @ weights
    return (time.perf_counter() - start) / rows * tokens * STEP_OVER_PRODUCT


def training_bytes(d_in: int, d_sae: int, batch_size: int, buffer_tokens: int) -> dict[str, int]:
    """Bytes of training in fp32: parameters with gradient and Adam's two moments, buffer, one batch's scores.

    >>> training_bytes(d_in=10, d_sae=100, batch_size=8, buffer_tokens=1000)
    {'autoencoder, gradient and Adam': 33760, 'buffer': 40000, 'scores of a batch': 3200}
    """
    parameters = 2 * d_in * d_sae + d_in + d_sae
    return {
        "autoencoder, gradient and Adam": 4 * 4 * parameters,
        "buffer": 4 * buffer_tokens * d_in,
        "scores of a batch": 4 * batch_size * d_sae,
    }


def model_bytes(lm: "LanguageModel") -> int:
    """Bytes of the language model's parameters."""
    return sum(p.numel() * p.element_size() for p in lm.model.parameters())


def physical_memory() -> int | None:
    """Bytes of memory of this machine, None where the system does not say."""
    if not hasattr(os, "sysconf"):
        return None
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def duration(seconds: float) -> str:
    """
    >>> duration(12.3), duration(90), duration(7300)
    ('12 s', '1.5 min', '2.0 h')
    """
    if seconds < 60:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.1f} min" if seconds < 3600 else f"{seconds / 3600:.1f} h"


def size(count: int) -> str:
    """
    >>> size(512), size(3 * 2**20), size(5 * 2**30)
    ('512 B', '3.0 MiB', '5.0 GiB')
    """
    value = float(count)
    for unit in ("B", "KiB", "MiB"):
        if value < 1024:
            return f"{value:.0f} B" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1024
    return f"{value:.1f} GiB"
