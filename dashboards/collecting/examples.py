"""Which places of the corpus a page shows: the strongest, some of each interval and quantile, random ones, and near
misses.

Every choice is a function of the firings and of a hash of (latent, place), so of nothing else: not of the order, the
size or the number of the parts in which the corpus was read. Rows are context x length + position.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from saelab.base import checks
from saelab.base.errors import ConfigError
from saelab.dashboards.collecting.collect import NEAR, Collection, Firings
from saelab.dashboards.collecting.latent_figures import extremes, first_in_contexts, quantile_edges
from saelab.dashboards.collecting.priority import priorities

PARTS = 5  # intervals of the maximum, and quantiles
LONGEST_WINDOW = 255
_ENOUGH = 4  # times the wanted number pass the first sieve of priorities, on average


@dataclass(frozen=True)
class Layout:
    """How many windows of each group a page has, and how many tokens a window."""

    window: int
    groups: list[dict[str, Any]]
    sizes: list[int]

    @classmethod
    def of(cls, windows: int, window: int) -> "Layout":
        """`windows` in all: a ninth each random and near misses, a 22nd in each interval and quantile, the rest the
        strongest.

        >>> Layout.of(45, 48).sizes
        [15, 2, 2, 2, 2, 2, 2, 2, 2, 2, 2, 5, 5]
        """
        windows, window = checks.count("windows", windows), checks.count("window", window, most=LONGEST_WINDOW)
        few, each = min(windows // 9, NEAR), windows // 22
        fifths = [(j / PARTS, (j + 1) / PARTS) for j in reversed(range(PARTS))]
        groups: list[tuple[str, str, float | None, float | None, int]] = [
            ("Top", "top", None, None, windows - 2 * few - 2 * PARTS * each)
        ]
        groups += [(f"{lo:.0%} to {hi:.0%} of the maximum", "interval", lo, hi, each) for lo, hi in fifths]
        groups += [(f"Quantile {lo:.0%} to {hi:.0%}", "quantile", lo, hi, each) for lo, hi in fifths]
        groups += [("Random", "random", None, None, few), ("Near misses", "near", None, None, few)]
        kept = [group for group in groups if group[4]]
        described = [{"name": name, "kind": kind, "lo": lo, "hi": hi} for name, kind, lo, hi, _ in kept]
        return cls(window, described, [size for *_, size in kept])


@dataclass(frozen=True)
class Windows:
    """Windows of some latents, those of one latent together, in the order of display.

    `latent` counts from the first of the latents; `row` is the peak's, `start` the first token's; `act` the activation
    at the peak (of a near miss the pre-activation). `acts` [sum of lengths] are the activations along all windows.
    """

    latent: np.ndarray
    group: np.ndarray
    row: np.ndarray
    act: np.ndarray
    start: np.ndarray
    length: int
    acts: np.ndarray


def choose(collection: Collection, latents: np.ndarray, f: Firings, layout: Layout, seed: int) -> Windows:
    """The windows of `latents`, whose firings are `f`."""
    found: list[tuple[np.ndarray, ...]] = []
    kinds = [group["kind"] for group in layout.groups]
    priority = priorities(seed, latents[f.latents], f.rows)
    for kind in dict.fromkeys(kinds):
        places = [i for i, other in enumerate(kinds) if other == kind]
        n = layout.sizes[places[0]]
        if kind == "top":
            chosen = strongest(f, collection.length, n)
            group = np.full(len(chosen), places[0])
        elif kind in ("interval", "quantile"):
            draw = by_interval if kind == "interval" else by_quantile
            chosen, part = draw(f, priority, collection.length, n)
            group = places[0] + PARTS - 1 - part
        elif kind == "random":
            local, rows = random_rows(collection, latents, n, seed)
            found.append((local, np.full(len(rows), places[0]), rows, activations(f, local, rows)))
            continue
        else:
            scores, at = (table[latents, :n] for table in collection.near)
            local, rank = np.nonzero(np.isfinite(scores))
            found.append((local, np.full(len(local), places[0]), at[local, rank], scores[local, rank]))
            continue
        found.append((f.latents[chosen].astype(np.int64), group, f.rows[chosen], f.values[chosen]))
    latent, group, row, act = (np.concatenate(columns) for columns in zip(*found, strict=True))
    order = np.lexsort((row, -act, group, latent))
    latent, group, row, act = latent[order], group[order], row[order].astype(np.int64), act[order].astype(np.float32)
    length = min(layout.window, collection.length)
    position = row % collection.length
    start = row - position + np.clip(position - length // 2, 0, collection.length - length)
    return Windows(latent, group, row, act, start, length, along(f, latent, start, length, collection.length))


def strongest(f: Firings, length: int, n: int) -> np.ndarray:
    """Firings: of each latent the peaks of the `n` contexts with the largest peaks; the earlier place among equals."""
    if not len(f.rows):
        return np.zeros(0, np.int64)
    starts = first_in_contexts(f, length)
    peaks = np.maximum.reduceat(f.values, starts)
    owner = f.latents[starts]
    keys = np.sort((owner.astype(np.uint64) << np.uint64(32)) | peaks.view(np.uint32))
    ends = np.searchsorted(owner, np.arange(len(f)), side="right")
    begins = np.searchsorted(owner, np.arange(len(f)))
    cut = keys[np.maximum(ends - n, begins).clip(max=len(keys) - 1)].astype(np.uint32).view(np.float32)
    high = np.flatnonzero(peaks >= cut[owner])
    long = np.append(starts[1:], len(f.rows))[high] - starts[high]
    of = np.repeat(np.arange(len(high)), long)
    place = np.arange(len(of)) - (np.cumsum(long) - long)[of] + starts[high][of]
    hit = np.flatnonzero(f.values[place] == peaks[high][of])
    at_peak = place[hit[np.concatenate([[True], np.diff(of[hit]) > 0])]]
    at_peak = at_peak[np.lexsort((f.rows[at_peak], -f.values[at_peak], f.latents[at_peak]))]
    return at_peak[_rank(f.latents[at_peak]) < n]


def by_interval(f: Firings, priority: np.ndarray, length: int, n: int) -> tuple[np.ndarray, np.ndarray]:
    """Firings, and the fifth of the latent's maximum in which each lies (the upper edge belongs to the next one): of
    each latent and fifth the `n` of lowest priority, at most one a context."""
    scale = PARTS / np.maximum(extremes(f)[1].astype(np.float64), np.finfo(np.float32).tiny)
    part = np.minimum((f.values * scale[f.latents]).astype(np.int8), PARTS - 1)
    keys = f.latents.astype(np.int64) * PARTS + part
    total = np.bincount(keys, minlength=len(f) * PARTS)
    sieved = np.flatnonzero(_high(priority) <= _limit(n, total)[keys])
    return _drawn(f, sieved, keys.__getitem__, total, priority, length, n)


def by_quantile(f: Firings, priority: np.ndarray, length: int, n: int) -> tuple[np.ndarray, np.ndarray]:
    """The same by fifths of the latent's firings; equal activations belong together."""
    edges = quantile_edges(f, PARTS)

    def keys_of(places: np.ndarray) -> np.ndarray:
        latents = f.latents[places].astype(np.int64)
        return latents * PARTS + np.count_nonzero(f.values[places, None] >= edges[latents], axis=1)

    below = np.concatenate([np.zeros((len(f), 1), np.int64), f.below(edges), f.counts[:, None]], 1)
    sieved = np.flatnonzero(_high(priority) <= _limit(n * PARTS, f.counts)[f.latents])
    return _drawn(f, sieved, keys_of, np.diff(below, axis=1).ravel(), priority, length, n)


