"""sparsify: its own Trainer.fit, with a stand-in language model whose only site puts out the batches.

fit() trains on what forward hooks see, so a model without weights that hands over the next batch is all that it needs;
optimiser (schedule-free signum), loss, projection and saving are its own. The SAE scored is the one that fit() saves,
which holds the schedule-free average.
"""

import tempfile
import time
from collections.abc import Iterator
from typing import Any

import protocol
import torch
from sparsify import SparseCoder, SparseCoderConfig, TrainConfig, Trainer
from torch import Tensor, nn


class StandIn(nn.Module):
    """A "model" whose module `site` puts out [1, batch, d_in], the next batch, whatever the token ids."""

    device = torch.device("cpu")
    dummy_inputs = {"input_ids": torch.zeros(1, 1, dtype=torch.long)}

    def __init__(self, d_in: int) -> None:
        super().__init__()
        self.site = nn.Identity()
        self.batches: Iterator[Tensor] = iter([torch.zeros(1, d_in)])  # for the width, asked once
        self.started: list[float] = []

    @property
    def base_model(self) -> "StandIn":
        return self

    def forward(self, input_ids: Tensor) -> Tensor:
        batch = next(self.batches)
        self.started.append(time.perf_counter())
        return self.site(batch[None])


class Counted:
    """A "data set" of `n` sequences, one a step, all of the same ids."""

    def __init__(self, n: int, length: int) -> None:
        self.n, self.length = n, length

    def __len__(self) -> int:
        return self.n

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        return {"input_ids": torch.zeros(self.length, dtype=torch.long)}

    def select(self, rows: range) -> "Counted":
        return Counted(len(rows), self.length)


class QuietTrainer(Trainer):
    """Saves only when told to, and notes when fit() came to its end."""

    saves = False
    ended = 0.0

    def save(self) -> None:
        self.ended = time.perf_counter()
        if self.saves:
            super().save()


class Sparsify:
    def __init__(self, task: protocol.Task) -> None:
        self.task = task
        self.folder = tempfile.TemporaryDirectory()
        self.model: Any = StandIn(task.d_in)
        self.trainer = QuietTrainer(
            TrainConfig(
                SparseCoderConfig(num_latents=task.d_sae, k=task.k),
                batch_size=1,
                lr=5e-3 / (task.d_sae / 2**14) ** 0.5,  # its own law
                hookpoints=["site"],
                init_seeds=[task.seed],
                log_to_wandb=False,
                save_dir=self.folder.name,
                run_name="run",
            ),
            Counted(task.steps, task.batch_size),  # type: ignore[arg-type]
            self.model,
        )

    def fit(self, batches: Iterator[Tensor], steps: int) -> None:
        self.model.batches = batches
        self.trainer.dataset = Counted(self.trainer.global_step + steps, self.task.batch_size)  # type: ignore[assignment]
        self.trainer.fit()

    def run(self, batches: list[Tensor]) -> list[float]:
        self.model.started = []
        self.fit(iter(batches), len(batches))
        ends = [*self.model.started[1:], self.trainer.ended]
        return [end - start for start, end in zip(self.model.started, ends, strict=True)]

    def train(self, batches: Iterator[Tensor]) -> None:
        self.trainer.saves = True
        self.fit(batches, self.task.steps)
        self.saved = SparseCoder.load_from_disk(f"{self.folder.name}/run/site")

    @torch.no_grad()
    def reconstruct(self, x: Tensor) -> Tensor:
        return self.saved(x).sae_out


if __name__ == "__main__":
    protocol.serve(Sparsify, ["eai-sparsify", "schedulefree"])
