"""A preallocated buffer from which batches are drawn uniformly, each row exactly once.

Neighbouring tokens of a text have correlated activations; a batch drawn from the whole of a large buffer does not.
The rows never move: a dense array of slot numbers says which are occupied (its first `len(buffer)` entries) and which
are free (the rest). Drawing takes random entries of the first part and swaps the last occupied ones into their
places; adding takes entries of the second. Both cost what is drawn or added, whatever the capacity.
"""

import math
import re
from collections.abc import Mapping

import torch
from jaxtyping import Shaped
from torch import Tensor

from saelab.base.errors import CheckpointError, ConfigError

_UNITS = (
    {"b": 1}
    | {f"{letter}b": 1000**n for n, letter in enumerate("kmgt", start=1)}
    | {f"{letter}ib": 1024**n for n, letter in enumerate("kmgt", start=1)}
)


def parse_bytes(size: str) -> int:
    """The number of bytes that a string such as "2GiB", "512 MiB" or "1.5GB" names.

    Raises `ConfigError` for anything else.

    >>> parse_bytes("2GiB"), parse_bytes("1.5 KB")
    (2147483648, 1500)
    """
    match = re.fullmatch(r"\s*(\d[\d_,]*(?:\.\d+)?)\s*([A-Za-z]+)\s*", size)
    if match is None or match[2].lower() not in _UNITS:
        raise ConfigError(f"{size!r} is not a size in bytes: write it as in '2GiB', '512MiB' or '1.5GB'")
    return int(float(re.sub("[_,]", "", match[1])) * _UNITS[match[2].lower()])


def parse_capacity(capacity: int | str, bytes_per_row: int) -> int:
    """The number of rows of a capacity given in rows (a number) or in bytes (a string such as "2GiB").

    Raises `ConfigError` when that is less than one row.

    >>> parse_capacity(131_072, 2304), parse_capacity("1GiB", 2304)
    (131072, 466033)
    """
    rows = parse_bytes(capacity) // bytes_per_row if isinstance(capacity, str) else capacity
    if rows < 1:
        raise ConfigError(f"a capacity of {capacity} holds no row of {bytes_per_row:,} bytes: raise it")
    return rows


