"""Columns of rows over shards: reading them memory-mapped, and filling one block after the other.

What the files are called and hold is written down in `saelab.reading.store`.
"""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, SupportsIndex

import torch
from jaxtyping import Shaped
from torch import Tensor

from saelab.base.errors import FormatError
from saelab.base.manifests import read_tensors, verify_file, verify_size

Layout = dict[str, dict[str, tuple[int, torch.dtype]]]
"""part -> key -> (width, dtype); a part is a file of each shard, width 0 means a column of scalars."""

TOKEN_KEYS = ("tokens", "positions", "documents", "contexts")
CHUNK_ROWS = 4096


class Shard(Protocol):
    """Some consecutive rows of every column."""

    @property
    def rows(self) -> int: ...

    def tensor(self, part: str, key: str) -> Shaped[Tensor, "rows *row"]:
        """[rows, width] or [rows]; not to be written to."""


class Block:
    """Preallocated rows of every column, filled from the front: a shard in memory."""

    def __init__(self, layout: Layout, capacity: int) -> None:
        self.capacity = capacity
        self.rows = 0
        self._tensors = {
            part: {
                key: torch.empty((capacity, width) if width else (capacity,), dtype=dtype)
                for key, (width, dtype) in keys.items()
            }
            for part, keys in layout.items()
        }

    def add(self, columns: Mapping[str, Mapping[str, Shaped[Tensor, "_ *row"]]], n: int) -> None:
        """Copy the first n rows of tensors, part -> key -> [>= n, ...], behind those that are there."""
        for part, keys in self._tensors.items():
            for key, tensor in keys.items():
                tensor[self.rows : self.rows + n].copy_(columns[part][key][:n])
        self.rows += n

    def clear(self) -> None:
        self.rows = 0

    def tensor(self, part: str, key: str) -> Shaped[Tensor, "rows *row"]:
        return self._tensors[part][key][: self.rows]

    def parts(self) -> dict[str, dict[str, Shaped[Tensor, "_ *row"]]]:
        return {part: {key: self.tensor(part, key) for key in keys} for part, keys in self._tensors.items()}


class FileShard:
    """One shard on disk: sizes are checked at once, the checksum of a file when it is first read.

    `files` maps a part to the name, size and SHA-256 of its file. `owner` is kept alive as long as the shard.
    """

    def __init__(
        self, folder: Path, files: Mapping[str, Mapping[str, Any]], rows: int, layout: Layout, owner: object = None
    ) -> None:
        self.rows = rows
        self._folder, self._files, self._layout, self._owner = folder, files, layout, owner
        self._open: dict[str, dict[str, Tensor]] = {}
        self._verified: set[str] = set()
        for file in files.values():
            verify_size(folder / file["name"], file["bytes"])
        for (
            part,
            keys,
        ) in layout.items():  # the rows are held before a file is read: they must be as many as it can hold
            least = rows * sum(max(width, 1) * dtype.itemsize for width, dtype in keys.values())
            if files[part]["bytes"] < least:
                raise FormatError(
                    f"{folder / files[part]['name']} has {files[part]['bytes']:,} bytes and {rows:,} rows take {least:,}: "
                    "harvest again"
                )

    def verify(self) -> None:
        """Raise `FormatError` naming the file that is not what the manifest says."""
        for file in self._files.values():
            verify_file(self._folder / file["name"], file["bytes"], file["sha256"])

    def tensor(self, part: str, key: str) -> Shaped[Tensor, "rows *row"]:
        found = self._open.get(part)  # another thread may let go of it meanwhile
        if found is None:
            found = self._open[part] = self._map(part)
        return found[key]

    def release(self) -> None:
        """Unmap the files."""
        self._open.clear()

    def _map(self, part: str) -> dict[str, Tensor]:
        file = self._files[part]
        path = self._folder / file["name"]
        if part not in self._verified:
            verify_file(path, file["bytes"], file["sha256"])
            self._verified.add(part)
        columns = self._layout[part].items()
        return read_tensors(
            path,
            {key: ((dtype,), f"{self.rows} {width}" if width else f"{self.rows}") for key, (width, dtype) in columns},
        )[0]


class Column:
    """One column over all shards, read like a tensor: `len`, `column[i]`, `column[i:j]`, `column[indices]`.

    Indices may be a tensor or list of row numbers in any order, repeated or negative, or a mask [n]. The result is
    always a new tensor: changing it changes nothing here. Iterating yields chunks [<= 4096, width] in order.
    """

    def __init__(self, shards: Sequence[Shard], part: str, key: str, width: int, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self._shards, self._part, self._key = shards, part, key
        self._offsets = torch.tensor([0, *(shard.rows for shard in shards)]).cumsum(0)
        self.shape = torch.Size((len(self), width) if width else (len(self),))

    def __len__(self) -> int:
        return int(self._offsets[-1])

    @property
    def bounds(self) -> list[int]:
        """Where the shards begin, and where the last one ends."""
        return self._offsets.tolist()

    def __iter__(self) -> Iterator[Shaped[Tensor, "_ *row"]]:
        for start in range(0, len(self), CHUNK_ROWS):
            yield self[start : start + CHUNK_ROWS]

    def __getitem__(
        self, index: SupportsIndex | slice | Sequence[int] | Shaped[Tensor, "..."]
    ) -> Shaped[Tensor, "*row"]:
        if isinstance(index, slice):
            start, stop, step = index.indices(len(self))
            return self._slice(start, stop) if step == 1 else self._gather(torch.arange(start, stop, step))
        if isinstance(index, int):
            return self._gather(torch.tensor([index]))[0]
        indices = torch.as_tensor(index)
        if indices.dtype == torch.bool:
            if indices.shape != (len(self),):
                raise IndexError(f"a mask of shape {list(indices.shape)} for {len(self):,} rows")
            return self._gather(indices.nonzero().squeeze(1))
        gathered = self._gather(indices.long().flatten())
        return gathered.view(*indices.shape, *self.shape[1:])

    def _slice(self, start: int, stop: int) -> Tensor:
        out = torch.empty((max(stop - start, 0), *self.shape[1:]), dtype=self.dtype)
        filled = 0
        while filled < len(out):
            i = int(torch.searchsorted(self._offsets, start + filled, right=True)) - 1
            inside = start + filled - int(self._offsets[i])
            piece = self._shards[i].tensor(self._part, self._key)[inside : inside + len(out) - filled]
            out[filled : filled + len(piece)] = piece
            filled += len(piece)
        return out

    def _gather(self, rows: Tensor) -> Tensor:
        rows = torch.where(rows < 0, rows + len(self), rows).cpu()
        if len(rows):
            lowest, highest = int(rows.min()), int(rows.max())
            if lowest < 0 or highest >= len(self):
                raise IndexError(f"row numbers from {lowest:,} to {highest:,} for {len(self):,} rows")
        if len(self._shards) == 1:
            return self._shards[0].tensor(self._part, self._key).index_select(0, rows)
        out = torch.empty((len(rows), *self.shape[1:]), dtype=self.dtype)
        ordered, order = rows.sort()
        bounds = torch.searchsorted(ordered, self._offsets).tolist()
        for shard, offset, low, high in zip(self._shards, self._offsets.tolist(), bounds, bounds[1:], strict=False):
            if high > low:
                out[order[low:high]] = shard.tensor(self._part, self._key).index_select(0, ordered[low:high] - offset)
        return out
