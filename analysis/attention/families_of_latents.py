"""Families of attention latents, by where their sources are: induction, previous token, local and long-range context.

Kissane et al. (arXiv 2406.17759) sort latents by hand; the scores and rules here are ours. Every firing of every latent is
attributed to its source positions (direct feature attribution), and the positive attribution counts as mass, of which a
latent has shares: from the position before, from the position after an earlier copy of the current token, from far away.

Shapes: n firings of one text, H heads, S source positions.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from saelab.analysis.attention.source_positions import at_positions
from saelab.analysis.circuits import frozen
from saelab.base.errors import ConfigError, DataError
from saelab.base.progress import progress_bar
from saelab.base.protocols import Dictionary
from saelab.models.purpose import Purpose
from saelab.models.tokens import Tokens
from saelab.reading.corpus import contexts_for

if TYPE_CHECKING:
    from pandas import DataFrame, Series

    from saelab.models.language import LanguageModel

NEAR, FAR = 8, 32  # source positions at most so far back are local, further back than so far long-range
MOST = 0.5  # of the mass names a family
OVER_CHANCE = 2.0  # times the chance share, for families that match tokens
SPREAD = 8.0  # sources, and
PERSISTENT = 0.5  # of firings with another at the next position: high-level context
FIRINGS = 10  # below, a latent has no family
CHUNK = 512  # firings whose [H, S] parts are made at a time

SHARES = (
    "induction", "induction_chance", "duplicate", "duplicate_chance", "previous_token", "current_token",
    "first_position", "local", "long_range", "effective_sources",
)  # fmt: skip
FAMILIES = (
    "induction", "duplicate token", "previous token", "current token", "first position", "high-level context",
    "local context", "long-range context", "mixed", "too few firings",
)  # fmt: skip


def latent_families(
    sae: Dictionary,
    lm: "LanguageModel",
    corpus: Any,
    *,
    tokens: int = 20_000,
    context_length: int | None = None,
    split: str = "heldout",
    shuffled: bool = False,
    seed: int = 0,
    batch_size: int = 4,
    progress: bool = True,
) -> "LatentFamilies":
    """Score every latent of an SAE of `hook_z` by where its firings come from, and name its family.

    Of each firing at t the attribution to sources s (at most t) is made exactly, with attention frozen; its positive part, as
    shares of the whole, is averaged over a latent's firings, weighed by activation:

    - `previous_token`: s = t - 1; `current_token`: s = t; `first_position`: s = 0;
    - `induction`: s < t, the token before s being the current one; `duplicate`: s < t, the token at s being the current one.
      Their `_chance` columns repeat this with the text's tokens in another order: what such matches catch anyhow;
    - `local`: at most 8 positions back, the current one included; `long_range`: more than 32;
    - `effective_sources`: exp of the entropy of the shares;
    - `persistence`: how many of the firings have another of the same latent at the next position;
    - `top_token_share`: how many of the firings have the latent's commonest strongest source token (`top_token`).

    Args:
        tokens: tokens of the corpus to read.
        context_length: tokens in a context, where not that of the SAE's training.
        split: "heldout", "train" or "all".
        shuffled: put the ordinary tokens of each text into random order before the model reads it: a control in which there is
            no content, though copies of tokens are still there for a real induction head to find.
        seed: of that order.
        batch_size: contexts a forward pass.
        progress: show a bar with the rate and the time left.

    Raises `ConfigError` for another site or model, `DataError` where the split has no context or nothing fires.

    >>> found = latent_families(sae, lm, corpus)  # doctest: +SKIP
    >>> found.counts()["induction"], found.examples(found.table.induction.idxmax())  # doctest: +SKIP
    """
    import pandas as pd

    block, _, _ = frozen.attention_site(sae, lm)
    if min(tokens, batch_size) < 1:
        raise ConfigError(f"{tokens=} and {batch_size=} must be at least 1")
    contexts = contexts_for(sae, lm, corpus, split, context_length)
    purpose, count = Purpose.of(sae), contexts.enough(tokens)
    generator = torch.Generator().manual_seed(seed)
    ids = contexts.ids[:count].long()
    if shuffled:
        ids = torch.stack([_shuffled(*row, generator) for row in zip(ids, contexts.mask, strict=False)])
    chance = torch.stack([_shuffled(*row, generator) for row in zip(ids, contexts.mask, strict=False)])
    found: list[dict[str, Any]] = []
    with torch.no_grad(), progress_bar(count, "sources", "context", progress) as bar:
        for start in range(0, count, batch_size):
            rows = slice(start, min(start + batch_size, count))
            tokens_read = contexts.tokens(rows)
            batch = Tokens(ids[rows], tokens_read.mask).to(lm.device)
            counted, first = contexts.counted(rows, purpose.skip_positions), tokens_read.mask.int().argmax(1)
            layer = frozen.read(lm, batch, [block]).layers[block]
            for context in range(len(batch.ids)):
                number = start + context
                masses = _firings(purpose, layer, context, counted[context])
                found += [_scored(m, ids[number], chance[number], number, int(first[context])) for m in masses]
            bar.update(len(batch.ids))
    if not found:
        raise DataError(f"no latent fires on the {count:,} contexts read: is the SAE of this model and site?")
    firings = pd.concat([pd.DataFrame(part) for part in found], ignore_index=True)
    return LatentFamilies(_table(firings, ids, sae.d_sae), firings, ids, contexts.mask[:count], lm)


class Mass(NamedTuple):
    """Some firings of one text: `latent`, `destination`, `activation` [n] and the positive attribution to sources [n, S]."""

    latent: Tensor
    destination: Tensor
    activation: Tensor
    by_source: Tensor


@dataclass(frozen=True, repr=False)
class LatentFamilies:
    """`table`, a row a latent that fires, indexed by latent: `firings`, `family` and the scores of `latent_families`.

    `firings` has a row for each firing: latent, context, destination, activation, its strongest source, that source's share of
    the mass, and the scores. `ids` and `mask` [context, position] are the texts read.
    """

    table: "DataFrame"
    firings: "DataFrame"
    ids: Tensor
    mask: Tensor
    lm: "LanguageModel"

    @property
    def labels(self) -> "Series":
        """The family of each latent that fires often enough to have one, by latent."""
        return self.table.family[self.table.family != FAMILIES[-1]]

    def counts(self) -> "Series":
        """How many latents each family has; they sum to the latents that fire at all."""
        return self.table.family.value_counts().reindex(FAMILIES, fill_value=0)

    @property
    def tested(self) -> int:
        """Latents with at least 10 firings, which is what is needed for a family."""
        return len(self.labels)

    def matched_by_chance(self, family: str = "induction") -> float:
        """False positives of the matching: the share of the latents tested that the family's share alone, made with the
        tokens in another order, would have put into it. "induction" or "duplicate token"."""
        column = {"induction": "induction_chance", "duplicate token": "duplicate_chance"}
        if family not in column:
            raise ConfigError(
                f"{family!r} matches no tokens, so that there is nothing to shuffle: {' or '.join(column)}"
            )
        return float((self.table.loc[self.labels.index, column[family]] >= MOST).mean())

    def examples(self, latent: int, k: int = 10, window: int = 6) -> "DataFrame":
        """The `k` strongest firings of a latent with their strongest source: activation, the text up to there and its last
        token, the token before the source, the source's own, the source's share, context, destination, source."""
        mine = self.firings[self.firings.latent == latent].nlargest(k, "activation")
        found = mine[["activation", "share", "context", "destination", "source"]].reset_index(drop=True)
        where = list(zip(found.context, found.destination, found.source, strict=True))
        found.insert(1, "text", [self._text(c, t - window, t) for c, t, _ in where])
        found.insert(2, "token", [self._text(c, t - 1, t) for c, t, _ in where])
        found.insert(3, "before_source", [self._text(c, s - 2, s - 1) for c, _, s in where])
        found.insert(4, "source_token", [self._text(c, s - 1, s) for c, _, s in where])
        return found

    def _text(self, context: int, start: int, stop: int) -> str:
        """The tokens after position `start` up to and with `stop`."""
        tokens = self.ids[context, max(start + 1, 0) : stop + 1].tolist()
        return "".join(map(self.lm.token_text, tokens))

    def __repr__(self) -> str:
        named = ", ".join(f"{count} {family}" for family, count in self.counts().items() if count)
        return f"LatentFamilies({len(self.firings):,} firings of {len(self.table):,} latents: {named})"


def _firings(purpose: Purpose, layer: frozen.Layer, context: int, counted: Tensor) -> Iterator[Mass]:
    """The firings of one text, some at a time, at the positions counted that the SAE is for."""
    sae = purpose.sae
    z = layer.z[context].flatten(1).to(sae.W_dec)
    places = purpose.within(z, counted).nonzero().flatten()
    codes = sae.encode_sparse(z[places])
    destinations = places[codes.rows()]
    for start in range(0, len(codes.values), CHUNK):
        part = slice(start, start + CHUNK)
        latent, destination = codes.indices[part], destinations[part]
        mass_nS = at_positions(sae, layer, context, destination, latent).sum(1).clamp(min=0)
        yield Mass(latent.cpu(), destination.cpu(), codes.values[part].cpu(), mass_nS.cpu())


def _scored(mass: Mass, ids: Tensor, chance: Tensor, context: int, first: int) -> dict[str, Any]:
    """Columns of one part of the table of firings of a text that begins at position `first`."""
    t, share_nS = mass.destination[:, None], mass.by_source
    share_nS = share_nS / share_nS.sum(1, keepdim=True).clamp(min=1e-30)
    s = torch.arange(share_nS.shape[1])
    back = t - s
    earlier = back > 0

    def part(which: Tensor) -> Tensor:
        return (share_nS * which).sum(1)

    def matching(tokens: Tensor, shift: int) -> Tensor:
        """The token `shift` before s is the current one."""
        return earlier & (s >= shift) & (tokens.roll(shift)[None] == tokens[mass.destination][:, None])

    columns = {
        "latent": mass.latent, "context": torch.full_like(mass.latent, context), "destination": mass.destination,
        "activation": mass.activation, "source": share_nS.argmax(1), "share": share_nS.amax(1),
        "induction": part(matching(ids, 1)), "induction_chance": part(matching(chance, 1)),
        "duplicate": part(matching(ids, 0)), "duplicate_chance": part(matching(chance, 0)),
        "previous_token": part(back == 1), "current_token": part(back == 0), "first_position": share_nS[:, first],
        "local": part(back <= NEAR), "long_range": part(back > FAR),
        "effective_sources": torch.special.entr(share_nS).sum(1).exp(),
    }  # fmt: skip
    return {name: column.numpy() for name, column in columns.items()}


def _table(firings: "DataFrame", ids: Tensor, d_sae: int) -> "DataFrame":
    import numpy as np
    import pandas as pd

    weights = firings.activation.clip(lower=1e-30)
    shares = list(SHARES)
    weighed = firings[shares].mul(weights, axis=0).groupby(firings.latent).sum()
    table = weighed.div(weights.groupby(firings.latent).sum(), axis=0)
    table.insert(0, "firings", firings.groupby("latent").size())
    places = (firings.context * ids.shape[1] + firings.destination) * d_sae + firings.latent
    inside = firings.destination + 1 < ids.shape[1]
    follows = pd.Series(np.isin(places + d_sae, places) & inside, index=firings.index)
    table["persistence"] = follows.groupby(firings.latent).mean()
    token = pd.Series(
        ids[firings.context.to_numpy().copy(), firings.source.to_numpy().copy()].numpy(), name="top_token"
    )
    pairs = pd.DataFrame({"latent": firings.latent, "top_token": token}).value_counts().reset_index()
    best = pairs.drop_duplicates("latent").set_index("latent")
    table["top_token"] = best.top_token
    table["top_token_share"] = best["count"] / table.firings
    table.insert(1, "family", _family(table))
    return table


def _family(table: "DataFrame") -> Any:
    """The first rule that holds, in the order of `FAMILIES`."""
    import numpy as np

    matched = {
        name: (table[name] >= MOST) & (table[name] >= OVER_CHANCE * table[f"{name}_chance"])
        for name in ("induction", "duplicate")
    }
    rules = [
        matched["induction"],
        matched["duplicate"],
        *(table[name] >= MOST for name in ("previous_token", "current_token", "first_position")),
        (table.effective_sources >= SPREAD) & (table.persistence >= PERSISTENT),
        *(table[name] >= MOST for name in ("local", "long_range")),
    ]
    return np.select([table.firings < FIRINGS, *rules], [FAMILIES[-1], *FAMILIES[: len(rules)]], default="mixed")


def _shuffled(ids: Tensor, mask: Tensor, generator: torch.Generator) -> Tensor:
    """The ordinary tokens in random order; special ones stay where they are."""
    places = mask.nonzero().flatten()
    other = ids.clone()
    other[places] = ids[places[torch.randperm(len(places), generator=generator)]]
    return other
