"""Figures of latents from their firings: index columns for all, histograms and moments for those with a page.

All of them are computed at once from `Firings`; F latents, N firings.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np

from saelab.dashboards.collecting.collect import Collection, Firings

BINS_AN_OCTAVE = 4
_SMALLEST_NORMAL = 2**23  # as the bits of an f32
# mantissa bits of the first f32 at or above 2^(j/4), j = 1, 2, 3
_EDGES = [int(np.ceil((2 ** (j / BINS_AN_OCTAVE) - 1) * 2**23)) for j in range(1, BINS_AN_OCTAVE)]
TOKENS = 10
NO_TOKEN = -1
UNSEEN = 4
_TOKEN_BITS = 20  # with the latent's place in its range and that of a firing at most 64


@dataclass
class Index:
    """Columns of the index, [d_sae] each; `tokens` [d_sae, 3], NO_TOKEN where there are fewer; `focus` is the figure by which
    the first of them leads, as a share of `max`."""

    count: np.ndarray
    max: np.ndarray
    mean: np.ndarray
    tokens: np.ndarray
    focus: np.ndarray
    contexts: np.ndarray


def index(collection: Collection, ids: np.ndarray, context_sample: np.ndarray, reads: np.ndarray) -> Index:
    """The index over all latents. `ids` [rows] are the token ids read, `reads` [d_vocab] how often each was at a counted
    place; `context_sample` bool [contexts], those that co-activation counts."""
    d = collection.d_sae
    found = Index(
        collection.counts, np.zeros(d, np.float32), np.zeros(d), np.full((d, 3), NO_TOKEN), np.zeros(d),
        np.zeros(d, np.int64),
    )  # fmt: skip
    for first, last in collection.ranges():
        f = collection.firings(first, last)
        mine = slice(first, last)
        found.max[mine] = reduced(np.maximum, f.values, f)
        found.mean[mine] = means(f.values, f)
        found.tokens[mine], _, _, scores = top_tokens(f, ids, reads, 3)
        found.focus[mine] = scores[:, 0] / np.maximum(found.max[mine], np.finfo(np.float32).tiny)
        places = first_in_contexts(f, collection.length)
        sampled = places[context_sample[f.rows[places] // collection.length]]
        found.contexts[mine] = np.bincount(f.latents[sampled], minlength=len(f))
    return found


def reduced(ufunc: Any, values: np.ndarray, f: Firings) -> np.ndarray:
    """The ufunc over each latent's values; 0 for latents without firings."""
    out = np.zeros(len(f), values.dtype)
    alive = f.counts > 0
    if alive.any():
        out[alive] = ufunc.reduceat(values, f.offsets[:-1][alive])
    return out


def means(values: np.ndarray, f: Firings) -> np.ndarray:
    """Mean over each latent's firings in float64; 0 where there are none."""
    return reduced(np.add, values.astype(np.float64), f) / np.maximum(f.counts, 1)


def first_in_contexts(f: Firings, length: int) -> np.ndarray:
    """Places of the first firing of each latent in each context in which it fires."""
    contexts = f.rows // np.int32(length)
    new = np.empty(len(contexts), bool)
    new[:1] = True
    new[1:] = contexts[1:] != contexts[:-1]
    new[f.offsets[:-1][f.counts > 0]] = True
    return np.flatnonzero(new)