def _high(priority: np.ndarray) -> np.ndarray:
    return (priority >> np.uint64(32)).astype(np.uint32)


def _limit(n: int, total: np.ndarray) -> np.ndarray:
    """The priority, its upper half, that lets about `_ENOUGH * n` of `total` pass."""
    return (np.minimum(_ENOUGH * n / np.maximum(total, 1), 1.0) * (2**32 - 1)).astype(np.uint32)


def _drawn(
    f: Firings, sieved: np.ndarray, keys_of: Callable[[np.ndarray], np.ndarray], total: np.ndarray, priority: np.ndarray,
    length: int, n: int,
) -> tuple[np.ndarray, np.ndarray]:  # fmt: skip
    """Firings and parts: of each key (latent * PARTS + part, `total` firings each) the `n` of lowest priority, those that
    passed the sieve first."""
    keys = keys_of(sieved)
    best = _lowest(keys, priority[sieved], f.rows[sieved] // length, n)
    chosen, mine = sieved[best], keys[best]
    few, sifted = (np.bincount(some, minlength=len(total)) for some in (mine, keys))
    short = (few < n) & (sifted < total)
    if short.any():  # the sieve let too few contexts through: those again, without it
        owners = np.unique(np.flatnonzero(short) // PARTS)
        again = np.flatnonzero(np.isin(f.latents, owners))
        keys = keys_of(again)
        again, keys = again[short[keys]], keys[short[keys]]
        more = _lowest(keys, priority[again], f.rows[again] // length, n)
        enough = ~short[mine]
        chosen = np.concatenate([chosen[enough], again[more]])
        mine = np.concatenate([mine[enough], keys[more]])
    return chosen, mine % PARTS


def _lowest(keys: np.ndarray, priority: np.ndarray, contexts: np.ndarray, n: int) -> np.ndarray:
    """Of each key the `n` entries of lowest priority, the first of each context only."""
    order = np.argsort(priority)
    order = order[
        np.argsort(keys[order].astype(np.uint16) if keys.max(initial=0) < 2**16 else keys[order], kind="stable")
    ]
    pairs = (keys[order].astype(np.uint64) << np.uint64(32)) | contexts[order].astype(np.uint64)
    _, first = np.unique(pairs, return_index=True)
    order = order[np.sort(first)]
    return order[_rank(keys[order]) < n]


def _rank(grouped: np.ndarray) -> np.ndarray:
    """The place of each entry within its run of equal values.

    >>> _rank(np.array([3, 3, 5, 5, 5]))
    array([0, 1, 0, 1, 2])
    """
    new = np.ones(len(grouped), bool)
    new[1:] = grouped[1:] != grouped[:-1]
    starts = np.flatnonzero(new)
    return np.arange(len(grouped)) - starts[np.cumsum(new) - 1]


def random_rows(collection: Collection, latents: np.ndarray, n: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """(latent's place, row): for each latent `n` counted places drawn by hash, at most one a context."""
    counted = collection.counted_rows
    tries = 4 * n
    local = np.repeat(np.arange(len(latents)), tries)
    number = np.tile(np.arange(tries), len(latents))
    rows = counted[(priorities(~seed, latents[local], number) % np.uint64(len(counted))).astype(np.int64)]
    kept = _lowest(local, number, rows // collection.length, n)
    return local[kept], rows[kept]


def activations(f: Firings, latent: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """The activation of each (latent, row); 0 where it does not fire."""
    if not len(f.rows):
        return np.zeros(len(rows), np.float32)
    keys, wanted = f.places, (latent.astype(np.int64) << 32) | rows
    at = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
    return np.where(keys[at] == wanted, f.values[at], np.float32(0))


def along(f: Firings, latent: np.ndarray, start: np.ndarray, window: int, length: int) -> np.ndarray:
    """Activations [windows x window] of each window's latent at each of its tokens."""
    out = np.zeros(len(start) * window, np.float32)
    keys, base = f.places, (latent.astype(np.int64) << 32) | start
    low, high = np.searchsorted(keys, base), np.searchsorted(keys, base + window)
    n = high - low
    of = np.repeat(np.arange(len(start)), n)
    entry = np.repeat(low - (np.cumsum(n) - n), n) + np.arange(n.sum())
    out[of * window + f.rows[entry] - start[of]] = f.values[entry]
    return out


def pooled(starts: np.ndarray, window: int) -> tuple[np.ndarray, np.ndarray]:
    """(rows of the pool, offset of each window in it): the union of the windows, in the order of the corpus.

    >>> pooled(np.array([10, 4, 11]), 3)
    (array([ 4,  5,  6, 10, 11, 12, 13]), array([3, 0, 4]))
    """
    rows = np.unique((np.unique(starts)[:, None] + np.arange(window)).ravel())
    return rows, np.searchsorted(rows, starts)


def repeats(tokens: np.ndarray, latent: np.ndarray) -> np.ndarray:
    """u8: 1 where an earlier window of the same latent has the same tokens [windows, window]."""
    seen: set[tuple[int, bytes]] = set()
    found = np.zeros(len(latent), np.uint8)
    for i, (owner, row) in enumerate(zip(latent.tolist(), np.ascontiguousarray(tokens), strict=True)):
        key = (owner, row.tobytes())
        found[i] = key in seen
        seen.add(key)
    return found


def spread(counts: np.ndarray, n: int, seed: int) -> np.ndarray:
    """`n` latents that fire, evenly over the ranks of their density: of each stretch of ranks the one of lowest
    priority.

    >>> spread(np.array([0, 5, 9, 1, 7]), 2, seed=0).shape
    (2,)
    """
    alive = np.flatnonzero(counts > 0)
    ranked = alive[np.lexsort((alive, -counts[alive]))]
    n = min(n, len(ranked))
    edges = [len(ranked) * i // n for i in range(n + 1)] if n else [0]
    priority = priorities(seed, ranked, np.zeros(len(ranked)))
    chosen = [lo + int(priority[lo:hi].argmin()) for lo, hi in zip(edges, edges[1:], strict=False)]
    return np.sort(ranked[chosen])


def selected(latents: int | Sequence[int] | None, counts: np.ndarray, seed: int) -> np.ndarray:
    """The latents with a page: a count of live ones, a list, or None for all. `ConfigError` for a bad list."""
    if latents is None:
        return np.arange(len(counts))
    if not isinstance(latents, Iterable) or getattr(latents, "ndim", 1) == 0:
        found = spread(counts, checks.count("latents", latents), seed)
        if not len(found):
            raise ConfigError("no latent fired on the tokens read: raise tokens, or name latents in a list")
        return found
    chosen = checks.counts("latents", latents, least=0, most=len(counts) - 1, of="the latents")
    if not chosen:
        raise ConfigError(f"latents={latents!r}: give whole numbers from 0 to {len(counts) - 1:,}, at least one")
    return np.sort(chosen)
