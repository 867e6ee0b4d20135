"""What recording costs in a run of a denoiser, and how exactly inversions come back to real images.

    python benchmarks/hspace_sampling.py               on an idle machine

The time is that of `hspace.sample` (64 samples, 50 steps, eta 1, h, x and x0 recorded) against a loop of diffusers alone
(U-Net and `DDIMScheduler.step`), in turn, medians over the rounds; the two give the same samples when they are given the
same noise, which is checked first. The errors are those of 32 held-out images per denoiser.
"""

import argparse
import os
import statistics
import time

import torch
import workers
from diffusers import DDIMScheduler

import saelab
from saelab import hspace
from saelab.hspace.inversion import METHODS
from saelab.models.diffusion import bundled_names


def diffusers_loop(denoiser: saelab.Denoiser, n: int, steps: int, start=None, noise=None) -> torch.Tensor:
    """What `DDIMPipeline` runs, without its conversion to pictures; with the noise given, that noise."""
    scheduler = DDIMScheduler.from_config(denoiser.scheduler.config)
    scheduler.set_timesteps(steps)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(n, *denoiser.sample_shape, generator=generator) if start is None else start
    with torch.no_grad():
        for i, t in enumerate(scheduler.timesteps):
            how = {"generator": generator} if noise is None else {"variance_noise": noise[:, i]}
            x = scheduler.step(denoiser.unet(x, t).sample, t, x, eta=1.0, **how).prev_sample
    return x


def speed(name: str, n: int, steps: int, rounds: int) -> list[object]:
    denoiser = saelab.load_denoiser(name)
    trajectory = hspace.sample(denoiser, n, steps, eta=1.0, progress=False)
    again = diffusers_loop(denoiser, n, steps, trajectory.start, trajectory.noise)
    difference = float((again - trajectory.samples).abs().max())
    seconds: dict[str, list[float]] = {"saelab": [], "diffusers": []}
    for _ in range(rounds):
        began = time.perf_counter()
        hspace.sample(denoiser, n, steps, eta=1.0, progress=False)
        seconds["saelab"].append(time.perf_counter() - began)
        began = time.perf_counter()
        diffusers_loop(denoiser, n, steps)
        seconds["diffusers"].append(time.perf_counter() - began)
    ours, theirs = (statistics.median(times) for times in seconds.values())
    spread = " ".join(f"{a / b:.2f}" for a, b in zip(seconds["saelab"], seconds["diffusers"], strict=True))
    return [name, f"{ours:.2f} s", f"{theirs:.2f} s", f"{ours / theirs:.3f} ({spread})", f"{difference:.1e}"]


def errors(name: str, n: int, steps: int) -> list[list[object]]:
    rows = []
    single = saelab.load_denoiser(name)
    images = single.examples()[0][:n]
    for denoiser in (single, single.to(torch.float64)):
        for method in METHODS:
            run = hspace.invert(denoiser, images.to(denoiser.dtype), method, steps, record=(), progress=False)
            precision = str(denoiser.dtype).removeprefix("torch.")
            energy = float(run.start.double().square().mean())
            worst, mean = float(run.errors.max()), float(run.errors.mean())
            rows.append([name, method, precision, f"{worst:.1e}", f"{mean:.1e}", f"{energy:.3f}"])
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=["speed", "errors"], default=["speed", "errors"])
    parser.add_argument("--names", nargs="+", default=bundled_names())
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--images", type=int, default=32)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--out", default="hspace_sampling.md", help="file name under benchmarks/results/")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    lines = ["# Runs of the bundled denoisers\n"]
    if "speed" in args.only:
        rows = [speed(name, args.samples, args.steps, args.rounds) for name in args.names]
        header = ["denoiser", "saelab, recording", "diffusers' own loop", "ratio (each round)", "largest difference"]
        lines += [workers.table(header, rows), ""]
        lines += [f"{args.samples} samples, {args.steps} steps, eta 1; h, x and x0 recorded; medians of {args.rounds} rounds "
                  "in turn. The difference is that between the two loops' samples with the same noise.\n"]  # fmt: skip
    if "errors" in args.only:
        found = [row for name in args.names for row in errors(name, args.images, args.steps)]
        header = ["denoiser", "inversion", "precision", "largest error", "mean error", "norm² of x_T / d"]
        lines += [workers.table(header, found), ""]
        lines += [f"{args.images} held-out images, {args.steps} steps; of each reconstruction the largest difference of "
                  "a pixel, images in [-1, 1]. EDICT's states are float64 whatever the network's precision.\n"]  # fmt: skip
    workers.write_result(args.out, "\n".join([*lines, workers.machine(args.threads)]))


if __name__ == "__main__":
    main()
