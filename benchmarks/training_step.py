"""The TopK training step of saelab against the peers and against the encoder's fp32 product alone.

    python benchmarks/training_step.py                 on an idle machine; benchmarks/peers.sh first

Every library sits in a process and an environment of its own and is handed the same four batches in turn. The rounds
are interleaved (each round times a few steps of every library, one library at a time), so that a slow minute of the
machine hits all of them. No latent counts as dead within these steps for any library (schedules are set for 10,000
steps), so no auxiliary loss is in the times. Medians over all steps; memory is the peak resident memory of the
library's process, imports included. In the last fifth of a run saelab also keeps the statistics of its latents: a line
of its own.
"""

import argparse
import os
import statistics
import time
from contextlib import ExitStack

import workers

VARIANTS = {  # label -> (driver, variables)
    "encoder product, W [d_in, d_sae]": ("encoder-product", {}),
    "encoder product, W [d_sae, d_in]": ("encoder-product", {"LAYOUT": "transposed"}),
    "saelab, fp32 product": ("saelab", {"SHORTLIST": "off"}),
    "saelab, bf16 shortlist": ("saelab", {"SHORTLIST": "on"}),
    "saelab, last fifth of a run": ("saelab", {"PART": "last"}),
    "sae-lens": ("sae-lens", {}),
    "dictionary-learning": ("dictionary-learning", {}),
    "sparsify": ("sparsify", {}),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=4096)
    parser.add_argument("--d-in", type=int, default=768)
    parser.add_argument("--d-sae", type=int, default=16384)
    parser.add_argument("--k", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--steps", type=int, default=3, help="steps of each library in a round")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--only", nargs="+", default=list(VARIANTS), metavar="LABEL", help=f"of {list(VARIANTS)}")
    parser.add_argument("--out", default="training_step.md", help="file name under benchmarks/results/")
    args = parser.parse_args()

    machine = workers.machine(args.threads)
    seconds: dict[str, list[float]] = {label: [] for label in args.only}
    versions: dict[str, str] = {}
    imported: dict[str, float] = {}
    peak: dict[str, float] = {}
    with ExitStack() as stack:
        live = {}
        for label in args.only:
            driver, variables = VARIANTS[label]
            worker = stack.enter_context(workers.Worker(driver, args.threads, **variables))
            versions |= worker.ask("versions")
            built = worker.ask("build", d_in=args.d_in, d_sae=args.d_sae, k=args.k, batch_size=args.batch, steps=10_000)
            imported[label] = built["imported_bytes"]
            worker.ask("steps", count=2)  # initialisation from the first batch, kernels' first calls
            live[label] = worker
        for i in range(args.rounds):
            for label, worker in live.items():
                time.sleep(0.5)  # the threads of the one before have gone to sleep
                seconds[label] += worker.ask("steps", count=args.steps)["seconds"]
            print(f"round {i + 1} of {args.rounds}", *(f"{label} {seconds[label][-1]:.3f}" for label in live), sep="; ")
        for label, worker in live.items():
            peak[label] = worker.ask("memory")["peak_bytes"]

    median = {label: statistics.median(times) for label, times in seconds.items()}
    products = [t for label, t in median.items() if label.startswith("encoder product")]
    ours = [label for label in median if label in ("saelab, fp32 product", "saelab, bf16 shortlist")]
    rows = []
    for label, t in median.items():
        spread = f"{min(seconds[label]) * 1e3:.0f} to {max(seconds[label]) * 1e3:.0f}"
        against = [f"{t / median[us]:.2f}x" for us in ours]
        share = f"{peak[label] / peak['sae-lens']:.2f}x" if "sae-lens" in peak else "-"
        rows.append(
            [label, f"{t * 1e3:.0f}", spread, f"{args.batch / t:,.0f}"]
            + [f"{t / min(products):.2f}x" if products else "-", *against]
            + [f"{peak[label] / 2**20:,.0f}", f"{imported[label] / 2**20:,.0f}", share]
        )
    header = ["step", "ms, median", "ms, range", "tokens/s", "against the faster product"]
    header += [f"time against {us}" for us in ours] + ["peak MiB", "of it after imports", "peak against sae-lens"]
    text = (
        f"# TopK training step: batch {args.batch}, d_in {args.d_in}, d_sae {args.d_sae}, k {args.k}\n\n"
        + workers.table(header, rows)
        + f"\n\n{args.rounds} interleaved rounds of {args.steps} steps, after 2 to warm up. {machine}. "
        + ", ".join(f"{name} {number}" for name, number in sorted(versions.items()))
        + "."
    )
    workers.write_result(args.out, text)


if __name__ == "__main__":
    main()
