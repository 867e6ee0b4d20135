"""Rows, groups of SAEs trained on the same batches, and their scores on held-out rows: what architectures.py runs.

Shapes: N rows, D inputs, F latents.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import workers
from torch import Tensor

import saelab
from saelab.autoencoders.architecture import Architecture, Batch
from saelab.autoencoders.codes import SparseCodes
from saelab.training.schedule import Schedule
from saelab.training.sources import RowSource
from saelab.training.step import Trainer

SITES = ("blocks.3.hook_resid_post", "blocks.2.attn.hook_z")
MAX_NORM = 4.0
FOLDER = workers.CACHE / "architectures"
CHUNK = 8192


def stores(kind: str, tokens: int) -> dict[str, Any]:
    """Harvested rows of both sites: "train", "heldout" (all that the split has) or "gradients"; made on the first call."""
    lm, corpus = saelab.load_model("smollm2-135m"), saelab.load_corpus("sotu", seed=0)
    return saelab.harvest(
        lm, corpus, sites=SITES, tokens=tokens, split="heldout" if kind == "heldout" else "train",
        gradients=kind == "gradients", batch_size=4 if kind == "gradients" else 8, out=FOLDER / "rows" / f"{kind}-{tokens}",
    )  # fmt: skip


class Heldout:
    """Held-out rows [N, D] of one site, all or those within `MAX_NORM` times the training rows' median norm."""

    def __init__(self, store: Any, limit: float) -> None:
        x = store[:]
        keep = torch.linalg.vector_norm(x, dim=1) <= limit
        self.x_ND = x[keep]
        self.names, self.context_N = store.contexts[:][keep].long().unique(return_inverse=True)
        self.variation = self._by_context((self.x_ND - self.x_ND.mean(0)).double().square().sum(1))

    def _by_context(self, values_N: Tensor) -> np.ndarray:
        return torch.zeros(len(self.names), dtype=torch.float64).index_add_(0, self.context_N, values_N).numpy()

    def score(self, sae: Any, l0: float | None = None) -> dict[str, Any]:
        """L0, silent latents and squared error by context; with `l0` also at a common factor on all thresholds that
        makes the mean L0 just that."""
        with torch.no_grad():
            codes = [sae.encode_sparse(rows) for rows in self.x_ND.split(CHUNK)]
            found = self._scored(sae, codes)
            if l0 is not None and sae.cfg.thresholds(sae.state) is not None:
                equal = self._scored(sae, at_l0(sae, self.x_ND, l0))
                found |= {"equal_" + name: value for name, value in equal.items()}
        return found

    def _scored(self, sae: Any, parts: list[SparseCodes]) -> dict[str, Any]:
        error_N = torch.cat(
            [
                (rows - sae.decode(codes)).square().sum(1).double()
                for rows, codes in zip(self.x_ND.split(CHUNK), parts, strict=True)
            ]
        )
        fires = sum(torch.bincount(codes.indices, minlength=sae.d_sae) for codes in parts)
        error = self._by_context(error_N)
        n = len(self.x_ND)
        return {
            "l0": float(fires.sum()) / n,
            "fvu": float(error.sum() / self.variation.sum()),
            "silent": int((fires == 0).sum()),
            "rare": int((fires < 1e-4 * n).sum()),
            "error": error,
        }


def at_l0(sae: Any, x_ND: Tensor, l0: float) -> list[SparseCodes]:
    """The codes when all thresholds are multiplied by the one factor that gives a mean L0 of `l0`."""
    params, cut = sae.params(), sae.cfg.thresholds(sae.state)
    parts, ratios = [], []
    for rows in x_ND.split(CHUNK):
        scaled = rows * sae.state.scale
        codes = sae.cfg.scores(params, Batch(scaled, scaled)).above(0.5 * cut)
        ratios.append(codes.values / (cut[codes.indices] if cut.ndim else cut))
        parts.append(codes.with_values(codes.values / sae.state.scale))
    ratio = torch.cat(ratios)
    wanted = min(len(ratio), round(l0 * len(x_ND)))
    edge = ratio.kthvalue(len(ratio) - wanted + 1).values
    return [codes.where(part >= edge) for codes, part in zip(parts, ratios, strict=True)]


@dataclass(frozen=True)
class Cell:
    """One SAE of the tables; its files are named by its fields."""

    study: str
    site: str
    rows: str  # "ordinary" or "all"
    label: str
    k: int
    seed: int
    d_sae: int
    tokens: int

    @property
    def name(self) -> str:
        """As a file's."""
        label = self.label.replace(" ", "-")
        return f"{self.study}-{self.site}-{self.rows}-{label}-k{self.k}-f{self.d_sae}-n{self.tokens}-s{self.seed}"

    @property
    def path(self) -> Path:
        return FOLDER / "cells" / f"{self.name}.json"

    @property
    def sae_path(self) -> Path:
        return FOLDER / "saes" / self.name

    def write(self, stages: list[dict[str, Any]], **more: Any) -> None:
        """The row of a finished cell; what scores hold by context goes with it."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        plain = [{k: v.tolist() if isinstance(v, np.ndarray) else v for k, v in stage.items()} for stage in stages]
        temporary = self.path.with_suffix(".tmp")
        temporary.write_text(json.dumps({**self.__dict__, **more, "stages": plain}))
        temporary.replace(self.path)


def train_group(
    columns: Sequence[dict[str, Any]],
    cfgs: Sequence[Architecture],
    *,
    tokens: int,
    batch_size: int,
    seed: int,
    max_norm: float | None,
    stages: Sequence[float],
    score: Callable[[int, Any], dict[str, Any]],
    metadata: dict[str, Any],
    lr_times: float = 1.0,
    b_dec_zero: bool = False,
) -> tuple[list[Any], list[list[dict[str, Any]]]]:
    """Train SAEs on the same batches, one column set each (they differ in their gradients only), scored at `stages`."""
    schedule = Schedule(tokens, batch_size)
    union = {f"{i}.{name}": column for i, each in enumerate(columns) for name, column in each.items() if name != "x"}
    source = RowSource({"x": columns[0]["x"]} | union, seed, max_norm, say=lambda message: None)
    saes = [saelab.SAE(cfg, source.widths["x"], metadata=metadata, seed=seed) for cfg in cfgs]
    trainers = [Trainer(sae, schedule) for sae in saes]
    sample = source.sample(32_768)
    for trainer in trainers:
        trainer.lr *= lr_times
        trainer.initialise({"x": sample["x"]})
        if b_dec_zero:
            trainer.sae.decoder_bias.data.zero_()
    found: list[list[dict[str, Any]]] = [[] for _ in saes]
    at = {max(1, round(stage * schedule.steps)): stage for stage in stages}
    for step in range(schedule.steps):
        rows = source.next(schedule.rows(step))
        for i, trainer in enumerate(trainers):
            mine = {"x": rows["x"]} | {
                name.partition(".")[2]: column for name, column in rows.items() if name.startswith(f"{i}.")
            }
            trainer.step(mine, log=False)
            trainer.sae.state.norm_limit.fill_(source.norms.limit)
        if step + 1 in at:
            for i, trainer in enumerate(trainers):
                stage = {"stage": at[step + 1], "tokens": schedule.tokens_before(step + 1)}
                found[i].append(stage | score(i, trainer.sae))
    for trainer in trainers:
        trainer.finish()
    return saes, found
