"""What the model loses when trained SAEs stand in for their site, by held-out document: the `downstream` study.

Clean pass and gradients are shared by all SAEs of a site; every SAE sees the same contexts, the first ones of each document.
"""

import time
from collections.abc import Sequence
from typing import Any

import torch
from architectures_data import FINISHED, Cell, read_row, write_row
from torch import Tensor

import saelab
from saelab.autoencoders.architectures.gradient import GradientTopK, select_with_gradient
from saelab.evaluation.passes import context_ce, context_kl, putting
from saelab.models.sites import run_recording
from saelab.models.tokens import Tokens

BATCH = 4
RESULTS = FINISHED / "downstream"


def measure(studies: Sequence[str], modes: Sequence[str], per_document: int, seeds: Sequence[int]) -> None:
    """Write a file for each SAE and mode that has none yet; the SAEs of one site and seed run together."""
    lm, corpus = saelab.load_model("smollm2-135m"), saelab.load_corpus("sotu", seed=0)
    contexts = corpus.contexts(lm, 256, "heldout")
    documents = contexts.documents[:, 0]
    chosen = torch.cat([(documents == d).nonzero().flatten()[:per_document] for d in documents.unique() if d >= 0])
    groups: dict[tuple[str, int], list[tuple[Cell, str]]] = {}
    for path in sorted(FINISHED.glob("*.json.gz")):
        fields = read_row(path)
        cell = Cell(**{name: fields[name] for name in Cell.__dataclass_fields__})
        if cell.study not in studies or cell.seed not in seeds or cell.rows != "ordinary":
            continue
        for mode in modes:
            plain = mode == "plain"
            if (plain or "beta" in cell.label) and not target(cell, mode, len(chosen)).exists():
                groups.setdefault((cell.site, cell.seed), []).append((cell, mode))
    for (site, _), cells in groups.items():
        started = time.time()
        _group(lm, site, cells, contexts.ids[chosen].long(), contexts.mask[chosen], documents[chosen], chosen)
        print(f"{site}: {len(cells)} splices in {time.time() - started:.0f} s", flush=True)


def target(cell: Cell, mode: str, n: int) -> Any:
    """The file of an SAE's result on n contexts."""
    return RESULTS / f"{cell.name}-{mode}-{n}.json.gz"


def _group(
    lm: Any, site: str, cells: list[tuple[Cell, str]], ids: Tensor, mask: Tensor, documents: Tensor, numbers: Tensor
) -> None:
    saes = {cell: saelab.SAE.load(cell.sae_path) for cell, _ in cells}
    sums: dict[tuple[Cell, str], dict[str, list[Tensor]]] = {pair: {"ce": [], "kl": [], "fired": []} for pair in cells}
    clean_ce, late = [], torch.arange(ids.shape[1]) >= 1
    modes = {mode for _, mode in cells}
    for start in range(0, len(ids), BATCH):
        rows = slice(start, start + BATCH)
        real, inputs = mask[rows], Tokens(ids[rows], torch.ones_like(mask[rows]))
        x_BPD = lm.record(inputs, site)
        slopes = {
            mode: run_recording(
                lm,
                inputs,
                [lm.site(site)],
                gradients=True,
                label_seeds=numbers[rows].tolist() if mode == "grad_model" else None,
            )[1][site]
            for mode in modes - {"plain"}
        }
        with torch.no_grad():
            clean = lm.logits(inputs)
            clean_ce.append(context_ce(clean, inputs.ids, real))
            for cell, mode in cells:
                sae = saes[cell]
                replaced = real & late & sae.replaceable(x_BPD)
                x = x_BPD[replaced]
                codes = sae.encode_sparse(x) if mode == "plain" else _chosen(sae, x, slopes[mode][replaced])
                with lm.intervene(site, putting(sae.decode(codes), replaced)):
                    spliced = lm.logits(inputs)
                found = sums[cell, mode]
                found["ce"].append(context_ce(spliced, inputs.ids, real) - clean_ce[-1])
                found["kl"].append(context_kl(clean, spliced, real))
                found["fired"].append(torch.tensor([len(codes.values) / max(len(x), 1)]))
    for (cell, mode), found in sums.items():
        row = {
            **cell.__dict__,
            "mode": mode,
            "documents": documents.tolist(),
            "targets": mask[:, 1:].sum(1).tolist(),
            "positions": mask.sum(1).tolist(),
            "clean_ce": torch.cat(clean_ce).double().numpy(),
            "delta_ce": torch.cat(found["ce"]).double().numpy(),
            "kl": torch.cat(found["kl"]).double().numpy(),
            "l0": float(torch.cat(found["fired"]).mean()),
        }
        write_row(target(cell, mode, len(ids)), row)


def _chosen(sae: Any, x: Tensor, slope: Tensor) -> Any:
    assert isinstance(sae.cfg, GradientTopK)
    return select_with_gradient(sae, x, slope)