def top_tokens(
    f: Firings, ids: np.ndarray, reads: np.ndarray, n: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """The `n` tokens [F, n] that characterise each latent, their firings, their mean activations over those, and the figure
    that ranks them: the share of a token's `reads` [d_vocab] on which the latent fires times the mean, `UNSEEN` reads without
    a firing added, so that what was read once does not lead; the lower id among equals.
    """
    shape = (len(f), n)
    tokens, counts = np.full(shape, NO_TOKEN, np.int64), np.zeros(shape, np.int64)
    averages, scores = np.zeros(shape), np.zeros(shape)
    if not len(f.rows):
        return tokens, counts, averages, scores
    # sorting numbers is several times cheaper than sorting places by them: the place is in the number
    bits = np.uint64(len(f.rows).bit_length())
    keys = (f.latents.astype(np.uint64) << np.uint64(_TOKEN_BITS)) | ids[f.rows].astype(np.uint64)
    keys = (keys << bits) | np.arange(len(keys), dtype=np.uint64)
    keys.sort()
    pairs = keys >> bits
    starts = np.flatnonzero(np.concatenate([[True], pairs[1:] != pairs[:-1]]))
    token = (pairs[starts] & np.uint64(2**_TOKEN_BITS - 1)).astype(np.int64)
    owner = (pairs[starts] >> np.uint64(_TOKEN_BITS)).astype(np.int64)
    number = np.diff(np.concatenate([starts, [len(keys)]]))
    places = (keys & ((np.uint64(1) << bits) - np.uint64(1))).astype(np.int64)
    total = np.add.reduceat(f.values[places].astype(np.float64), starts)
    score = total / (reads[token] + UNSEEN)
    order = np.lexsort((-score, owner))  # stable: the lower id among equals
    first = np.searchsorted(owner, np.arange(len(f) + 1))
    rank = first[:-1, None] + np.arange(n)
    there = rank < first[1:, None]
    best = order[rank[there]]
    tokens[there], counts[there] = token[best], number[best]
    averages[there], scores[there] = total[best] / number[best], score[best]
    return tokens, counts, averages, scores


def bins(values: np.ndarray) -> np.ndarray:
    """The bin floor(4 log2 a) of each positive value: bin b is [2^(b/4), 2^((b+1)/4)), whatever the range of the data.

    Decided by comparing bits with those of the edges, never by a rounded logarithm.

    >>> bins(np.array([1.0, 1.18, 1.19, 2.0, 0.5], np.float32))
    array([ 0,  0,  1,  4, -4], dtype=int32)
    """
    bits = values.view(np.int32)
    if len(bits) and bits.min() < _SMALLEST_NORMAL:  # subnormal: scaled by 2^24 on the way
        small = bits < _SMALLEST_NORMAL
        return np.where(small, bins(np.where(small, values * np.float32(2**24), np.float32(1))) - 24 * BINS_AN_OCTAVE,
                        bins(np.where(small, np.float32(1), values)))  # fmt: skip
    found = BINS_AN_OCTAVE * ((bits >> 23) - 127)
    mantissa = bits & (2**23 - 1)
    for edge in _EDGES:
        found += mantissa >= edge
    return found


def lower_edges(bins: np.ndarray) -> np.ndarray:
    """The first float32 of each bin.

    >>> lower_edges(np.array([0, 1, 4, -4]))
    array([1.       , 1.1892072, 2.       , 0.5      ], dtype=float32)
    """
    octave, j = np.divmod(bins, BINS_AN_OCTAVE)
    exact = np.ldexp(1 + np.array([0, *_EDGES])[j] / 2**23, octave)
    found = exact.astype(np.float32)
    return np.where(found < exact, np.nextafter(found, np.float32(np.inf)), found)  # subnormals have fewer bits


def histograms(f: Firings) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """First bin [F], number of bins [F], and the firings in each, one latent after the other."""
    if not len(f.rows):
        return np.zeros(len(f), np.int64), np.zeros(len(f), np.int64), np.zeros(0, np.int64)
    lowest, highest = extremes(f)
    alive = f.counts > 0
    first, last = np.zeros(len(f), np.int64), np.zeros(len(f), np.int64)
    first[alive], last[alive] = bins(lowest[alive]), bins(highest[alive])
    number = np.where(alive, last - first + 1, 0)
    owner = np.repeat(np.arange(len(f)), number)
    ends = np.cumsum(number)
    upper = lower_edges(first[owner] + np.arange(ends[-1]) - (ends - number)[owner] + 1)
    keys = (owner.astype(np.uint64) << np.uint64(32)) | upper.view(np.uint32)
    return first, number, np.diff(np.searchsorted(f.ordered, keys), prepend=0)


def extremes(f: Firings) -> tuple[np.ndarray, np.ndarray]:
    """The smallest and the largest activation of each latent, float32; 0 for latents without firings."""
    values = f.ordered.astype(np.uint32).view(np.float32)
    alive = f.counts > 0
    lowest, highest = np.zeros(len(f), np.float32), np.zeros(len(f), np.float32)
    lowest[alive], highest[alive] = values[f.offsets[:-1][alive]], values[f.offsets[1:][alive] - 1]
    return lowest, highest


def moments(f: Firings, n_counted: int) -> dict[str, np.ndarray]:
    """max, min, mean, std, skew, kurtosis (less 3) over firings, and `square`, the mean square over all `n_counted`
    places.

    Population moments around the mean, in float64; NaN where they are undefined.
    """
    values = f.values.astype(np.float64)
    n = np.where(f.counts > 0, f.counts, np.nan)
    mean = reduced(np.add, values, f) / n
    apart = values - mean[f.latents]
    squared = apart * apart
    second = reduced(np.add, squared, f) / n
    with np.errstate(invalid="ignore", divide="ignore"):
        std = np.sqrt(second)
        spread = np.where(std > 1e-9 * mean, std, np.nan)
        skew = reduced(np.add, squared * apart, f) / n / spread**3
        kurtosis = reduced(np.add, squared * squared, f) / n / spread**4 - 3
    lowest, highest = (np.where(f.counts > 0, end, np.nan) for end in extremes(f))
    square = reduced(np.add, values * values, f) / max(n_counted, 1)
    return {
        "max": highest,
        "min": lowest,
        "mean": mean,
        "std": std,
        "skew": skew,
        "kurtosis": kurtosis,
        "square": square,
    }


def quantile_edges(f: Firings, parts: int) -> np.ndarray:
    """Activations [F, parts - 1] that cut each latent's firings into `parts` equal ones: edge j is the value at sorted
    place ceil(j n / parts)."""
    if not len(f.rows):
        return np.zeros((len(f), parts - 1), np.float32)
    j = np.arange(1, parts)
    place = f.offsets[:-1, None] + np.minimum(-(-j * f.counts[:, None] // parts), np.maximum(f.counts[:, None] - 1, 0))
    return f.ordered[np.minimum(place, len(f.rows) - 1)].astype(np.uint32).view(np.float32)
