"""From what the user passes to `train` to a source of rows, and what the run's manifest says of it."""

import functools
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from saelab.base import processes as distributed
from saelab.base import seeds
from saelab.base.errors import ConfigError
from saelab.evaluation.fidelity import evaluate
from saelab.evaluation.report import Report
from saelab.models.identity import refuse_interventions
from saelab.reading.buffer import parse_capacity
from saelab.reading.corpus import load_corpus
from saelab.reading.images import NoisedPlaces, load_images
from saelab.reading.reader import ContextReader
from saelab.reading.store import ActivationStore
from saelab.training.lanes import Lanes
from saelab.training.pieces import ItemPieces, ModelPieces, Pieces, StorePieces, rows_digest, rows_of
from saelab.training.settings import Settings
from saelab.training.sources import RowSource, Source, StreamSource

if TYPE_CHECKING:
    from saelab.models.denoiser import Denoiser
    from saelab.models.language import LanguageModel

CONTEXTS_PER_FORWARD = 8
STREAMED_SHARDS = 256  # 16 GiB as `harvest` writes them: stores of more are not read at random access
KNOWN_ROWS = 8192  # of an iterable, that its fingerprint holds


class Input(NamedTuple):
    source: Source
    metadata: dict[str, Any]  # of the SAE: where its activations come from
    fingerprint: dict[str, Any]  # what must be the same for a run to be continued
    evaluate: Callable[..., Report] | None = None  # an SAE, where the source is a model


def open_source(source: Any, corpus: Any, settings: Settings, gradients: bool) -> Input:
    """Raises `ConfigError` for arguments that do not go together, `DataError` for data that cannot be trained on."""
    if hasattr(source, "tokenizer") and hasattr(source, "record"):
        return open_model(source, corpus, settings, gradients)
    if hasattr(source, "alphas_cumprod") and hasattr(source, "record"):
        return open_denoiser(source, corpus, settings, gradients)
    if corpus is not None:
        raise ConfigError(
            f"a corpus goes with a model, and the source is a {type(source).__name__}: wrap a model with saelab.load_model"
        )
    if isinstance(source, torch.nn.Module):
        raise ConfigError("wrap the model with saelab.load_model(model, tokenizer=...) and pass a corpus and a site")
    parts: tuple[Any, ...] = source if isinstance(source, tuple) and len(source) == 2 else (source,)
    if all(isinstance(part, (Tensor, np.ndarray)) or _is_store(part) for part in parts):
        return open_rows(parts, settings, gradients)
    if isinstance(source, (str, bytes, Mapping)) or not hasattr(source, "__iter__"):
        raise ConfigError(
            f"cannot train on a {type(source).__name__}: pass a LanguageModel with corpus and site, a Denoiser with site, "
            "an ActivationStore, a "
            "[n, d] tensor or NumPy array, a pair of them, or an iterable of [n, d] tensors"
        )
    return open_iterable(source, settings)


def open_model(lm: "LanguageModel", corpus: Any, settings: Settings, gradients: bool) -> Input:
    """The activations of a model, made while it reads the corpus."""
    if corpus is None or settings.site is None:
        missing = " and ".join(name for name, value in (("corpus", corpus), ("site", settings.site)) if value is None)
        raise ConfigError(
            f"training from a model needs {missing}: train(lm, corpus, site='blocks.3.hook_resid_post', ...)"
        )
    corpus = load_corpus(corpus, seed=settings.seed)
    if settings.out is not None:
        refuse_interventions(lm, "a run with out=")
    sites = {"x": settings.site} | ({"target": settings.target_site} if settings.target_site else {})
    place, *_ = [lm.site(path) for path in sites.values()]  # a wrong site is said before the corpus is read
    contexts = corpus.contexts(lm, settings.context_length, split="train", prepend_bos=settings.prepend_bos)
    reader = ContextReader(
        lm, contexts, dict.fromkeys(sites.values()), skip_positions=settings.skip_positions, gradients=gradients,
        batch_size=CONTEXTS_PER_FORWARD,
    )  # fmt: skip
    stream = _stream(ModelPieces(reader, sites), settings)
    metadata = _common(settings) | {
        "model": lm.name,
        "model_digest": lm.digest,
        "heads": [place.heads, place.d_head] if place.heads else None,
        "context_length": contexts.ids.shape[1],  # rows of token ids keep their own
        "skip_positions": settings.skip_positions,
        "prepend_bos": contexts.prepend_bos,
        "corpus": corpus.name,
        "corpus_digest": corpus.digest,
        "split": "train",
        "trained_on": "language model",
    }
    score = functools.partial(evaluate, lm=lm, corpus=corpus, progress=False)
    return Input(stream, metadata, metadata | {"buffer_tokens": settings.buffer_tokens}, score)


