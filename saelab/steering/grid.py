"""What a sweep runs: one cell a text, and the controls beside each latent."""

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from saelab.base.codes import SparseCodes
from saelab.base.errors import ConfigError
from saelab.base.protocols import Dictionary
from saelab.base.seeds import named_generator

WITH_UNIT = ("add", "clamp", "cap")
WITH_STRENGTH = (*WITH_UNIT, "scale")
WITHOUT_STRENGTH = ("ablate", "project_out")
OPERATIONS = WITH_STRENGTH + WITHOUT_STRENGTH
STEERED, NONE, RANDOM_DIRECTION, RANDOM_LATENT = "steered", "none", "random_direction", "random_latent"
BASELINES = (NONE, RANDOM_DIRECTION, RANDOM_LATENT)
SHOWN = (
    3  # random latents of each target, and random directions that texts are made with: the others are measured alone
)


@dataclass(frozen=True)
class Cell:
    """One text of a sweep. `latent` is the target, also of its controls, which `draw` numbers; `row` is its place.

    `control` is the latent that a "random_latent" steers with. Unsteered cells have neither latent nor operation.
    """

    row: int
    baseline: str
    latent: int | None
    operation: str | None
    strength: float | None
    draw: int | None
    control: int | None
    prompt_id: int
    seed: int

    @property
    def written(self) -> bool:
        """Whether a text is made: not with the many random directions that only a rank needs."""
        return self.baseline != RANDOM_DIRECTION or (self.draw or 0) < SHOWN

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


class Controls(NamedTuple):
    """`latents[t]` random latents of each target t (`SHOWN` at most), `vectors[t]` [draws, d] directions of its norm."""

    latents: dict[int, list[int]]
    vectors: dict[int, Tensor]


def cells(
    latents: Sequence[int],
    operations: Sequence[str],
    strengths: Sequence[float],
    prompts: int,
    seeds: Sequence[int],
    baselines: Iterable[str],
    draws: int,
    controls: Controls,
) -> list[Cell]:
    """Every cell, the unsteered ones first; an operation without a strength comes once.

    >>> found = cells([7], ["add", "ablate"], [1.0, 2.0], 1, [0], ["none"], 0, Controls({}, {}))
    >>> [(cell.operation, cell.strength) for cell in found]
    [(None, None), ('add', 1.0), ('add', 2.0), ('ablate', None)]
    """
    kinds: list[tuple[str, int | None]] = [(STEERED, None)]
    for kind, count in ((RANDOM_DIRECTION, draws), (RANDOM_LATENT, min(draws, SHOWN))):
        kinds += [(kind, draw) for draw in range(count if kind in baselines else 0)]
    grid: list[tuple[str, int | None, str | None, float | None, int | None]] = [(NONE, None, None, None, None)]
    for latent in latents:
        for operation in operations:
            for strength in strengths if operation in WITH_STRENGTH else [None]:
                grid += [(kind, latent, operation, strength, draw) for kind, draw in kinds]
    found: list[Cell] = []
    for kind, target, operation_, strength, draw in grid:
        control = (
            controls.latents[target][draw]
            if kind == RANDOM_LATENT and target is not None and draw is not None
            else None
        )
        for prompt in range(prompts):
            for seed in seeds:
                found.append(Cell(len(found), kind, target, operation_, strength, draw, control, prompt, seed))
    return found


def draw_controls(sae: Dictionary, latents: Sequence[int], draws: int) -> Controls:
    """The controls of each latent, seeded by its number: the same directions in every sweep.

    Directions are uniform on the sphere; random latents are live ones (where the SAE has statistics) other than the
    targets. Raises `ConfigError` when there are not enough other latents.
    """
    stats = statistics(sae)
    candidates = torch.ones(sae.d_sae, dtype=torch.bool) if stats is None else (stats.density > 0).cpu()
    candidates[list(latents)] = False
    pool = candidates.nonzero().flatten()
    beside = min(draws, SHOWN)
    if len(pool) < beside:
        raise ConfigError(f"{beside} random latents stand beside each target and {len(pool)} live ones are left beside the "
                          f"{len(latents)} targets: lower draws")  # fmt: skip
    W_dec = sae.W_dec.detach()
    if not draws:
        return Controls({}, {})
    chosen, vectors = {}, {}
    for latent in latents:
        order = torch.randperm(len(pool), generator=named_generator(f"latents beside {latent}"))
        chosen[latent] = pool[order[:beside]].tolist()
        rows = [
            torch.randn(
                W_dec.shape[1], generator=named_generator(f"direction {draw} beside {latent}"), dtype=torch.float64
            )
            for draw in range(draws)
        ]
        norm = W_dec[latent].double().cpu().norm()
        vectors[latent] = torch.stack([norm * row / row.norm() for row in rows]).to(W_dec)
    return Controls(chosen, vectors)


class Extended:
    """The SAE with the random directions as further latents: each fires as its target does and writes elsewhere.

    So every operation on one changes the activation by as much as on its target, position by position, and one
    encoding of a batch serves all. What is not said here is the SAE's own.
    """

    def __init__(self, sae: Dictionary, vectors: dict[int, Float[Tensor, "draws d"]]) -> None:
        self.sae = sae
        self.state = None  # its counters are of the SAE's own latents
        W_dec = sae.W_dec.detach()
        self.first = torch.zeros(sae.d_sae, dtype=torch.int64, device=W_dec.device)
        self.copies = torch.zeros_like(self.first)
        self.d_sae = sae.d_sae
        for latent, rows in vectors.items():
            self.first[latent], self.copies[latent] = self.d_sae, len(rows)
            self.d_sae += len(rows)
        self.origins = torch.cat([torch.full((len(rows),), latent) for latent, rows in vectors.items()] or
                                 [torch.zeros(0, dtype=torch.int64)]).to(W_dec.device)  # fmt: skip
        self.W_dec = torch.cat([W_dec, *vectors.values()])

    def __getattr__(self, name: str) -> Any:
        return getattr(self.sae, name)

    def latent(self, target: int, draw: int) -> int:
        """The number here of a target's random direction."""
        return int(self.first[target]) + draw

    @property
    def latent_stats(self) -> Any:
        stats = self.sae.latent_stats
        return type(stats)(*(torch.cat([figures, figures[self.origins.to(figures.device)]]) for figures in stats))

    def encode_sparse(self, x: Float[Tensor, "*rows d_in"]) -> SparseCodes:
        codes = self.sae.encode_sparse(x)
        copies = self.copies[codes.indices]
        more = torch.arange(len(copies), device=copies.device).repeat_interleave(copies)
        number = torch.arange(len(more), device=copies.device) - (copies.cumsum(0) - copies)[more]
        extra = self.first[codes.indices[more]] + number
        all_rows, indices = torch.cat([codes.rows(), codes.rows()[more]]), torch.cat([codes.indices, extra])
        values = torch.cat([codes.values, codes.values[more]])
        order = (all_rows * self.d_sae + indices).argsort()
        counts = torch.bincount(all_rows, minlength=len(codes))
        offsets = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
        return SparseCodes(values[order], indices[order], offsets, self.d_sae)

    def encode(self, x: Float[Tensor, "*rows d_in"]) -> Float[Tensor, "*rows d_sae"]:
        return self.encode_sparse(x).to_dense().view(*x.shape[:-1], self.d_sae)


def statistics(sae: Dictionary) -> Any:
    """The SAE's figures of each latent, None where it has none."""
    try:
        return sae.latent_stats
    except (ConfigError, AttributeError):
        return None
