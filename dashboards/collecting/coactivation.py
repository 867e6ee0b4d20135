"""Which latents fire in the same contexts. P pages, F latents, C contexts (a sample where there are many)."""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch

from saelab.dashboards.collecting.collect import Collection, Firings
from saelab.dashboards.collecting.latent_figures import first_in_contexts
from saelab.dashboards.collecting.priority import priorities

MOST_CONTEXTS, LEAST_CONTEXTS = 4096, 256
PRODUCT = 2e12  # of the tables, at most, by taking fewer contexts
N = 10
_PAGES, _LATENTS, _PAIRS = 2048, 4096, 1024


def context_sample(n_contexts: int, pages: int, d_sae: int, seed: int) -> np.ndarray:
    """Bool [n_contexts]: all of them, or those of lowest priority where the product would be too large."""
    most = min(MOST_CONTEXTS, max(LEAST_CONTEXTS, int(PRODUCT / max(pages * d_sae, 1))))
    chosen = np.ones(n_contexts, bool)
    if n_contexts > most:
        order = np.argsort(priorities(seed, np.full(n_contexts, 1), np.arange(n_contexts)), kind="stable")
        chosen[order[most:]] = False
    return chosen


class Together(NamedTuple):
    """Of each page the N latents that fire in the same contexts, best first; -1 and zeros where there are fewer.

    `both` counts the contexts in which both fire; of those, `before` the ones in which the other first fires on an earlier
    token than the page's latent, `after` on a later one; `lag` is the mean of the page's first position less the other's.
    """

    latents: np.ndarray
    both: np.ndarray
    before: np.ndarray
    after: np.ndarray
    lag: np.ndarray


def coactivation(collection: Collection, pages: np.ndarray, sample: np.ndarray) -> Together:
    """By Jaccard = both / (one + other - both) over the sampled contexts, over all latents of the SAE."""
    number = np.cumsum(sample) - 1
    mine_PC = np.concatenate([_firsts(f, sample, number, collection.length) for _, f in collection.of(pages)])
    fires_P = torch.from_numpy((mine_PC >= 0).sum(1).astype(np.float32))
    best_PN, both_PN = torch.zeros(len(pages), 0), torch.zeros(len(pages), 0)
    ids_PN = torch.zeros(len(pages), 0, dtype=torch.int64)
    for first, others_FC in _blocks(collection, sample, number):
        block_FC = torch.from_numpy((others_FC >= 0).astype(np.float32))
        fires_F = block_FC.sum(1)
        parts = []
        for begin in range(0, len(pages), _PAGES):
            part = slice(begin, begin + _PAGES)
            # whole numbers: exact in any order
            both = torch.from_numpy((mine_PC[part] >= 0).astype(np.float32)) @ block_FC.T
            jaccard = both / (fires_P[part, None] + fires_F - both).clamp(min=1)
            itself = torch.from_numpy(pages[part])
            inside = ((itself >= first) & (itself < first + len(block_FC))).nonzero().squeeze(1)
            jaccard[inside, itself[inside] - first] = -1
            both[inside, itself[inside] - first] = 0
            top = jaccard.topk(min(N, len(block_FC)), dim=1)
            parts.append((top.values, top.indices + first, both.gather(1, top.indices)))
        found = [torch.cat(column) for column in zip(*parts, strict=True)]
        merged = torch.cat([best_PN, found[0]], 1).sort(dim=1, descending=True, stable=True)
        keep = merged.indices[:, :N]
        best_PN = merged.values[:, :N]
        ids_PN = torch.cat([ids_PN, found[1]], 1).gather(1, keep)
        both_PN = torch.cat([both_PN, found[2]], 1).gather(1, keep)
    ids, both_counts = np.full((len(pages), N), -1, np.int64), np.zeros((len(pages), N), np.int64)
    width = ids_PN.shape[1]
    ids[:, :width], both_counts[:, :width] = ids_PN.numpy(), both_PN.numpy().astype(np.int64)
    ids[both_counts == 0] = -1
    before, after, ahead = np.zeros_like(ids), np.zeros_like(ids), np.zeros_like(ids)
    for first, others_FC in _blocks(collection, sample, number):
        page, rank = np.nonzero((ids >= first) & (ids < first + len(others_FC)))
        for begin in range(0, len(page), _PAIRS):
            at = page[begin : begin + _PAIRS], rank[begin : begin + _PAIRS]
            one, other = mine_PC[at[0]], others_FC[ids[at] - first]
            apart = np.where((one >= 0) & (other >= 0), one - other, 0)
            before[at], after[at], ahead[at] = (apart > 0).sum(1), (apart < 0).sum(1), apart.sum(1)
    lag = np.divide(ahead, both_counts, out=np.full(ids.shape, np.nan), where=both_counts > 0)
    return Together(ids, both_counts, before, after, lag)


def _blocks(collection: Collection, sample: np.ndarray, number: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
    """(first latent, `_firsts`) of all latents, a block at a time."""
    for first in range(0, collection.d_sae, _LATENTS):
        f = collection.firings(first, min(first + _LATENTS, collection.d_sae))
        yield first, _firsts(f, sample, number, collection.length)


def _firsts(f: Firings, sample: np.ndarray, number: np.ndarray, length: int) -> np.ndarray:
    """int32 [latents, sampled contexts]: the position at which each first fires, -1 where it does not."""
    places = first_in_contexts(f, length)
    contexts, positions = np.divmod(f.rows[places], np.int32(length))
    taken = sample[contexts]
    table = np.full((len(f), int(sample.sum())), -1, np.int32)
    table[f.latents[places[taken]], number[contexts[taken]]] = positions[taken]
    return table
