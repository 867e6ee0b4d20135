"""Activations at rest: rows of tokens in memory, or in memory-mapped shards on disk.

The protocol, version 1
-----------------------
A harvest of m sites is one folder:

    manifest.json                  JSON, rewritten whole after each shard
    rows-00000.safetensors         tokens, positions, documents, contexts: int32 [n] each
    site0-00000.safetensors        x [n, width] and, for a harvest with gradients, gradients [n, width], in the
    site1-00000.safetensors        harvest's dtype (float32, float16, bfloat16 or float64)
    rows-00001.safetensors         the next shard ...

* **Names.** `<part>-<number>.safetensors`: the parts are `rows` and `site<k>`, k being the site's place in the
  manifest's "sites"; shards are numbered from 0, in five digits or more.
* **Rows.** A row is one token at one place of one context; rows are in the order in which they were read. Row i of
  every file of a shard is the same token, and shard s begins where shard s - 1 ends. Shards need not be equally long.
  `tokens` is the token's id, `positions` its place in the context, `contexts` the number of the context in the packed
  corpus, `documents` the index of the document in the corpus. Padding, special tokens and skipped positions have none.
* **Manifest.** "format" is "saelab activations", "version" 1; a reader refuses greater ones. "fingerprint" says what
  was asked for and alone decides the content; "metadata" describes it; "sites" lists {"name", "width", "heads"};
  "dtype"; "gradients"; "rows" is the number that the finished harvest has; "shards" lists {"rows", "cursor", "files"},
  where "files" maps each part to {"bytes", "sha256"} and "cursor" counts the contexts read once that shard is full.
* **Writing.** Files are written to a temporary sibling, fsynced and renamed, the manifest after the files that it
  lists. So a shard that the manifest lists is complete, any other file is rubbish to be overwritten, and a harvest that
  was killed goes on at the last "cursor". It is finished when the shards' rows add up to "rows".
* **Reading.** Sizes are checked when the folder is opened, each file's SHA-256 when it is first read; `verify()` checks
  all of them at once.
"""

import hashlib
import os
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, SupportsIndex

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor

from saelab.base import digests
from saelab.base.errors import CheckpointError, ConfigError, FormatError
from saelab.base.files import MANIFEST, user_path
from saelab.base.manifests import ANYTHING, COUNT, FILE, FLAG, METADATA, SIZE, TABLE, TEXT, check, exactly, read_json
from saelab.reading.shards import TOKEN_KEYS, Column, FileShard, Layout, Shard

FORMAT, VERSION = "saelab activations", 1
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16, "float64": torch.float64}


