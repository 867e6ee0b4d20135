"""saelab itself, under the same commands as the peers.

SHORTLIST=on|off forces the bf16 shortlist (unset, saelab decides); PART=last times the last fifth of a run, in which
the statistics of the latents are kept.
"""

import itertools
import os
from collections.abc import Iterator

import protocol
import torch
from torch import Tensor

import saelab
from saelab.kernels import selection
from saelab.training.schedule import Schedule
from saelab.training.step import Trainer

SAMPLE_BATCHES = 8  # 32,768 rows at batch 4,096, what `saelab.train` starts from

if "SHORTLIST" in os.environ:
    selection.bf16_products_are_fast = lambda: os.environ["SHORTLIST"] == "on"  # type: ignore[assignment]


class Saelab:
    """The Trainer that `saelab.train` drives, on batches in the order given.

    `saelab.train` would shuffle a tensor in its own order.
    """

    def __init__(self, task: protocol.Task) -> None:
        cfg = saelab.TopK(k=task.k, d_sae=task.d_sae)
        sae = saelab.SAE(cfg, task.d_in, seed=task.seed)
        schedule = Schedule(tokens=task.steps * task.batch_size, batch_size=task.batch_size)
        self.trainer = Trainer(sae, schedule)
        self.started = False

    def start(self, batches: list[Tensor]) -> None:
        """What `train` does before the first step."""
        self.trainer.initialise({"x": torch.cat(batches)})
        self.started = True
        if os.environ.get("PART") == "last":
            self.trainer.done = self.trainer.schedule.statistics_from

    def step(self, batch: Tensor) -> None:
        self.trainer.step({"x": batch}, log=False)  # as 99 of 100 steps of `train` do

    def run(self, batches: list[Tensor]) -> list[float]:
        if not self.started:
            self.start(batches)
        return protocol.timed(self.step, batches)

    def train(self, batches: Iterator[Tensor]) -> None:
        first = list(itertools.islice(batches, SAMPLE_BATCHES))
        self.start(first)
        for batch in itertools.chain(first, batches):
            self.step(batch)
        self.trainer.finish()

    @torch.no_grad()
    def reconstruct(self, x: Tensor) -> Tensor:
        return self.trainer.sae(x)


if __name__ == "__main__":
    protocol.serve(Saelab, [])
