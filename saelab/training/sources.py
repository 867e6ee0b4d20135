"""Where the rows of a run come from: a model and its corpus, a store or tensor, or any iterable of tensors.

A source gives raw rows {"x": [n, d], "target", "gradient"} in an order fixed by the seed, leaves out high-norm rows, and
can be put back to any point with `state_dict`: the unread rows of its buffer, its cursor and its counts. Of many processes
each is given its part of a batch, and of the state.
"""

from collections.abc import Callable, Iterator
from typing import Any, Protocol

import torch
from torch import Tensor

from saelab.base import processes as distributed
from saelab.base import seeds
from saelab.base.codes import check_finite
from saelab.base.errors import ConfigError, DataError
from saelab.reading.buffer import ActivationBuffer
from saelab.training.norms import NormFilter
from saelab.training.pieces import NAMES, PIECE_ROWS, Pieces, Rows, check_aligned

Say = Callable[[str], None]


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
                check_finite(rows, f"rows {start:,} to {start + len(rows):,} of {NAMES[name]}")
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

    def _own(self, index: Tensor) -> Rows:
        """Those of these rows that are this process's."""
        return {name: column[index[distributed.part(len(index))]] for name, column in self.columns.items()}

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
        return self._own(index)

    def sample(self, n: int) -> Rows:
        return self._own(self._order[:n])

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

    A new epoch begins only when the buffer cannot serve a batch from the old one, so each row serves exactly once an epoch.
    Nothing is read beyond the `total` rows of the run. `filling(rows, goal)` is told how full the buffer is.
    """

    filling: Callable[[int, int], None]

    def __init__(
        self, pieces: Pieces, buffer_tokens: int | str, seed: int, max_norm: float | None, total: int, say: Say = print
    ) -> None:
        self.total, self.say, self.filling = total, say, lambda rows, goal: None
        self.pieces, self.widths = pieces, pieces.widths
        columns = {name: (width, torch.float32) for name, width in pieces.widths.items()}
        self.buffer = ActivationBuffer(buffer_tokens, columns, seed)
        self.norms = NormFilter(max_norm, pieces.widths["x"])
        self.epoch, self.cursor, self._kept_in_epoch, self._served = 0, 0, 0, 0
        self._iterator: Iterator[tuple[Rows, int]] | None = None

    def require(self, batch_size: int, lanes: int = 1) -> None:
        """Raise `ConfigError` when the buffer, that of one of so many lanes, cannot hold a batch beside the next piece."""
        self.buffer.require(batch_size)
        if self.buffer.capacity < (enough := batch_size + self.pieces.most):
            raise ConfigError(
                f"buffer of {self.buffer.capacity:,} tokens cannot hold a batch of {batch_size:,} and the next "
                f"{self.pieces.most:,} from the model{f' in each of {lanes:,} lanes' if lanes > 1 else ''}: raise "
                f"`buffer_tokens` to {enough * lanes:,} or more, or lower `batch_size`"
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
        goal = min(self.buffer.capacity - self.pieces.most, self.total - self._served)
        while self.buffer.free() >= self.pieces.most and len(self.buffer) < self.total - self._served:
            if self._iterator is None:
                self._iterator = self.pieces.read(self.epoch, self.cursor)
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
            elif self.epoch + 1 >= self.pieces.epochs:
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


def _new_epoch(epoch: int, rows: int) -> str:
    return f"all {rows:,} rows were used once more: epoch {epoch + 1} begins"
