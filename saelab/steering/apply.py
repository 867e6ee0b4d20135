"""Steering itself: operations become hooks at their sites, for all rows of a batch alike or for each its own."""

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from saelab.base.errors import ConfigError, InterventionError, SiteError
from saelab.models.checkpointing import recomputing
from saelab.models.identity import warn_of_other_weights
from saelab.models.reach import opened
from saelab.models.sites import Site
from saelab.models.where import Where
from saelab.steering.operations import Operation
from saelab.steering.program import Part, Program, latent_codes
from saelab.steering.receipt import Receipt, Tally

if TYPE_CHECKING:
    from saelab.models.language import LanguageModel


@contextlib.contextmanager
def steer(lm: "LanguageModel", *operations: Operation) -> Iterator[Receipt]:
    """See `LanguageModel.steer`."""
    if not operations:
        raise ConfigError("steering needs at least one operation, such as steering.add(sae, 123, strength=4.0)")
    with _steering(lm, Receipt(lm, None, operations), [(operations, None)]) as receipt:
        yield receipt


@contextlib.contextmanager
def steer_rows(lm: "LanguageModel", rows: Sequence[Sequence[Operation]]) -> Iterator[Receipt]:
    """Within it, row i of every forward pass gets the operations `rows[i]`; an empty list leaves the row as it is.

    As `lm.steer`, for batches of exactly `len(rows)` rows; another size is an `InterventionError`. Rows do not see each
    other: each comes out as it would alone, up to rounding. An operation (the same object) may stand in several
    rows; its line of the receipt counts them together.
    """
    if not any(rows):
        raise ConfigError("steering needs at least one operation in one of the rows")
    together: dict[tuple[int, ...], list[int]] = {}
    for i, row in enumerate(rows):
        if row:
            together.setdefault(tuple(map(id, row)), []).append(i)
    groups = [(rows[numbers[0]], torch.tensor(numbers)) for numbers in together.values()]
    with _steering(lm, Receipt(lm, rows, ()), groups) as receipt:
        yield receipt


@contextlib.contextmanager
def _steering(
    lm: "LanguageModel", receipt: Receipt, groups: Sequence[tuple[Sequence[Operation], Tensor | None]]
) -> Iterator[Receipt]:
    lines: dict[int, int] = {}
    sites: dict[Site, list[Program]] = {}
    for operations, rows in groups:
        parts: dict[Site, list[Part]] = {}
        for operation in operations:
            line = lines.setdefault(id(operation), len(lines))
            if line == len(receipt.tallies):
                receipt.tallies.append(Tally(operation))
            site = _checked_site(lm, operation)
            if operation.latent is not None:
                warn_of_other_weights(lm, operation.source, stacklevel=6)
            same = next((known for known in (*sites, *parts) if lm.place(known) == lm.place(site)), site)
            parts.setdefault(same, []).append(Part(operation, line))
        for site, here in parts.items():
            sites.setdefault(site, []).append(Program(here, rows))
    n_rows = None if receipt.rows is None else len(receipt.rows)
    with contextlib.ExitStack() as hooks:
        for site, programs in sites.items():
            hooks.enter_context(lm.intervene(site, _Edit(lm, programs, receipt, n_rows)))
        hooks.enter_context(opened(receipt))
        yield receipt
    receipt.check()


def _checked_site(lm: "LanguageModel", operation: Operation) -> Site:
    """The operation's site, once it is known to be as wide as the direction."""
    if not isinstance(operation, Operation):
        raise ConfigError(f"{operation!r} is no operation: make one with steering.add, clamp, scale, ablate, "
                          "project_out or cap")  # fmt: skip
    site = lm.site(operation.place)
    width = len(operation.direction)
    if site.width != width:
        raise SiteError(f"{operation.name} is {width} wide and site {site.name!r} {site.width}: "
                        "give the site that it was made at")  # fmt: skip
    return site


