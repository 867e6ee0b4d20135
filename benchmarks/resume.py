"""Kills a training run with SIGKILL at random moments, resumes it each time, compares the final weights bit by bit.

    python benchmarks/resume.py [--kills 5] [--seed 0] [--source lm|tensor]

The moments are drawn with a seed: a share of the run for each kill, and a delay of up to half a second after the step
at that share, so that kills fall into steps, into the model's forward passes and into checkpoints being written. One
process at a time, all with the same number of threads.
"""

import argparse
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
import workers

SITE = "blocks.3.hook_resid_post"


class Steps:
    """A logger that tells the parent how far the run is."""

    def log(self, row: dict[str, float]) -> None:
        print(int(row["step"]), flush=True)

    def close(self) -> None:
        pass


def child(out: str, source: str, tokens: int, d_sae: int, batch_size: int) -> None:
    """One `saelab.train` into `out`, to its end; prints each step."""
    import saelab

    data: tuple[object, ...]
    if source == "lm":
        data, site = (saelab.load_model("smollm2-135m"), saelab.load_corpus("sotu")), SITE
    else:
        data, site = (torch.randn(tokens, 64, generator=torch.Generator().manual_seed(0)),), None
    saelab.train(
        *data,
        site=site,
        sae=saelab.TopK(k=16, d_sae=d_sae),
        tokens=tokens,
        batch_size=batch_size,
        buffer_tokens=8 * batch_size,
        checkpoint_every=max(tokens // 20, batch_size),
        log_every=batch_size,
        loggers=[Steps()],
        seed=0,
        out=out,
        progress=False,
    )


def start(out: Path, args: argparse.Namespace) -> subprocess.Popen[str]:
    """A child process; its output is one line a step."""
    command = [sys.executable, __file__, "--child", str(out), "--source", args.source, "--tokens", str(args.tokens)]
    command += ["--d-sae", str(args.d_sae), "--batch-size", str(args.batch_size)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=workers.environment(args.threads))


def follow(process: subprocess.Popen[str], until: int | None = None) -> tuple[int, int]:
    """The first and the last step that the child tells of, up to a step or to its end."""
    assert process.stdout is not None
    first = last = 0
    for line in process.stdout:
        last = int(line)
        first = first or last
        if until is not None and last >= until:
            break
    return first, last


def weights(out: Path) -> dict[str, torch.Tensor]:
    """Everything of the finished run's SAE, training state included."""
    import saelab

    return saelab.load_run(out).sae.state_dict()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--source", choices=("lm", "tensor"), default="lm")
    parser.add_argument("--tokens", type=int, default=200_000)
    parser.add_argument("--d-sae", type=int, default=2048)
    parser.add_argument("--batch-size", type=int, default=2048)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--child", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        return child(args.child, args.source, args.tokens, args.d_sae, args.batch_size)

    rng = random.Random(args.seed)
    steps = -(-args.tokens // args.batch_size)
    kills = sorted(rng.uniform(0.02, 0.98) for _ in range(args.kills))
    rows: list[list[object]] = []
    with tempfile.TemporaryDirectory() as folder:
        whole, broken = Path(folder, "whole"), Path(folder, "broken")
        process = start(whole, args)
        first, last = follow(process)
        assert process.wait() == 0, "the uninterrupted run failed"
        rows.append(["uninterrupted", first, last, "-", "-"])
        for number, share in enumerate(kills, start=1):
            process = start(broken, args)
            first, last = follow(process, until=round(share * steps))
            delay = rng.uniform(0, 0.5)
            time.sleep(delay)
            process.send_signal(signal.SIGKILL)
            how = "killed" if process.wait() == -signal.SIGKILL else "had just ended"
            rows.append([f"kill {number}: {how}", first, last, f"{delay:.2f} s later", left_behind(broken)])
        process = start(broken, args)
        first, last = follow(process)
        assert process.wait() == 0, "the resumed run failed"
        rows.append(["resumed to the end", first, last, "-", "-"])
        one, other = weights(whole), weights(broken)
    same = {name: one[name].equal(other[name]) or bool((one[name].isnan() & other[name].isnan()).all()) for name in one}
    verdict = "bitwise equal" if one.keys() == other.keys() and all(same.values()) else f"DIFFERENT: {same}"
    workers.write_result(
        "resume.md",
        f"# Kill and resume ({args.source}, {args.tokens:,} tokens, d_sae {args.d_sae})\n\n"
        + workers.table(["what", "from step", "to step", "SIGKILL", "left behind"], rows)
        + f"\n\nFinal state of {len(one)} tensors: {verdict}. Seed {args.seed}. {workers.machine(args.threads)}.",
    )
    if verdict != "bitwise equal":
        sys.exit(1)


def left_behind(out: Path) -> str:
    """What the killed process left in the folder."""
    files = [path for path in out.rglob("*") if path.is_file()] if out.exists() else []
    return f"{len(files)} files, {sum(path.stat().st_size for path in files) / 2**20:.1f} MiB"


if __name__ == "__main__":
    main()
