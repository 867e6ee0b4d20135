"""Receipts: what steering did, in numbers, and enough of how to do it again."""

import itertools
import json
import os
import platform
import threading
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from saelab.base.errors import InterventionError
from saelab.base.files import whole_file
from saelab.base.version import __version__
from saelab.models.generation import Generation
from saelab.steering.operations import Operation
from saelab.steering.program import Part, Program, Touched, coordinate, latent_codes

if TYPE_CHECKING:
    from pandas import DataFrame

    from saelab.models.language import LanguageModel

FORMAT = 1
PRINTED = 6  # operations: more do not fit a repr
COLUMNS = [
    "site", "operation", "direction", "strength", "unit", "calls", "positions", "changed", "relative_change",
    "latent_before", "latent_after", "latent_positions",
]  # fmt: skip
_LATENT_POSITIONS = 1024  # of each operation: reading them costs an encoding each, which steering itself may not need


class Tally:
    """Running figures of one operation at its site; sums stay on the device until they are asked for."""

    def __init__(self, operation: Operation) -> None:
        self.operation = operation
        self.calls = 0
        self.positions: Tensor | int = 0
        self.changed: Tensor | int = 0
        self.relative: Tensor | float = 0.0
        self.waiting = 0  # positions kept for reading the latent, of which so many are read:
        self.read = 0
        self.before = 0.0
        self.after = 0.0

    def row(self) -> dict[str, Any]:
        """Its line of the table."""
        n = int(self.positions)
        return {
            "site": self.operation.place,
            "operation": self.operation.kind,
            "direction": self.operation.name,
            "strength": self.operation.amount,
            "unit": self.operation.unit,
            "calls": self.calls,
            "positions": n,
            "changed": int(self.changed),
            "relative_change": float(self.relative) / n if n else None,
            "latent_before": self.before / self.read if self.read else None,
            "latent_after": self.after / self.read if self.read else None,
            "latent_positions": self.read,
        }


class Kept(NamedTuple):
    """Vectors [N, D] before and after, and for each part of the program which of them it touched."""

    before: Tensor
    after: Tensor
    masks: list[Tensor]


