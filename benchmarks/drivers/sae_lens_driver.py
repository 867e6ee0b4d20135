"""sae-lens: TopKTrainingSAE under its own SAETrainer.step, all defaults but the sizes."""

from collections.abc import Iterator

import protocol
import torch
from sae_lens import LoggingConfig, TopKTrainingSAE, TopKTrainingSAEConfig
from sae_lens.config import SAETrainerConfig
from sae_lens.training.sae_trainer import SAETrainer
from torch import Tensor


class SaeLens:
    def __init__(self, task: protocol.Task) -> None:
        lr = 3e-4
        sae = TopKTrainingSAE(TopKTrainingSAEConfig(d_in=task.d_in, d_sae=task.d_sae, k=task.k))
        self.trainer = SAETrainer(
            SAETrainerConfig(
                total_training_samples=task.steps * task.batch_size,
                train_batch_size_samples=task.batch_size,
                lr=lr,
                lr_end=lr / 10,  # what its runner sets for None
                logger=LoggingConfig(log_to_wandb=False),
            ),
            sae,
            data_provider=iter(()),  # batches are handed to step()
        )

    def step(self, batch: Tensor) -> None:
        self.trainer.step(batch)
        self.trainer.n_training_steps += 1  # step() leaves it to the caller, as in fit()

    def run(self, batches: list[Tensor]) -> list[float]:
        return protocol.timed(self.step, batches)

    def train(self, batches: Iterator[Tensor]) -> None:
        for batch in batches:
            self.step(batch)

    @torch.no_grad()
    def reconstruct(self, x: Tensor) -> Tensor:
        sae = self.trainer.sae.eval()
        return sae.decode(sae.encode(x))


if __name__ == "__main__":
    protocol.serve(SaeLens, ["sae-lens", "transformer-lens"])
