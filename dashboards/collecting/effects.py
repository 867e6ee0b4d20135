"""What ablating a latent at one token does to the model's predictions: to first order, by the direct path, and in full.

* First order: -f (d . g), f the activation, d the decoder row, g the gradient of the context's summed loss at that
  place. One backward pass a context serves every latent and every token of it.
* Direct: the latent's share is taken off the final residual stream, the norms on its way frozen; the unembedding, its
  bias, scale and soft cap act in full. Exact where nothing stands between; no pass more.
* Full: another forward pass with x - f d at that one place.

Shapes: C contexts of a batch, L positions of each, V vocabulary, W width of the site, N places (latent, row) asked about; a
row is context x L + position.
"""

import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from saelab.base.progress import progress_bar
from saelab.base.protocols import Dictionary
from saelab.dashboards.collecting.weights import ToLogits
from saelab.models.hooks import first_runs
from saelab.models.site_names import ATTENTION
from saelab.models.sites import Site, flat, frozen
from saelab.models.tokens import Tokens

if TYPE_CHECKING:
    from saelab.models.language import LanguageModel
    from saelab.reading.packing import Contexts

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

    def put(self, i: int, clean_V: Float[Tensor, " v"], ablated_V: Float[Tensor, " v"], following: int | None) -> None:
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


