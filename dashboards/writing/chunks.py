"""The chunks of one SAE: index, pages, what the tokens find. Token ids are still global (`Ids`) here. L latents of a
chunk."""

import math
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from saelab.analysis.attention.heads import head_shares
from saelab.base.errors import ConfigError
from saelab.base.protocols import Dictionary
from saelab.base.statistics import spearman
from saelab.dashboards.collecting import direction_map, examples, weights
from saelab.dashboards.collecting import effects as fx
from saelab.dashboards.collecting import latent_figures as figures
from saelab.dashboards.collecting.coactivation import coactivation, context_sample
from saelab.dashboards.collecting.collect import Collection
from saelab.dashboards.collecting.effects import Places
from saelab.dashboards.collecting.peak_sources import Sources, block_of, sources
from saelab.dashboards.collecting.vocab import Ids
from saelab.dashboards.writing.codec import Column, Half, none_of
from saelab.evaluation.sparsity import ENOUGH
from saelab.models.sites import Site

if TYPE_CHECKING:
    from saelab.models.language import LanguageModel
    from saelab.reading.packing import Contexts

PER_CHUNK = 64
PAGE, SILENT, DENSE, DUPLICATE, DEAD = 1, 2, 4, 8, 16
DENSE_ABOVE, DUPLICATE_ABOVE = 0.1, 0.9
SEED_COSINE = 0.9

Chunk = tuple[str, str, dict[str, Any], dict[str, Any]]  # name, kind, columns, what else the header says


