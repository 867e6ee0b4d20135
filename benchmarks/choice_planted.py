"""Mutual Choice and Feature Choice against TopK on planted features, where tokens are uneven and where they are not.

    python benchmarks/choice_planted.py            resumable: a line of results/choice_planted.csv for each finished cell

256 features in 128 dimensions fire as often as their rank's inverse says, each with a strength between 0.5 and 1.5; a token
has 1 to 15 of them (uneven), or 8 (even). Three shapes: twice as many latents as features, as many, half as many. Every
token is new, held-out ones come from a seed of their own. Everything is at the package's defaults, the learning rates too:
they were not tuned, for any architecture.
"""

import argparse
import csv
import itertools
import statistics
from typing import Any

import torch
import workers
from torch import Tensor

import saelab
from saelab.base.codes import SparseCodes
from saelab.base.seeds import named_generator

FEATURES, D_IN, K = 256, 128, 8
KINDS = {"uneven": (1, 15), "even": (8, 8)}
SHAPES = (512, 256, 128)
SEEDS = range(5)
USEFUL = 1e-5  # of the variance, that leaving a latent out costs at least
RARE = 1e-3  # of the tokens
COLUMNS = ["tokens", "kind", "d_sae", "sae", "seed", "fvu", "l0", "silent", "useful", "rare", "rare_share", "unspent"]
CELLS, PAGE = workers.RESULTS / "choice_planted.csv", "choice_planted.md"
NOTES = """
`fvu` is the fraction of variance unexplained on {held_out:,} held-out tokens, `L0` measured there with the learnt thresholds.
A ratio is to TopK's of the same seed; the bars were set before: at most 0.8 where tokens are uneven, at most 1.05 where they
are even, on every seed, and L0 within 10% of k = {k}.

A silent latent fires on no held-out token; a useful one is worth at least {useful:g} of the
variance, which is what the error grows by when that latent alone is left out; a rare one fires on less than {rare:g} of the
tokens, and what such latents are worth together is a share of the explained variance.
"""


def saes(d_sae: int) -> dict[str, Any]:
    return {
        "TopK": saelab.TopK(k=K, d_sae=d_sae),
        "MutualChoice": saelab.MutualChoice(k=K, d_sae=d_sae),
        "FeatureChoice": saelab.FeatureChoice(k=K, d_sae=d_sae),
    }


def planted(kind: str, n: int, seed: int, part: str) -> Tensor:
    """Rows [n, D_IN]; the features are those of the seed, the tokens those of its part."""
    directions = torch.nn.functional.normalize(torch.randn(FEATURES, D_IN, generator=named_generator(f"{seed}")), dim=1)
    generator, (least, most) = named_generator(f"{kind} {seed} {part}"), KINDS[kind]
    weights = -torch.arange(1.0, FEATURES + 1).log()
    rows = []
    for start in range(0, n, 4096):
        size = min(4096, n - start)
        gumbel = -(-torch.rand(size, FEATURES, generator=generator).clamp_min(1e-30).log()).log()
        count = torch.randint(least, most + 1, (size, 1), generator=generator)
        chosen = (weights + gumbel).topk(most, dim=1).indices
        strength = (0.5 + torch.rand(size, most, generator=generator)) * (torch.arange(most) < count)
        rows.append(torch.zeros(size, FEATURES).scatter_(1, chosen, strength) @ directions)
    return torch.cat(rows)


def worth(sae: saelab.SAE, x: Tensor, codes: SparseCodes) -> Tensor:
    """By how much of the variance the error grows when each latent alone is left out [d_sae]."""
    error = x - sae.decode(codes)
    rows = sae.W_dec[codes.indices]
    aligned = (error[codes.rows()] * rows).sum(1)
    grows = 2 * codes.values * aligned + codes.values.square() * rows.square().sum(1)
    return torch.zeros(sae.d_sae).index_add_(0, codes.indices, grows) / (x - x.mean(0)).square().sum()


