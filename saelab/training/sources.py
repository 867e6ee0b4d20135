"""Where the rows of a run come from: a model and its corpus, a store or tensor, or any iterable of tensors.

A source gives raw rows {"x": [n, d], "target", "gradient"} in an order fixed by the seed, leaves out high-norm rows, and
can be put back to any point with `state_dict`: the unread rows of its buffer, its cursor and its counts.
"""

import itertools
import math
import warnings
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Protocol

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from saelab.base import seeds
from saelab.base.codes import check_finite
from saelab.base.errors import ConfigError, DataError
from saelab.base.surroundings import OwnRandomness
from saelab.reading.buffer import ActivationBuffer
from saelab.reading.reader import ContextReader
from saelab.training.norms import NormFilter

Rows = dict[str, Tensor]
Say = Callable[[str], None]
Pieces = Callable[[int, int], Iterator[tuple[Rows, int]]]  # (epoch, cursor) -> (rows, next cursor) one after the other
PIECE_ROWS = 2048


class Source(Protocol):
    """What the loop asks of the data."""

    norms: NormFilter
    widths: dict[str, int]
    filling: Callable[[int, int], None]

    def next(self, n: int) -> Rows: ...
    def sample(self, n: int) -> Rows: ...
    @property
    def place(self) -> list[int]:
        """How far it has been read, in numbers."""
        ...

    def go_on(self, place: list[int], total: int) -> None:
        """Read on from a place (from the start, where it is unknown), `total` rows in all."""
        ...

    def state_dict(self) -> Rows: ...
    def load_state_dict(self, state: Rows) -> None: ...


class RowSource:
    """Rows at random access, a new permutation of all of them each epoch.

    `columns` are tensors or stores of equal length that can be indexed by a tensor of row numbers.
    """

    filling: Callable[[int, int], None]

    def __init__(self, columns: dict[str, Any], seed: int, max_norm: float | None, say: Say = print) -> None:
        check_aligned(columns)
        n_rows = len(columns["x"])
        if n_rows == 0:
            raise DataError("there are no rows to train on")
        self.columns, self.seed, self.say = columns, seed, say
        self.norms = NormFilter(max_norm, columns["x"][:1].shape[1])
        for start in range(
            0, n_rows, PIECE_ROWS
        ):  # the whole of it is at hand: the median is exact from the first batch on
            for name, column in columns.items():
                rows = column[start : start + PIECE_ROWS].float()
                what = "activations" if name == "x" else f"{name}s"
                check_finite(rows, f"rows {start:,} to {start + len(rows):,} of the {what}")
                if name == "x":
                    self.norms.see(rows)
        self.kept = torch.cat(
            [
                start + self.norms.keep(columns["x"][start : start + PIECE_ROWS].float()).nonzero().squeeze(1)
                for start in range(0, n_rows, PIECE_ROWS)
            ]
        )
        if len(self.kept) == 0:
            raise DataError(f"none of {n_rows:,} rows is within max_norm={max_norm}: raise it or set it to None")
        self.widths = {name: column[:1].shape[1] for name, column in columns.items()}
        self.epoch, self.position = 0, 0
        self._order = self._permutation()

    def _permutation(self) -> Tensor:
        generator = torch.Generator().manual_seed(seeds.derived(self.seed, self.epoch))
        return self.kept[torch.randperm(len(self.kept), generator=generator)]

    def _rows(self, index: Tensor) -> Rows:
        return {name: column[index] for name, column in self.columns.items()}

    def next(self, n: int) -> Rows:
        index = self._order[self.position : self.position + n]
        self.position += len(index)
        while len(index) < n:
            self.epoch, self.position = self.epoch + 1, 0
            self.say(_new_epoch(self.epoch, len(self.kept)))
            self._order = self._permutation()
            more = self._order[: n - len(index)]
            self.position = len(more)
            index = torch.cat([index, more])
        return self._rows(index)

    def sample(self, n: int) -> Rows:
        return self._rows(self._order[:n])

    @property
    def place(self) -> list[int]:
        return [self.epoch, self.position]

    def go_on(self, place: list[int], total: int) -> None:
        self.epoch, self.position = place or (0, 0)
        self._order = self._permutation()

    def state_dict(self) -> Rows:
        return {"cursor": torch.tensor([self.epoch, self.position])}

    def load_state_dict(self, state: Rows) -> None:
        self.epoch, self.position = (int(value) for value in state["cursor"])
        self._order = self._permutation()


