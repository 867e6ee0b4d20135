"""A toy SAE on a toy model, and every code of it computed the slow way, for the tests of dashboards."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

import saelab
from tests import tiny

LENGTH = 32
SITE = "blocks.1.hook_resid_post"
TEXTS = [f"{n}. {text} \U0001f600" for n in range(40) for text in tiny.TEXTS]


def make_sae(lm: Any, site: str = SITE, d_sae: int = 48, k: int = 4, seed: int = 0, **metadata: Any) -> saelab.SAE:
    """An untrained TopK SAE whose latent 5 copies latent 4, and whose latent 7 can never fire."""
    width = lm.site(site).width
    facts = {"site": site, "model": lm.name, "context_length": LENGTH, "skip_positions": 1, **metadata}
    sae = saelab.SAE(saelab.TopK(k=k, d_sae=d_sae), width, facts, seed=seed)
    with torch.no_grad():
        sae.W_dec[5] = sae.W_dec[4]
        sae.encoder_bias[7] = -1e6
        sae.decoder_bias += 0.01
    return sae


@dataclass
class Oracle:
    """Dense activations [rows, F], what the SAE misses [rows], where it counts [rows], token ids [rows]."""

    acts: np.ndarray
    scores: np.ndarray
    miss: np.ndarray
    counted: np.ndarray
    ids: np.ndarray
    n_contexts: int


def oracle(lm: Any, sae: Any, contexts: Any, n_contexts: int, tile: int) -> Oracle:
    """Everything from dense matrices, over batches of `tile` contexts (few rows would have other bits)."""
    acts, scores, miss = [], [], []
    for start in range(0, n_contexts, tile):
        stop = min(start + tile, n_contexts)
        places = torch.arange(start, start + tile).clamp(max=stop - 1)
        x = lm.record(contexts.ids[places].long(), sae.metadata["site"]).flatten(0, 1)[: (stop - start) * LENGTH]
        with torch.no_grad():
            dense = sae.encode(x)
            scores.append(((x - sae.b_dec) @ sae.W_enc + sae.b_enc).numpy())
            lost = (x.double() - sae(x)).square().sum(1) / x.double().square().sum(1)
        acts.append(dense.numpy())
        miss.append(np.round(15 * lost.clamp(max=1).numpy()))
    mask = contexts.mask[:n_contexts].clone()
    mask[:, :1] = False
    counted = mask.flatten().numpy()
    dense = np.concatenate(acts)
    dense[~counted] = 0
    missed = np.concatenate(miss)
    missed[~counted] = 255
    ids = contexts.ids[:n_contexts].flatten().numpy()
    return Oracle(dense, np.concatenate(scores), missed.astype(np.uint8), counted, ids, n_contexts)
