"""Rows of activations in chunks: which of them the map is fitted on, and which it has not seen.

The held-out rows are halved once more, because the parts of the rows that a map was fitted on are smaller than those of any
others (by 5% of the nonlinear variance at 40 rows a dimension): what is learnt from the parts, be it a regression or an SAE,
is learnt on one half and scored on the other, and neither was seen by the map.
"""

import warnings
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from saelab.base import checks
from saelab.base.errors import ConfigError, DataError
from saelab.reading.store import ActivationStore

CHUNK_ROWS = 4096
BLOCK, GROUPS = (
    64,
    1024,
)  # where nothing says which document rows are of: blocks of so many, dealt out to so many groups


MAP, LEARN, SCORE = 0, 1, 2  # what a row is for: fit the map; held out: learn from the parts, score what was learnt


class Chunk(NamedTuple):
    """Rows `x` [n, d], their numbers [n], their groups [n], and the use that all of them have."""

    x: Tensor
    row: Tensor
    group: Tensor
    use: int

    @property
    def held(self) -> bool:
        """Whether the map has not seen these rows."""
        return self.use != MAP


class Rows:
    """The rows of a tensor [n, d], of an `ActivationStore` or of a re-iterable of tensors, split by use.

    Of a store, documents are held out whole, taken evenly from the beginning to the end of the corpus (whole contexts where
    there are under three documents, with a warning); elsewhere each row is held out with probability `holdout`, drawn from
    `seed`. Half of what is held out is there to learn from the parts, half to score. A chunk has rows of one use only. Groups,
    for the bootstrap, are documents (or contexts) of a store, elsewhere blocks of 64 rows, dealt out to 1,024 groups so that
    a long stream has no more of them. Iterating again gives the same.

    Raises `ConfigError` for a one-shot iterator or a `holdout` that is not between 0 and 1, `DataError` for too few rows to
    split.

    >>> import torch
    >>> rows = Rows(torch.zeros(10, 3), holdout=0.5, seed=0)
    >>> sum(len(chunk.x) for chunk in rows), rows.held_out_by
    (10, 'row')
    """

    def __init__(self, x: Any, holdout: float, seed: int) -> None:
        holdout = checks.number("holdout", holdout, above=0, below=1)
        if not isinstance(x, Iterable) or isinstance(x, str):
            raise ConfigError(
                f"x is {type(x).__name__}: give activations, a tensor [n, d], a store, or tensors one by one"
            )
        if isinstance(x, Iterator):
            raise ConfigError(
                "x is a one-shot iterator, and the rows are read twice: give a tensor, a store, or an object whose "
                "__iter__ starts anew"
            )
        self.x, self.holdout, self.seed = x, holdout, seed
        self.held_out_by = "row"
        if isinstance(x, ActivationStore):
            self.held_out_by, self._groups, self._uses = _split(x, holdout)
        elif isinstance(x, Tensor) and x.ndim != 2:
            raise ConfigError(f"x has {x.ndim} dimensions: give rows [n, d], for example x.flatten(0, -2)")

    def __len__(self) -> int:
        """Number of rows; 0 where it is not known."""
        return len(self.x) if isinstance(self.x, Tensor | ActivationStore) else 0

    def __iter__(self) -> Iterator[Chunk]:
        start = 0
        generator = torch.Generator().manual_seed(self.seed)
        for x in self._pieces():
            numbers = torch.arange(start, start + len(x))
            if isinstance(self.x, ActivationStore):
                group, uses = self._groups[start : start + len(x)], self._uses[start : start + len(x)]
            else:
                drawn = torch.rand(len(x), generator=generator)
                group, uses = numbers // BLOCK % GROUPS, (drawn < self.holdout).int() + (drawn < self.holdout / 2).int()
            for use in (MAP, LEARN, SCORE):
                mine = (uses == use).nonzero().squeeze(1)
                if len(mine):
                    yield Chunk(x[mine.to(x.device)], numbers[mine], group[mine], use)
            start += len(x)

    def _pieces(self) -> Iterator[Tensor]:
        if isinstance(self.x, Tensor):
            yield from self.x.split(CHUNK_ROWS)
            return
        for x in self.x:
            if not isinstance(x, Tensor) or x.ndim != 2:
                raise DataError(f"the rows come as {type(x).__name__}, not as tensors [n, d]")
            yield x


def _split(store: ActivationStore, holdout: float) -> tuple[str, Tensor, Tensor]:
    for name in ("document", "context"):
        groups = getattr(store, f"{name}s").long()
        held = torch.isin(groups, _spread(groups, holdout))
        scored = held & torch.isin(groups, _spread(groups[held], 0.5))
        uses = held.int() + scored.int()
        if len(uses.unique()) == 3:
            if name == "context":
                warnings.warn(
                    f"the {len(store):,} rows are of too few documents (at least 3): whole contexts are held out, which leaves "
                    "the parts more alike than documents are; harvest more tokens",
                    stacklevel=4,
                )
            return name, groups, uses
    raise DataError(
        f"the store's {len(store):,} rows are of fewer than 3 contexts: too few to hold any out, harvest more tokens"
    )


def _spread(groups: Tensor, holdout: float) -> Tensor:
    """The groups held out: going through them in order, each where it brings the share of rows nearer to `holdout`."""
    chosen, held, seen = [], 0, 0
    for group, count in zip(*(column.tolist() for column in groups.unique(return_counts=True)), strict=True):
        wanted = holdout * (seen + count)
        if abs(held + count - wanted) < abs(held - wanted):
            chosen.append(group)
            held += count
        seen += count
    return torch.tensor(chosen, dtype=groups.dtype)
