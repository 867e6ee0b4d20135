"""What a steering hook costs while generating, and what batching gains a sweep.

    python benchmarks/steering.py [--rounds 9] [--tokens 64] [--d-sae 4096]

Hook: `lm.generate` on SmolLM2-135M, greedy, with the key-value cache, plain and under `lm.steer` with operations that
change nothing (add 0, cap at infinity), so that every way writes the same tokens and the difference is the hook's.
add reads no codes while it runs; cap encodes each position. The receipt's own encoding (latent before and after) is
within the time. Rounds are interleaved, ratios paired by round.

Sweep: the same `steering.sweep` with rows batched and with `batch_size=1`, which is prompt by prompt: the same texts,
the same measures. Tokens are those generated.
"""

import argparse
import os
import statistics
import time
from collections.abc import Callable
from importlib.metadata import version

import torch
import workers

import saelab
from saelab import steering
from saelab.models.generation import generate_ids

PROMPTS = [
    "The state of the union is", "My fellow citizens,", "The economy", "We ask the Congress", "In the last year",
    "Our schools and colleges", "The army and the navy", "Peace with all nations",
]  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layer", type=int, default=12, help="the site is blocks.LAYER.hook_resid_post")
    parser.add_argument("--tokens", type=int, default=64, help="new tokens of each text")
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 8], help="prompts generated together")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--d-sae", type=int, default=4096)
    parser.add_argument("--sweep-latents", type=int, default=4)
    parser.add_argument("--sweep-strengths", type=int, default=4)
    parser.add_argument("--sweep-tokens", type=int, default=20)
    parser.add_argument("--sweep-rounds", type=int, default=2)
    parser.add_argument("--batch-size", type=int, default=32, help="of the sweep")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--out", default="steering.md", help="file name under benchmarks/results/")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    machine = workers.machine(args.threads)

    lm = saelab.load_model("smollm2-135m")
    site = f"blocks.{args.layer}.hook_resid_post"
    sae = autoencoder(lm, site, args.d_sae)
    text = (
        "# Steering\n\n## A hook while generating\n\n"
        + hook_table(lm, sae, args)
        + f"\n\n{args.tokens} new tokens a text, greedy, with cache, at {site} with {args.d_sae:,} latents; "
        + f"{args.rounds} interleaved rounds, ratios paired by round.\n\n## A sweep, batched and prompt by prompt\n\n"
        + sweep_table(lm, sae, args)
        + f"\n\n{machine}, transformers {version('transformers')}."
    )
    workers.write_result(args.out, text)


def autoencoder(lm: saelab.LanguageModel, site: str, d_sae: int) -> saelab.SAE:
    """An untrained TopK SAE about the mean of a few texts: it costs what a trained one does."""
    x = lm.record(PROMPTS, site)[lm.tokenize(PROMPTS).mask]
    median = float(x[1:].norm(dim=1).median())
    sae = saelab.SAE(
        saelab.TopK(k=32, d_sae=d_sae), d_in=x.shape[1], metadata={"site": site, "median_norm": median}
    )  # fmt: skip
    with torch.no_grad():
        sae.decoder_bias.copy_(x[1:].mean(0))
    return sae


def hook_table(lm: saelab.LanguageModel, sae: saelab.SAE, args: argparse.Namespace) -> str:
    """Milliseconds a step and the ratio to the plain model, for each number of rows."""
    operations = {
        "plain": None,
        "add": steering.add(sae, 0, strength=0.0, unit="activation"),
        "cap (reads the codes)": steering.cap(sae, 0, strength=float("inf"), unit="activation"),
    }
    rows = []
    for n in args.rows:
        tokens = lm.tokenize(PROMPTS[:n])
        seconds: dict[str, list[float]] = {name: [] for name in operations}
        texts = {}
        for i in range(-1, args.rounds):  # the first round warms up
            for name, operation in operations.items():
                start = time.perf_counter()
                texts[name] = generated(lm, tokens, operation, args.tokens)
                if i >= 0:
                    seconds[name].append(time.perf_counter() - start)
            print(f"{n} rows, round {i + 1} of {args.rounds}", flush=True)
        assert all(text == texts["plain"] for text in texts.values())
        steps = max(map(len, texts["plain"]))
        for name, times in seconds.items():
            ratios = [own / plain for own, plain in zip(times, seconds["plain"], strict=True)]
            spread = f"{min(ratios):.3f} to {max(ratios):.3f}"
            rows.append(
                [n, name, f"{statistics.median(times) / steps * 1e3:.2f}", f"{statistics.median(ratios):.3f}", spread]
            )
    return workers.table(["rows", "operation", "ms a step, median", "against plain, median", "range"], rows)


def generated(lm: saelab.LanguageModel, tokens: saelab.Tokens, operation: steering.Operation | None, n: int) -> list:
    if operation is None:
        return generate_ids(lm, tokens, n, temperature=0)
    with lm.steer(operation):
        return generate_ids(lm, tokens, n, temperature=0)


def sweep_table(lm: saelab.LanguageModel, sae: saelab.SAE, args: argparse.Namespace) -> str:
    """Tokens a second of the same sweep in both ways."""
    strengths = [0.1 * (i + 1) for i in range(args.sweep_strengths)]

    def run(batch_size: int) -> tuple[int, float]:
        start = time.perf_counter()
        table = steering.sweep(
            lm, sae, list(range(args.sweep_latents)), ["add"], strengths, PROMPTS, unit="residual_norm", draws=1,
            max_new_tokens=args.sweep_tokens, batch_size=batch_size, progress=False,
        ).to_pandas()  # fmt: skip
        seconds = time.perf_counter() - start
        return sum(len(lm.tokenize(text).ids[0]) for text in table.text if text), seconds

    ways: dict[str, Callable[[], tuple[int, float]]] = {
        f"batches of {args.batch_size}": lambda: run(args.batch_size),
        "prompt by prompt": lambda: run(1),
    }
    rates: dict[str, list[float]] = {name: [] for name in ways}
    for i in range(args.sweep_rounds):
        for name, way in ways.items():
            tokens, seconds = way()
            rates[name].append(tokens / seconds)
            print(f"sweep, round {i + 1} of {args.sweep_rounds}: {name} {tokens} tokens in {seconds:.1f} s", flush=True)
    slow = rates["prompt by prompt"]
    rows = [
        [name, f"{statistics.median(rate):,.1f}", f"{min(rate):,.1f} to {max(rate):,.1f}"]
        + [f"{statistics.median(a / b for a, b in zip(rate, slow, strict=True)):.2f}x"]
        for name, rate in rates.items()
    ]
    return workers.table(["way", "tokens/s, median", "range", "against prompt by prompt"], rows)


if __name__ == "__main__":
    main()