def cell(kind: str, d_sae: int, name: str, seed: int, tokens: int, held_out: int) -> dict[str, Any]:
    x = planted(kind, tokens, seed, "trained on")
    run = saelab.train(x, sae=saes(d_sae)[name], tokens=tokens, batch_size=2048, seed=seed, progress=False)
    sae, x = run.sae, planted(kind, held_out, seed, "held out")
    codes = sae.encode_sparse(x)
    error = (x - sae.decode(codes)).square().sum() / (x - x.mean(0)).square().sum()
    each, density = worth(sae, x, codes), codes.by_latent().offsets.diff() / len(x)
    rare = (density > 0) & (density < RARE)
    unspent = sae.cfg.unspent_share(sae.state) if isinstance(sae.cfg, saelab.FeatureChoice) else ""
    return {
        "tokens": tokens, "kind": kind, "d_sae": d_sae, "sae": name, "seed": seed, "fvu": float(error), "l0": codes.l0,
        "silent": int((density == 0).sum()), "useful": int((each >= USEFUL).sum()), "rare": int(rare.sum()),
        "rare_share": float(each[rare].sum() / (1 - error)), "unspent": unspent,
    }  # fmt: skip


def finished(tokens: int) -> list[dict[str, str]]:
    with CELLS.open() as file:
        return [row for row in csv.DictReader(file) if int(row["tokens"]) == tokens]


def page(tokens: int, held_out: int) -> str:
    rows, table = finished(tokens), []
    fvu = {(r["kind"], r["d_sae"], r["sae"], r["seed"]): float(r["fvu"]) for r in rows}
    for kind, d_sae, name in itertools.product(KINDS, SHAPES, saes(SHAPES[0])):
        own = [r for r in rows if (r["kind"], r["d_sae"], r["sae"]) == (kind, str(d_sae), name)]
        ratios = [float(r["fvu"]) / fvu[kind, r["d_sae"], "TopK", r["seed"]] for r in own]
        if not ratios:
            continue
        mean = {column: statistics.mean(float(r[column]) for r in own) for column in COLUMNS[5:11]}
        bar = 0.8 if kind == "uneven" else 1.05
        met = "" if name == "TopK" else "yes" if max(ratios) <= bar and abs(mean["l0"] / K - 1) <= 0.1 else "no"
        table.append([
            kind, d_sae, name, len(own), f"{mean['fvu']:.4f}",
            f"{statistics.mean(ratios):.3f} ({min(ratios):.3f} to {max(ratios):.3f})", f"{mean['l0']:.2f}",
            f"{mean['silent']:.0f}", f"{mean['useful']:.0f}", f"{mean['rare']:.0f}", f"{mean['rare_share']:.2%}", met,
        ])  # fmt: skip
    head = ["tokens", "latents", "SAE", "seeds", "fvu", "ratio to TopK (range)", "L0"]
    head += ["silent", "useful", "rare", "worth of the rare", "bar met"]
    notes = NOTES.format(held_out=held_out, k=K, useful=USEFUL, rare=RARE)
    title = f"# Mutual Choice and Feature Choice on planted features\n\n{tokens:,} tokens a run, means over seeds."
    return f"{title}\n{notes}\n{workers.table(head, table)}\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=400_000)
    parser.add_argument("--held-out", type=int, default=100_000)
    parser.add_argument("--seeds", type=int, nargs="*", default=list(SEEDS))
    options = parser.parse_args()
    if not CELLS.exists():
        CELLS.write_text(",".join(COLUMNS) + "\n")
    done = {(r["kind"], int(r["d_sae"]), r["sae"], int(r["seed"])) for r in finished(options.tokens)}
    every = itertools.product(options.seeds, KINDS, SHAPES, saes(SHAPES[0]))
    for seed, kind, d_sae, name in (one for one in every if (one[1], one[2], one[3], one[0]) not in done):
        row = cell(kind, d_sae, name, seed, options.tokens, options.held_out)
        with CELLS.open("a", newline="") as file:
            csv.DictWriter(file, COLUMNS).writerow(row)
        print(row, flush=True)
    workers.write_result(PAGE, page(options.tokens, options.held_out))


if __name__ == "__main__":
    main()
