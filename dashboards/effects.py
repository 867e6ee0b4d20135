"""What ablating a latent at one token does to the model's predictions: to first order, by the direct path, and in full.

* First order: -f (d . g), f the activation, d the decoder row, g the gradient of the context's summed loss at that
  place. One backward pass a context serves every latent and every token of it.
* Direct: the latent's share is taken off the final residual stream, the last norm frozen. Exact where nothing stands
between.
* Full: another forward pass with x - f d at that one place.

Shapes: L positions of a context, V vocabulary, N places (latent, row) asked about; a row is context x L + position.
"""

import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from saelab.dashboards.weights import ToLogits
from saelab.models.families import ATTENTION
from saelab.models.sites import Site, run_recording
from saelab.models.tokens import Tokens

if TYPE_CHECKING:
    from saelab.activations.packing import Contexts
    from saelab.models.language import LanguageModel

CHANGES = 3
LATE = 0.75  # of the model's depth: from there on the direct path is most of the effect
DIRECT, FULL = 1, 2
FULL_CONTEXTS = 3
FULL_LATENTS = 32
_BATCH = 4  # contexts: their logits over the vocabulary are the largest tensors here
_TELL = 30  # seconds from which an estimate is printed


@dataclass
class Changes:
    """At each of N places: change of the loss, KL(clean, ablated), the next token and its probability before and
    after, the tokens [N, CHANGES] whose probability rises and falls most with the changes. Token ids are global, -1
    for none."""

    loss: np.ndarray
    kl: np.ndarray
    next: np.ndarray
    p: np.ndarray
    p_ablated: np.ndarray
    up: np.ndarray
    up_delta: np.ndarray
    down: np.ndarray
    down_delta: np.ndarray

    @classmethod
    def empty(cls, n: int) -> "Changes":
        """N rows still to be filled."""
        wide, ids = (n, CHANGES), -np.ones((n, CHANGES), np.int64)
        flat = [np.full(n, np.nan) for _ in range(4)]
        return cls(flat[0], flat[1], -np.ones(n, np.int64), flat[2], flat[3], ids, np.full(wide, np.nan), ids.copy(),
                   np.full(wide, np.nan))  # fmt: skip

    def put(self, i: int, clean_V: Tensor, ablated_V: Tensor, following: int | None) -> None:
        """Fill row i from log-probabilities and the true next token; `loss` becomes that of the next token."""
        p, q = clean_V.exp(), ablated_V.exp()
        self.kl[i] = float((p.double() * (clean_V - ablated_V).double()).sum())
        change = q - p
        for name, sign in (("up", 1), ("down", -1)):
            best = (sign * change).topk(min(CHANGES, len(change)))
            getattr(self, name)[i, : len(best.values)] = best.indices.cpu()
            getattr(self, name + "_delta")[i, : len(best.values)] = (sign * best.values).cpu()
        if following is not None:
            self.next[i] = following
            self.p[i], self.p_ablated[i] = float(p[following]), float(q[following])
            self.loss[i] = float(clean_V[following] - ablated_V[following])

    @classmethod
    def joined(cls, parts: Sequence["Changes"]) -> "Changes":
        """One after the other."""
        return cls(*(np.concatenate([getattr(part, field.name) for part in parts]) for field in fields(cls)))


def is_late(lm: "LanguageModel", site: Site) -> bool:
    """Whether the direct path is worth showing: sites of attention, and those of the last quarter of the blocks."""
    parts = site.name.split(".")
    layer = int(parts[1]) if parts[0] == "blocks" and len(parts) > 2 and parts[1].isdigit() else -1
    return site.kind == ATTENTION or layer + 1 > LATE * lm.n_layers


