"""Reading rows with their codes twice, without those above the norm limit that an SAE was trained with."""

from collections.abc import Iterator

import torch
from jaxtyping import Float
from torch import Tensor

from saelab.analysis.dark_matter.rows import Chunk, Rows
from saelab.base.codes import SparseCodes, check_finite
from saelab.base.errors import ConfigError
from saelab.base.moments import Spread
from saelab.base.progress import progress_bar
from saelab.base.protocols import Dictionary

CODES_KEPT = 512 * 2**20  # bytes of sparse codes of held-out rows kept for the second pass; others are encoded again


class CodedRows:
    """The rows that count with their codes: all of them the first time, the held-out ones the second."""

    def __init__(self, sae: Dictionary, rows: Rows, high_norm: bool, progress: bool) -> None:
        self.sae, self.rows, self.high_norm, self.progress = sae, rows, high_norm, progress
        self.kept: list[SparseCodes] = []
        self.room = CODES_KEPT
        self.fired = 0  # on held-out rows
        self.dropped = Spread(sae.d_in)

    def read(self, what: str, again: bool = False) -> Iterator[tuple[Chunk, SparseCodes]]:
        """The chunks within the norm limit with their codes, counting what fires and is dropped; `again`: the second time."""
        with progress_bar(len(self.rows) or None, what, "row", self.progress) as bar:
            number = 0
            for chunk in self.rows:
                if chunk.x.shape[1] != self.sae.d_in:
                    raise ConfigError(f"the rows are {chunk.x.shape[1]:,} wide and the SAE reads {self.sae.d_in:,}")
                bar.update(len(chunk.x))
                if again and not chunk.held:
                    continue
                chunk, dropped = for_sae(self.sae, chunk, self.high_norm)
                if not again:
                    self.dropped.add(dropped.to("cpu", torch.float64))
                if not len(chunk.x):
                    continue
                codes = self._codes(number, chunk.x) if chunk.held else self.sae.encode_sparse(chunk.x)
                if chunk.held:
                    number += 1
                    self.fired += 0 if again else len(codes.indices)
                yield chunk, codes

    def _codes(self, number: int, x_ND: Tensor) -> SparseCodes:
        """The codes of the held-out chunk of this number."""
        if number < len(self.kept) and len(self.kept[number]) == len(x_ND):
            kept = self.kept[number]
            return SparseCodes(kept.values, kept.indices.long(), kept.offsets, kept.n_latents)
        codes = self.sae.encode_sparse(x_ND)
        size = codes.values.nbytes + 4 * len(codes.indices) + codes.offsets.nbytes
        if number == len(self.kept) and size <= self.room:
            self.room -= size
            self.kept.append(SparseCodes(codes.values, codes.indices.int(), codes.offsets, codes.n_latents))
        return codes


def for_sae(sae: Dictionary, chunk: Chunk, high_norm: bool) -> tuple[Chunk, Float[Tensor, "n d"]]:
    """The chunk on the SAE's device in at least fp32, less the rows above its norm limit unless `high_norm`; and those."""
    x = wide(chunk.x.to(sae.device))
    if not bool(torch.isfinite(x.sum())):
        check_finite(x, "the activations")
    keep = torch.ones(len(x), dtype=torch.bool, device=x.device) if high_norm else sae.replaceable(x)
    if bool(keep.all()):
        return chunk._replace(x=x), x[:0]
    mine = keep.cpu()
    return Chunk(x[keep], chunk.row[mine], chunk.group[mine], chunk.use), x[~keep]


def wide(x: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """In fp32, or fp64 where it is that."""
    return x if x.dtype == torch.float64 else x.float()
