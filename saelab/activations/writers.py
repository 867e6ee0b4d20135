"""Where a harvest's rows go: tensors in memory, or shards in a folder (protocol: `saelab.activations.store`)."""

import json
import os
import shutil
import tempfile
import weakref
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from saelab.activations.shards import Block
from saelab.activations.store import (
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
from saelab.errors import CheckpointError
from saelab.files import MANIFEST, sha256, user_path, whole_file

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

    def add(self, columns: Mapping[str, Mapping[str, Tensor]], n: int, cursor: int) -> None:
        self._block.add(columns, n)
        self.cursor = cursor

    def stores(self) -> dict[str, ActivationStore]:
        return stores_over([self._block], self._plan, None)


class _TemporaryFolder:
    """A folder that goes when the last object that holds this one does."""

    def __init__(self) -> None:
        self.path = Path(tempfile.mkdtemp(prefix="saelab-harvest-"))
        weakref.finalize(self, shutil.rmtree, self.path, ignore_errors=True)


class FolderWriter:
    """Takes a harvest's rows to a folder, shard by shard; goes on behind the shards that are there.

    `plan` is the manifest without "format", "version" and "shards"; `chunk_rows` the most rows that `add` will get.
    Without `out` the folder is a temporary one. Raises `CheckpointError` when the folder holds something else (the
    differing keys of the fingerprint are listed) or the disk is full: complete shards stay and are gone on from.
    """

    def __init__(self, plan: Mapping[str, Any], chunk_rows: int, out: str | os.PathLike | None) -> None:
        self._owner = _TemporaryFolder() if out is None else None
        self._folder = self._owner.path if self._owner else user_path(out)
        self._manifest = self._begin(plan)
        layout = layout_of(plan)
        self._block = Block(layout, max(chunk_rows, SHARD_BYTES // max(row_bytes({p: k}) for p, k in layout.items())))
        self._flushed = sum(shard["rows"] for shard in self._manifest["shards"])
        self.cursor = self._manifest["shards"][-1]["cursor"] if self._manifest["shards"] else 0

    def _begin(self, plan: Mapping[str, Any]) -> dict[str, Any]:
        folder = self._folder
        if (folder / MANIFEST).exists():
            manifest = read_store_manifest(folder)
            there, here = manifest["fingerprint"], plan["fingerprint"]
            differing = [key for key in {**there, **here} if there.get(key) != here.get(key)]
            if differing:
                listed = "; ".join(f"{key}: {there.get(key)!r} there, {here.get(key)!r} here" for key in differing)
                raise CheckpointError(f"{folder} holds another harvest ({listed}): give another `out` or remove it")
            file_shards(folder, manifest, None)  # checks sizes before anything is built on them
            for rubbish in folder.glob(".*.tmp-*"):
                rubbish.unlink(missing_ok=True)
            return manifest
        if folder.exists() and (not folder.is_dir() or any(not p.name.startswith(".") for p in folder.iterdir())):
            raise CheckpointError(f"{folder} exists and is not a harvest: give another `out`")
        manifest = {"format": FORMAT, "version": VERSION, **plan, "shards": []}
        self._write_manifest(manifest)
        return manifest

    @property
    def rows(self) -> int:
        return self._flushed + self._block.rows

    def add(self, columns: Mapping[str, Mapping[str, Tensor]], n: int, cursor: int) -> None:
        if self._block.rows + n > self._block.capacity:
            self._flush()
        self._block.add(columns, n)
        self.cursor = cursor

    def _flush(self) -> None:
        from safetensors.torch import save_file

        if not self._block.rows:
            return
        number, files = len(self._manifest["shards"]), {}
        for part, tensors in self._block.parts().items():
            path = self._folder / file_name(part, number)
            with whole_file(path) as temporary:
                save_file(tensors, temporary)
            files[part] = {"bytes": path.stat().st_size, "sha256": sha256(path)}
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