class ActivationStore:
    """Activations of one site, a row a token, that read like a tensor [n, d_in] however large they are.

    `store[i:j]`, `store[i]` and `store[indices]` (row numbers in any order) give new tensors; iterating yields chunks
    in order, as often as one likes. Made by `saelab.harvest`; a finished folder is reopened by `ActivationStore.open`.

    Attributes
    ----------
    site, d_in, dtype: the site's name, its width, the dtype of the rows.
    tokens, positions, documents, contexts: int32 [n]: token id, place in the context, index into the corpus'
        documents, number of the context. With them a row can be traced to its text.
    gradients: None, or the gradient of the summed next-token loss at each row, indexable like the store.
    metadata: model, model_digest, corpus, corpus_digest, site, heads, context_length, skip_positions, prepend_bos,
        split, seed, dtype, tokens (the number of rows), versions.
    digest: SHA-256 over what the store holds and how it was made.
    path: the folder, or None in memory.

    >>> store = saelab.harvest(lm, corpus, site="blocks.3.hook_resid_post", tokens=50_000)    # doctest: +SKIP
    >>> store[:1000].shape, store[torch.tensor([7, 3])].shape    # doctest: +SKIP
    (torch.Size([1000, 576]), torch.Size([2, 576]))
    >>> lm.tokenizer.decode(store.tokens[7]), corpus.documents[store.documents[7]][:20]    # doctest: +SKIP
    (' union', 'Fellow-Citizens of t')
    """

    def __init__(self, shards: Sequence[Shard], manifest: Mapping[str, Any], place: int, path: Path | None) -> None:
        site, dtype = manifest["sites"][place], DTYPES[manifest["dtype"]]
        self._shards, self._manifest, self._part = shards, manifest, f"site{place}"
        self.site: str = site["name"]
        self.d_in: int = site["width"]
        self.dtype = dtype
        self.path = path
        self._x = Column(shards, self._part, "x", self.d_in, dtype)
        self.gradients = Column(shards, self._part, "gradients", self.d_in, dtype) if manifest["gradients"] else None
        self.metadata: dict[str, Any] = {
            **manifest["metadata"],
            "site": self.site,
            "heads": site["heads"],
            "dtype": manifest["dtype"],
            "tokens": len(self),
        }

    @classmethod
    def open(cls, path: str | os.PathLike[str], site: str | None = None) -> "ActivationStore":
        """The store in a finished folder; `site` says which, where the folder has several.

        Raises `FormatError` for a folder that is none or whose shards are cut short or changed (named),
        `CheckpointError` for an unfinished harvest, `ConfigError` when the site is missing or needed.
        """
        stores = open_stores(path)
        if site is None and len(stores) > 1 or site is not None and site not in stores:
            raise ConfigError(
                f"{path} has the sites {', '.join(stores)}: "
                f"{'say which with `site`' if site is None else f'not {site!r}'}"
            )
        return stores[site if site is not None else next(iter(stores))]

    def __len__(self) -> int:
        return len(self._x)

    @property
    def shape(self) -> torch.Size:
        return self._x.shape

    def __getitem__(
        self, index: SupportsIndex | slice | Sequence[int] | Shaped[Tensor, "..."]
    ) -> Float[Tensor, "*row"]:
        return self._x[index]

    def __iter__(self) -> Iterator[Float[Tensor, "_ d"]]:
        return iter(self._x)

    @property
    def bounds(self) -> list[int]:
        """Where its shards begin, and where the last one ends."""
        return self._x.bounds

    def release(self) -> None:
        """Unmap what was read of its files; what is read again is mapped again."""
        for shard in self._shards:
            if isinstance(shard, FileShard):
                shard.release()

    def _token_column(self, key: str) -> Tensor:
        return Column(self._shards, "rows", key, 0, torch.int32)[:]

    @cached_property
    def tokens(self) -> Int[Tensor, " n"]:
        return self._token_column("tokens")

    @cached_property
    def positions(self) -> Int[Tensor, " n"]:
        return self._token_column("positions")

    @cached_property
    def documents(self) -> Int[Tensor, " n"]:
        return self._token_column("documents")

    @cached_property
    def contexts(self) -> Int[Tensor, " n"]:
        return self._token_column("contexts")

    @cached_property
    def digest(self) -> str:
        if self.path is None:
            columns = [self.tokens, self.positions, self.documents, self.contexts, *self]
            content = hashlib.sha256()
            for chunk in columns if self.gradients is None else [*columns, *self.gradients]:
                content.update(digests.content(chunk))
            parts: Any = content.hexdigest()
        else:
            parts = [
                [shard["files"][part]["sha256"] for part in ("rows", self._part)] for shard in self._manifest["shards"]
            ]
        described = {"fingerprint": self._manifest["fingerprint"], "site": self.site, "content": parts}
        return digests.of_json(described)

    def verify(self) -> None:
        """Check the SHA-256 of every file now; `FormatError` names the one that is not what was written."""
        for shard in self._shards:
            if isinstance(shard, FileShard):
                shard.verify()

    def __repr__(self) -> str:
        return (
            f"ActivationStore({len(self):,} x {self.d_in} {self.metadata['dtype']}, site={self.site!r}, "
            f"model={self.metadata.get('model')!r}, {'in memory' if self.path is None else self.path})"
        )


