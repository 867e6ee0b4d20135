"""How long direct attribution takes: `python benchmarks/attention.py`.

One latent of an attention layer over one prompt of 256 tokens, beside the model's own forward pass to the end of that layer's
attention. The autoencoder is untrained: attribution costs what a trained one's does. Rounds are interleaved.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
import workers

import saelab
from saelab.analysis import attention
from saelab.analysis.circuits import recursive_dfa


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--blocks", type=int, nargs="+", default=[2, 17])
    parser.add_argument("--d-sae", type=int, default=2048)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", default="attention_speed.md", help="file name under benchmarks/results/")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    machine = workers.machine(args.threads)

    lm = saelab.load_model("smollm2-135m")
    ids = saelab.load_corpus("sotu").contexts(lm, args.tokens).ids[:1]
    rows = [row for block in args.blocks for row in timed(lm, ids, block, args)]
    text = (
        "# Direct attribution\n\nOne prompt; milliseconds beyond the plain forward pass that stops where that layer's "
        "`hook_attn_out` is known, paired by round.\n\n"
        + workers.table(["block", "what", "ms in all, median", "ms beyond the pass, median", "largest"], rows)
        + f"\n\n{args.tokens} tokens, {args.d_sae:,} latents an SAE, {args.rounds} rounds after one that warms up. {machine}."
    )
    workers.write_result(args.out, text)


def timed(lm: saelab.LanguageModel, ids: torch.Tensor, block: int, args: argparse.Namespace) -> list[list[Any]]:
    """One row for each way of attributing at this block."""
    sae = autoencoder(lm, f"blocks.{block}.attn.hook_z", args.d_sae)
    residual = autoencoder(lm, f"blocks.{block}.hook_resid_pre", args.d_sae)
    last = ids.shape[1] - 1
    ways: dict[str, Callable[[], object]] = {
        "the forward pass": lambda: lm.record(ids, f"blocks.{block}.hook_attn_out"),
        "by source and head": lambda: attention.direct_attribution(sae, lm, ids, latent=7),
        "by feature of the stream, one destination": lambda: attention.feature_attribution(
            sae, lm, ids, 7, residual, [last]
        ),
        "a circuit of depth 2": lambda: recursive_dfa.trace(sae, lm, ids, 7, last, saes=[residual]),
    }
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for i in range(-1, args.rounds):  # the first round warms up
        for name, way in ways.items():
            start = time.perf_counter()
            way()
            if i >= 0:
                seconds[name].append(time.perf_counter() - start)
        print(f"block {block}, round {i + 1} of {args.rounds}", flush=True)
    plain = seconds["the forward pass"]
    rows = []
    for name, times in seconds.items():
        beyond = [own - base for own, base in zip(times, plain, strict=True)]
        rows.append(
            [
                block,
                name,
                *(f"{x * 1e3:.1f}" for x in (statistics.median(times), statistics.median(beyond), max(beyond))),
            ]
        )
    return rows


def autoencoder(lm: saelab.LanguageModel, name: str, d_sae: int) -> saelab.SAE:
    """An untrained SAE of a site."""
    site = lm.site(name)
    heads = [site.heads, site.d_head] if site.heads else None
    return saelab.SAE(saelab.TopK(k=32, d_sae=d_sae), site.width, {"site": name, "heads": heads})


if __name__ == "__main__":
    main()