class _Edit:
    """What the hook of one site calls: gather the touched positions, run the programs, put the vectors back."""

    def __init__(self, lm: "LanguageModel", programs: list[Program], receipt: Receipt, n_rows: int | None) -> None:
        self.lm, self.programs, self.receipt, self.n_rows = lm, programs, receipt, n_rows
        self.lines = {part.row for program in programs for part in program.parts}

    def __call__(self, x: Tensor, where: Where) -> Tensor:
        if self.n_rows is not None and len(x) != self.n_rows:
            raise InterventionError(f"a batch of {len(x)} rows came where {self.n_rows} were to be steered: "
                                    "give steer_rows as many lists of operations as there are rows")  # fmt: skip
        counts = not recomputing()
        if counts:
            self.receipt.count(self.lines)
        where = _columns_of(x, where)
        masks: dict[Any, Tensor] = {}
        found = [self._places(program, x, where, masks) for program in self.programs]
        touched = [(program, *places) for program, places in zip(self.programs, found, strict=True) if len(places[0])]
        if not touched:
            return x
        vectors = [x[rows, columns] for _, rows, columns, _ in touched]
        codes = _codes([(program, h) for (program, *_), h in zip(touched, vectors, strict=True)])
        new = x.clone()
        for (program, rows, columns, on), h, read in zip(touched, vectors, codes, strict=True):
            done = program.run(h, _ordinary(program, h, on), read)
            new[rows, columns] = done.after
            if counts:
                self.receipt.add(program, done)
        return new

    def _places(
        self, program: Program, x: Tensor, where: Where, masks: dict[Any, Tensor]
    ) -> tuple[Tensor, Tensor, list[Tensor]]:
        """Rows, columns [N] of the positions that any part touches, and for each part which of them it does."""
        parts = []
        for part in program.parts:
            if part.scope not in masks:
                masks[part.scope] = part.scope.mask(where, self.lm).to(x.device)
            mask = masks[part.scope]
            parts.append(mask if program.rows is None else mask[program.rows.to(x.device)])
        either = parts[0] if len(parts) == 1 else torch.stack(parts).any(0)
        rows, columns = either.nonzero(as_tuple=True)
        on = [mask[rows, columns] for mask in parts]
        return (rows if program.rows is None else program.rows.to(x.device)[rows]), columns, on


def _columns_of(x: Tensor, where: Where) -> Where:
    """`where` of the activation's own positions: a model that keeps the last logits only runs its head on those."""
    new = x.shape[1]
    if where.ids.shape[1] == new:
        return where
    return replace(
        where,
        ids=where.ids[:, -new:],
        positions=where.positions[:, -new:],
        mask=where.mask[:, -new:],
        generated=where.generated[:, -new:],
    )


def _ordinary(program: Program, h_ND: Tensor, masks: list[Tensor]) -> list[Tensor]:
    """The masks without activations that are too long for the part's autoencoder."""
    within: dict[int, Tensor] = {}
    kept = []
    for part, mask in zip(program.parts, masks, strict=True):
        sae = part.operation.source
        if part.operation.latent is not None and not part.scope.high_norm:
            if id(sae) not in within:
                within[id(sae)] = sae.replaceable(h_ND.detach().to(sae.W_dec)).to(mask.device)
            mask = mask & within[id(sae)]
        kept.append(mask)
    return kept


def _codes(vectors: list[tuple[Program, Tensor]]) -> list[list[Tensor | None]]:
    """For each program and part the codes [N] that it reads; every autoencoder runs once, on all rows together."""
    found: list[list[Tensor | None]] = [[None] * len(program.parts) for program, _ in vectors]
    saes = {id(part.sae): part.sae for program, _ in vectors for part in program.parts if part.sae is not None}
    for key, sae in saes.items():
        readers = [i for i, (program, _) in enumerate(vectors) if any(id(part.sae) == key for part in program.parts)]
        h = torch.cat([vectors[i][1] for i in readers])
        codes = sae.encode_sparse(h.to(sae.W_dec))
        ends = torch.tensor([len(vectors[i][1]) for i in readers]).cumsum(0).tolist()
        latents: dict[int, Tensor] = {}
        for i, stop in zip(readers, ends, strict=True):
            for k, part in enumerate(vectors[i][0].parts):
                if id(part.sae) == key:
                    latent = int(part.operation.latent or 0)
                    if latent not in latents:
                        latents[latent] = latent_codes(codes, latent)
                    found[i][k] = latents[latent][stop - len(vectors[i][1]) : stop].to(h.device)
    return found
