"""Rows, groups of SAEs trained on the same batches, and their scores on held-out rows: what architectures.py runs.

Shapes: N rows, D inputs, F latents.
"""

import gzip
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
from saelab.base.codes import SparseCodes
from saelab.training.schedule import Schedule
from saelab.training.sources import RowSource
from saelab.training.step import Trainer

SITES = ("blocks.3.hook_resid_post", "blocks.2.attn.hook_z")
MAX_NORM = 4.0
FOLDER = workers.CACHE / "architectures"  # rows and weights
FINISHED = workers.RESULTS / "architectures"  # a file for each finished cell: kept, so that a run goes on anywhere
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
            if l0 is None or sae.cfg.thresholds(sae.state) is None:
                return self._scored(sae, [sae.encode_sparse(rows) for rows in self.x_ND.split(CHUNK)])
            deployed, equal = at_l0(sae, self.x_ND, l0)
            scores = self._scored(sae, equal)
            return self._scored(sae, deployed) | {"equal_" + name: value for name, value in scores.items()}

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


def at_l0(sae: Any, x_ND: Tensor, l0: float) -> tuple[list[SparseCodes], list[SparseCodes]]:
    """The codes as deployed, and those when all thresholds are multiplied by the one factor that gives a mean L0 of `l0`."""
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
    deployed = [codes.where(part > 1) for codes, part in zip(parts, ratios, strict=True)]
    return deployed, [codes.where(part >= edge) for codes, part in zip(parts, ratios, strict=True)]


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
        return FINISHED / f"{self.name}.json.gz"

    @property
    def sae_path(self) -> Path:
        return FOLDER / "saes" / self.name

    def write(self, stages: list[dict[str, Any]], **more: Any) -> None:
        """The row of a finished cell; what scores hold by context goes with it."""
        write_row(self.path, {**self.__dict__, **more, "stages": stages})


def write_row(path: Path, row: dict[str, Any]) -> None:
    """A finished row as compressed JSON, arrays with seven digits, whole or not at all."""

    def plain(array: np.ndarray) -> list[float]:
        return [float(f"{value:.7g}") for value in array.ravel().tolist()]

    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    temporary.write_bytes(gzip.compress(json.dumps(row, default=plain).encode(), mtime=0))
    temporary.replace(path)


def read_row(path: Path) -> dict[str, Any]:
    """What `write_row` wrote."""
    return json.loads(gzip.decompress(path.read_bytes()))


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
    """Train SAEs on the same batches, one column set each (they differ in their gradients only), scored at `stages`.

    A Mutual Choice SAE beside a Feature Choice one of the same numbers waits for it: until the latter's phases part they are
    the same run, bit for bit (a test holds them to it), which is done once.
    """
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
    leaders = {i: j for i, cfg in enumerate(cfgs) for j, other in enumerate(cfgs) if same_start(cfg, other)}
    for step in range(schedule.steps):
        rows = source.next(schedule.rows(step))
        for i, j in list(leaders.items()):
            if schedule.progress(step) >= cfgs[j].mutual_share:
                follow(trainers[i], trainers[j])
                found[i] += found[j]
                del leaders[i]
        for i, trainer in enumerate(trainers):
            if i in leaders:
                continue
            mine = {"x": rows["x"]} | {
                name.partition(".")[2]: column for name, column in rows.items() if name.startswith(f"{i}.")
            }
            trainer.step(mine, log=False)
            trainer.sae.state.norm_limit.fill_(source.norms.limit)
        if step + 1 in at:
            for i, trainer in enumerate(trainers):
                if i not in leaders:
                    stage = {"stage": at[step + 1], "tokens": schedule.tokens_before(step + 1)}
                    found[i].append(stage | score(i, trainer.sae))
    for trainer in trainers:
        trainer.finish()
    return saes, found


def same_start(cfg: Architecture, other: Architecture) -> bool:
    """Whether `cfg` is the Mutual Choice that `other`, a Feature Choice, begins as."""
    return (
        type(cfg) is saelab.MutualChoice
        and isinstance(other, saelab.FeatureChoice)
        and all(getattr(cfg, name) == getattr(other, name) for name in cfg.__dataclass_fields__)
    )


def follow(trainer: Trainer, leader: Trainer) -> None:
    """Put a trainer where the leader stands: what they both keep is copied."""
    theirs = leader.state_dict()
    trainer.parameters, trainer.done = list(trainer.sae.parameters()), leader.done
    mine = {name: theirs[name].clone() for name in trainer.state_dict() if name in theirs and name != "done"}
    mine |= {name: tensor.clone() for name, tensor in theirs.items() if name.startswith("optimizer.")}
    trainer.load_state_dict(mine | {"done": theirs["done"]})