def open_stores(path: str | os.PathLike[str]) -> dict[str, ActivationStore]:
    """Every store of a finished folder, by site name; rows are aligned. Errors as in `ActivationStore.open`."""
    folder = user_path(path)
    manifest = read_store_manifest(folder)
    written = sum(shard["rows"] for shard in manifest["shards"])
    if written > manifest["rows"]:
        raise FormatError(
            f"{folder} should have {manifest['rows']:,} rows and its shards have {written:,}: harvest it again"
        )
    if written < manifest["rows"]:
        raise CheckpointError(
            f"the harvest in {folder} is not finished: {written:,} of {manifest['rows']:,} rows; "
            "run it again with the same arguments and it goes on there"
        )
    return stores_over(file_shards(folder, manifest, None), manifest, folder)


def layout_of(manifest: Mapping[str, Any]) -> Layout:
    """The columns of each file of a shard."""
    keys = ("x", "gradients") if manifest["gradients"] else ("x",)
    layout: Layout = {"rows": {key: (0, torch.int32) for key in TOKEN_KEYS}}
    for place, site in enumerate(manifest["sites"]):
        layout[f"site{place}"] = {key: (site["width"], DTYPES[manifest["dtype"]]) for key in keys}
    return layout


def row_bytes(layout: Layout) -> int:
    """Bytes of one row over all columns."""
    return sum(max(width, 1) * dtype.itemsize for keys in layout.values() for width, dtype in keys.values())


SCHEMA: dict[str, Any] = {
    "format": exactly(FORMAT), "fingerprint": TABLE, "metadata": METADATA, "dtype": exactly(*DTYPES), "gradients": FLAG,
    "sites": [{"name": TEXT, "width": SIZE, "heads": ANYTHING}], "rows": COUNT,
    "shards": [{"rows": COUNT, "cursor": COUNT, "files": {"rows": FILE, "*": FILE}}],
}  # fmt: skip


def read_store_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a harvest, finished or not; `FormatError` for anything else."""
    where = f"{folder} is not a harvest of activations: {MANIFEST}"
    try:
        manifest = read_json(folder / MANIFEST, {"format": exactly(FORMAT), "version": COUNT})
    except FormatError as error:
        raise FormatError(f"{where}: {error}") from error
    if manifest["version"] > VERSION:
        raise FormatError(
            f"{where}: it has version {manifest['version']} of the protocol, this saelab reads {VERSION}: install a newer one"
        )
    check(manifest, SCHEMA, where)
    names = [site["name"] for site in manifest["sites"]]
    parts = {"rows", *(f"site{place}" for place in range(len(names)))}
    if not names or len(set(names)) != len(names):
        raise FormatError(f"{where}: it has the sites {names}; a harvest has one or more, each once")
    for shard in manifest["shards"]:
        if set(shard["files"]) != parts:
            raise FormatError(f"{where}: a shard has the files {sorted(shard['files'])}, not {sorted(parts)}")
    return manifest


def file_name(part: str, number: int) -> str:
    return f"{part}-{number:05d}.safetensors"


def file_shards(folder: Path, manifest: Mapping[str, Any], owner: object) -> list[FileShard]:
    layout = layout_of(manifest)
    return [
        FileShard(
            folder,
            {part: {"name": file_name(part, number), **file} for part, file in shard["files"].items()},
            shard["rows"],
            layout,
            owner,
        )
        for number, shard in enumerate(manifest["shards"])
    ]


def stores_over(shards: Sequence[Shard], manifest: Mapping[str, Any], path: Path | None) -> dict[str, ActivationStore]:
    """The store of each site over the same shards."""
    names = [site["name"] for site in manifest["sites"]]
    return {name: ActivationStore(shards, manifest, place, path) for place, name in enumerate(names)}
