"""Rows of activations in chunks, each with the group it belongs to and whether it is held out."""

import warnings
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from saelab.activations.store import ActivationStore
from saelab.errors import ConfigError, DataError

CHUNK_ROWS = 4096
BLOCK = 64  # rows of a group where nothing says which document they are of


class Chunk(NamedTuple):
    """Rows `x` [n, d], their numbers [n], their groups [n] and which are held out [n]."""

    x: Tensor
    row: Tensor
    group: Tensor
    held: Tensor


class Rows:
    """The rows of a tensor [n, d], of an `ActivationStore` or of a re-iterable of tensors, split in two.

    Of a store, documents are held out whole, taken evenly from the beginning to the end of the corpus (whole contexts where
    there is one document only, with a warning); elsewhere each row is held out with probability `holdout`, drawn from `seed`.
    Groups, for the bootstrap, are documents (or contexts) of a store and blocks of 64 rows elsewhere. Iterating again gives
    the same.

    Raises `ConfigError` for a one-shot iterator or a `holdout` that is not between 0 and 1, `DataError` for too few rows to
    split.

    >>> import torch
    >>> rows = Rows(torch.zeros(10, 3), holdout=0.5, seed=0)
    >>> [len(chunk.x) for chunk in rows], rows.held_out_by
    ([10], 'row')
    """

    def __init__(self, x: Any, holdout: float, seed: int) -> None:
        if not 0 < holdout < 1:
            raise ConfigError(f"holdout is {holdout}: it must be between 0 and 1, as 0.5")
        if isinstance(x, Iterator):
            raise ConfigError(
                "x is a one-shot iterator, and the rows are read twice: give a tensor, a store, or an object whose "
                "__iter__ starts anew"
            )
        self.x, self.holdout, self.seed = x, holdout, seed
        self.held_out_by = "row"
        if isinstance(x, ActivationStore):
            self.held_out_by, self._groups, self._held = _split(x, holdout)
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
                group, held = self._groups[start : start + len(x)], self._held[start : start + len(x)]
            else:
                group, held = numbers // BLOCK, torch.rand(len(x), generator=generator) < self.holdout
            yield Chunk(x, numbers, group, held)
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
        held_groups = _spread(groups, holdout)
        held = torch.isin(groups, held_groups)
        if bool(held.any()) and not bool(held.all()):
            if name == "context":
                warnings.warn(
                    f"all {len(store):,} rows are of one document: whole contexts of it are held out, which leaves the two "
                    "parts more alike than documents are; harvest more tokens",
                    stacklevel=4,
                )
            return name, groups, held
    raise DataError(f"the store's {len(store):,} rows are of one context: nothing can be held out, harvest more tokens")


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