@dataclass(frozen=True)
class Places:
    """Firings asked about: latents, rows and activations [N]."""

    latents: np.ndarray
    rows: np.ndarray
    values: np.ndarray

    def __len__(self) -> int:
        return len(self.rows)

    def by_context(self, length: int) -> dict[int, np.ndarray]:
        """Numbers of the places of each context."""
        order = np.argsort(self.rows, kind="stable")
        contexts, starts = np.unique(self.rows[order] // length, return_index=True)
        ends = [*starts[1:], len(order)]
        return {int(c): order[a:b] for c, a, b in zip(contexts, starts, ends, strict=False)}


@dataclass(frozen=True)
class Clean:
    """One pass over some contexts: logits [C, L, V], what the norms on the direct path read and gave [C, L, D] (by the path's
    `places`), and at the SAE's site the gradient [C, L, W] of each context's summed loss, float32."""

    tokens: Tokens
    logits: Tensor
    seen: Mapping[str, Tensor]
    gradient: Tensor

    @classmethod
    def of(cls, lm: "LanguageModel", site: Site, tokens: Tokens, path: ToLogits | None) -> "Clean":
        made: list[Tensor] = []
        with torch.inference_mode(False), torch.enable_grad(), frozen(lm.runner):
            live = first_runs(
                {"site": lm.place(site), **(path.places if path else {})},
                lambda: made.append(lm.forward(tokens)),
                keep=Tensor.requires_grad_,
                stop=False,
            )
            # the loss's slope at the logits, p - [next token], saves the loss itself and what its backward pass keeps
            slope = made[0].detach().float().softmax(-1)
            slope[:, :-1].scatter_add_(2, tokens.ids[:, 1:, None], -torch.ones_like(slope[:, :-1, :1]))
            slope[:, -1] = 0
            slope[:, :-1][~_targets(tokens.mask)] = 0
            (gradient,) = torch.autograd.grad(made[0], live["site"], slope.to(made[0]))
        seen = {name: x.detach() for name, x in live.items() if name != "site"}
        return cls(tokens, made[0].detach(), seen, flat(gradient).float())

    def log_p(self, context: int, position: int) -> Float[Tensor, " v"]:
        """Log-probabilities [V] of the next token."""
        return self.logits[context, position].float().log_softmax(-1)

    def loss(self, context: int) -> float:
        return _loss(self.logits[context], self.tokens.ids[context], self.tokens.mask[context])

    def following(self, context: int, position: int) -> int | None:
        """The true next token; None at the end."""
        ids, mask = self.tokens.ids[context], self.tokens.mask[context]
        return int(ids[position + 1]) if position + 1 < len(ids) and mask[position + 1] else None


def explain(
    lm: "LanguageModel", sae: Dictionary, site: Site, contexts: "Contexts", shown: Places, in_full: Places, directly: Places,
    path: ToLogits | None = None, progress: bool = True,
) -> tuple[np.ndarray, Changes, Changes]:  # fmt: skip
    """First-order effects [N] of all that is `shown`, in nats, positive where the loss would rise; the changes by full
    passes (whose `loss` is the context's summed one) and by the direct `path`, the last norm frozen.

    `site` is where the SAE writes. Each context with something shown takes one forward and one backward pass, each place
    `in_full` a forward pass more.
    """
    length = contexts.ids.shape[1]
    slopes, ablated, direct = np.zeros(len(shown)), Changes.empty(len(in_full)), Changes.empty(len(directly))
    everywhere = [places.by_context(length) for places in (shown, in_full, directly)]
    needed = np.array(sorted(set().union(*everywhere)), np.int64)
    with _Bar(2 * len(needed) + len(in_full), progress) as bar:
        for numbers in (needed[k : k + _BATCH] for k in range(0, len(needed), _BATCH)):
            clean = Clean.of(lm, site, _tokens(lm, contexts, numbers), path if len(directly) else None)
            jobs: list[tuple[int, int]] = []
            for c, number in enumerate(numbers.tolist()):
                mine, full, straight = (places.get(number, np.zeros(0, np.int64)) for places in everywhere)
                slopes[mine] = _first_order(sae, clean.gradient[c], shown, mine, length)
                for i in straight.tolist():
                    assert path is not None
                    _direct(sae, path, clean, c, directly, i, direct)
                jobs += [(c, i) for i in full.tolist()]
            bar.update(2 * len(numbers))
            for some in (jobs[k : k + _BATCH] for k in range(0, len(jobs), _BATCH)):
                _in_full(lm, sae, site, clean, in_full, some, ablated)
                bar.update(len(some))
    return slopes, ablated, direct


def _first_order(sae: Dictionary, g_LW: Tensor, shown: Places, mine: np.ndarray, length: int) -> np.ndarray:
    """-f (d . g)"""
    W_dec, out = sae.W_dec.detach(), []
    for some in np.array_split(mine, len(mine) // 8192 + 1):
        at = torch.from_numpy(shown.rows[some] % length).to(g_LW.device)
        d_NW = W_dec[torch.from_numpy(shown.latents[some]).to(W_dec.device)].to(g_LW)
        out.append((d_NW * g_LW[at]).sum(1).double().cpu().numpy())
    return -shown.values[mine] * np.concatenate(out)


def _direct(sae: Dictionary, path: ToLogits, clean: Clean, c: int, places: Places, i: int, out: Changes) -> None:
    position = int(places.rows[i] % clean.logits.shape[1])
    removed = sae.W_dec[int(places.latents[i])].detach().float() * float(places.values[i])
    seen = {name: x[c, position][None] for name, x in clean.seen.items()}
    logits_V = clean.logits[c, position].float()
    ablated_V = logits_V + path.change(removed[None], seen)[0].to(logits_V)
    out.put(i, clean.log_p(c, position), ablated_V.log_softmax(-1), clean.following(c, position))


def _in_full(
    lm: "LanguageModel",
    sae: Dictionary,
    site: Site,
    clean: Clean,
    places: Places,
    jobs: list[tuple[int, int]],
    out: Changes,
) -> None:
    """The places `i` of contexts `c`, a row of the batch each."""
    length = clean.logits.shape[1]
    rows = torch.tensor([c for c, _ in jobs], device=clean.tokens.ids.device)
    ids = clean.tokens.ids[rows]
    positions = [int(places.rows[i] % length) for _, i in jobs]

    def ablate(x: Tensor, where: Any) -> Tensor:
        x = x.clone()
        for b, ((_, i), position) in enumerate(zip(jobs, positions, strict=True)):
            x[b, position] -= (float(places.values[i]) * sae.W_dec[int(places.latents[i])].detach()).to(x)
        return x

    with lm.intervene(site, ablate):
        logits = lm.logits(Tokens(ids, clean.tokens.mask[rows]))
    for b, ((c, i), position) in enumerate(zip(jobs, positions, strict=True)):
        ablated_V = logits[b, position].float().log_softmax(-1)
        out.put(i, clean.log_p(c, position), ablated_V, clean.following(c, position))
        out.loss[i] = _loss(logits[b], ids[b], clean.tokens.mask[c]) - clean.loss(c)


def _targets(mask: Tensor) -> Tensor:
    """Positions whose next token is predicted from a real one, and real: [..., L - 1]."""
    return mask[..., :-1] & mask[..., 1:]


def _loss(logits_LV: Tensor, ids_L: Tensor, mask_L: Tensor) -> float:
    """Summed next-token cross-entropy over real targets, nats."""
    log_p = logits_LV[:-1].float().log_softmax(-1)
    return float(-log_p.gather(1, ids_L[1:, None])[_targets(mask_L)].double().sum())


def _tokens(lm: "LanguageModel", contexts: "Contexts", numbers: np.ndarray) -> Tokens:
    return contexts.tokens(torch.from_numpy(numbers)).to(lm.device)


class _Bar:
    """Forward and backward passes; the first are timed, and what all will take is said before going on."""

    def __init__(self, total: int, progress: bool) -> None:
        self.bar = progress_bar(total, "effects", "pass", progress)
        self.total, self.began, self.told = total, time.perf_counter(), not progress

    def __enter__(self) -> "_Bar":
        return self

    def update(self, passes: int) -> None:
        self.bar.update(passes)
        left = (time.perf_counter() - self.began) / passes * (self.total - passes)
        if not self.told and left > _TELL:
            self.bar.write(f"effects: {self.total:,} passes, about {left / 60:.1f} min to go", file=sys.stderr)
        self.told = True

    def __exit__(self, *_: Any) -> None:
        self.bar.close()
