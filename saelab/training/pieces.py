"""Rows that come in pieces, one after the other: from a model that reads a corpus, or from any iterable of tensors."""

import copy
import hashlib
import itertools
import math
import warnings
from collections.abc import Iterable, Iterator
from typing import Any, Protocol

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from saelab.base import digests, seeds
from saelab.base.codes import check_finite
from saelab.base.errors import ConfigError, DataError
from saelab.base.surroundings import OwnRandomness
from saelab.reading.reader import ContextReader

Rows = dict[str, Tensor]  # {"x": [n, d], "target", "gradient"}
PIECE_ROWS = 2048
NAMES = {"x": "the activations", "target": "the targets", "gradient": "the gradients"}


class Pieces(Protocol):
    """At most `most` rows at a time of columns of these widths, read as often as there are epochs."""

    widths: dict[str, int]
    most: int
    epochs: float

    def read(self, epoch: int, cursor: int) -> Iterator[tuple[Rows, int]]:
        """The pieces of an epoch from a cursor on, each with the cursor behind it."""
        ...

    def lane(self, number: int, lanes: int) -> "Pieces":
        """Those of one of so many lanes, which have all of them together and none twice."""
        ...


class ModelPieces:
    """A model's activations; `columns` maps "x" (and "target") to sites, the cursor counts contexts."""

    epochs = math.inf

    def __init__(self, reader: ContextReader, columns: dict[str, str]) -> None:
        self.reader, self.columns = reader, columns
        self.most = reader.batch_size * reader.contexts.ids.shape[1]
        self.widths = {name: reader.sites[site].width for name, site in columns.items()}
        if reader.gradients:
            self.widths["gradient"] = self.widths["x"]

    def read(self, epoch: int, cursor: int) -> Iterator[tuple[Rows, int]]:
        for rows in self.reader.rows(cursor):
            found = {name: rows.x[site] for name, site in self.columns.items()}
            if rows.gradients is not None:
                found["gradient"] = rows.gradients[self.columns["x"]]
            yield found, rows.cursor

    def lane(self, number: int, lanes: int) -> "ModelPieces":
        if len(self.reader.order) < lanes:
            raise ConfigError(f"{len(self.reader.order):,} contexts do not fill {lanes:,} lanes: give fewer `lanes`")
        reader = copy.copy(self.reader)
        reader.order = reader.order[number::lanes]
        return ModelPieces(reader, self.columns)


class ItemPieces:
    """A re-iterable of [n, d] tensors (or pairs of them: input, target), or an iterator for one epoch.

    The cursor counts pieces. `digest` is that of the first `known_rows` rows. What the iterable draws from the global random
    generators, as a shuffling DataLoader does, comes from generators of its own, seeded by seed and epoch: an epoch can be
    read again to the same rows, and the user's generators stay as they are.
    """

    most = PIECE_ROWS

    def __init__(self, items: Iterable[Any], seed: int, known_rows: int = 1) -> None:
        self.seed, self.own = seed, (0, 1)
        first, self.digest = _beginning(items, seed, known_rows)
        self.widths = _widths(columns_of(first[0], 0))
        once = isinstance(items, Iterator)
        self.items: Iterable[Any] = itertools.chain(first, items) if once else items
        self.epochs = 1 if once else math.inf

    def read(self, epoch: int, cursor: int) -> Iterator[tuple[Rows, int]]:
        own, count, end = OwnRandomness(seeds.derived(self.seed, epoch)), 0, object()
        lane, lanes = self.own
        with own:
            iterator = iter(self.items)
        for number in itertools.count():
            with own:
                item = next(iterator, end)
            if item is end:
                return
            columns = columns_of(item, number)
            if (found := _widths(columns)) != self.widths:
                raise DataError(f"item {number:,} of the iterable has widths {found}, and the first had {self.widths}")
            for start in range(0, len(columns["x"]), PIECE_ROWS):
                count += 1
                if count > cursor and (count - 1) % lanes == lane:
                    yield {name: x[start : start + PIECE_ROWS].float() for name, x in columns.items()}, count

    def lane(self, number: int, lanes: int) -> "ItemPieces":
        if self.epochs == 1 and lanes > 1:
            raise ConfigError(f"an iterator is read once, not by {lanes:,} lanes: give a list or another re-iterable")
        mine = copy.copy(self)
        mine.own = (number, lanes)
        return mine


