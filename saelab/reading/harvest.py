"""From a model and a corpus to rows of activations, one forward pass for any number of sites."""

import contextlib
import importlib.metadata
import os
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Bool, Int64
from torch import Tensor

from saelab.base import checks
from saelab.base.errors import ConfigError, DataError
from saelab.models.identity import refuse_interventions
from saelab.models.sites import run_recording
from saelab.reading.corpus import load_corpus
from saelab.reading.store import ActivationStore, layout_of, row_bytes
from saelab.reading.writers import FolderWriter, MemoryWriter, try_out

if TYPE_CHECKING:
    from saelab.models.language import LanguageModel
    from saelab.models.sites import Site
    from saelab.reading.packing import Contexts

IN_MEMORY = 2 * 2**30


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


def usable(
    contexts: "Contexts", numbers: Tensor | slice, skip_positions: int, gradients: bool
) -> Bool[Tensor, "n pos"]:
    """Which places of some contexts have a row: ordinary tokens past the first `skip_positions` of their context.

    With gradients the last real position has none: nothing after it depends on it, its gradient is exactly zero.
    """
    keep = contexts.counted(numbers, skip_positions)
    if gradients:
        real = contexts.tokens(numbers).mask
        keep &= real.flip(1).cumsum(1).flip(1) != real  # a later one is real, too
    return keep


def stream(
    lm: "LanguageModel",
    contexts: "Contexts",
    sites: Sequence[str],
    *,
    skip_positions: int = 1,
    gradients: bool | str = False,
    start: int = 0,
    batch_size: int = 8,
    dtype: torch.dtype | None = None,
    order: Int64[Tensor, " n"] | None = None,
) -> Iterator[Rows]:
    """Rows of activations at `sites`, `batch_size` contexts at a time, in the order of the contexts.

    Content and order are deterministic: a stream from `start` yields the same bits as one that got there by itself.
    `gradients` adds the gradient of the summed next-token loss at each row and leaves out each context's last
    position, where it is zero; "sampled" takes labels that the model draws, by a generator seeded with the context's
    number, instead of the true next tokens. Rows are fp32 unless `dtype`. `order` (int64, context numbers) reads the
    contexts in that order; `start` and `Rows.cursor` count along it.

    Raises `SiteError` for a site that the model does not have, `ConfigError` for a `start` between two batches and
    `DataError`, naming site, context and position, when an activation is NaN or infinite.
    """
    batch_size = checks.count("batch_size", batch_size)
    skip_positions = checks.count("skip_positions", skip_positions, least=0)
    order = torch.arange(len(contexts.ids)) if order is None else order
    if start % batch_size and start < len(order):
        raise ConfigError(f"start={start} lies between two batches of {batch_size} contexts: use a multiple")
    resolved = {name: lm.site(name) for name in sites}
    return _batches(lm, contexts, resolved, skip_positions, gradients, start, batch_size, dtype or torch.float32, order)