def first_order(
    lm: "LanguageModel", sae: Any, site: Site, contexts: "Contexts", latents: np.ndarray, rows: np.ndarray,
    values: np.ndarray, progress: bool = True,
) -> np.ndarray:  # fmt: skip
    """-f (d . g) [N] in nats, positive where the loss would rise; `site` is where the SAE writes."""
    length = contexts.ids.shape[1]
    order = np.argsort(rows, kind="stable")
    out = np.zeros(len(rows))
    W_dec = sae.W_dec.detach().float()
    needed = np.unique(rows // length)
    ends = np.searchsorted(rows[order] // length, needed, side="right")
    begins = np.searchsorted(rows[order] // length, needed)
    for some in _batches(len(needed), "effects, to first order", progress):
        numbers = needed[some]
        _, gradient = run_recording(lm, _tokens(lm, contexts, numbers), [site], gradients=True)
        for i, number in zip(range(some.start, some.stop), range(len(numbers)), strict=True):
            mine = order[begins[i] : ends[i]]
            g_LD = gradient[site.name][number].to(W_dec)
            for part in np.array_split(mine, max(len(mine) // 8192, 1)):
                at = torch.from_numpy(rows[part] % length).to(g_LD.device)
                d_ND = W_dec[torch.from_numpy(latents[part]).to(W_dec.device)]
                out[part] = -values[part] * (d_ND * g_LD[at]).sum(1).double().cpu().numpy()
    return out


def direct(
    lm: "LanguageModel", sae: Any, path: ToLogits, contexts: "Contexts", latents: np.ndarray, rows: np.ndarray,
    values: np.ndarray, progress: bool = True,
) -> Changes:  # fmt: skip
    """The next-token distribution at each place with the latent's direct contribution taken away, the last norm
    frozen."""
    length = contexts.ids.shape[1]
    out = Changes.empty(len(rows))
    needed, owner = np.unique(rows // length, return_inverse=True)
    last = lm.site(f"blocks.{lm.n_layers - 1}.hook_resid_post")
    epsilon = _epsilon(lm)
    for some in _batches(len(needed), "effects, direct", progress):
        kept: list[Tensor] = []

        def keep(x: Tensor, where: Any, kept: list[Tensor] = kept) -> Tensor:
            kept.append(x)
            return x

        with lm.intervene(last, keep):
            logits = lm.logits(_tokens(lm, contexts, needed[some]))
        final = kept[0].float()
        centred = final - final.mean(-1, keepdim=True) if path.unembedding.centred else final
        scale = (centred.square().mean(-1) + epsilon).rsqrt()
        for i in np.flatnonzero((owner >= some.start) & (owner < some.stop)).tolist():
            context, position = int(owner[i]) - some.start, int(rows[i] % length)
            written = path.written(sae.W_dec[int(latents[i])][None].detach().float())
            push_V = path.unembedding.logits(written)[0] * (float(values[i]) * scale[context, position])
            clean_V = logits[context, position].float()
            following = int(contexts.ids[int(needed[owner[i]]), position + 1]) if position + 1 < length else None
            out.put(i, clean_V.log_softmax(-1), (clean_V - push_V.to(clean_V)).log_softmax(-1), following)
    return out


def full(
    lm: "LanguageModel", sae: Any, site: Site, contexts: "Contexts", latents: np.ndarray, rows: np.ndarray,
    values: np.ndarray, progress: bool = True,
) -> Changes:  # fmt: skip
    """The same by forward passes with x - f d at each place; `loss` is the change of the context's summed loss."""
    length = contexts.ids.shape[1]
    out = Changes.empty(len(rows))
    jobs: list[tuple[int, int | None]] = []  # (context, place to ablate or None for the clean pass), contexts together
    for context in np.unique(rows // length).tolist():
        jobs += [(context, None), *((context, int(i)) for i in np.flatnonzero(rows // length == context))]
    clean: dict[int, Tensor] = {}
    clean_loss = 0.0
    for some in _batches(len(jobs), "effects, in full", progress):
        mine = jobs[some]
        tokens = _tokens(lm, contexts, np.array([context for context, _ in mine]))
        edits = [(b, i) for b, (_, i) in enumerate(mine) if i is not None]

        def ablate(x: Tensor, where: Any, edits: list[tuple[int, int]] = edits) -> Tensor:
            x = x.clone()
            for b, i in edits:
                x[b, int(rows[i] % length)] -= (float(values[i]) * sae.W_dec[int(latents[i])].detach()).to(x)
            return x

        with lm.intervene(site, ablate):
            logits = lm.logits(tokens)
        for b, (context, i) in enumerate(mine):
            log_p = logits[b].float().log_softmax(-1)
            ids = tokens.ids[b]
            loss = float(-log_p[:-1].gather(1, ids[1:, None].to(log_p.device)).double().sum())
            if i is None:
                clean_loss = loss
                asked = np.flatnonzero(rows // length == context)
                clean = {int(j): log_p[int(rows[j] % length)].clone() for j in asked}
                continue
            position = int(rows[i] % length)
            out.put(i, clean[i], log_p[position], int(ids[position + 1]) if position + 1 < length else None)
            out.loss[i] = loss - clean_loss
    return out


def rank_correlation(a: np.ndarray, b: np.ndarray) -> float | None:
    """Spearman's, ties at their mean rank; None with fewer than three pairs or without variation.

    >>> round(rank_correlation(np.array([1.0, 2, 3, 4]), np.array([10.0, 30, 20, 40])), 6)
    0.8
    """
    ranks = [_ranks(x) for x in (a, b)]
    if len(a) < 3 or not all(np.ptp(r) for r in ranks):
        return None
    return float(np.corrcoef(ranks[0], ranks[1])[0, 1])


def _ranks(x: np.ndarray) -> np.ndarray:
    _, inverse, counts = np.unique(x, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts - 1) / 2)[inverse]


def _tokens(lm: "LanguageModel", contexts: "Contexts", numbers: np.ndarray) -> Tokens:
    ids = contexts.ids[torch.from_numpy(numbers)].long()
    return Tokens(ids, torch.ones_like(ids, dtype=torch.bool)).to(lm.device)


def _epsilon(lm: "LanguageModel") -> float:
    config = getattr(lm.runner, "config", None) or getattr(lm.runner, "cfg", None)
    names = ("rms_norm_eps", "layer_norm_epsilon", "layer_norm_eps", "eps")
    return float(next((getattr(config, name) for name in names if getattr(config, name, None) is not None), 0.0))


def _batches(n: int, what: str, progress: bool) -> Iterator[slice]:
    """Slices of n contexts with a bar; the first one is timed, and what all will take is said before going on."""
    from tqdm import tqdm

    with tqdm(total=n, desc=what, unit="context", delay=2, disable=not progress) as bar:
        for start in range(0, n, _BATCH):
            stop, began = min(start + _BATCH, n), time.perf_counter()
            yield slice(start, stop)
            bar.update(stop - start)
            left = (time.perf_counter() - began) / (stop - start) * (n - stop)
            if start == 0 and left > _TELL and progress:
                tqdm.write(f"{what}: {n:,} contexts, about {left / 60:.1f} min to go", file=sys.stderr)