class StreamSource:
    """Rows that come in pieces, mixed in a buffer.

    `pieces(epoch, cursor)` iterates over (rows, next cursor) from a cursor on, at most `piece_rows` rows at a time. A new
    epoch begins only when the buffer cannot serve a batch from the old one, so each row serves exactly once an epoch.
    Nothing is read beyond the `total` rows of the run. `filling(rows, goal)` is told how full the buffer is.
    """

    filling: Callable[[int, int], None]

    def __init__(
        self,
        pieces: Pieces,
        widths: dict[str, int],
        piece_rows: int,
        buffer_tokens: int | str,
        seed: int,
        max_norm: float | None,
        total: int,
        epochs: float = math.inf,
        say: Say = print,
    ) -> None:
        self.total, self.say, self.filling = total, say, lambda rows, goal: None
        self.pieces, self.widths, self.piece_rows, self.epochs = pieces, widths, piece_rows, epochs
        self.buffer = ActivationBuffer(buffer_tokens, {name: (w, torch.float32) for name, w in widths.items()}, seed)
        self.norms = NormFilter(max_norm, widths["x"])
        self.epoch, self.cursor, self._kept_in_epoch, self._served = 0, 0, 0, 0
        self._iterator: Iterator[tuple[Rows, int]] | None = None

    def require(self, batch_size: int) -> None:
        """Raise `ConfigError` when the buffer cannot hold a batch beside the next piece."""
        self.buffer.require(batch_size)
        if self.buffer.capacity < batch_size + self.piece_rows:
            raise ConfigError(
                f"buffer of {self.buffer.capacity:,} tokens cannot hold a batch of {batch_size:,} and the next "
                f"{self.piece_rows:,} from the model: raise `buffer_tokens` to {batch_size + self.piece_rows:,} or more, "
                "or lower `batch_size`"
            )

    def next(self, n: int) -> Rows:
        self._fill(n)
        self._served += n
        return self.buffer.draw(n)

    def sample(self, n: int) -> Rows:
        self._fill(1)
        return self.buffer.peek(n)

    @property
    def place(self) -> list[int]:
        return [self.epoch, self.cursor, self._kept_in_epoch]

    def go_on(self, place: list[int], total: int) -> None:
        self.epoch, self.cursor, self._kept_in_epoch = place or (0, 0, 0)
        self.total = total

    def _fill(self, n: int) -> None:
        goal = min(self.buffer.capacity - self.piece_rows, self.total - self._served)
        while self.buffer.free() >= self.piece_rows and len(self.buffer) < self.total - self._served:
            if self._iterator is None:
                self._iterator = self.pieces(self.epoch, self.cursor)
            piece = next(self._iterator, None)
            if piece is not None:
                rows, self.cursor = piece
                self.norms.see(rows["x"])
                keep = self.norms.keep(rows["x"])
                rows = rows if bool(keep.all()) else {name: column[keep] for name, column in rows.items()}
                self._kept_in_epoch += len(rows["x"])
                self.buffer.add(rows)
                self.filling(len(self.buffer), goal)
            elif len(self.buffer) >= n:
                return
            elif self._kept_in_epoch == 0:
                raise DataError("the source gave no rows to train on: it is empty, or every row is above max_norm")
            elif self.epoch + 1 >= self.epochs:
                raise ConfigError(
                    f"the iterator ended after {self._kept_in_epoch:,} rows and the run asks for more: an iterator serves "
                    "one epoch; give a list or another re-iterable, or lower `tokens`"
                )
            else:
                self.epoch += 1
                self.say(_new_epoch(self.epoch, self._kept_in_epoch))
                self.cursor, self._kept_in_epoch, self._iterator = 0, 0, None

    def state_dict(self) -> Rows:
        cursor = torch.tensor([self.epoch, self.cursor, self._kept_in_epoch, self._served])
        buffer = {f"buffer.{name}": tensor for name, tensor in self.buffer.state_dict().items()}
        return {"cursor": cursor} | self.norms.state_dict() | buffer

    def load_state_dict(self, state: Rows) -> None:
        self.epoch, self.cursor, self._kept_in_epoch, self._served = (int(value) for value in state["cursor"])
        self._iterator = None
        self.norms.load_state_dict(state)
        self.buffer.load_state_dict(
            {name.removeprefix("buffer."): tensor for name, tensor in state.items() if name.startswith("buffer.")}
        )


def model_pieces(reader: ContextReader, columns: dict[str, str]) -> Pieces:
    """Pieces of a model's activations; `columns` maps "x" (and "target") to sites, the cursor counts contexts."""

    def pieces(epoch: int, cursor: int) -> Iterator[tuple[Rows, int]]:
        for rows in reader.rows(cursor):
            found = {name: rows.x[site] for name, site in columns.items()}
            if rows.gradients is not None:
                found["gradient"] = rows.gradients[columns["x"]]
            yield found, rows.cursor

    return pieces


def iterable_pieces(items: Iterable[Any], widths: dict[str, int], seed: int) -> Pieces:
    """Pieces of a re-iterable of [n, d] tensors (or pairs of them: input, target); the cursor counts pieces.

    What the iterable draws from the global random generators, as a shuffling DataLoader does, comes from generators of its
    own, seeded by seed and epoch: an epoch can be read again to the same rows, and the user's generators stay as they are.
    """

    def pieces(epoch: int, cursor: int) -> Iterator[tuple[Rows, int]]:
        own, count, end = OwnRandomness(seeds.derived(seed, epoch)), 0, object()
        with own:
            iterator = iter(items)
        for number in itertools.count():
            with own:
                item = next(iterator, end)
            if item is end:
                return
            columns = pieces_of(item, number)
            found = {name: column.shape[1] for name, column in columns.items()}
            if found != widths:
                raise DataError(f"item {number:,} of the iterable has widths {found}, and the first had {widths}")
            for start in range(0, len(columns["x"]), PIECE_ROWS):
                count += 1
                if count > cursor:
                    yield {name: x[start : start + PIECE_ROWS].float() for name, x in columns.items()}, count

    return pieces


def pieces_of(item: Any, number: int) -> Rows:
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
        if value.ndim == 2 and value.shape[1] and value.is_floating_point() and value.layout == torch.strided:
            return value.detach()
        kind = "" if value.layout == torch.strided else f", {value.layout}"
        found = f"{list(value.shape)} of {value.dtype}{kind}"
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


def _new_epoch(epoch: int, rows: int) -> str:
    return f"all {rows:,} rows were used once more: epoch {epoch + 1} begins"