def _batches(
    lm: "LanguageModel",
    contexts: "Contexts",
    sites: dict[str, "Site"],
    skip_positions: int,
    gradients: bool | str,
    start: int,
    batch_size: int,
    dtype: torch.dtype,
    order: Tensor,
) -> Iterator[Rows]:
    for first in range(start, len(order), batch_size):
        numbers = order[first : first + batch_size]
        keep = usable(contexts, numbers, skip_positions, bool(gradients)).flatten().nonzero().squeeze(1)
        if not len(keep):
            continue
        ids = contexts.ids[numbers]
        inputs = contexts.tokens(numbers).to(lm.device)  # special tokens have no row but are read
        seeds = numbers.tolist() if gradients == "sampled" else None
        recorded = run_recording(lm, inputs, list(sites.values()), gradients=bool(gradients), label_seeds=seeds)
        activations, gradient = recorded if gradients else (recorded, None)
        rows = Rows(
            x=_picked(activations, sites, keep, dtype),
            gradients=None if gradient is None else _picked(gradient, sites, keep, dtype),
            tokens=ids.flatten()[keep].int(),
            positions=(keep % ids.shape[1]).int(),
            documents=contexts.documents[numbers].flatten()[keep].int(),
            contexts=numbers[keep // ids.shape[1]].int(),
            cursor=min(first + batch_size, len(order)),
        )
        _check_finite(rows)
        yield rows


def _picked(
    recorded: dict[str, Tensor], sites: dict[str, "Site"], keep: Tensor, dtype: torch.dtype
) -> dict[str, Tensor]:
    keep = keep.to(next(iter(recorded.values())).device)
    return {name: recorded[site.name].flatten(0, 1).index_select(0, keep).to(dtype) for name, site in sites.items()}


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


def harvest(
    lm: "LanguageModel",
    corpus: Any,
    *,
    site: str | None = None,
    sites: Sequence[str] | None = None,
    tokens: int,
    gradients: bool | str = False,
    out: str | os.PathLike | None = None,
    context_length: int | None = None,
    skip_positions: int = 1,
    dtype: torch.dtype | str | None = None,
    split: str = "train",
    seed: int = 0,
    batch_size: int = 8,
    prepend_bos: bool | None = None,
    progress: bool = True,
) -> ActivationStore | dict[str, ActivationStore]:
    """Store the activations of exactly `tokens` tokens: a row each, for one site or several, in one pass.

    Rows are ordinary tokens past the first `skip_positions` of their context: no padding, no special token.

    Args:
        corpus: what `load_corpus` gives or takes.
        site, sites: one site gives a store, several give a dict of stores whose rows are aligned, read in one pass.
        tokens: the number of rows. A corpus that has fewer ends the harvest early, with a warning that gives both.
        gradients: True also stores d(summed next-token loss) / d(activation) at each row, as `store.gradients`, of the true
            next tokens; "sampled", of labels drawn from the model's own distribution. A context's last position is left
            out then: its gradient is zero.
        out: a folder, in which a harvest that was killed goes on, to the same bits, when called again, and a finished
            one is opened. Without it rows are kept in memory up to 2 GiB, beyond that in a temporary folder that is
            removed with the stores.
        context_length: tokens in a context of a corpus of text, 256 unless given (or the model's maximum, where that is less).
        skip_positions: first positions of each context that are left out.
        prepend_bos: whether each context begins with the model's BOS; None follows the tokenizer.
        dtype: of the stored rows: float32 unless given.
        split: "train", "heldout" or "all".
        seed: of the order in which contexts are read, so of which ones are when the corpus has more than enough.
        batch_size: contexts a forward pass.
        progress: show a bar with the rate and the time left.

    Ctrl-C returns the rows so far, with a warning; with `out` it raises, and the complete shards stay.

    Raises `ConfigError` for arguments that cannot work, `SiteError` for an unknown site, `InterventionError` for an `out`
    within an open intervention, which no digest can tell, `DataError` for NaN or infinite activations (named; nothing is
    overwritten), `CheckpointError` for a full disk and for an `out` that cannot be written, that another process harvests
    into, or that holds another harvest (the differing keys are listed), `FormatError` for damaged shards in it.

    >>> stores = saelab.harvest(lm, corpus, sites=["blocks.3.hook_resid_post", "blocks.4.hook_resid_post"],
    ...                         tokens=50_000, out="cache/blocks-3-4")    # doctest: +SKIP
    >>> row = 123; int(stores["blocks.3.hook_resid_post"].tokens[row])    # doctest: +SKIP
    """
    names = _site_names(site, sites)
    checks.language_model("lm", lm)
    checks.choice("gradients", gradients, (True, "sampled", False))
    row_dtype = checks.dtype_of(dtype) or torch.float32
    tokens, batch_size = checks.count("tokens", tokens), checks.count("batch_size", batch_size)
    seed = checks.seed(seed)
    skip_positions = checks.count("skip_positions", skip_positions, least=0)
    if out is not None:
        try_out(out)
    corpus = load_corpus(corpus)
    contexts = corpus.contexts(lm, context_length, split=split, prepend_bos=prepend_bos, progress=progress)
    context_length = contexts.ids.shape[1]  # rows of token ids keep their own
    if skip_positions + bool(gradients) >= context_length:
        raise ConfigError(f"skip_positions={skip_positions:,} must leave some of {context_length:,} positions")
    available = int(usable(contexts, slice(None), skip_positions, bool(gradients)).sum())
    if not available:
        raise DataError(
            f"none of the {contexts.mask.numel():,} tokens of {corpus.name} ({split}) can be used: all are "
            f"special, padding or among the first {skip_positions} of a context"
        )
    if available < tokens:
        warnings.warn(
            f"the corpus has {available:,} tokens in split {split!r}, {tokens:,} were asked for: the harvest "
            "stops there",
            stacklevel=2,
        )

    if out is not None:
        refuse_interventions(lm, f"the harvest in {out}")
    metadata = {
        "model": lm.name,
        "model_digest": lm.digest,
        "corpus": corpus.name,
        "corpus_digest": corpus.digest,
        "context_length": context_length,
        "skip_positions": skip_positions,
        "prepend_bos": contexts.prepend_bos,
        "split": split,
        "seed": seed,
    }
    labels = {"gradients": "sampled" if gradients == "sampled" else "true"} if gradients else {}
    dtype_name = str(row_dtype).removeprefix("torch.")
    resolved = [lm.site(name) for name in names]
    plan: dict[str, Any] = {
        "fingerprint": {
            **metadata,
            "contexts_digest": contexts.digest,
            "model_dtype": str(lm.dtype),
            "sites": names,
            "tokens": tokens,
            "gradients": gradients,
            "dtype": dtype_name,
            "batch_size": batch_size,
        },
        "metadata": {**metadata, **labels, "versions": _versions()},
        "sites": [
            {"name": name, "width": s.width, "heads": [s.heads, s.width // s.heads] if s.heads else None}
            for name, s in zip(names, resolved, strict=True)
        ],
        "dtype": dtype_name,
        "gradients": bool(gradients),
        "rows": min(tokens, available),
    }
    in_memory = out is None and plan["rows"] * row_bytes(layout_of(plan)) <= IN_MEMORY
    writer = MemoryWriter(plan) if in_memory else FolderWriter(plan, batch_size * context_length, out)
    with contextlib.closing(writer):
        try:
            _fill(
                writer,
                plan["rows"],
                progress,
                stream(
                    lm,
                    contexts,
                    names,
                    skip_positions=skip_positions,
                    gradients=gradients,
                    start=writer.cursor,
                    batch_size=batch_size,
                    dtype=row_dtype,
                    order=torch.randperm(len(contexts.ids), generator=torch.Generator().manual_seed(seed)),
                ),
            )
        except KeyboardInterrupt as stop:
            if out is not None:
                stop.add_note(f"the complete shards in {out} stay: the same call goes on behind them")
            if out is not None or not writer.rows:
                raise
            warnings.warn(f"interrupted: {writer.rows:,} of {plan['rows']:,} tokens are in the store", stacklevel=2)
        stores = writer.stores()
    return stores if site is None else stores[site]


def _fill(writer: MemoryWriter | FolderWriter, total: int, progress: bool, chunks: Iterator[Rows]) -> None:
    from tqdm.auto import tqdm

    with tqdm(total=total, initial=writer.rows, unit=" tokens", desc="harvest", disable=not progress) as bar:
        while writer.rows < total:
            rows = next(chunks)
            n = min(len(rows), total - writer.rows)
            columns = {
                "rows": {
                    "tokens": rows.tokens,
                    "positions": rows.positions,
                    "documents": rows.documents,
                    "contexts": rows.contexts,
                }
            }
            for place, name in enumerate(rows.x):
                columns[f"site{place}"] = {"x": rows.x[name]}
                if rows.gradients is not None:
                    columns[f"site{place}"]["gradients"] = rows.gradients[name]
            writer.add(columns, n, rows.cursor)
            bar.update(n)


def _site_names(site: str | None, sites: Sequence[str] | None) -> list[str]:
    if (site is None) == (sites is None):
        raise ConfigError("give either `site`, a name, or `sites`, a list of names")
    names = [site] if site is not None else list(sites or ())
    if not names or len(set(names)) != len(names) or isinstance(sites, str):
        raise ConfigError(f"sites={sites!r}: give a list of at least one name, each once")
    return names


def _versions() -> dict[str, str]:
    versions = {}
    for package in ("saelab", "torch", "transformers"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    return versions
