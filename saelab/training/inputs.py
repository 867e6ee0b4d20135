"""From what the user passes to `train` to a source of rows, and what the run's manifest says of it."""

import hashlib
import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from saelab.errors import ConfigError, DataError
from saelab.models.identity import refuse_interventions
from saelab.training.sources import PIECE_ROWS, RowSource, StreamSource, iterable_pieces, model_pieces

CONTEXTS_PER_FORWARD = 8


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
    context_length: int,
    skip_positions: int,
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
        if isinstance(corpus, str):
            from saelab.activations.corpus import load_corpus

            corpus = load_corpus(corpus, seed=seed)
        sites = {"x": site} | ({"target": target_site} if target_site else {})
        if digests:
            refuse_interventions(source, "a run with out=")
        resolved = {name: source.site(path) for name, path in sites.items()}
        contexts = corpus.contexts(source, context_length, split="train")
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
            "prepend_bos": False,
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
    parts = source if isinstance(source, tuple) and len(source) == 2 else (source,)
    if all(isinstance(part, Tensor) or _is_store(part) for part in parts):
        for part in parts:
            if isinstance(part, Tensor) and (part.ndim != 2 or not part.is_floating_point()):
                raise DataError(
                    f"activations are a 2-D floating-point tensor [n, d]; this one is {list(part.shape)} of {part.dtype}"
                )
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

    if not hasattr(source, "__iter__"):
        raise ConfigError(
            f"cannot train on a {type(source).__name__}: pass a LanguageModel with corpus and site, an ActivationStore, a "
            "[n, d] tensor, a pair of them, or an iterable of [n, d] tensors"
        )
    once = isinstance(source, Iterator)
    items = source
    first = None
    if once:
        first = next(source, None)
        items = _Once(first, source)
    else:
        first = next(iter(source), None)
    if first is None:
        raise DataError("the iterable is empty")
    pair = isinstance(first, (tuple, list))
    widths = {"x": (first[0] if pair else first).shape[-1]} | ({"target": first[1].shape[-1]} if pair else {})
    stream = StreamSource(
        iterable_pieces(items), widths, PIECE_ROWS, buffer_tokens, seed, max_norm, tokens, 1 if once else math.inf, say
    )
    stream.require(batch_size)
    metadata = common | {"trained_on": "iterable"}
    return Input(stream, metadata, metadata | {"buffer_tokens": buffer_tokens})


class _Once:
    """An iterator whose first item was looked at."""

    def __init__(self, first: Any, rest: Iterator[Any]) -> None:
        self.first, self.rest = first, rest

    def __iter__(self) -> Iterator[Any]:
        yield self.first
        yield from self.rest


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
        digest.update(rows[start : start + 65_536].detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
