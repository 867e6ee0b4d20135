"""A batch of contexts through the plain model, and again with something else at the positions that an autoencoder is for."""

import contextlib
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Bool, Float, Float64, Int
from torch import Tensor
from torch.nn.functional import cross_entropy

from saelab.base import statistics
from saelab.models.purpose import Purpose
from saelab.models.sites import Site

if TYPE_CHECKING:
    from saelab.models.language import LanguageModel
    from saelab.reading.packing import Contexts


class CleanPass:
    """Some contexts read by the plain model.

    `logits` [batch, position, vocabulary]; `x` and `target` [batch, position, d], what stands where the autoencoder reads
    and where it writes; `mask` [batch, position], real tokens that are not special; `targets` [batch, position - 1], which
    of them are predicted; `mine` [batch, position], those that it is for.
    """

    def __init__(self, purpose: Purpose, lm: "LanguageModel", contexts: "Contexts", rows: slice) -> None:
        source, self.site = purpose.source(lm), purpose.target(lm)
        self.lm, self.inputs = lm, contexts.tokens(rows).to(lm.device)
        seen: dict[str, Tensor] = {}

        def keeping(site: Site) -> Callable[[Tensor, Any], Tensor]:
            return lambda x, where: seen.setdefault(site.name, x)

        with contextlib.ExitStack() as hooks:
            for site in dict.fromkeys([source, self.site]):
                hooks.enter_context(lm.intervene(site, keeping(site)))
            self.logits = lm.logits(self.inputs)
        self.x, self.target = seen[source.name], seen[self.site.name]
        device = self.x.device
        self.mask, self.targets = contexts.mask[rows].to(device), contexts.targets(rows).to(device)
        self.mine = purpose.within(self.x, contexts.counted(rows, purpose.skip_positions))

    def again(self, values: Float[Tensor, "*n d"], replaced: Bool[Tensor, "batch pos"]) -> Float[Tensor, "batch pos v"]:
        """The logits with `values` ([n, d] or [d]) at some positions of where the autoencoder writes."""
        with self.lm.intervene(self.site, putting(values, replaced)):
            return self.lm.logits(self.inputs)


def putting(
    values: Float[Tensor, "*n d"], replaced: Bool[Tensor, "batch pos"]
) -> Callable[[Float[Tensor, "batch pos d"], Any], Float[Tensor, "batch pos d"]]:
    """An intervention that writes `values` ([n, d] or [d]) at the positions `replaced`."""

    def put(x: Tensor, where: Any) -> Tensor:
        new = x.clone()
        new[replaced] = values.to(x)
        return new

    return put


def context_ce(
    logits: Float[Tensor, "batch pos v"], ids: Int[Tensor, "batch pos"], targets: Bool[Tensor, "batch next"]
) -> Float64[Tensor, " batch"]:
    """Next-token cross-entropy in nats, summed over the targets [batch, position - 1] of each context.

    One context at a time, because its log-probabilities are large.
    """
    return torch.stack(
        [
            cross_entropy(row[:-1][real].float(), target[real], reduction="none").double().sum()
            for row, target, real in zip(logits, ids[:, 1:], targets, strict=True)
        ]
    )


def context_kl(
    clean: Float[Tensor, "batch pos v"], spliced: Float[Tensor, "batch pos v"], mask: Bool[Tensor, "batch pos"]
) -> Float64[Tensor, " batch"]:
    """KL(clean || spliced), summed over the real positions of each context."""
    rows = zip(clean, spliced, mask, strict=True)
    return torch.stack([statistics.kl(p[real].float(), q[real].float()).sum() for p, q, real in rows])