class ActivationBuffer:
    """Rows waiting to be trained on: `add` some, `draw` batches that are uniform over all of them.

    Each row added is drawn exactly once. The memory is taken once, at the start, and nothing is concatenated.
    Drawing uses a generator of the buffer's own, on the CPU whatever the `device`, so that the order is the same
    everywhere.

    Parameters
    ----------
    capacity: rows, or bytes as in "2GiB".
    columns: name -> (width, dtype); width 0 makes a column of scalars, [n] instead of [n, width].
    seed: of the order in which rows are drawn.
    device: where the rows lie.

    Raises `ConfigError` for a capacity below one row, when adding more rows than are free and when drawing more than
    there are.

    >>> buffer = ActivationBuffer(capacity=8, columns={"x": (2, torch.float32), "token": (0, torch.int32)}, seed=0)
    >>> buffer.add({"x": torch.randn(6, 2), "token": torch.arange(6)})
    >>> buffer.free(), len(buffer)
    (2, 6)
    >>> batch = buffer.draw(4)
    >>> batch["x"].shape, len(buffer)
    (torch.Size([4, 2]), 2)
    >>> sorted(batch["token"].tolist() + buffer.draw(2)["token"].tolist())
    [0, 1, 2, 3, 4, 5]
    """

    def __init__(
        self,
        capacity: int | str,
        columns: Mapping[str, tuple[int, torch.dtype]],
        seed: int,
        device: str | torch.device = "cpu",
    ) -> None:
        bytes_per_row = sum(max(width, 1) * dtype.itemsize for width, dtype in columns.values())
        self.capacity = parse_capacity(capacity, bytes_per_row)
        self._columns = {
            name: torch.empty((self.capacity, width) if width else (self.capacity,), dtype=dtype, device=device)
            for name, (width, dtype) in columns.items()
        }
        self._slots = torch.arange(self.capacity)  # the first _unread are occupied, the others free
        self._unread = 0
        self._generator = torch.Generator().manual_seed(seed)

    def __len__(self) -> int:
        """The number of unread rows."""
        return self._unread

    def __repr__(self) -> str:
        columns = ", ".join(
            f"{name} [{', '.join(map(str, ('n', *rows.shape[1:])))}] {str(rows.dtype).removeprefix('torch.')}"
            for name, rows in self._columns.items()
        )
        return f"ActivationBuffer({len(self):,} of {self.capacity:,} rows; {columns})"

    def free(self) -> int:
        """The number of rows that can be added now."""
        return self.capacity - self._unread

    def require(self, batch_size: int) -> None:
        """Raise `ConfigError` if a batch of this size can never be drawn."""
        if batch_size > self.capacity:
            raise ConfigError(
                f"buffer of {self.capacity:,} tokens is smaller than the batch of {batch_size:,}: "
                "raise `buffer_tokens` or lower `batch_size`"
            )

    @torch.no_grad()
    def add(self, rows: Mapping[str, Shaped[Tensor, "n ..."]]) -> None:
        """Copy rows, one tensor [n, width] a column, into free slots."""
        self._check(rows)
        n = len(next(iter(rows.values())))
        if n > self.free():
            raise ConfigError(
                f"{n:,} rows do not fit into the {self.free():,} free of a buffer of {self.capacity:,}: "
                "draw first, add fewer at a time or raise `buffer_tokens`"
            )
        slots = self._slots[self._unread : self._unread + n]
        for name, column in self._columns.items():
            column.index_copy_(0, slots.to(column.device), rows[name].detach().to(column.device, column.dtype))
        self._unread += n

    @torch.no_grad()
    def draw(self, n: int) -> dict[str, Shaped[Tensor, "n ..."]]:
        """n rows, uniform over all unread ones and without replacement, as new tensors [n, width]."""
        self.require(n)
        if n > self._unread:
            raise ConfigError(f"{n:,} rows asked of a buffer with {self._unread:,} unread ones: add rows first")
        places = self._distinct(n)
        drawn = self._slots[places]
        kept = self._unread - n
        survives = torch.ones(n, dtype=torch.bool)  # which of the last n occupied entries were not drawn
        survives[places[places >= kept] - kept] = False
        self._slots[places[places < kept]] = self._slots[kept : self._unread][survives]
        self._slots[kept : self._unread] = drawn
        self._unread = kept
        return {name: column.index_select(0, drawn.to(column.device)) for name, column in self._columns.items()}

    def peek(self, n: int) -> dict[str, Shaped[Tensor, "n ..."]]:
        """At most n unread rows, evenly spread over the slots, which stay unread."""
        slots = self._slots[: self._unread].sort().values[:: max(1, -(-self._unread // n))]
        return {name: column.index_select(0, slots.to(column.device)) for name, column in self._columns.items()}

    def _distinct(self, n: int) -> Tensor:
        """n different numbers below `len(self)` in random order, without touching all of them when n is small."""
        total = self._unread
        if 4 * n >= total:
            return torch.randperm(total, generator=self._generator)[:n]
        # The first n different values of a uniform sequence are a uniform sample; this many draws nearly always hold n.
        expected = -total * math.log1p(-n / total)
        while True:
            values = torch.randint(total, (int(expected + 8 * math.sqrt(n)) + 8,), generator=self._generator)
            ordered, order = values.sort(stable=True)
            first = torch.ones_like(ordered, dtype=torch.bool)
            first[1:] = ordered[1:] != ordered[:-1]
            where = order[first].sort().values
            if len(where) >= n:
                return values[where[:n]]

    def _check(self, rows: Mapping[str, Tensor]) -> None:
        if rows.keys() != self._columns.keys():
            raise ConfigError(f"rows have the columns {sorted(rows)}, the buffer has {sorted(self._columns)}")
        lengths = {name: len(tensor) for name, tensor in rows.items()}
        if len(set(lengths.values())) != 1:
            raise ConfigError(f"columns of different lengths: {lengths}")
        for name, column in self._columns.items():
            if rows[name].shape[1:] != column.shape[1:]:
                raise ConfigError(
                    f"rows of column {name!r} have shape {list(rows[name].shape[1:])}, the buffer's have "
                    f"{list(column.shape[1:])}"
                )

    def _check_dtypes(self, rows: Mapping[str, Tensor]) -> None:
        for name, column in self._columns.items():
            if rows[name].dtype != column.dtype:
                raise ConfigError(f"column {name!r} is {rows[name].dtype} there and {column.dtype} here")

    def state_dict(self) -> dict[str, Shaped[Tensor, "..."]]:
        """The unread rows, "column.<name>" [n, width] each, and the generator's state; tensors only."""
        occupied = self._slots[: self._unread]
        rows = {
            f"column.{name}": column.index_select(0, occupied.to(column.device))
            for name, column in self._columns.items()
        }
        return rows | {"generator": self._generator.get_state()}

    def load_state_dict(self, state: Mapping[str, Shaped[Tensor, "..."]]) -> None:
        """Go on exactly where `state_dict` was taken: what is added and drawn from here on has the same bits.

        Raises `CheckpointError` when the columns differ or the rows do not fit; nothing is changed then.
        """
        rows = {name.removeprefix("column."): tensor for name, tensor in state.items() if name.startswith("column.")}
        generator = torch.Generator()
        try:
            self._check(rows)
            self._check_dtypes(rows)
            generator.set_state(state["generator"].cpu())
        except (ConfigError, KeyError, RuntimeError, TypeError) as error:
            raise CheckpointError(f"the state is not one of this buffer: {error}") from error
        n = len(next(iter(rows.values())))
        if n > self.capacity:
            raise CheckpointError(
                f"the state has {n:,} unread rows, the buffer a capacity of {self.capacity:,}: raise `buffer_tokens`"
            )
        self._slots = torch.arange(self.capacity)
        self._unread = 0
        self.add(rows)
        self._generator = generator
