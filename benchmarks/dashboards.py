"""What a dashboard costs: the collector's rate and memory, the time of a whole build against sae-dashboard, bytes a latent.

    python benchmarks/dashboards.py [collect] [build] [size] [--rounds 3] [--threads 1]

collect   made-up codes (16,384 latents, k 32, Zipf latents and tokens) through everything but the model's forward pass, the
          encoder's product and the decoder: grouping into shards, the figures of the index, then histograms, moments,
          token statistics and examples of every latent, or of 512 with co-activation over all. Tokens a second of processor
          time, on one thread.
build     512 latents, 200,000 tokens, effects off, of one random HookedTransformer and TopK SAE, by saelab and by
          sae-dashboard 0.8 in the environment that benchmarks/peers.sh makes; each in a process of its own, rounds interleaved.
size      bytes a latent of a single file on the bundled model and corpus, by chunk, and of the shell.

Milliseconds in Chromium, the index of a million latents included: benchmarks/dashboards_page.py.
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
import workers

import saelab
from saelab.dashboards.collecting import coactivation, collect, examples
from saelab.dashboards.collecting import latent_figures as figures
from saelab.dashboards.collecting.one_pass import Tile
from saelab.dashboards.writing import bundle
from saelab.pages.shell import shell

LENGTH, TILE = 256, 2048
PARTS = ("collect", "build", "size")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", default=[], metavar="PART", help="of collect, build, size (default: all)")
    parser.add_argument("--tokens", type=int, default=983_040, help="of collect")
    parser.add_argument("--d-sae", type=int, default=16_384)
    parser.add_argument("--k", type=int, default=32)
    parser.add_argument("--build-tokens", type=int, default=200_000)
    parser.add_argument("--latents", type=int, default=512)
    parser.add_argument("--d-model", type=int, default=512)
    parser.add_argument("--vocab", type=int, default=20_000)
    parser.add_argument("--sae", help="folder of an SAE for size (default: an untrained one at blocks.3)")
    parser.add_argument("--size-tokens", type=int, default=200_000)
    parser.add_argument(
        "--effects", default="none", help="of size: none, direct or full (slow: a backward pass a context)"
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", default="dashboards.md")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    lines = ["# Dashboards", ""]
    for part in args.parts or PARTS:
        lines += {"collect": collected, "build": built, "size": sized}[part](args)
        lines.append("")
    workers.write_result(args.out, "\n".join([*lines, workers.machine(args.threads)]))


def zipf(n: int, size: int, shift: float, generator: torch.Generator) -> torch.Tensor:
    """Numbers below n, the i-th as often as 1 / (i + shift)."""
    shares = 1 / (torch.arange(n) + shift)
    return torch.searchsorted((shares / shares.sum()).cumsum(0), torch.rand(size, generator=generator)).clamp(max=n - 1)


def tile(number: int, args: argparse.Namespace) -> Tile:
    generator = torch.Generator().manual_seed(number)
    latents = zipf(args.d_sae, TILE * args.k, 50, generator).view(TILE, args.k).sort(1).values.flatten().int()
    rows = torch.repeat_interleave(torch.arange(number * TILE, (number + 1) * TILE, dtype=torch.int32), args.k)
    values, near = (
        torch.rand(TILE * args.k, generator=generator) * 9 + 0.01,
        torch.rand(args.d_sae, generator=generator),
    )
    return Tile(rows, latents, values, torch.ones(TILE, dtype=torch.bool), torch.zeros(TILE, dtype=torch.uint8),
                torch.zeros(3, dtype=torch.float64), near,
                torch.full((args.d_sae,), number * TILE, dtype=torch.int32))  # fmt: skip


def paged(found: collect.Collection, ids: np.ndarray, chosen: np.ndarray, tokens: int) -> None:
    """What the pages of these latents take from the firings."""
    layout = examples.Layout.of(45, 48)
    for first in range(0, len(chosen), 64):
        latents = chosen[first : first + 64]
        firings = found.take(latents)
        (
            figures.histograms(firings),
            figures.moments(firings, tokens),
            figures.top_tokens(firings, ids, np.bincount(ids), 10),
        )
        examples.choose(found, latents, firings, layout, 0)


def collected(args: argparse.Namespace) -> list[str]:
    """Rates of the collector alone; making the codes up is not counted."""
    names = ["shards and index", "with a page for every latent", f"with {args.latents} pages, and co-activation"]
    rates: dict[str, list[float]] = {name: [] for name in names}
    ids = zipf(49_152, args.tokens, 3, torch.Generator().manual_seed(0)).int().numpy()
    per_shard = max(collect.SHARD_FIRINGS // args.k // TILE, 1)
    for _ in range(args.rounds):
        shards, spent = [], 0.0
        for first in range(0, args.tokens // TILE, per_shard):
            tiles = [tile(i, args) for i in range(first, min(first + per_shard, args.tokens // TILE))]
            start = time.process_time()
            batches = [collect._joined(tiles[i : i + 4]) for i in range(0, len(tiles), 4)]
            shards.append({name: tensor.numpy() for name, tensor in collect._transposed(batches, args.d_sae).items()})
            spent += time.process_time() - start
            del tiles, batches
        found = collect.Collection(args.d_sae, LENGTH, args.tokens // LENGTH, shards)
        start = time.process_time()
        figures.index(found, ids, np.ones(found.n_contexts, bool))
        spent += time.process_time() - start
        rates[names[0]].append(args.tokens / spent)
        for name, pages in zip(names[1:], (args.d_sae, args.latents), strict=True):
            chosen = examples.selected(pages, found.counts, 0)
            start = time.process_time()
            paged(found, ids, chosen, args.tokens)
            if pages == args.latents:
                coactivation.coactivation(found, chosen, np.ones(found.n_contexts, bool))
            rates[name].append(args.tokens / (spent + time.process_time() - start))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    rows = [[name, f"{statistics.median(r):,.0f}", f"{min(r):,.0f} to {max(r):,.0f}"] for name, r in rates.items()]
    table = workers.table(["collecting", "tokens/s of processor time, median", "range"], rows)
    setting = f"{args.tokens:,} tokens, {args.d_sae:,} latents, k {args.k}"
    note = f"{setting}; peak memory {peak / 2**30:.2f} GiB, the made-up codes too."
    return [table, "", note]


def built(args: argparse.Namespace) -> list[str]:
    """Seconds of a whole build by each library."""
    driver = Path(__file__).parent / "drivers" / "sae_dashboard_driver.py"
    python = workers.PEERS / "sae-dashboard" / "bin" / "python"
    if not python.exists():
        sys.exit(f"{python} is missing: make it with benchmarks/peers.sh sae-dashboard")
    found: dict[str, list[dict]] = {"saelab": [], "sae-dashboard": []}
    for _ in range(args.rounds):
        for who, answers in found.items():
            with tempfile.TemporaryDirectory() as folder:
                command = [python, driver, "--who", who, "--folder", folder, "--tokens", args.build_tokens,
                           "--latents", args.latents, "--d-sae", 4 * args.d_model, "--k", args.k,
                           "--d-model", args.d_model, "--vocab", args.vocab,
                           "--threads", args.threads]  # fmt: skip
                subprocess.run([str(part) for part in command], check=True, env=workers.environment(args.threads))
                answers.append(json.loads((Path(folder) / f"{who}.json").read_text()))
    seconds = {who: statistics.median(a["seconds"] for a in answers) for who, answers in found.items()}
    rows = [
        [f"{who} {answers[0]['version']}", f"{seconds[who]:.1f}", f"{answers[0]['bytes'] / args.latents:,.0f}"]
        for who, answers in found.items()
    ]
    note = f"{args.latents} latents, {args.build_tokens:,} tokens: {seconds['sae-dashboard'] / seconds['saelab']:.1f}x faster."
    return [workers.table(["build", "seconds, median", "bytes a latent, whole file"], rows), "", note]


def sized(args: argparse.Namespace) -> list[str]:
    """Bytes of a single file, by kind of chunk."""
    lm, corpus = saelab.load_model("smollm2-135m"), saelab.load_corpus("sotu")
    metadata = {"site": "blocks.3.hook_resid_post", "context_length": LENGTH}
    sae = saelab.SAE.load(args.sae) if args.sae else saelab.SAE(saelab.TopK(k=32, d_sae=4096), 576, metadata)
    with tempfile.TemporaryDirectory() as folder:
        page = saelab.dashboards.build(
            sae, lm, corpus, Path(folder) / "page.html", latents=args.latents, tokens=args.size_tokens,
            effects=None if args.effects == "none" else args.effects,
            evaluation=None, parquet=False, work=Path(folder) / "work",
        )  # fmt: skip
        manifest, _ = bundle.read(page.path)
    kinds: dict[str, int] = {}
    for name, (_, size, _) in manifest["chunks"].items():
        kinds[name.split("-")[0]] = kinds.get(name.split("-")[0], 0) + (size + 2) // 3 * 4
    rows = [[kind, f"{size:,}", f"{size / args.latents:,.0f}"] for kind, size in kinds.items()]
    rows.append(["all chunks", f"{sum(kinds.values()):,}", f"{sum(kinds.values()) / args.latents:,.0f}"])
    rows.append(["shell", f"{sum(len(piece.encode()) for piece in shell()):,}", ""])
    return [
        workers.table(["chunk", "bytes as base64", "a latent"], rows),
        "",
        f"{args.latents} latents, {args.size_tokens:,} tokens, effects {args.effects}.",
    ]


if __name__ == "__main__":
    main()