@dataclass
class Part:
    """One SAE with what was collected, and what its chunks are made from."""

    lm: "LanguageModel"
    sae: Dictionary
    site: Site
    target: Site
    collection: Collection
    contexts: "Contexts"
    pages: np.ndarray
    layout: examples.Layout
    seed: int = 0
    prefix: str = ""
    others: Sequence[Any] = ()  # SAEs of other seeds
    null: Collection | None = None
    rival: Any = None  # the SAE compared with
    effects: fx.Changes | None = None
    correlation: float | None = None
    full_pairs: int = 0
    _effect_keys: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))
    _effect_values: np.ndarray = field(default_factory=lambda: np.zeros(0))
    _explained: dict[int, int] = field(default_factory=dict)  # (latent << 32 | row) -> row of `effects`
    _sources: tuple[np.ndarray, Sources] | None = None  # by latent << 32 | row
    _methods: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))

    @cached_property
    def ids(self) -> np.ndarray:
        """Token ids [rows] in the order of the corpus."""
        return self.contexts.ids[: self.collection.n_contexts].flatten().numpy()

    @cached_property
    def documents(self) -> np.ndarray:
        return self.contexts.documents[: self.collection.n_contexts].flatten().numpy()

    @cached_property
    def sample(self) -> np.ndarray:
        """Bool [contexts]: those over which co-activation is counted."""
        return context_sample(self.collection.n_contexts, len(self.pages), self.collection.d_sae, self.seed)

    @cached_property
    def index(self) -> figures.Index:
        return figures.index(self.collection, self.ids, self.sample, self.reads)

    @cached_property
    def reads(self) -> np.ndarray:
        """How often each token id was read at a counted place, [d_vocab]."""
        return np.bincount(self.ids[self.collection.counted], minlength=self.lm.d_vocab)

    @cached_property
    def norms(self) -> weights.Norms:
        return weights.Norms.of(self.sae)

    @cached_property
    def decoder_neighbours(self) -> tuple[np.ndarray, np.ndarray]:
        """(latents, cosines) [pages, 10], over all latents."""
        return weights.neighbours(self.sae.W_dec, self.pages)

    @cached_property
    def path(self) -> weights.ToLogits | None:
        """None, with a warning that says why, where the model's way from the stream to the logits is not known."""
        try:
            return weights.ToLogits.of(self.lm, self.target)
        except ConfigError as error:
            warnings.warn(f"the page has no logits and no direct effects: {error}", stacklevel=2)
            return None

    @cached_property
    def block(self) -> int | None:
        """Of an attention layer's SAE."""
        return block_of(self.lm, self.site)

    @cached_property
    def flags(self) -> np.ndarray:
        """u8 [d_sae]"""
        count, counted = self.collection.counts, self.collection.n_counted
        flags = np.zeros(len(count), "u1")
        flags[self.pages] |= PAGE
        flags[count == 0] |= SILENT | (DEAD if counted >= ENOUGH else 0)
        flags[count > DENSE_ABOVE * counted] |= DENSE
        flags[self.pages[self.decoder_neighbours[1][:, 0] > DUPLICATE_ABOVE]] |= DUPLICATE
        return flags

    def explain(self, mode: str, progress: bool) -> None:
        """Compute the effects at the windows' tokens: to first order, directly where that says something, some in
        full."""
        keys, values = [], []
        tops: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []
        for latents in self._chunks():
            found = self.windows(latents)
            places = np.flatnonzero(found.acts)
            window = places // found.length
            keys.append((latents[found.latent[window]] << 32) | (found.start[window] + places % found.length))
            values.append(found.acts[places])
            top = (found.group == 0) & (found.act > 0)
            tops.append((latents[found.latent[top]], found.row[top], found.act[top]))
        unique, first = np.unique(np.concatenate(keys), return_index=True)
        value = np.concatenate(values)[first]
        self._effect_keys = unique
        latent, row, act = (np.concatenate(column) for column in zip(*tops, strict=True))
        in_full = self._in_full(latent, mode)
        late = mode == "direct" and self.path is not None and fx.is_late(self.lm, self.target)
        directly = ~in_full if late else np.zeros_like(in_full)
        shown = fx.Places(unique >> 32, unique & 0xFFFFFFFF, value)
        full, straight = (fx.Places(latent[which], row[which], act[which]) for which in (in_full, directly))
        self._effect_values, *made = fx.explain(
            self.lm, self.sae, self.target, self.contexts, shown, full, straight, self.path, progress
        )
        estimate = self._effect_values[np.searchsorted(unique, (latent[in_full] << 32) | row[in_full])]
        self.full_pairs, correlation = int(in_full.sum()), spearman(estimate, made[0].loss)
        self.correlation = None if self.full_pairs < 3 or np.isnan(correlation) else correlation
        self.effects = fx.Changes.joined(made)
        explained = np.concatenate([np.flatnonzero(in_full), np.flatnonzero(directly)])
        self._explained = {int(latent[i]) << 32 | int(row[i]): n for n, i in enumerate(explained)}
        self._methods = np.repeat([fx.FULL, fx.DIRECT], [self.full_pairs, int(directly.sum())])

    def trace(self, progress: bool) -> None:
        """Find where the peaks come from that fire, or nearly do; for SAEs of attention layers.

        A page is worth having without: where the model does not show its pattern, a warning says so.
        """
        if self.block is None:
            return
        keys = []
        for latents in self._chunks():
            found = self.windows(latents)
            peaks = np.flatnonzero(found.act)
            keys.append((latents[found.latent[peaks]] << 32) | found.row[peaks])
        unique = np.unique(np.concatenate(keys))
        places = Places(unique >> 32, unique & 0xFFFFFFFF, np.zeros(len(unique)))
        try:
            self._sources = unique, sources(self.lm, self.sae, self.block, self.contexts, places, progress)
        except ConfigError as error:
            warnings.warn(f"the page does not say where attention reads from: {error}", stacklevel=3)

    def _in_full(self, latent: np.ndarray, mode: str) -> np.ndarray:
        """Which top windows are explained by full passes: the first contexts of every latent, or of some, evenly
        spread."""
        first = examples._rank(latent) < fx.FULL_CONTEXTS
        if mode == "full":
            return first
        alive = np.unique(latent)
        # no more passes than first order took
        most = min(fx.FULL_LATENTS, max(self.collection.n_contexts // fx.FULL_CONTEXTS, 1))
        step = max(math.ceil(len(alive) / most), 1)
        return first & np.isin(latent, alive[::step])

    def windows(self, latents: np.ndarray) -> examples.Windows:
        """The windows of some latents."""
        return examples.choose(self.collection, latents, self.collection.take(latents), self.layout, self.seed)

    def _chunks(self) -> list[np.ndarray]:
        return [self.pages[i : i + PER_CHUNK] for i in range(0, len(self.pages), PER_CHUNK)]

    def chunks(self) -> Iterator[Chunk]:
        """Every chunk of this SAE but labels and prompts."""
        yield self.prefix + "idx-0", "index", self._index_columns(), {}
        yield self.prefix + "idx-1", "index", self._more_index_columns(), {}
        yield self.prefix + "pages", "pages", {"latent": self.pages.astype("<u4")}, {}
        yield self.prefix + "map", "map", self._map_columns(), {}
        both = coactivation(self.collection, self.pages, self.sample)
        encoder = weights.neighbours(self.sae.W_enc.detach().T, self.pages)
        found: dict[str, list[np.ndarray]] = {"acts": [], "logits": []}
        for i, latents in enumerate(self._chunks()):
            mine = slice(i * PER_CHUNK, i * PER_CHUNK + len(latents))
            tables = [table[mine] for table in (*both, *self.decoder_neighbours, *encoder)]
            columns, miss = self._page_columns(latents, tables)
            found["acts"].append(columns["tok"].ids)
            if "top" in columns:
                found["logits"].append(columns["top"].ids)
            yield f"{self.prefix}f-{i:05d}", "features", columns, {}
            yield f"{self.prefix}m-{i:05d}", "miss", {"miss": miss}, {}
        yield self.prefix + "inv", "inverted", {name: Inverted(parts) for name, parts in found.items()}, {}

    def _index_columns(self) -> dict[str, Any]:
        index = self.index
        return {
            "count": index.count.astype("<u4"), "max": Half(index.max), "mean": Half(index.mean), "flags": self.flags,
            "focus": index.focus.astype("<f2"),
            **{f"tok{j}": Ids(index.tokens[:, j]) for j in range(3)},
        }  # fmt: skip

    def _more_index_columns(self) -> dict[str, Any]:
        ids, cosines = self.decoder_neighbours
        columns: dict[str, Any] = {
            "dec_norm": Half(self.norms.dec), "enc_dec": self.norms.cosine.astype("<f2"),
            "near": self._spread(latent_ids(ids[:, 0])), "near_cos": self._spread(cosines[:, 0].astype("<f2")),
            "contexts": self.index.contexts.astype("<u4"),
        }  # fmt: skip
        if self.rival is not None:
            matches, match_cos = weights.neighbours(self.sae.W_dec, self.pages, 1, self.rival.W_dec)
            columns |= {"match": self._spread(latent_ids(matches[:, 0])),
                        "match_cos": self._spread(match_cos[:, 0].astype("<f2"))}  # fmt: skip
        if self.others:
            nearest = [weights.neighbours(self.sae.W_dec, self.pages, 1, sae.W_dec)[1][:, 0] for sae in self.others]
            columns["seeds"] = self._spread(np.sum([cosine >= SEED_COSINE for cosine in nearest], 0).astype("u1"))
        if self.null is not None:
            highest = np.zeros(self.null.d_sae)
            for first, last in self.null.ranges():
                f = self.null.firings(first, last)
                highest[first:last] = figures.reduced(np.maximum, f.values, f)
            columns |= {"null_count": self.null.counts.astype("<u4"), "null_max": Half(highest)}
        return columns

    def _map_columns(self) -> dict[str, Any]:
        """Where the pages' directions lie, [pages] each."""
        at = torch.from_numpy(self.pages).to(self.sae.W_dec.device)
        planes = direction_map.planes(self.sae.W_dec.detach()[at])
        return {
            f"{name}_{axis}": plane[:, k].astype("<f2") for name, plane in planes.items() for k, axis in enumerate("xy")
        }

    def _spread(self, values: np.ndarray) -> np.ndarray:
        """A column [d_sae] of values that only latents with a page have."""
        none = np.nan if values.dtype.kind == "f" else none_of(values.dtype)
        column = np.full(self.collection.d_sae, none, values.dtype)
        column[self.pages] = values
        return column

    def _page_columns(self, latents: np.ndarray, tables: list[np.ndarray]) -> tuple[dict[str, Any], np.ndarray]:
        co, co_both, before, after, lag, dec, dec_cos, enc, enc_cos = tables
        f = self.collection.take(latents)
        first, number, hist = figures.histograms(f)
        columns: dict[str, Any] = {
            "latent": latents.astype("<u4"), "windows": None, "count": f.counts.astype("<u4"),
            "contexts": self.index.contexts[latents].astype("<u4"),
            **{k: v.astype("<f4") for k, v in figures.moments(f, self.collection.n_counted).items()},
            "hist_first": first.astype("<i2"), "hist_bins": number.astype("<u2"), "hist": hist.astype("<u4"),
        }  # fmt: skip
        if self.null is not None:
            first, number, hist = figures.histograms(self.null.take(latents))
            columns |= {
                "null_first": first.astype("<i2"),
                "null_bins": number.astype("<u2"),
                "null_hist": hist.astype("<u4"),
            }
        tokens, counts, averages, _ = figures.top_tokens(f, self.ids, self.reads, figures.TOKENS)
        columns |= {"tok_n": f.counts.astype("<u4"), "tok": Ids(tokens), "tok_count": counts.astype("<u4"),
                    "tok_mean": Half(averages)}  # fmt: skip
        at = torch.from_numpy(latents).to(self.sae.W_dec.device)
        if self.path is not None:
            made = weights.logit_columns(self.path, self.sae.W_dec.detach()[at].float())
            for name, values in made.items():
                columns[name] = _stored_logits(name, values)
        norms = self.norms
        columns |= {"dec_norm": norms.dec[latents], "enc_norm": norms.enc[latents], "enc_dec": norms.cosine[latents],
                    "b_enc": norms.bias[latents]}  # fmt: skip
        columns |= {"dec_near": latent_ids(dec), "dec_cos": dec_cos.astype("<f2"), "enc_near": latent_ids(enc),
                    "enc_cos": enc_cos.astype("<f2"), "coact": latent_ids(co), "coact_both": co_both.astype("<u4"),
                    "coact_contexts": np.where(co >= 0, self.index.contexts[co], 0).astype("<u4"),
                    "coact_before": before.astype("<u4"), "coact_after": after.astype("<u4"),
                    "coact_lag": lag.astype("<f2")}  # fmt: skip
        if self.target.heads:
            columns["heads"] = head_shares(self.sae.W_dec.detach()[at], self.target.heads).cpu().numpy().astype("<f2")
        windows, rows = self._window_columns(latents, f)
        return columns | windows, self.collection.miss[rows]

    def _window_columns(self, latents: np.ndarray, f: Any) -> tuple[dict[str, Any], np.ndarray]:
        found = examples.choose(self.collection, latents, f, self.layout, self.seed)
        rows, offset = examples.pooled(found.start, found.length)
        ids = self.ids[rows]
        of = np.repeat(found.latent, found.length)
        scale = np.zeros(len(latents), np.float32)
        np.maximum.at(scale, of, found.acts)
        documents = self.documents[found.row].astype(np.int64)
        seen = np.lib.stride_tricks.sliding_window_view(ids, found.length)[offset]
        columns: dict[str, Any] = {
            "windows": np.bincount(found.latent, minlength=len(latents)).astype("<u2"),
            "scale": scale, "group": found.group.astype("u1"),
            "context": (found.row // self.collection.length).astype("<u4"), "document": latent_ids(documents),
            "start": (found.start % self.collection.length).astype("<u2"), "peak": (found.row - found.start).astype("u1"),
            "offset": offset.astype("<u4"), "length": np.full(len(offset), found.length, "u1"), "act": found.act,
            "repeat": examples.repeats(seen, found.latent), "acts": quantised(found.acts, scale[of]), "pool": Ids(ids),
        }  # fmt: skip
        if self.effects is not None:
            columns |= self._effect_columns(latents, found, of)
        if self._sources is not None:
            columns |= self._source_columns(latents, found)
        return columns, rows

    def _source_columns(self, latents: np.ndarray, found: examples.Windows) -> dict[str, Any]:
        assert self._sources is not None
        keys, made = self._sources
        peaks = np.flatnonzero(found.act)
        at = np.searchsorted(keys, (latents[found.latent[peaks]] << 32) | found.row[peaks])
        there = made.value[at] != 0
        number = np.zeros(len(found.act), "u1")
        number[peaks] = there.sum(1)
        return {"dfa_n": number, "dfa_back": made.back[at][there], "dfa_head": made.head[at][there],
                "dfa": Half(made.value[at][there])}  # fmt: skip

    def _effect_columns(self, latents: np.ndarray, found: examples.Windows, of: np.ndarray) -> dict[str, Any]:
        assert self.effects is not None
        active = np.flatnonzero(found.acts)
        window = active // found.length
        keys = (latents[found.latent[window]] << 32) | (found.start[window] + active % found.length)
        effect = np.zeros(len(found.acts))
        effect[active] = self._effect_values[np.searchsorted(self._effect_keys, keys)]
        scale = np.zeros(len(latents))
        np.maximum.at(scale, of, np.abs(effect))
        scale = scale.astype("<f4")
        top = np.flatnonzero(found.group == 0)
        place = [self._explained.get(int(latents[found.latent[w]]) << 32 | int(found.row[w])) for w in top.tolist()]
        shown = np.array([w for w, n in zip(top.tolist(), place, strict=True) if n is not None], np.int64)
        n = np.array([n for n in place if n is not None], np.int64)
        x = self.effects
        steps = np.divide(127 * effect, scale[of], out=np.zeros(len(effect)), where=scale[of] > 0)
        return {
            "effect_scale": scale, "effects": np.clip(np.round(steps), -127, 127).astype("i1"),
            "x_window": shown.astype("<u4"), "x_method": self._methods[n].astype("u1"), "x_loss": x.loss[n].astype("<f4"),
            "x_kl": x.kl[n].astype("<f4"), "x_next": Ids(x.next[n]), "x_p": x.p[n].astype("<f2"),
            "x_p_ablated": x.p_ablated[n].astype("<f2"), "x_up": Ids(x.up[n]), "x_up_delta": x.up_delta[n].astype("<f2"),
            "x_down": Ids(x.down[n]), "x_down_delta": x.down_delta[n].astype("<f2"),
        }  # fmt: skip


class Inverted:
    """Tokens [pages, n] in parts: which pages each token finds."""

    def __init__(self, parts: list[np.ndarray]) -> None:
        self.tokens = np.concatenate(parts) if parts else np.zeros((0, 1), np.int64)

    def columns(self, name: str, vocab: Any) -> dict[str, Column]:
        """`{name}_n` [V] and `{name}`, ranks of pages in ascending order."""
        pages = np.repeat(np.arange(len(self.tokens)), self.tokens.shape[1])
        tokens = self.tokens.ravel()
        real = tokens >= 0
        local, pages = vocab.local(tokens[real]).astype(np.int64), pages[real]
        order = np.lexsort((pages, local))
        counts = np.bincount(local, minlength=len(vocab.ids))
        return {name + "_n": counts.astype("<u4"), name: pages[order].astype("<u4")}


def quantised(acts: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """u8: round(255 a / scale), at least 1 where a > 0."""
    steps = np.divide(255 * acts.astype(np.float64), scale, out=np.zeros(len(acts)), where=scale > 0)
    return np.where(acts > 0, np.clip(np.round(steps), 1, 255), 0).astype("u1")


def latent_ids(ids: np.ndarray) -> np.ndarray:
    """u32, all bits set where there is none (-1)."""
    return np.where(ids < 0, none_of("<u4"), ids).astype("<u4")


def _stored_logits(name: str, values: np.ndarray) -> Any:
    if name.endswith("_value"):
        return values.astype("<f2")
    return (
        values.astype("<f4")
        if name in ("logit_lo", "logit_hi")
        else values.astype("<u4")
        if name == "logit_hist"
        else Ids(values)
    )
