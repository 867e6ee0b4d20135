"""What recording costs in a run of a denoiser.

    python benchmarks/hspace_sampling.py               on an idle machine

The time is that of `hspace.sample` (64 samples, 50 steps, eta 1, h, x and x0 recorded) against a loop of diffusers alone
(U-Net and `DDIMScheduler.step`), in turn, medians over the rounds; the two give the same samples when they are given the
same noise, which is checked first.
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--names", nargs="+", default=bundled_names())
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--out", default="hspace_sampling.md", help="file name under benchmarks/results/")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    header = ["denoiser", "saelab, recording", "diffusers' own loop", "ratio (each round)", "largest difference"]
    rows = [speed(name, args.samples, args.steps, args.rounds) for name in args.names]
    what = (
        f"{args.samples} samples, {args.steps} steps, eta 1; h, x and x0 recorded; medians of {args.rounds} rounds in turn. "
        "The difference is that between the two loops' samples with the same noise. "
    )
    text = f"# Runs of the bundled denoisers\n\n{workers.table(header, rows)}\n\n{what}{workers.machine(args.threads)}."
    workers.write_result(args.out, text)


if __name__ == "__main__":
    main()
