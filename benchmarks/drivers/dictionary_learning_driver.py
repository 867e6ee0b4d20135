"""dictionary_learning: TopKTrainer.update, all defaults but the sizes and, in short runs, the warm-up."""

from collections.abc import Iterator

import protocol
import torch
from dictionary_learning.trainers.top_k import TopKTrainer
from torch import Tensor


class DictionaryLearning:
    def __init__(self, task: protocol.Task) -> None:
        self.trainer = TopKTrainer(
            steps=task.steps,
            activation_dim=task.d_in,
            dict_size=task.d_sae,
            k=task.k,
            layer=0,
            lm_name="",
            lr=2e-4 / (task.d_sae / 2**14) ** 0.5,  # its own law
            warmup_steps=min(1000, task.steps // 20),  # its 1,000 must be under the number of steps
            seed=task.seed,
            device="cpu",
        )
        self.done = 0

    def step(self, batch: Tensor) -> None:
        self.trainer.update(self.done, batch)
        self.done += 1

    def run(self, batches: list[Tensor]) -> list[float]:
        return protocol.timed(self.step, batches)

    def train(self, batches: Iterator[Tensor]) -> None:
        for batch in batches:
            self.step(batch)

    @torch.no_grad()
    def reconstruct(self, x: Tensor) -> Tensor:
        return self.trainer.ae(x)


if __name__ == "__main__":
    protocol.serve(DictionaryLearning, ["dictionary-learning", "nnsight"])
