"""The training step of every architecture against TopK's, and a sweep of eight equal SAEs against eight solo runs.

    python benchmarks/architecture_speed.py            on an idle machine

Steps are interleaved: in each round one step of every architecture, on the same batch, the trainer far enough into its run
that thresholds and budgets are in use (half of it; Feature Choice: 80%). The sweep reads a real model: its solo runs read the
model again each, the sweep once.
"""

import argparse
import statistics
import time
from typing import Any

import torch
import workers

import saelab
from saelab.training.schedule import Schedule
from saelab.training.step import Trainer

STEPS = 1000


def architectures(k: int, d_sae: int) -> dict[str, Any]:
    return {
        "TopK": saelab.TopK(k=k, d_sae=d_sae),
        "MutualChoice": saelab.MutualChoice(k=k, d_sae=d_sae),
        "FeatureChoice": saelab.FeatureChoice(k=k, d_sae=d_sae),
        "GradientTopK": saelab.GradientTopK(k=k, d_sae=d_sae),
        "Matryoshka": saelab.Matryoshka(k=k, d_sae=d_sae),
        "MultiTopK": saelab.MultiTopK(k=k, d_sae=d_sae),
    }


def steps(batch: int, d_in: int, d_sae: int, k: int, rounds: int) -> str:
    """Milliseconds of a step, medians, and their ratio to TopK's."""
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(512, d_in, generator=generator)
    batches = [
        {
            "x": torch.rand(batch, 512, generator=generator).pow(8) @ features
            + 0.1 * torch.randn(batch, d_in, generator=generator),
            "gradient": torch.randn(batch, d_in, generator=generator),
        }
        for _ in range(4)
    ]
    trainers = {}
    for label, cfg in architectures(k, d_sae).items():
        trainer = Trainer(saelab.SAE(cfg, d_in), Schedule(STEPS * batch, batch))
        trainer.initialise(batches[0])
        for rows in batches[:2]:
            trainer.step(rows, log=False)
        trainer.done = STEPS * 8 // 10 - 40 if label == "FeatureChoice" else STEPS // 2
        for rows in batches:
            trainer.step(rows, log=False)
        trainers[label] = trainer
    seconds: dict[str, list[float]] = {label: [] for label in trainers}
    for i in range(rounds):
        for label, trainer in trainers.items():
            started = time.perf_counter()
            trainer.step(batches[i % len(batches)], log=False)
            seconds[label].append(time.perf_counter() - started)
    median = {label: statistics.median(times) for label, times in seconds.items()}
    ratios = {
        label: statistics.median(t / top for t, top in zip(times, seconds["TopK"], strict=True))
        for label, times in seconds.items()
    }
    rows = [
        [
            label,
            f"{t * 1e3:.0f}",
            f"{min(seconds[label]) * 1e3:.0f} to {max(seconds[label]) * 1e3:.0f}",
            f"{ratios[label]:.2f}x",
        ]
        for label, t in median.items()
    ]
    return workers.table(["SAE", "ms a step", "range", "of TopK's, median of rounds"], rows)


def together(tokens: int, n: int, d_sae: int, k: int) -> str:
    """Seconds of a sweep of n equal SAEs on the bundled model, and of one solo run, n of which it replaces."""
    lm, corpus = saelab.load_model("smollm2-135m"), saelab.load_corpus("sotu", seed=0)
    site = "blocks.3.hook_resid_post"
    arguments: dict[str, Any] = {"site": site, "tokens": tokens, "progress": False}
    cfg = saelab.TopK(k=k, d_sae=d_sae)
    passes = 0

    def counted(*_: Any) -> None:
        nonlocal passes
        passes += 1

    handle = lm.model.register_forward_pre_hook(lambda module, inputs: counted())
    rows, times = [], {}
    saelab.train(lm, corpus, sae=cfg, **{**arguments, "tokens": 8192})  # tokenised and warm
    for label, run in (
        ("one solo run", lambda: saelab.train(lm, corpus, sae=cfg, **arguments)),
        (f"sweep of {n}", lambda: saelab.sweep(lm, corpus, [cfg] * n, **arguments)),
        ("one solo run, again", lambda: saelab.train(lm, corpus, sae=cfg, **arguments)),
    ):
        passes, started = 0, time.perf_counter()
        run()
        times[label] = time.perf_counter() - started
        rows.append([label, f"{times[label]:.1f}", passes])
    handle.remove()
    alone = n * (times["one solo run"] + times["one solo run, again"]) / 2
    rows.append([f"{n} solo runs (n times their mean)", f"{alone:.1f}", ""])
    rows.append(["the sweep's share of that", f"{times[f'sweep of {n}'] / alone:.2f}x", ""])
    return workers.table([f"{tokens:,} tokens, {cfg!r}", "seconds", "forward passes"], rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=4096)
    parser.add_argument("--d-in", type=int, default=768)
    parser.add_argument("--d-sae", type=int, default=16384)
    parser.add_argument("--k", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--sweep-tokens", type=int, default=100_000)
    parser.add_argument("--out", default="architecture_speed.md", help="file name under benchmarks/results/")
    options = parser.parse_args()
    lines = ["# Steps and sweeps", "", workers.machine(torch.get_num_threads()), ""]
    for d_in, d_sae in ((options.d_in, options.d_sae), (576, options.d_sae // 4)):
        lines += [f"## Batch {options.batch:,}, d_in {d_in}, d_sae {d_sae:,}, k {options.k}", ""]
        lines += [steps(options.batch, d_in, d_sae, options.k, options.rounds), ""]
        print(lines[-2], flush=True)
    lines += ["## A sweep", "", together(options.sweep_tokens, 8, options.d_sae // 4, options.k)]
    print(lines[-1])
    workers.write_result(options.out, "\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