class Receipt:
    """What a steering context did so far; made by `lm.steer`.

    Counts add up over forward passes. Without a key-value cache a position counts once in each pass.
    `print(receipt)` shows `to_pandas()`; `save` writes what `saelab steer --replay` and `steering.replay` do again.
    """

    def __init__(self, lm: "LanguageModel", rows: Sequence[Sequence[Operation]] | None, every: Sequence[Operation]):
        self.lm = lm
        self.rows = rows
        self.every = every
        self.tallies: list[Tally] = []
        self.generations: list[tuple[Generation, list[Any]]] = []
        self._waiting: list[tuple[Program, Kept]] = []
        self._lock = threading.Lock()  # several threads may be steered by one context

    def count(self, lines: Iterable[int]) -> None:
        """A forward pass has come to the site of these lines."""
        with self._lock:
            for line in lines:
                self.tallies[line].calls += 1

    def add(self, program: Program, touched: Touched) -> None:
        """Add what a program did in one forward pass."""
        with self._lock, torch.no_grad():
            for part, mask, changed, relative in zip(
                program.parts, touched.masks, touched.changed, touched.relative, strict=True
            ):
                tally = self.tallies[part.row]
                tally.positions = tally.positions + mask.sum()
                tally.changed = tally.changed + changed.sum()
                tally.relative = tally.relative + relative.double().sum()
            self._keep(program, touched)

    def _keep(self, program: Program, touched: Touched) -> None:
        """Keep the first vectors that each operation touched, to read its latent when asked."""
        open_parts = [k for k, part in enumerate(program.parts) if self.tallies[part.row].waiting < _LATENT_POSITIONS]
        if not open_parts:
            return
        wanted = torch.stack([touched.masks[k] for k in open_parts]).any(0)
        rows = wanted.nonzero().squeeze(1)[:_LATENT_POSITIONS]
        masks = [mask[rows] for mask in touched.masks]
        for part, mask in zip(program.parts, masks, strict=True):
            self.tallies[part.row].waiting += int(mask.sum())
        self._waiting.append((program, Kept(touched.before[rows].detach(), touched.after[rows].detach(), masks)))

    def generated(self, generation: Generation) -> None:
        """Keep what `lm.generate` gave, with all contexts that were open then."""
        self.generations.append((generation, self.lm.receipts))

    def settle(self) -> None:
        """Read the latents of the vectors that wait, before and after; each source reads all of them at once."""
        with self._lock:
            waiting, self._waiting = self._waiting, []
        by_source: dict[int, list[tuple[Part, Tensor, Kept]]] = {}
        for program, kept in waiting:
            for part, mask in zip(program.parts, kept.masks, strict=True):
                by_source.setdefault(id(part.operation.source), []).append((part, mask, kept))
        with torch.no_grad():
            for entries in by_source.values():
                self._read(entries)

    def _read(self, entries: list[tuple[Part, Tensor, Kept]]) -> None:
        distinct = list({id(kept): kept for _, _, kept in entries}.values())
        starts = [0, *itertools.accumulate(len(kept.before) for kept in distinct)]
        start_of = {id(kept): start for kept, start in zip(distinct, starts[:-1], strict=True)}
        places: dict[int, list[Tensor]] = {}
        parts = {part.row: part for part, _, _ in entries}
        for part, mask, kept in entries:
            places.setdefault(part.row, []).append(start_of[id(kept)] + mask.nonzero().squeeze(1))
        vectors = [kept.before for kept in distinct] + [kept.after for kept in distinct]
        read = _reader(entries[0][0].operation, torch.cat(vectors))
        for line, rows in places.items():
            before, after = read(parts[line].operation).double().view(2, -1)
            chosen = torch.cat(rows).to(before.device)
            tally = self.tallies[line]
            tally.read += len(chosen)
            tally.before += float(before[chosen].sum())
            tally.after += float(after[chosen].sum())

    def check(self) -> None:
        """Raise `InterventionError` when a site never ran, or an operation touched no position."""
        for tally in self.tallies:
            if not tally.calls:
                raise InterventionError(
                    f"nothing was steered: {tally.operation.place} never ran inside the context. Call the wrapped model "
                    "(lm.logits, lm.loss, lm.generate or lm.model) within it, in the thread that opened it or one that the "
                    "main thread started since (others through contextvars.copy_context().run)"
                )
            if not int(tally.positions):
                raise InterventionError(
                    f"{tally.operation!r} touched no position in {tally.calls:,} calls at {tally.operation.place}: its "
                    f"scope ({tally.operation.scope!r}) met none of the tokens. Special tokens, padding, activations of "
                    "very high norm and the first token of a context are left out unless the scope asks for them"
                )

    def to_pandas(self) -> "DataFrame":
        """One row an operation, in the order given.

        `site`, `operation`, `direction`, `strength`, `unit` (of strength), `calls` (forward passes that ran the site),
        `positions` (touched, over all calls), `changed` (of these, those with a change that is not zero),
        `relative_change` (mean of |change| / |h| over the touched positions), `latent_before` and `latent_after` (mean
        activation of the latent, or coordinate of a plain vector: of the unsteered vector and, encoded again, of what
        stands after all operations at the site), over the first `latent_positions` touched (all up to about 1,000).
        """
        import pandas as pd

        self.settle()
        return pd.DataFrame([tally.row() for tally in self.tallies], columns=COLUMNS)

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain values: model, autoencoders (folder and digest), operations, figures, texts."""
        from saelab.models.identity import weights_digest

        self.settle()
        contexts = [self, *(r for _, stack in self.generations for r in stack)]
        saes = {id(op.source): op.source for r in contexts for op in r.operations() if op.latent is not None}
        numbers = {key: i for i, key in enumerate(saes)}
        return {
            "format": FORMAT,
            "versions": {"saelab": __version__, "torch": torch.__version__, "python": platform.python_version()},
            "model": {"name": self.lm.name, "digest": self.lm.digest, "dtype": str(self.lm.dtype)},
            "autoencoders": [
                {
                    "path": None if getattr(sae, "path", None) is None else str(sae.path),
                    "digest": weights_digest(sae),
                    "description": repr(sae),
                }
                for sae in saes.values()
            ],
            "steering": self._program(numbers),
            "hooks": [tally.row() for tally in self.tallies],
            "generations": [
                {
                    **asdict(generation),
                    "prompt_texts": [str(self.lm.tokenizer.decode(ids)) for ids in generation.prompts],
                    "contexts": [receipt._program(numbers) for receipt in stack],
                }
                for generation, stack in self.generations
            ],
        }

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write `to_dict()` as JSON. Raises `CheckpointError` on a full or read-only disk."""
        text = json.dumps(self.to_dict(), indent=1)
        with whole_file(path) as temporary:
            temporary.write_text(text, encoding="utf-8")

    def operations(self) -> list[Operation]:
        """All operations, row by row."""
        return [*self.every, *(operation for row in self.rows or () for operation in row)]

    def _program(self, numbers: dict[int, int]) -> dict[str, Any]:
        def described(operation: Operation) -> dict[str, Any]:
            values = operation.to_dict()
            return values if operation.latent is None else {**values, "source": {"sae": numbers[id(operation.source)]}}

        if self.rows is None:
            return {"every_row": [described(operation) for operation in self.every]}
        return {"rows": [[described(operation) for operation in row] for row in self.rows]}

    def __repr__(self) -> str:
        more = len(self.tallies) - PRINTED
        rest = f"\nand {more:,} more: to_pandas() has them" if more > 0 else ""
        return (
            f"Receipt of {len(self.tallies)} operations:\n{self.to_pandas().head(PRINTED).to_string(index=False)}{rest}"
        )


def _reader(operation: Operation, h_ND: Tensor) -> Callable[[Operation], Tensor]:
    """What gives the activations [N] of the operations that share a source with this one, on these vectors."""
    sae = operation.source
    if operation.latent is None:
        exact = h_ND.to(torch.promote_types(h_ND.dtype, torch.float32))
        return lambda other: coordinate(exact, other.direction)
    codes = sae.encode_sparse(h_ND.to(sae.W_dec))
    return lambda other: latent_codes(codes, int(other.latent or 0))