def open_denoiser(denoiser: "Denoiser", corpus: Any, settings: Settings, gradients: bool) -> Input:
    """The activations of a denoiser at every place, made while it sees noised images."""
    if settings.site is None:
        raise ConfigError("training from a denoiser needs a site: train(denoiser, site='mid_block', ...)")
    if settings.target_site is not None or gradients:
        what = "target_site" if settings.target_site is not None else "an architecture that needs gradients"
        raise ConfigError(f"{what} goes with a language model: of a denoiser an autoencoder of one site can be trained")
    if settings.out is not None:
        refuse_interventions(denoiser, "a run with out=")
    site = denoiser.site(settings.site)
    images = load_images(corpus, denoiser)
    stream = _stream(NoisedPlaces(denoiser, images.split("train"), site, settings.seed), settings)
    metadata = _common(settings) | {
        "site": site,
        "model": denoiser.name,
        "model_digest": denoiser.digest,
        "places": list(denoiser.site_shape(site)),
        "skip_positions": 0,
        "corpus": images.name,
        "corpus_digest": images.digest,
        "split": "train",
        "trained_on": "denoiser",
    }
    score = functools.partial(evaluate, lm=denoiser, corpus=images, progress=False)
    return Input(stream, metadata, metadata | {"buffer_tokens": settings.buffer_tokens}, score)


def open_rows(parts: tuple[Any, ...], settings: Settings, gradients: bool) -> Input:
    """A store, tensor or array, or a pair of them (input, target)."""
    parts = tuple(part if _is_store(part) else rows_of(part, "the source") for part in parts)
    columns = dict(zip(("x", "target"), parts, strict=False))
    if gradients:
        columns["gradient"] = _gradients(parts[0])
    common = _common(settings)
    if len(parts) == 2 and _is_store(parts[1]):
        common["target_site"] = parts[1].metadata.get("site")
    stored = {k: v for k, v in parts[0].metadata.items() if v is not None} if _is_store(parts[0]) else {}
    metadata = {**common, **stored, "max_norm": settings.max_norm, "seed": settings.seed}
    metadata["trained_on"] = "store" if _is_store(parts[0]) else "tensor"
    known = {"rows": [rows_digest(part) for part in parts]} if _is_compared(settings) else {}
    if all(isinstance(part, ActivationStore) and len(part.bounds) > STREAMED_SHARDS + 1 for part in parts):
        stream = _stream(StorePieces(columns, settings.seed), settings)
        return Input(stream, metadata, metadata | known | {"buffer_tokens": settings.buffer_tokens})
    rows = RowSource(columns, settings.seed, settings.max_norm, say=settings.say)
    return Input(rows, metadata, metadata | known)


def open_iterable(items: Iterable[Any], settings: Settings) -> Input:
    """Anything that gives tensors or pairs of them, once or as often as it is asked."""
    pieces = ItemPieces(items, settings.seed, KNOWN_ROWS if _is_compared(settings) else 1)
    stream = _stream(pieces, settings)
    metadata = _common(settings) | {"trained_on": "iterable"}
    fingerprint = metadata | {"buffer_tokens": settings.buffer_tokens}
    if _is_compared(settings):
        fingerprint["rows"] = pieces.digest
    if settings.out is not None:
        settings.say(
            f"the data of an iterable are told from others by their first {KNOWN_ROWS:,} rows: if what comes after those has "
            "changed, give another `out`"
        )
    return Input(stream, metadata, fingerprint)


def _common(settings: Settings) -> dict[str, Any]:
    return {name: getattr(settings, name) for name in ("site", "target_site", "max_norm", "seed")} | (
        {"lanes": settings.lanes} if settings.lanes > 1 else {}
    )


def _stream(pieces: Pieces, settings: Settings) -> Source:
    lanes = settings.lanes
    rows = parse_capacity(settings.buffer_tokens, 4 * sum(pieces.widths.values()))

    def stream(lane: int) -> StreamSource:
        own = pieces.lane(lane, lanes) if lanes > 1 else pieces
        seed = seeds.derived(settings.seed, lane) if lane else settings.seed
        source = StreamSource(own, rows // lanes, seed, settings.max_norm, settings.tokens // lanes, settings.say)
        source.require(settings.batch_size // lanes, lanes)
        return source

    return stream(0) if lanes == 1 else Lanes(lanes, stream)


def _is_compared(settings: Settings) -> bool:
    """Whether the fingerprint is: with that of a run in `out`, or with those of other processes."""
    return settings.out is not None or distributed.world_size() > 1


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
