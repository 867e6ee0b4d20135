"""Every firing of every latent, from one pass over the corpus, grouped by latent: shards on disk that merge by
concatenation.

A shard covers whole tiles of the corpus. It holds its firings by latent and, within a latent, in the order of the
corpus, so that
the firings of a latent are its slices of all shards, one after the other: the same for any number of shards. Whatever a
page shows is computed from those, exactly.
"""

import os
import secrets
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch

from saelab.base import cache, digests
from saelab.base.errors import ConfigError, DataError, disk_errors_named
from saelab.base.files import cache_folder, user_path
from saelab.base.progress import progress_bar
from saelab.base.tensors import write_tensors
from saelab.dashboards.collecting.one_pass import Reader, Tile
from saelab.models.hooks import open_interventions
from saelab.models.identity import foreign_hooks

LAYOUT = "1"  # of a shard: raise it when what is computed or written changes
SHARD_FIRINGS = 2**22
RANGE_FIRINGS = 2**20  # firings worked on at once, at most (unless one latent alone has more): what fits the caches
NEAR = 16
MEMORY = 2**30
_SORT_BYTES = 64  # of working memory a firing, while a shard is transposed or a range of latents is worked on


@dataclass(frozen=True)
class Firings:
    """The firings of latents `first` up to `last`: those of latent first + i are `offsets[i]:offsets[i + 1]`,
    ascending rows.

    A row is context x context length + position.
    """

    first: int
    offsets: np.ndarray
    rows: np.ndarray
    values: np.ndarray

    @property
    def counts(self) -> np.ndarray:
        return np.diff(self.offsets)

    @cached_property
    def latents(self) -> np.ndarray:
        """Of each firing, counted from `first`."""
        return np.repeat(np.arange(len(self.offsets) - 1, dtype=np.uint32), self.counts)

    @cached_property
    def places(self) -> np.ndarray:
        """int64, ascending: latent << 32 | row of each firing."""
        return (self.latents.astype(np.int64) << 32) | self.rows

    @cached_property
    def ordered(self) -> np.ndarray:
        """uint64, ascending: latent << 32 | the bits of its activation, which for positive floats sort as they do."""
        return np.sort((self.latents.astype(np.uint64) << np.uint64(32)) | self.values.view(np.uint32))

    def below(self, values: np.ndarray) -> np.ndarray:
        """How many of a latent's firings are below each of its float32 `values` [latents, n]."""
        latents = np.arange(len(self), dtype=np.uint64)[:, None] << np.uint64(32)
        return np.searchsorted(self.ordered, latents | values.view(np.uint32)) - self.offsets[:-1, None]

    def __len__(self) -> int:
        return len(self.offsets) - 1


