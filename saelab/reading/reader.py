"""The one eye: contexts through a model, as the rows that count, with their places and an autoencoder's codes."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Bool, Int64
from torch import Tensor

from saelab.base import checks
from saelab.base.codes import SparseCodes
from saelab.base.errors import ConfigError, DataError
from saelab.models.purpose import Purpose
from saelab.models.sites import run_recording

if TYPE_CHECKING:
    from saelab.models.language import LanguageModel
    from saelab.reading.packing import Contexts


@dataclass
class Rows:
    """Aligned rows of some contexts, without skipped positions, special tokens and padding."""

    x: dict[str, Tensor]  # site -> [n, width], on the model's device
    gradients: dict[str, Tensor] | None
    tokens: Tensor  # int32 [n], on the CPU like the next three
    positions: Tensor  # place in the context
    documents: Tensor  # index into corpus.documents
    contexts: Tensor  # number of the context
    cursor: int  # how many contexts have been read once these rows are used

    def __len__(self) -> int:
        return len(self.tokens)

    def where(self, chosen_N: Bool[Tensor, " n"]) -> "Rows":
        """Some of the rows."""

        def some(column: Any) -> Any:
            if isinstance(column, dict):
                return {name: some(x) for name, x in column.items()}
            return column[chosen_N.to(column.device)] if isinstance(column, Tensor) else column

        return Rows(**{field.name: some(getattr(self, field.name)) for field in fields(self)})


class ContextReader:
    """What is read of a corpus and how: `rows` of activations, `coded` with the codes of an autoencoder.

    A row is an ordinary token past the first `skip_positions` of its context: no padding, no special token.

    Args:
        lm: the model; it runs as far as the last of the sites.
        contexts: those of a corpus.
        sites: names, all recorded in one pass.
        skip_positions: first positions of each context that have no row.
        gradients: True adds the gradient of the summed next-token loss at each row and leaves out each context's last
            position: nothing after it depends on it, its gradient is exactly zero. "sampled" takes labels that the model
            draws, by a generator seeded with the context's number, instead of the true next tokens.
        batch_size: contexts a forward pass.
        dtype: of the rows, fp32 unless given.
        order: the numbers of the contexts to read, one after the other; all of them unless given.

    Raises `SiteError` for a site that the model does not have.
    """

    def __init__(
        self,
        lm: "LanguageModel",
        contexts: "Contexts",
        sites: Iterable[str],
        *,
        skip_positions: int = 1,
        gradients: bool | str = False,
        batch_size: int = 8,
        dtype: torch.dtype | None = None,
        order: Int64[Tensor, " n"] | None = None,
    ) -> None:
        self.lm, self.contexts, self.gradients = lm, contexts, gradients
        self.batch_size = checks.count("batch_size", batch_size)
        self.skip_positions = checks.count("skip_positions", skip_positions, least=0)
        self.order = torch.arange(len(contexts.ids)) if order is None else order
        self.dtype = dtype or torch.float32
        self.sites = {name: lm.site(name) for name in sites}

    @classmethod
    def of(
        cls, purpose: Purpose, lm: "LanguageModel", contexts: "Contexts", tokens: int, batch_size: int
    ) -> "ContextReader":
        """Of the sites that an autoencoder reads and writes, in the first contexts, that hold `tokens` tokens together."""
        sites = dict.fromkeys([purpose.source(lm).name, purpose.target(lm).name])
        order = torch.arange(contexts.enough(tokens))
        return cls(lm, contexts, sites, skip_positions=purpose.skip_positions, batch_size=batch_size, order=order)

    def rows(self, start: int = 0) -> Iterator[Rows]:
        """The rows of `batch_size` contexts at a time; `start` and `Rows.cursor` count contexts along the order.

        Content and order are deterministic: from `start` on come the same bits as from the beginning. Raises `ConfigError`
        for a `start` between two batches and `DataError`, naming site, context and position, when an activation is NaN or
        infinite.
        """
        if start % self.batch_size and start < len(self.order):
            raise ConfigError(f"start={start} lies between two batches of {self.batch_size} contexts: use a multiple")
        return self._batches(start)

    def coded(self, purpose: Purpose) -> Iterator[tuple[Rows, SparseCodes]]:
        """The rows that an autoencoder is for, and their codes."""
        sae = purpose.sae
        for rows in self.rows():
            x = rows.x[purpose.source(self.lm).name].to(sae.W_dec)
            mine = sae.replaceable(x)
            with torch.no_grad():
                codes = sae.encode_sparse(x[mine])
            yield rows.where(mine), codes

    def available(self) -> int:
        """How many rows there are in all of the contexts."""
        return int(self._counted(slice(None)).sum())

    def _counted(self, numbers: Tensor | slice) -> Bool[Tensor, "n pos"]:
        keep = self.contexts.counted(numbers, self.skip_positions)
        if self.gradients:
            real = self.contexts.tokens(numbers).mask
            keep &= real.flip(1).cumsum(1).flip(1) != real  # a later one is real, too
        return keep

    def _batches(self, start: int) -> Iterator[Rows]:
        contexts, gradients = self.contexts, bool(self.gradients)
        for first in range(start, len(self.order), self.batch_size):
            numbers = self.order[first : first + self.batch_size]
            keep = self._counted(numbers).flatten().nonzero().squeeze(1)
            if not len(keep):
                continue
            ids = contexts.ids[numbers]
            inputs = contexts.tokens(numbers).to(self.lm.device)  # special tokens have no row but are read
            seeds = numbers.tolist() if self.gradients == "sampled" else None
            recorded = run_recording(self.lm, inputs, list(self.sites.values()), gradients=gradients, label_seeds=seeds)
            activations, gradient = recorded if gradients else (recorded, None)
            rows = Rows(
                x=self._picked(activations, keep),
                gradients=None if gradient is None else self._picked(gradient, keep),
                tokens=ids.flatten()[keep].int(),
                positions=(keep % ids.shape[1]).int(),
                documents=contexts.documents[numbers].flatten()[keep].int(),
                contexts=numbers[keep // ids.shape[1]].int(),
                cursor=min(first + self.batch_size, len(self.order)),
            )
            _check_finite(rows)
            yield rows

    def _picked(self, recorded: dict[str, Tensor], keep: Tensor) -> dict[str, Tensor]:
        found = {name: recorded[site.name].flatten(0, 1) for name, site in self.sites.items()}
        return {name: x.index_select(0, keep.to(x.device)).to(self.dtype) for name, x in found.items()}


def _check_finite(rows: Rows) -> None:
    for what, tensors in (("activation", rows.x), ("gradient", rows.gradients or {})):
        for name, x in tensors.items():
            # One cheap pass: no NaN or infinity survives in a finite sum. A sum of finite numbers may overflow, though.
            if bool(x.sum(dtype=torch.float32).isfinite()):
                continue
            bad = (~x.isfinite()).any(1).nonzero().squeeze(1)
            if len(bad):
                row = int(bad[0])
                raise DataError(
                    f"{len(bad):,} of {len(x):,} rows have a NaN or infinite {what} at {name} in {x.dtype}, the first "
                    f"at context {int(rows.contexts[row])}, position {int(rows.positions[row])}: nothing was "
                    "overwritten; look at that text, or use float32 for the model and for the rows"
                )
