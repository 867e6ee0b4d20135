"""Which latents fire in the same contexts. P pages, F latents, C contexts (a sample where there are many)."""

from collections.abc import Callable

import numpy as np
import torch

from saelab.dashboards.collect import Collection, Firings
from saelab.dashboards.figures import distinct_contexts
from saelab.dashboards.priority import priorities

MOST_CONTEXTS, LEAST_CONTEXTS = 4096, 256
PRODUCT = 2e12  # of the tables, at most, by taking fewer contexts
N = 10
_PAGES, _LATENTS = 2048, 4096


def context_sample(n_contexts: int, pages: int, d_sae: int, seed: int) -> np.ndarray:
    """Bool [n_contexts]: all of them, or those of lowest priority where the product would be too large."""
    most = min(MOST_CONTEXTS, max(LEAST_CONTEXTS, int(PRODUCT / max(pages * d_sae, 1))))
    chosen = np.ones(n_contexts, bool)
    if n_contexts > most:
        order = np.argsort(priorities(seed, np.full(n_contexts, 1), np.arange(n_contexts)), kind="stable")
        chosen[order[most:]] = False
    return chosen


def coactivation(
    collection: Collection, pages: np.ndarray, sample: np.ndarray, tick: Callable[[], None] = lambda: None
) -> tuple[np.ndarray, np.ndarray]:
    """(latents, contexts in which both fire) [pages, N], by Jaccard over the sampled contexts, best first; -1 and 0
    where fewer.

    Jaccard = both / (one + other - both), over all latents of the SAE.
    """
    number = np.cumsum(sample) - 1
    c = int(sample.sum())
    rows_PC = np.zeros((len(pages), c), np.float32)
    start = 0
    for some, f in collection.of(pages):
        _mark(rows_PC[start : start + len(some)], f, sample, number, collection.length)
        start += len(some)
    mine_P = torch.from_numpy(rows_PC.sum(1))
    best_PN, both_PN = torch.zeros(len(pages), 0), torch.zeros(len(pages), 0)
    ids_PN = torch.zeros(len(pages), 0, dtype=torch.int64)
    for first in range(0, collection.d_sae, _LATENTS):
        last = min(first + _LATENTS, collection.d_sae)
        block_FC = np.zeros((last - first, c), np.float32)
        _mark(block_FC, collection.firings(first, last), sample, number, collection.length)
        other_F = torch.from_numpy(block_FC.sum(1))
        parts = []
        for begin in range(0, len(pages), _PAGES):
            part = slice(begin, begin + _PAGES)
            both = torch.from_numpy(rows_PC[part]) @ torch.from_numpy(block_FC).T  # whole numbers: exact in any order
            jaccard = both / (mine_P[part, None] + other_F - both).clamp(min=1)
            itself = torch.from_numpy(pages[part])
            inside = ((itself >= first) & (itself < last)).nonzero().squeeze(1)
            jaccard[inside, itself[inside] - first] = -1
            both[inside, itself[inside] - first] = 0
            top = jaccard.topk(min(N, last - first), dim=1)
            parts.append((top.values, top.indices + first, both.gather(1, top.indices)))
            tick()
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
    return ids, both_counts


def _mark(table: np.ndarray, f: Firings, sample: np.ndarray, number: np.ndarray, length: int) -> None:
    latents, contexts = distinct_contexts(f, length)
    taken = sample[contexts]
    table[latents[taken], number[contexts[taken]]] = 1