@dataclass
class Collection:
    """What the pass found for one SAE; made by `collect`."""

    d_sae: int
    length: int
    n_contexts: int
    shards: list[dict[str, np.ndarray]] = field(repr=False)

    @cached_property
    def counts(self) -> np.ndarray:
        """Firings of each latent, int64 [d_sae]."""
        return np.sum([np.diff(shard["offsets"]) for shard in self.shards], axis=0)

    @cached_property
    def counted(self) -> np.ndarray:
        """Bool [contexts x length]: where the SAE is applied."""
        return np.concatenate([shard["counted"] for shard in self.shards])

    @cached_property
    def counted_rows(self) -> np.ndarray:
        """The rows where the SAE is applied, ascending."""
        return np.flatnonzero(self.counted)

    @cached_property
    def miss(self) -> np.ndarray:
        """u8 [contexts x length]: what the SAE misses, in fifteenths; 255 where it is not applied."""
        return np.concatenate([shard["miss"] for shard in self.shards])

    @property
    def n_counted(self) -> int:
        return int(self.counted.sum())

    @property
    def l0(self) -> float:
        return float(self.counts.sum() / max(self.n_counted, 1))

    @cached_property
    def explained_variance(self) -> float:
        """1 - sum |x - x_hat|^2 / sum |x - mean|^2 over counted rows; NaN where nothing varies."""
        error, size, *mean = np.concatenate([shard["sums"] for shard in self.shards]).cumsum(0)[-1]
        variation = size - np.square(mean).sum() / max(self.n_counted, 1)
        return float(1 - error / variation) if variation > 1e-12 * size else float("nan")

    @cached_property
    def near(self) -> tuple[np.ndarray, np.ndarray]:
        """(scores, rows) [d_sae, NEAR]: the largest pre-activations of latents that stayed silent, best first, one a
        tile."""
        scores = np.concatenate([shard["near_scores"] for shard in self.shards], 1)
        rows = np.concatenate([shard["near_rows"] for shard in self.shards], 1)
        return _largest(scores, rows)

    def firings(self, first: int, last: int) -> Firings:
        """Those of latents `first` up to `last`."""
        counts = self.counts[first:last]
        offsets = np.concatenate([[0], np.cumsum(counts)])
        rows, values = np.empty(offsets[-1], np.int32), np.empty(offsets[-1], np.float32)
        place = offsets[:-1].copy()
        for shard in self.shards:
            edges = shard["offsets"][first : last + 1]
            n = np.diff(edges)
            # where each of the shard's firings goes: behind what earlier shards had of its latent
            to = np.repeat(place - (edges[:-1] - edges[0]), n) + np.arange(edges[-1] - edges[0])
            rows[to], values[to] = shard["rows"][edges[0] : edges[-1]], shard["values"][edges[0] : edges[-1]]
            place += n
        return Firings(first, offsets, rows, values)

    def ranges(self) -> Iterator[tuple[int, int]]:
        """Neighbouring latents with at most `RANGE_FIRINGS` firings together (or a single one)."""
        ends, first = np.cumsum(self.counts), 0
        while first < self.d_sae:
            before = ends[first - 1] if first else 0
            last = max(int(np.searchsorted(ends, before + RANGE_FIRINGS, side="right")), first + 1)
            yield first, last
            first = last

    def take(self, latents: np.ndarray) -> Firings:
        """Those of some latents, one after the other."""
        runs = np.split(latents, np.flatnonzero(np.diff(latents) != 1) + 1)
        parts = [self.firings(int(run[0]), int(run[-1]) + 1) for run in runs if len(run)]
        offsets = np.concatenate([[0], np.cumsum(self.counts[latents])]).astype(np.int64)
        rows = np.concatenate([np.zeros(0, np.int32), *(part.rows for part in parts)])
        return Firings(0, offsets, rows, np.concatenate([np.zeros(0, np.float32), *(part.values for part in parts)]))

    def of(self, latents: np.ndarray) -> Iterator[tuple[np.ndarray, Firings]]:
        """The firings of some latents, a memory-bounded part at a time: (latents, their firings)."""
        start = 0
        while start < len(latents):
            ends = np.cumsum(self.counts[latents[start:]])
            n = max(int(np.searchsorted(ends, RANGE_FIRINGS, side="right")), 1)
            yield latents[start : start + n], self.take(latents[start : start + n])
            start += n


def predicted_bytes(reader: Reader, l0: float, shards: int | None = None) -> tuple[int, int]:
    """(memory, disk) in bytes that collecting will take at `l0` firings a token, the model and the SAEs not counted."""
    tokens = reader.n_contexts * reader.length
    widest = max(sae.d_sae for sae in reader.saes)
    n_shards = shards or _default_shards(reader, l0)
    batch = tokens / n_shards * l0
    tile = reader.tile_contexts * reader.length
    memory = (
        _SORT_BYTES * min(max(batch, 0), tokens * l0)
        + NEAR_ROWS_BYTES * widest
        + 5 * tokens
        + 24 * tile * max(sae.d_out for sae in reader.saes)
    )
    memory = max(memory, _SORT_BYTES * min(RANGE_FIRINGS, tokens * l0) + 5 * tokens + 16 * NEAR * widest)
    disk = len(reader.saes) * (8 * tokens * l0 + 2 * tokens + n_shards * widest * (8 + 8 * NEAR))
    return int(memory), int(disk)


NEAR_ROWS_BYTES = 4 * 64 * 3  # of a latent: dense scores of the rows looked at, their copy and their mask


def _default_shards(reader: Reader, l0: float) -> int:
    tokens = reader.n_contexts * reader.length
    return min(max(round(tokens * l0 / SHARD_FIRINGS), 1), reader.n_tiles)