class StorePieces:
    """Stores shard by shard, in an order of the shards that is drawn anew for each epoch; the cursor counts pieces.

    `columns` are the stores, and the gradients of the first; nothing is kept that grows with the rows.
    """

    most = PIECE_ROWS
    epochs = math.inf

    def __init__(self, columns: dict[str, Any], seed: int) -> None:
        check_aligned(columns)
        self.columns, self.seed, self.own = columns, seed, (0, 1)
        self.widths = {name: column.shape[1] for name, column in columns.items()}
        self.shards = list(itertools.pairwise(columns["x"].bounds))

    def read(self, epoch: int, cursor: int) -> Iterator[tuple[Rows, int]]:
        lane, lanes = self.own
        generator = torch.Generator().manual_seed(seeds.derived(self.seed, epoch))
        count = 0
        for shard in torch.randperm(len(self.shards), generator=generator).tolist()[lane::lanes]:
            begin, end = self.shards[shard]
            for start in range(begin, end, PIECE_ROWS):
                count += 1
                if count > cursor:
                    rows = {name: of[start : min(start + PIECE_ROWS, end)].float() for name, of in self.columns.items()}
                    for name, found in rows.items():
                        check_finite(found, f"rows {start:,} to {start + len(found):,} of {NAMES[name]}")
                    yield rows, count
            self._release()

    def _release(self) -> None:
        for column in self.columns.values():
            if hasattr(column, "release"):
                column.release()

    def lane(self, number: int, lanes: int) -> "StorePieces":
        if len(self.shards) < lanes:
            raise ConfigError(f"{len(self.shards):,} shards do not fill {lanes:,} lanes: give fewer `lanes`")
        mine = copy.copy(self)
        mine.own = (number, lanes)
        return mine


def _beginning(items: Iterable[Any], seed: int, n_rows: int) -> tuple[list[Any], str]:
    """The first items of an iterable, those of `n_rows` rows or one, and a digest of their content."""
    found: list[Any] = []
    digest, rows = hashlib.sha256(), 0
    with OwnRandomness(seeds.derived(seed, 0)):
        for number, item in enumerate(items):
            found.append(item)
            for name, column in columns_of(item, number).items():
                digest.update(f"{name} {rows_digest(column)}".encode())
                rows += len(column)
            if rows >= n_rows:
                break
    if not found:
        raise DataError("the iterable is empty")
    return found, digest.hexdigest()


def _widths(columns: Rows) -> dict[str, int]:
    return {name: column.shape[1] for name, column in columns.items()}


def columns_of(item: Any, number: int) -> Rows:
    """An item of an iterable as columns: a tensor or an array of rows, alone in a tuple or list, or two (input, target)."""
    what = f"item {number:,} of the iterable"
    parts = item if isinstance(item, (tuple, list)) else (item,)
    if len(parts) not in (1, 2):
        raise DataError(
            f"{what} is a {type(item).__name__} of {len(parts)}: give [n, d] tensors, or pairs (input, target)"
        )
    columns = {name: rows_of(part, what) for name, part in zip(("x", "target"), parts, strict=False)}
    check_aligned(columns)
    for name, column in columns.items():
        check_finite(column, what if name == "x" else f"the target of {what}")
    return columns


def rows_of(value: Any, what: str) -> Float[Tensor, "n d"]:
    """Rows as training reads them: a dense [n, d] tensor without a graph, from a floating-point tensor or NumPy array.

    Raises `DataError` for anything else.
    """
    if np.ma.is_masked(value):
        raise DataError(
            f"{what} is a masked array, some of whose entries are masked: fill them, or leave their rows out"
        )
    if isinstance(value, np.ndarray) and value.dtype.kind == "f" and value.dtype.itemsize <= 8:
        with warnings.catch_warnings(action="ignore"):  # of arrays that cannot be written to: nothing writes here
            value = torch.from_numpy(np.ascontiguousarray(value, dtype=value.dtype.newbyteorder("=")))
    if isinstance(value, Tensor):
        nested = value.is_nested
        if (
            not nested
            and value.ndim == 2
            and value.shape[1]
            and value.is_floating_point()
            and value.layout == torch.strided
        ):
            return value.detach()
        kind = "" if value.layout == torch.strided else f", {value.layout}"
        found = f"{'nested' if nested else list(value.shape)} of {value.dtype}{kind}"
    else:
        found = f"a {type(value).__name__}" + (f" of {value.dtype}" if isinstance(value, np.ndarray) else "")
    raise DataError(f"activations are a 2-D floating-point tensor [n, d], and {what} is {found}")


def check_aligned(columns: dict[str, Any]) -> None:
    """Raise `DataError` unless all columns have as many rows."""
    lengths = {name: len(column) for name, column in columns.items()}
    if len(set(lengths.values())) > 1:
        raise DataError(
            f"the rows are not aligned: {', '.join(f'{n} has {length:,}' for n, length in lengths.items())}"
        )


def rows_digest(rows: Any) -> str:
    """Over a tensor's shape, dtype and rows; a store knows its own."""
    if not isinstance(rows, Tensor):
        return rows.digest
    digest = hashlib.sha256(f"{tuple(rows.shape)} {rows.dtype}".encode())
    for start in range(0, len(rows), 65_536):
        digest.update(digests.content(rows[start : start + 65_536]))
    return digest.hexdigest()
