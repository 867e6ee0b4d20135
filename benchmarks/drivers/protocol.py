"""What a parent script asks of one library in its own process and environment: build, step, train, score.

Imports torch and numpy only, because it runs in every peer's environment. Commands are JSON lines on standard input,
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

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class Task:
    """A TopK SAE to train: `rate` multiplies the library's own default learning rate."""

    d_in: int
    d_sae: int
    k: int
    batch_size: int
    steps: int
    rate: float = 1.0
    seed: int = 0


class Learner(Protocol):
    """One library. `x` is [n, d_in] float32 everywhere."""

    def __init__(self, task: Task) -> None: ...

    def run(self, batches: list[Tensor]) -> list[float]:
        """One optimisation step a batch; the seconds that each took."""

    def train(self, batches: Iterator[Tensor]) -> None:
        """The whole run, up to a finished SAE."""

    def reconstruct(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The reconstruction [n, d_in], and which latents fired on any row [d_sae]."""


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


class Rows:
    """Rows of a float32 .npy file, memory-mapped, in the order of an index file, times `scale`."""

    def __init__(self, rows: str, order: str, first: int, count: int, scale: float) -> None:
        self.rows = np.load(rows, mmap_mode="r")
        self.order = np.load(order)[first : first + count]
        self.scale = scale

    def batches(self, size: int) -> Iterator[Tensor]:
        """Consecutive batches; the last one may be short."""
        for start in range(0, len(self.order), size):
            yield torch.from_numpy(self.rows[self.order[start : start + size]]) * self.scale

    def mean(self) -> Tensor:
        """[d_in], float64."""
        sums = sum(batch.double().sum(0) for batch in self.batches(4096))
        return sums / len(self.order)


def score(learner: Learner, batches: list[Tensor] | Iterator[Tensor], mean: Tensor) -> dict[str, float]:
    """Explained variance 1 - sum ||x - x_hat||^2 / sum ||x - mean||^2 in float64, and the share of silent latents."""
    error = total = 0.0
    n = 0
    fired = None
    for x in batches:
        x_hat, now = learner.reconstruct(x)
        error += float((x - x_hat).double().square().sum())
        total += float((x.double() - mean).square().sum())
        n += len(x)
        fired = now if fired is None else fired | now
    assert fired is not None
    return {"explained_variance": 1 - error / total, "dead_fraction": 1 - float(fired.double().mean()), "rows": n}


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
            case "train":
                task = Task(**ask["task"])
                torch.manual_seed(task.seed)  # peers initialise from the global generator
                learner = make(task)
                start = time.perf_counter()
                learner.train(Rows(**ask["rows"]).batches(task.batch_size))
                answer = {"seconds": time.perf_counter() - start}
            case "score":
                assert learner is not None
                rows = Rows(**ask["rows"])
                answer = score(learner, rows.batches(4096), rows.mean())
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
    result = score(learner, [x], x.double().mean(0))
    stepped = make(task).run([x[:512]] * 3)
    names = ", ".join(f"{name} {version(name)}" for name in packages)
    print(f"{names}: explained variance {result['explained_variance']:.3f}, {len(stepped)} timed steps")
    assert result["explained_variance"] > 0.1