def collect(
    reader: Reader,
    folder: str | os.PathLike[str] | None = None,
    *,
    shards: int | None = None,
    batch_tiles: int = 4,
    memory: int = MEMORY,
    progress: bool = True,
) -> list[Collection]:
    """Read the contexts once and keep every firing, for each SAE of the reader.

    Shards are written whole to `folder` (a folder in the cache by default); those that are there already, made from
    the same model, SAEs, contexts and code, are not read again. `batch_tiles` tiles are joined before they are
    grouped; neither that nor `shards` changes the result.

    Raises `ConfigError`, with the numbers, where it would take more than `memory` bytes (the model, the SAEs and the
    shards' pages not counted) or more disk than there is; `DataError` when no place of the contexts is one that an SAE
    is for.
    """
    l0 = expected_l0(reader)
    need, disk = predicted_bytes(reader, l0, shards)
    tokens = reader.n_contexts * reader.length
    if need > memory:
        raise ConfigError(
            f"{tokens:,} tokens at {l0:.1f} firings each would take {need:,} bytes of memory, more than {memory:,}: use "
            "more shards, fewer tokens, or raise memory="
        )
    made_of = fingerprint(reader)
    folder = user_path(folder) if folder is not None else default_folder(reader)
    with disk_errors_named(folder):
        folder.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(folder).free
    if disk > free:
        raise ConfigError(
            f"the firings of {tokens:,} tokens at {l0:.1f} each take {disk:,} bytes in {folder}, which has {free:,} free: use "
            "fewer tokens, or set SAELAB_CACHE to a folder on a larger disk"
        )
    n_shards = min(shards or _default_shards(reader, l0), reader.n_tiles)
    edges = [reader.n_tiles * i // n_shards for i in range(n_shards + 1)]
    collected: list[list[dict[str, np.ndarray]]] = [[] for _ in reader.saes]
    with progress_bar(reader.n_contexts, "reading the corpus", " contexts", progress) as bar:
        for first, last in zip(edges, edges[1:], strict=False):
            for mine, shard in zip(
                collected, _shard(reader, folder, made_of, first, last, batch_tiles, bar), strict=True
            ):
                mine.append(shard)
    made = [
        Collection(sae.d_sae, reader.length, reader.n_contexts, shards)
        for sae, shards in zip(reader.saes, collected, strict=True)
    ]
    if not min(collection.n_counted for collection in made):
        raise DataError(
            f"none of the {tokens:,} tokens read is one that the SAE is for: all are special, among the first positions of "
            "a context, or above the norm limit"
        )
    return made


def default_folder(reader: Reader) -> Path:
    """Where a pass keeps its shards unless told otherwise."""
    return cache_folder() / "dashboards" / fingerprint(reader)[:32]


def fingerprint(reader: Reader) -> str:
    """SHA-256 over what determines the firings: weights, contexts, how much is read, and the layout of the shards."""
    facts = [LAYOUT, reader.lm.digest, str(reader.lm.dtype), reader.contexts.digest, reader.n_contexts, reader.seed,
             torch.get_num_threads(), torch.__version__]  # fmt: skip
    for sae, site, target in zip(reader.saes, reader.sites, reader.targets, strict=True):
        counted = [sae.metadata.get(name) for name in ("skip_positions", "max_norm")]
        facts.append(
            [digests.of_tensors(sae.state_dict()), sae.cfg.to_dict(), site.name, target.name, counted, str(sae.dtype)]
        )
    if open_interventions(reader.lm.runner) or foreign_hooks(reader.lm.runner):
        facts.append(secrets.token_hex())  # what they do is nowhere written down: never found again
    return digests.of_json(facts)


def expected_l0(reader: Reader) -> float:
    """Firings a token, of the SAE with most: its budget, else what training counted, else those of one tile."""
    found = []
    for sae in reader.saes:
        state = sae.state
        if int(state.stat_tokens):
            found.append(float(state.fires.sum() / state.stat_tokens))
        elif hasattr(sae.cfg, "k") and isinstance(sae.cfg.k, int):
            found.append(float(sae.cfg.k))
    if len(found) < len(reader.saes):
        tiles = next(iter(reader.tiles(0, 1)))
        found += [len(tile.rows) / max(int(tile.counted.sum()), 1) for tile in tiles]
    return max(found)


def _shard(
    reader: Reader, folder: Path, made_of: str, first: int, last: int, batch_tiles: int, bar: Any
) -> list[dict[str, np.ndarray]]:
    """The shard of tiles `first` up to `last`, for each SAE: from the folder, else read and written."""
    key = f"{made_of}-{first}-{last}"
    paths = [folder / f"{i}-{first:06d}-{last:06d}.safetensors" for i in range(len(reader.saes))]
    found = [cache.read(path) for path in paths]
    contexts = min(last * reader.tile_contexts, reader.n_contexts) - first * reader.tile_contexts
    if any(entry is None or entry[1].get("key") != key for entry in found):
        grouped: list[list[dict[str, Any]]] = [[] for _ in reader.saes]
        waiting: list[list[Tile]] = []
        for number, tiles in enumerate(reader.tiles(first, last)):
            waiting.append(tiles)
            if len(waiting) == batch_tiles or number == last - first - 1:
                for batches, mine in zip(grouped, zip(*waiting, strict=True), strict=True):
                    batches.append(_joined(mine))
                waiting = []
            bar.update(min(reader.tile_contexts, contexts - number * reader.tile_contexts))
        for path, sae, batches in zip(paths, reader.saes, grouped, strict=True):
            write_tensors(path, _transposed(batches, sae.d_sae), {"key": key})
        found = [cache.read(path) for path in paths]
    else:
        bar.update(contexts)
    return [{name: tensor.numpy() for name, tensor in entry[0].items()} for entry in found if entry is not None]


def _joined(tiles: Sequence[Tile]) -> dict[str, Any]:
    names = ("rows", "latents", "values", "counted", "miss")
    joined: dict[str, Any] = {name: torch.cat([getattr(tile, name) for tile in tiles]) for name in names}
    if not bool(joined["values"].isfinite().all()):
        bad = int((~joined["values"].isfinite()).nonzero()[0])
        raise DataError(
            f"latent {int(joined['latents'][bad])} has the activation {float(joined['values'][bad])}: the SAE's weights "
            "are not finite, or too large for its precision"
        )
    for name in ("near_scores", "near_rows"):
        joined[name] = torch.stack([getattr(tile, name) for tile in tiles], 1).numpy()
    return joined | {"sums": torch.stack([tile.sums for tile in tiles])}


def _transposed(batches: list[dict[str, Any]], d_sae: int) -> dict[str, torch.Tensor]:
    """A shard's tensors: its firings by latent, in the order of the corpus within one."""
    latents = torch.cat([batch["latents"] for batch in batches])
    order = _order(latents.numpy(), d_sae)
    # numpy takes several times faster than torch
    by_latent = {
        name: torch.from_numpy(torch.cat([batch[name] for batch in batches]).numpy().take(order))
        for name in ("rows", "values")
    }
    counts = torch.bincount(latents, minlength=d_sae)
    offsets = torch.zeros(d_sae + 1, dtype=torch.int64)
    torch.cumsum(counts, 0, out=offsets[1:])
    del latents
    scores, rows = _largest(
        np.concatenate([batch["near_scores"] for batch in batches], 1),
        np.concatenate([batch["near_rows"] for batch in batches], 1),
    )
    return {
        "offsets": offsets,
        **by_latent,
        "counted": torch.cat([batch["counted"] for batch in batches]),
        "miss": torch.cat([batch["miss"] for batch in batches]),
        "sums": torch.cat([batch["sums"] for batch in batches]),
        "near_scores": torch.from_numpy(scores),
        "near_rows": torch.from_numpy(rows),
    }


def _order(latents: np.ndarray, d_sae: int) -> np.ndarray:
    """A stable order by latent; numpy sorts 16-bit integers by radix."""
    if d_sae <= 65_536:
        return latents.astype(np.uint16).argsort(kind="stable")
    low = latents.astype(np.uint16).argsort(kind="stable")
    return low[(latents >> 16).astype(np.uint16)[low].argsort(kind="stable")]


def _largest(scores: np.ndarray, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The NEAR largest of each latent's candidates [d_sae, n], best first, the earlier row first among equals."""
    bits = (scores + np.float32(0)).view(np.uint32)  # -0 is 0
    # unsigned numbers that sort as the floats do
    rising = np.where(bits >> np.uint32(31), ~bits, bits | np.uint32(2**31))
    # candidates come in the order of the corpus, so their number decides among equals
    keys = (~rising).astype(np.uint64) << np.uint64(32) | np.arange(scores.shape[1], dtype=np.uint64)
    keys.sort(axis=1)
    order = (keys[:, :NEAR] & np.uint64(2**32 - 1)).astype(np.int64)
    return np.take_along_axis(scores, order, 1), np.take_along_axis(rows, order, 1)
