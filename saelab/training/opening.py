"""From what the user passes to `train` to a source of rows, and what the run's manifest says of it."""

import hashlib
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from saelab.base import digests, seeds
from saelab.base.errors import ConfigError, DataError
from saelab.base.surroundings import OwnRandomness
from saelab.models.identity import refuse_interventions
from saelab.training.sources import (
    PIECE_ROWS,
    RowSource,
    StreamSource,
    iterable_pieces,
    model_pieces,
    pieces_of,
    rows_of,
)

CONTEXTS_PER_FORWARD = 8
KNOWN_ROWS = 8192  # of an iterable, that its fingerprint holds


class Input(NamedTuple):
    source: RowSource | StreamSource
    metadata: dict[str, Any]  # of the SAE: where its activations come from
    fingerprint: dict[str, Any]  # what must be the same for a run to be continued


def open_input(
    source: Any,
    corpus: Any,
    *,
    site: str | None,
    target_site: str | None,
    context_length: int | None,
    skip_positions: int,
    prepend_bos: bool | None,
    max_norm: float | None,
    buffer_tokens: int | str,
    batch_size: int,
    tokens: int,
    gradients: bool,
    seed: int,
    digests: bool,
    say: Callable[[str], None],
) -> Input:
    """Raises `ConfigError` for arguments that do not go together, `DataError` for data that cannot be trained on."""
    common = {"site": site, "target_site": target_site, "max_norm": max_norm, "seed": seed}
    if hasattr(source, "tokenizer") and hasattr(source, "record"):
        if corpus is None or site is None:
            missing = " and ".join(name for name, value in (("corpus", corpus), ("site", site)) if value is None)
            raise ConfigError(
                f"training from a model needs {missing}: train(lm, corpus, site='blocks.3.hook_resid_post', ...)"
            )
        sites = {"x": site} | ({"target": target_site} if target_site else {})
        if digests:
            refuse_interventions(source, "a run with out=")
        resolved = {name: source.site(path) for name, path in sites.items()}
        contexts = corpus.contexts(source, context_length, split="train", prepend_bos=prepend_bos)
        context_length = contexts.ids.shape[1]  # rows of token ids keep their own
        widths = {name: found.width for name, found in resolved.items()}
        if gradients:
            widths["gradient"] = widths["x"]
        pieces = model_pieces(
            source, contexts, sites, skip_positions=skip_positions, gradients=gradients, batch_size=CONTEXTS_PER_FORWARD
        )
        stream = StreamSource(
            pieces, widths, CONTEXTS_PER_FORWARD * context_length, buffer_tokens, seed, max_norm, tokens, say=say
        )
        stream.require(batch_size)
        place = resolved["x"]
        metadata = common | {
            "model": source.name,
            "model_digest": source.digest,
            "heads": [place.heads, place.d_head] if place.heads else None,
            "context_length": context_length,
            "skip_positions": skip_positions,
            "prepend_bos": contexts.prepend_bos,
            "corpus": corpus.name,
            "corpus_digest": corpus.digest,
            "split": "train",
            "trained_on": "language model",
        }
        return Input(stream, metadata, metadata | {"buffer_tokens": buffer_tokens})

    if corpus is not None:
        raise ConfigError(
            f"a corpus goes with a model, and the source is a {type(source).__name__}: wrap a model with saelab.load_model"
        )
    if isinstance(source, torch.nn.Module):
        raise ConfigError("wrap the model with saelab.load_model(model, tokenizer=...) and pass a corpus and a site")
    parts: tuple[Any, ...] = source if isinstance(source, tuple) and len(source) == 2 else (source,)
    if all(isinstance(part, (Tensor, np.ndarray)) or _is_store(part) for part in parts):
        parts = tuple(part if _is_store(part) else rows_of(part, "the source") for part in parts)
        columns = dict(zip(("x", "target"), parts, strict=False))
        if gradients:
            columns["gradient"] = _gradients(parts[0])
        rows = RowSource(columns, seed, max_norm, say=say)
        metadata = {k: v for k, v in parts[0].metadata.items() if v is not None} if _is_store(parts[0]) else {}
        if len(parts) == 2 and _is_store(parts[1]):
            common["target_site"] = parts[1].metadata.get("site")
        metadata = {**common, **metadata, "max_norm": max_norm, "seed": seed}
        metadata["trained_on"] = "store" if _is_store(parts[0]) else "tensor"
        fingerprint = metadata | ({"rows": [_digest(part) for part in parts]} if digests else {})
        return Input(rows, metadata, fingerprint)

    if isinstance(source, (str, bytes, Mapping)) or not hasattr(source, "__iter__"):
        raise ConfigError(
            f"cannot train on a {type(source).__name__}: pass a LanguageModel with corpus and site, an ActivationStore, a "
            "[n, d] tensor or NumPy array, a pair of them, or an iterable of [n, d] tensors"
        )
    once = isinstance(source, Iterator)
    first, known = _beginning(source, seed, KNOWN_ROWS if digests else 1)
    items = _Resumed(first, source) if once else source
    widths = {name: column.shape[1] for name, column in pieces_of(first[0], 0).items()}
    stream = StreamSource(
        iterable_pieces(items, widths, seed), widths, PIECE_ROWS, buffer_tokens, seed, max_norm, tokens,
        1 if once else math.inf, say,
    )  # fmt: skip
    stream.require(batch_size)
    metadata = common | {"trained_on": "iterable"}
    fingerprint = metadata | {"buffer_tokens": buffer_tokens} | ({"rows": known} if digests else {})
    if digests:
        say(
            f"the data of an iterable are told from others by their first {KNOWN_ROWS:,} rows: if what comes after those has "
            "changed, give another `out`"
        )
    return Input(stream, metadata, fingerprint)


class _Resumed:
    """An iterator whose first items were looked at."""

    def __init__(self, first: list[Any], rest: Iterator[Any]) -> None:
        self.first, self.rest = first, rest

    def __iter__(self) -> Iterator[Any]:
        yield from self.first
        yield from self.rest


def _beginning(items: Iterable[Any], seed: int, n_rows: int) -> tuple[list[Any], str]:
    """The first items of an iterable, those of `n_rows` rows or one, and a digest of their content."""
    found: list[Any] = []
    digest, rows = hashlib.sha256(), 0
    with OwnRandomness(seeds.derived(seed, 0)):
        for number, item in enumerate(items):
            found.append(item)
            for name, column in pieces_of(item, number).items():
                digest.update(f"{name} {_digest(column)}".encode())
                rows += len(column)
            if rows >= n_rows:
                break
    if not found:
        raise DataError("the iterable is empty")
    return found, digest.hexdigest()


def _is_store(source: Any) -> bool:
    return hasattr(source, "metadata") and hasattr(source, "d_in") and hasattr(source, "__getitem__")


def _gradients(rows: Any) -> Any:
    gradients = getattr(rows, "gradients", None)
    if gradients is None:
        raise ConfigError(
            "this architecture needs the gradient of the model's loss beside each activation, and the source has none: "
            "harvest it with saelab.harvest(lm, corpus, site=..., tokens=..., gradients=True)"
        )
    return gradients


def _digest(rows: Any) -> str:
    if not isinstance(rows, Tensor):
        return rows.digest
    digest = hashlib.sha256(f"{tuple(rows.shape)} {rows.dtype}".encode())
    for start in range(0, len(rows), 65_536):
        digest.update(digests.content(rows[start : start + 65_536]))
    return digest.hexdigest()
