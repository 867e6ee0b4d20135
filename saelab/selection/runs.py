"""A run: epochs of training with the strengths after each, kept in a folder so that it survives a kill."""

import json
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from saelab.base import cache
from saelab.base.errors import CheckpointError, DataError
from saelab.base.progress import progress_bar
from saelab.base.tensors import write_tensors
from saelab.selection.autoencoder import Autoencoder, Recipe
from saelab.selection.samples import Samples
from saelab.selection.streams import DROPOUT, stream
from saelab.training.checkpoint import check_fingerprint, part
from saelab.training.running import first_interrupt_noted

FILE = "quickselection.safetensors"
SECONDS_BETWEEN_CHECKPOINTS = 10.0
FINISHED = ("finished", "stable")  # how a run may have ended that does not go on


@dataclass
class Stability:
    """When to stop early: the `k` features on top shared at least `overlap` with the epoch before, `patience` times running."""

    patience: int
    overlap: float
    k: int
    aggregate: str

    def reached(self, strengths: list[np.ndarray]) -> bool:
        if len(strengths) <= self.patience:
            return False
        last = [len(strengths) - i for i in range(self.patience + 1)]
        tops = [set(ranking_of(aggregated(strengths[:n], self.aggregate))[: self.k].tolist()) for n in last]
        return all(len(one & other) >= self.overlap * self.k for one, other in zip(tops, tops[1:], strict=False))


@dataclass
class Run:
    """What training has made so far: `strengths` [d] after each epoch, `losses` of each, and how it came to an end."""

    model: Autoencoder
    seed: int
    epochs: int
    kind: str
    strengths: list[np.ndarray] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    ended: str | None = None  # "finished", "stable" or "interrupted"

    def train(
        self, samples: Samples, recipe: Recipe, stability: Stability | None, folder: "Folder | None", progress: bool
    ) -> None:
        """Go on to the end. The first Ctrl-C finishes the epoch and writes the checkpoint; a second one raises."""
        self.ended = None
        bar = progress_bar(self.epochs, "QuickSelection", " epochs", progress, initial=len(self.losses))
        with first_interrupt_noted() as interrupt, torch.no_grad(), bar:
            while self.ended is None:
                epoch = len(self.losses) + 1
                self._epoch(epoch, samples, recipe)
                bar.update()
                bar.set_postfix(loss=f"{self.losses[-1]:.4g}", refresh=False)
                if epoch == self.epochs:
                    self.ended = "finished"
                elif stability is not None and stability.reached(self.strengths):
                    self.ended = "stable"
                elif interrupt.is_set():
                    self.ended = "interrupted"
                if folder is not None:
                    folder.save(self)

    def _epoch(self, epoch: int, samples: Samples, recipe: Recipe) -> None:
        loss = self.model.train_epoch(samples.batches(epoch), recipe, stream(self.seed, DROPOUT, epoch))
        if not np.isfinite(loss):
            raise DataError(
                f"the loss is {loss} in epoch {epoch}: training diverged at lr={recipe.lr:g}; lower `lr`, or scale the "
                "features (`scale='standard'`)"
            )
        self.losses.append(loss)
        # By our notes the authors' code ranks by the matrix of the last epoch but one.
        if epoch < self.epochs:
            strength_D = self.model.evolve(recipe, self.seed, epoch, self.kind)
        elif self.epochs == 1:
            strength_D = self.model.strength(self.kind)
        else:
            return
        strength_D[samples.constant_D] = 0.0
        self.strengths.append(strength_D)


class Folder:
    """The folder of a run: one checksummed file, replaced whole at most every ten seconds and at the end."""

    def __init__(self, path: Path, fingerprint: dict[str, Any]) -> None:
        self.path, self.fingerprint, self.saved = path / FILE, fingerprint, time.monotonic()

    def save(self, run: Run) -> None:
        if run.ended is None and time.monotonic() - self.saved < SECONDS_BETWEEN_CHECKPOINTS:
            return
        tensors = {f"model.{name}": tensor for name, tensor in run.model.state().items()}
        tensors["losses"] = torch.tensor(run.losses, dtype=torch.float64)
        tensors["strengths"] = torch.from_numpy(np.array(run.strengths))
        about = {"fingerprint": json.dumps(self.fingerprint), "seed": str(run.seed), "ended": run.ended or ""}
        write_tensors(self.path, tensors, about)
        self.saved = time.monotonic()

    def load(self, run: Run) -> None:
        """Take up the run of the folder, if there is one; `CheckpointError` when it is another or damaged."""
        if not self.path.exists():
            return
        found = cache.read(self.path)
        if found is None:
            raise CheckpointError(f"{self.path} is damaged: remove it to start again")
        tensors, about = found
        check_fingerprint(self.path.parent, json.loads(about["fingerprint"]), self.fingerprint)
        run.model.load_state(part(tensors, "model."))
        run.losses = tensors["losses"].tolist()
        run.strengths = list(tensors["strengths"].numpy().copy())
        run.seed, run.ended = int(about["seed"]), about["ended"] or None


def aggregated(strengths: list[np.ndarray], how: str) -> np.ndarray:
    """The strengths [d] to rank by: of the "last" epoch, or the "sum" over all."""
    return strengths[-1] if how == "last" else np.sum(strengths, axis=0)


def ranking_of(strength_D: np.ndarray) -> np.ndarray:
    """Features from the strongest to the weakest; of equal ones the lower index comes first."""
    return np.argsort(-strength_D, kind="stable")
