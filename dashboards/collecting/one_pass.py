"""The one pass: contexts through the model and the SAEs, a tile at a time.

Products of few rows differ from those of many in the last bits. So the model and the encoders always see a tile of the
same number of contexts, whose edges lie at fixed places of the corpus (the last one is padded); how many tiles are
read at once, and how the tiles are dealt to shards, cannot change a bit of what comes out.

Shapes: N rows of a tile (contexts x positions), D width, F latents.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from saelab.base import checks
from saelab.base.codes import SparseCodes
from saelab.base.errors import DataError
from saelab.base.protocols import Dictionary
from saelab.dashboards.collecting.priority import priorities
from saelab.models.purpose import Purpose
from saelab.models.sites import Site, run_recording

if TYPE_CHECKING:
    from saelab.models.language import LanguageModel
    from saelab.reading.packing import Contexts

TILE_TOKENS = 2048
NEAR_ROWS = 64  # rows of a tile whose dense scores are looked at for near misses; fp32 products of 64 rows are stable
UNKNOWN_MISS = 255


@dataclass(frozen=True)
class Reader:
    """What is read: the first `n_contexts` of `contexts` at the sites of `saes`, all on one pass."""

    lm: "LanguageModel"
    saes: Sequence[Dictionary]
    sites: Sequence[Site]
    targets: Sequence[Site]  # what the SAE reconstructs: its site, a transcoder's target site
    contexts: "Contexts"
    n_contexts: int
    seed: int = 0

    @classmethod
    def of(
        cls, lm: "LanguageModel", saes: Sequence[Dictionary], contexts: "Contexts", tokens: int, seed: int = 0
    ) -> "Reader":
        """Read at least `tokens` tokens, in whole contexts; `SiteError` where an SAE does not fit its site."""
        purposes = [Purpose.of(sae) for sae in saes]
        sites, targets = [each.source(lm) for each in purposes], [each.target(lm) for each in purposes]
        wanted = math.ceil(checks.count("tokens", tokens) / contexts.ids.shape[1])
        return cls(lm, list(saes), sites, targets, contexts, min(wanted, len(contexts)), seed)

    @property
    def length(self) -> int:
        """Positions of a context."""
        return self.contexts.ids.shape[1]

    @property
    def tile_contexts(self) -> int:
        return math.ceil(TILE_TOKENS / self.length)

    @property
    def n_tiles(self) -> int:
        return math.ceil(self.n_contexts / self.tile_contexts)

    def tiles(self, first: int, last: int) -> Iterator[list["Tile"]]:
        """For each tile from `first` up to `last`, what each SAE makes of it."""
        for number in range(first, last):
            start = number * self.tile_contexts
            stop = min(start + self.tile_contexts, self.n_contexts)
            places = torch.arange(start, start + self.tile_contexts).clamp(max=stop - 1)  # the last tile is padded
            inputs = self.contexts.tokens(places).to(self.lm.device)
            recorded = run_recording(self.lm, inputs, list(dict.fromkeys([*self.sites, *self.targets])))
            with torch.no_grad():
                yield [
                    self._tile(sae, recorded[site.name].flatten(0, 1), recorded[target.name].flatten(0, 1), start, stop)
                    for sae, site, target in zip(self.saes, self.sites, self.targets, strict=True)
                ]

    def _tile(self, sae: Dictionary, x_ND: Tensor, target_ND: Tensor, start: int, stop: int) -> "Tile":
        x_ND, target_ND = x_ND.to(sae.W_dec), target_ND.to(sae.W_dec)
        n = (stop - start) * self.length
        purpose = Purpose.of(sae)
        usable = self.contexts.counted(slice(start, stop), purpose.skip_positions)
        if not bool(x_ND.sum(dtype=torch.float32).isfinite()) and not bool(x_ND[:n].isfinite().all()):
            row = int((~x_ND[:n].isfinite()).any(1).nonzero()[0])
            raise DataError(
                f"an activation at {purpose.site} is NaN or infinite, the first at context "
                f"{start + row // self.length}, position {row % self.length}: look at that text, or use float32"
            )
        counted_N = purpose.within(x_ND[:n], usable.flatten()).cpu()
        codes = sae.encode_sparse(x_ND)
        target_ND = target_ND.double()
        size_N = target_ND.square().sum(1)
        error_N = (target_ND - sae.decode(codes, x_ND)).square().sum(1)
        miss_N = (15 * (error_N / size_N.clamp(min=1e-300)).clamp(max=1)).round()[:n].to(torch.uint8).cpu()
        miss_N[~counted_N] = UNKNOWN_MISS

        keep_N = torch.zeros(len(x_ND), dtype=torch.bool)
        keep_N[:n] = counted_N
        entries = keep_N.to(codes.values.device)[codes.rows()]
        base = start * self.length
        counted_rows = counted_N.nonzero().flatten()
        mine_ND = target_ND[:n][counted_N.to(x_ND.device)]
        sums = torch.cat([
            torch.stack([error_N[:n].cpu()[counted_N].sum(), size_N[:n].cpu()[counted_N].sum()]),
            mine_ND.sum(0).cpu(),
        ])  # fmt: skip
        near = self._near(sae, x_ND, codes, counted_rows, base)
        return Tile(
            rows=(codes.rows()[entries].cpu() + base).to(torch.int32),
            latents=codes.indices[entries].cpu().to(torch.int32),
            values=codes.values[entries].float().cpu(),
            counted=counted_N,
            miss=miss_N,
            sums=sums,
            near_scores=near[0],
            near_rows=near[1],
        )

    def _near(
        self, sae: Dictionary, x_ND: Tensor, codes: SparseCodes, counted: Tensor, base: int
    ) -> tuple[Tensor, Tensor]:
        """The largest pre-activation [F] of each latent where it stays silent, and its row, among some rows of the
        tile.

        Looking at every row would cost the dense product of all of them: these are the `NEAR_ROWS` of lowest priority.
        """
        if not len(counted):
            return torch.full((sae.d_sae,), -torch.inf), torch.zeros(sae.d_sae, dtype=torch.int32)
        order = np.argsort(priorities(self.seed, np.zeros(len(counted)), counted.numpy() + base), kind="stable")
        chosen = counted[torch.from_numpy(order[:NEAR_ROWS].copy())].sort().values
        padded = torch.cat([chosen, chosen[-1:].expand(NEAR_ROWS - len(chosen))]).to(x_ND.device)
        scores_NF = dense_scores(sae, x_ND[padded])
        place_N = torch.full((len(x_ND),), -1, device=x_ND.device)
        place_N[chosen.to(x_ND.device)] = torch.arange(len(chosen), device=x_ND.device)
        at = place_N[codes.rows()]
        scores_NF[at[at >= 0], codes.indices[at >= 0]] = -torch.inf
        best_F, where_F = scores_NF[: len(chosen)].max(0)
        # torch's max leaves open which of equal values it takes
        first_F = (scores_NF[: len(chosen)] == best_F).byte().argmax(0)
        return best_F.float().cpu(), (chosen[torch.minimum(where_F, first_F).cpu()] + base).to(torch.int32)


def dense_scores(sae: Dictionary, x_ND: Float[Tensor, "n d"]) -> Float[Tensor, "n f"]:
    """Dense pre-activations [N, F] in raw units."""
    from saelab.autoencoders.architecture import Batch

    scaled = sae.scaled(x_ND)
    return sae.cfg.scores(sae.params(), Batch(scaled, scaled)).dense().clone() / sae.state.target_scale


@dataclass(frozen=True)
class Tile:
    """What one SAE made of one tile: `rows` (context x length + position), `latents`, `values` of every firing at a
    counted place.

    `counted` says at which of the tile's places the SAE is applied, `miss` [N] how much it misses there (sixteenths,
    255 unknown); `sums` holds the squared error, the squared norm and the sum [D] of the counted rows of what the SAE
    reconstructs.
    """

    rows: Tensor
    latents: Tensor
    values: Tensor
    counted: Tensor
    miss: Tensor
    sums: Tensor
    near_scores: Tensor
    near_rows: Tensor
