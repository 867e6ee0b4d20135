"""The architectures side by side on SmolLM2: one study a call, a file for each finished cell, resumable.

    python benchmarks/architectures.py choice --k 16 --seeds 0 1 2
    python benchmarks/architectures.py gradient --seeds 0 1 2 3 4
    python benchmarks/architectures.py jumprelu
    python benchmarks/architectures.py revival --seeds 0 1 2
    python benchmarks/architectures.py baselines --seeds 0
    python benchmarks/architectures.py downstream --studies gradient
    python benchmarks/architectures.py report

Seeds (of initialisation and data order) were fixed beforehand; nothing is chosen after looking at held-out rows.
"""

import argparse
import time
from typing import Any

import torch
from architectures_data import MAX_NORM, SITES, Cell, Heldout, stores, train_group

import saelab
from saelab.training.norms import NormFilter

TOKENS, DISTINCT, DISTINCT_GRADIENTS = 1_000_000, 500_000, 100_000
STAGES = (0.25, 0.5, 1.0)
BETAS = (0.3, 1.0, 3.0)


def configurations(study: str, k: int, d_sae: int) -> dict[str, Any]:
    """The SAEs of a study, by label."""
    if study == "choice":
        return {
            "TopK": saelab.TopK(k=k, d_sae=d_sae),
            "MutualChoice": saelab.MutualChoice(k=k, d_sae=d_sae),
            "FeatureChoice": saelab.FeatureChoice(k=k, d_sae=d_sae),
        }
    if study == "gradient":
        betas = {f"beta={beta:g}": saelab.GradientTopK(k=k, d_sae=d_sae, beta=beta) for beta in BETAS}
        shuffled = {"beta=1 shuffled": saelab.GradientTopK(k=k, d_sae=d_sae, beta=1.0)}
        return {"TopK": saelab.TopK(k=k, d_sae=d_sae)} | betas | shuffled
    if study == "jumprelu":
        return {
            f"start={factor:g}x": saelab.JumpReLU(target_l0=k, d_sae=d_sae, start_factor=factor) for factor in (0.25, 4)
        }
    if study == "revival":
        zipf = saelab.MutualChoice(k=k, d_sae=d_sae, aux="zipf")
        return {
            "none": saelab.MutualChoice(k=k, d_sae=d_sae, aux_coefficient=0.0),
            "aux_k": saelab.MutualChoice(k=k, d_sae=d_sae),
            "aux_zipf": zipf,
        }
    return {
        "TopK": saelab.TopK(k=k, d_sae=d_sae),
        "MultiTopK": saelab.MultiTopK(k=k, d_sae=d_sae),
        "Matryoshka": saelab.Matryoshka(k=k, d_sae=d_sae),
        "JumpReLU": saelab.JumpReLU(target_l0=k, d_sae=d_sae),
        "ReLU": saelab.ReLU(l1=5.0, d_sae=d_sae),
        "ReLU attention": saelab.ReLU.attention_output(l1=5.0, d_sae=d_sae),
        "Gated": saelab.Gated(l1=5.0, d_sae=d_sae),
    }


def run(study: str, site: str, rows: str, k: int, seed: int, options: argparse.Namespace) -> None:
    """Train and score the cells of one group that are not there yet."""
    d_sae = options.d_sae or (16_384 if study == "revival" else 4096)
    configs = configurations(study, k, d_sae)
    cells = {label: Cell(study, site, rows, label, k, seed, d_sae, options.tokens) for label in configs}
    missing = [label for label, cell in cells.items() if not cell.path.exists()]
    if not missing:
        return
    started = time.time()
    gradients = study == "gradient"
    distinct = min(DISTINCT_GRADIENTS if gradients else DISTINCT, options.tokens)
    store = stores("gradients" if gradients else "train", distinct)[site]
    columns = [{"x": store} for _ in missing]
    if gradients:
        # the control: every row gets the gradient of another one
        shuffled = store.gradients[torch.randperm(len(store), generator=torch.Generator().manual_seed(seed))]
        for column, label in zip(columns, missing, strict=True):
            if label != "TopK":
                column["gradient"] = shuffled if "shuffled" in label else store.gradients
    norms = NormFilter(MAX_NORM if rows == "ordinary" else None, store.d_in)
    for start in range(0, len(store), 65_536):
        norms.see(store[start : start + 65_536])
    heldout = Heldout(stores("heldout", 200_000)[site], norms.limit)

    budget = k if study in ("choice", "revival") else None
    saes, found = train_group(
        columns,
        [configs[label] for label in missing],
        tokens=options.tokens,
        batch_size=options.batch,
        seed=seed,
        max_norm=MAX_NORM if rows == "ordinary" else None,
        stages=STAGES if study == "choice" else (1.0,),
        score=lambda i, sae: heldout.score(sae, budget),
        metadata={**store.metadata, "max_norm": MAX_NORM if rows == "ordinary" else None, "seed": seed},
        lr_times=4.0 if study == "revival" else 1.0,
        b_dec_zero=study == "revival",
    )
    for label, sae, stages in zip(missing, saes, found, strict=True):
        sae.save(cells[label].sae_path)
        cells[label].write(
            stages,
            distinct=len(store),
            heldout_rows=len(heldout.x_ND),
            variation=heldout.variation.tolist(),
            unspent=sae.cfg.unspent_share(sae.state) if isinstance(sae.cfg, saelab.FeatureChoice) else None,
        )
        last = stages[-1]
        print(f"{cells[label].name}: L0 {last['l0']:.2f}, FVU {last['fvu']:.4f}, silent {last['silent']}", flush=True)
    print(f"  {time.time() - started:.0f} s", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "study", choices=["choice", "gradient", "jumprelu", "revival", "baselines", "downstream", "report"]
    )
    parser.add_argument("--sites", nargs="+", default=[SITES[0]], choices=SITES)
    parser.add_argument("--rows", nargs="+", default=["ordinary"], choices=["ordinary", "all"])
    parser.add_argument("--k", nargs="+", type=int)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--tokens", type=int, default=TOKENS)
    parser.add_argument("--d-sae", type=int)
    parser.add_argument("--batch", type=int, default=4096)
    parser.add_argument("--studies", nargs="+", default=["gradient"], help="whose SAEs are spliced into the model")
    parser.add_argument("--modes", nargs="+", default=["plain"], choices=["plain", "grad_model", "grad_true"])
    parser.add_argument("--contexts", type=int, default=3, help="held-out contexts of each document, downstream")
    options = parser.parse_args()
    if options.study == "report":
        from architectures_report import write

        write()
        return
    if options.study == "downstream":
        from architectures_downstream import measure

        measure(options.studies, options.modes, options.contexts, options.seeds)
        return
    default = {"jumprelu": [8, 16, 32, 64], "revival": [8]}.get(options.study, [16])
    for k in options.k or default:
        for seed in options.seeds:
            for site in options.sites:
                for rows in options.rows:
                    run(options.study, site, rows, k, seed, options)


if __name__ == "__main__":
    main()
