"""From a model and a corpus to stored rows of activations, one forward pass for any number of sites."""

import contextlib
import importlib.metadata
import os
import warnings
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch

from saelab.base import checks
from saelab.base.errors import ConfigError, DataError
from saelab.base.progress import progress_bar
from saelab.models.identity import refuse_interventions
from saelab.reading.corpus import load_corpus
from saelab.reading.reader import ContextReader, Rows
from saelab.reading.shards import TOKEN_KEYS
from saelab.reading.store import ActivationStore, layout_of, row_bytes
from saelab.reading.writers import FolderWriter, MemoryWriter, try_out

if TYPE_CHECKING:
    from saelab.models.language import LanguageModel
    from saelab.reading.corpus import Corpus

IN_MEMORY = 2 * 2**30


def harvest(
    lm: "LanguageModel",
    corpus: Any,
    *,
    site: str | None = None,
    sites: Sequence[str] | None = None,
    tokens: int,
    gradients: bool | str = False,
    out: str | os.PathLike[str] | None = None,
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
    row_dtype, tokens, seed = checks.dtype_of(dtype), checks.count("tokens", tokens), checks.seed(seed)
    batch_size = checks.count("batch_size", batch_size)
    skip_positions = checks.count("skip_positions", skip_positions, least=0)
    if out is not None:
        try_out(out)
    corpus = load_corpus(corpus)
    contexts = corpus.contexts(lm, context_length, split=split, prepend_bos=prepend_bos, progress=progress)
    order = torch.randperm(len(contexts.ids), generator=torch.Generator().manual_seed(seed))
    reader = ContextReader(
        lm, contexts, names, skip_positions=skip_positions, gradients=gradients, batch_size=batch_size, dtype=row_dtype,
        order=order,
    )  # fmt: skip
    rows = _rows_there(reader, corpus, split, tokens)
    if out is not None:
        refuse_interventions(lm, f"the harvest in {out}")
    plan = _plan(reader, corpus, {"split": split, "seed": seed}, tokens, rows)
    in_memory = out is None and rows * row_bytes(layout_of(plan)) <= IN_MEMORY
    writer = MemoryWriter(plan) if in_memory else FolderWriter(plan, batch_size * contexts.ids.shape[1], out)
    with contextlib.closing(writer):
        try:
            _fill(writer, rows, progress, reader.rows(writer.cursor))
        except KeyboardInterrupt as stop:
            if out is not None:
                stop.add_note(f"the complete shards in {out} stay: the same call goes on behind them")
            if out is not None or not writer.rows:
                raise
            warnings.warn(f"interrupted: {writer.rows:,} of {rows:,} tokens are in the store", stacklevel=2)
        stores = writer.stores()
    return stores if site is None else stores[site]


def _rows_there(reader: ContextReader, corpus: "Corpus", split: str, tokens: int) -> int:
    """How many of the rows asked for the corpus has."""
    length = reader.contexts.ids.shape[1]
    if reader.skip_positions + bool(reader.gradients) >= length:
        raise ConfigError(f"skip_positions={reader.skip_positions:,} must leave some of {length:,} positions")
    available = reader.available()
    if not available:
        raise DataError(
            f"none of the {reader.contexts.mask.numel():,} tokens of {corpus.name} ({split}) can be used: all are "
            f"special, padding or among the first {reader.skip_positions} of a context"
        )
    if available < tokens:
        warnings.warn(
            f"the corpus has {available:,} tokens in split {split!r}, {tokens:,} were asked for: the harvest "
            "stops there",
            stacklevel=3,
        )
    return min(tokens, available)


def _plan(reader: ContextReader, corpus: "Corpus", chosen: dict[str, Any], tokens: int, rows: int) -> dict[str, Any]:
    """What the manifest says before anything is read; `chosen` are the split and the seed."""
    lm, contexts, gradients = reader.lm, reader.contexts, reader.gradients
    metadata = {
        "model": lm.name,
        "model_digest": lm.digest,
        "corpus": corpus.name,
        "corpus_digest": corpus.digest,
        "context_length": contexts.ids.shape[1],  # rows of token ids keep their own
        "skip_positions": reader.skip_positions,
        "prepend_bos": contexts.prepend_bos,
        **chosen,
    }
    labels = {"gradients": "sampled" if gradients == "sampled" else "true"} if gradients else {}
    dtype = str(reader.dtype).removeprefix("torch.")
    return {
        "fingerprint": {
            **metadata,
            "contexts_digest": contexts.digest,
            "model_dtype": str(lm.dtype),
            "sites": list(reader.sites),
            "tokens": tokens,
            "gradients": gradients,
            "dtype": dtype,
            "batch_size": reader.batch_size,
        },
        "metadata": {**metadata, **labels, "versions": _versions()},
        "sites": [
            {"name": name, "width": s.width, "heads": [s.heads, s.width // s.heads] if s.heads else None}
            for name, s in reader.sites.items()
        ],
        "dtype": dtype,
        "gradients": bool(gradients),
        "rows": rows,
    }


def _fill(writer: MemoryWriter | FolderWriter, total: int, progress: bool, chunks: Iterator[Rows]) -> None:
    with progress_bar(total, "harvest", " tokens", progress, initial=writer.rows, delay=0) as bar:
        while writer.rows < total:
            rows = next(chunks)
            n = min(len(rows), total - writer.rows)
            columns = {"rows": {key: getattr(rows, key) for key in TOKEN_KEYS}}
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
