"""What a parent script asks of one library in its own process and environment: build and step; with `--check`, train and score.

Imports torch only, because it runs in every peer's environment. Commands are JSON lines on standard input,
answers JSON lines on the file descriptor given with `--answers`.
"""

import json
import os
import resource
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any, Protocol

import torch
from torch import Tensor


@dataclass(frozen=True)
class Task:
    """A TopK SAE to train at the library's own default learning rate."""

    d_in: int
    d_sae: int
    k: int
    batch_size: int
    steps: int
    seed: int = 0


class Learner(Protocol):
    """One library. `x` is [n, d_in] float32 everywhere."""

    def __init__(self, task: Task) -> None: ...

    def run(self, batches: list[Tensor]) -> list[float]:
        """One optimisation step a batch; the seconds that each took."""

    def train(self, batches: Iterator[Tensor]) -> None:
        """The whole run, up to a finished SAE."""

    def reconstruct(self, x: Tensor) -> Tensor:
        """The reconstruction [n, d_in]."""


def timed(step: Any, batches: list[Tensor]) -> list[float]:
    """The seconds of `step(batch)` for each batch."""
    seconds = []
    for batch in batches:
        start = time.perf_counter()
        step(batch)
        seconds.append(time.perf_counter() - start)
    return seconds


def synthetic_rows(n: int, d: int, seed: int) -> Tensor:
    """[n, d]: 16 of 4d directions with exponential strengths, an offset and noise; the same bits in every process."""
    generator = torch.Generator().manual_seed(seed)
    shared = torch.Generator().manual_seed(12345)  # the directions are those of every seed
    directions = torch.nn.functional.normalize(torch.randn(4 * d, d, generator=shared), dim=-1)
    offset = torch.randn(d, generator=shared)
    which = torch.randint(4 * d, (n, 16), generator=generator)
    strengths = torch.empty(n, 16).exponential_(generator=generator)
    signal = torch.nn.functional.embedding_bag(which, directions, per_sample_weights=strengths, mode="sum")
    return signal + offset + 0.05 * torch.randn(n, d, generator=generator)


def peak_bytes() -> int:
    """Peak resident memory of this process."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def serve(make: type[Learner], packages: list[str]) -> None:
    """Answers commands until standard input ends; with `--check`, trains on synthetic rows and prints the result."""
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", torch.get_num_threads())))
    if "--check" in sys.argv:
        check(make, packages)
        return
    answers = os.fdopen(int(sys.argv[sys.argv.index("--answers") + 1]), "w")
    learner: Learner | None = None
    pool: list[Tensor] = []
    for line in sys.stdin:
        ask = json.loads(line)
        match ask.pop("do"):
            case "versions":
                answer: dict[str, Any] = {name: version(name) for name in ["torch", *packages]}
            case "build":
                imported = peak_bytes()
                task = Task(**ask)
                pool = [synthetic_rows(task.batch_size, task.d_in, seed) for seed in range(4)]
                learner = make(task)
                answer = {"imported_bytes": imported}
            case "steps":
                assert learner is not None
                answer = {"seconds": learner.run([pool[i % len(pool)] for i in range(ask["count"])])}
            case "memory":
                answer = {"peak_bytes": peak_bytes()}
            case other:
                raise ValueError(other)
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


def check(make: type[Learner], packages: list[str]) -> None:
    """Trains a small SAE on synthetic rows: the environment works if the explained variance is well above zero."""
    torch.manual_seed(0)
    task = Task(d_in=32, d_sae=128, k=16, batch_size=512, steps=200)
    learner = make(task)
    learner.train(synthetic_rows(task.batch_size, task.d_in, seed) for seed in range(task.steps))
    x = synthetic_rows(4096, task.d_in, seed=10_000)
    explained_variance = 1 - float((x - learner.reconstruct(x)).square().sum() / (x - x.mean(0)).square().sum())
    stepped = make(task).run([x[:512]] * 3)
    names = ", ".join(f"{name} {version(name)}" for name in packages)
    print(f"{names}: explained variance {explained_variance:.3f}, {len(stepped)} timed steps")
    assert explained_variance > 0.1
