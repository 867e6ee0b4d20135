"""Where a harvest's rows go: tensors in memory, or shards in a folder (protocol: `saelab.reading.store`)."""

import contextlib
import json
import os
import shutil
import tempfile
import weakref
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jaxtyping import Shaped
from torch import Tensor

from saelab.base import digests
from saelab.base.errors import CheckpointError
from saelab.base.files import MANIFEST, check_free, remove_left_over, try_folder, user_path, whole_file
from saelab.base.locks import locked
from saelab.base.tensors import save_tensors
from saelab.reading.shards import Block
from saelab.reading.store import (
    FORMAT,
    VERSION,
    ActivationStore,
    file_name,
    file_shards,
    layout_of,
    read_store_manifest,
    row_bytes,
    stores_over,
)

SHARD_BYTES = 64 * 2**20


class MemoryWriter:
    """Takes a harvest's rows into tensors allocated once."""

    cursor = 0

    def __init__(self, plan: Mapping[str, Any]) -> None:
        self._plan = plan
        self._block = Block(layout_of(plan), plan["rows"])

    @property
    def rows(self) -> int:
        return self._block.rows

    def add(self, columns: Mapping[str, Mapping[str, Shaped[Tensor, "_ *row"]]], n: int, cursor: int) -> None:
        self._block.add(columns, n)
        self.cursor = cursor

    def close(self) -> None:
        """There is nothing to let go."""

    def stores(self) -> dict[str, ActivationStore]:
        return stores_over([self._block], self._plan, None)


def try_out(out: str | os.PathLike[str]) -> None:
    """Raise `CheckpointError`, before anything long is done, where a folder cannot take a harvest."""
    folder = user_path(out)
    if not _whole(_manifest_in(folder)):
        try_folder(folder)


def _manifest_in(folder: Path) -> dict[str, Any] | None:
    if (folder / MANIFEST).exists():
        return read_store_manifest(folder)
    check_free(folder, "harvest")
    return None


def _whole(manifest: Mapping[str, Any] | None) -> bool:
    return manifest is not None and _rows_of(manifest) >= manifest["rows"]


def _rows_of(manifest: Mapping[str, Any]) -> int:
    return sum(shard["rows"] for shard in manifest["shards"])


class _TemporaryFolder:
    """A folder that goes when the last object that holds this one does."""

    def __init__(self) -> None:
        self.path = Path(tempfile.mkdtemp(prefix="saelab-harvest-"))
        weakref.finalize(self, shutil.rmtree, self.path, ignore_errors=True)


class FolderWriter:
    """Takes a harvest's rows to a folder, shard by shard; goes on behind the shards that are there.

    `plan` is the manifest without "format", "version" and "shards"; `chunk_rows` the most rows that `add` will get.
    Without `out` the folder is a temporary one. It is locked until `close`, unless it holds the whole harvest: to read that
    nothing need be writable. Raises `CheckpointError` when the folder holds something else (the differing keys of the
    fingerprint are listed), another process harvests into it, it is removed meanwhile, or the disk is full: complete shards
    stay and are gone on from.
    """

    def __init__(self, plan: Mapping[str, Any], chunk_rows: int, out: str | os.PathLike[str] | None) -> None:
        self._owner = _TemporaryFolder() if out is None else None
        self._folder = self._owner.path if self._owner else user_path(out)
        with contextlib.ExitStack() as stack:
            found = self._of(plan)
            if not _whole(found):
                stack.enter_context(locked(self._folder, keep=False))
                remove_left_over(self._folder)
                found = self._of(plan)
            self._manifest = found or {"format": FORMAT, "version": VERSION, **plan, "shards": []}
            if found is None:
                self._write_manifest(self._manifest)
            self._held = stack.pop_all()
        layout = layout_of(plan)
        self._block = Block(layout, max(chunk_rows, SHARD_BYTES // max(row_bytes({p: k}) for p, k in layout.items())))
        self._flushed = _rows_of(self._manifest)
        self.cursor = self._manifest["shards"][-1]["cursor"] if self._manifest["shards"] else 0

    def close(self) -> None:
        """Let others write into the folder."""
        self._held.close()

    def _of(self, plan: Mapping[str, Any]) -> dict[str, Any] | None:
        """The manifest in the folder, if it is one of this plan; None where the folder is free."""
        folder = self._folder
        manifest = _manifest_in(folder)
        if manifest is not None:
            there, here = manifest["fingerprint"], plan["fingerprint"]
            differing = [key for key in {**there, **here} if there.get(key) != here.get(key)]
            if differing:
                listed = "; ".join(f"{key}: {there.get(key)!r} there, {here.get(key)!r} here" for key in differing)
                raise CheckpointError(f"{folder} holds another harvest ({listed}): give another `out` or remove it")
            file_shards(folder, manifest, None)  # checks sizes before anything is built on them
        return manifest

    @property
    def rows(self) -> int:
        return self._flushed + self._block.rows

    def add(self, columns: Mapping[str, Mapping[str, Shaped[Tensor, "_ *row"]]], n: int, cursor: int) -> None:
        if self._block.rows + n > self._block.capacity:
            self._flush()
        self._block.add(columns, n)
        self.cursor = cursor

    def _flush(self) -> None:
        if not self._block.rows:
            return
        if not (self._folder / MANIFEST).exists():
            raise CheckpointError(
                f"{self._folder} was removed while the harvest wrote into it, and its {self._flushed:,} rows with it: the same "
                "call starts it again"
            )
        number, files = len(self._manifest["shards"]), {}
        for part, tensors in self._block.parts().items():
            path = self._folder / file_name(part, number)
            with whole_file(path) as temporary:
                save_tensors(temporary, tensors)
            files[part] = digests.entry(path)
        shard = {"rows": self._block.rows, "cursor": self.cursor, "files": files}
        manifest = {**self._manifest, "shards": [*self._manifest["shards"], shard]}
        self._write_manifest(manifest)
        self._manifest = manifest
        self._flushed += self._block.rows
        self._block.clear()

    def _write_manifest(self, manifest: Mapping[str, Any]) -> None:
        with whole_file(self._folder / MANIFEST) as temporary:
            temporary.write_text(json.dumps(manifest, indent=1))

    def stores(self) -> dict[str, ActivationStore]:
        self._flush()
        return stores_over(file_shards(self._folder, self._manifest, self._owner), self._manifest, self._folder)
