"""`build`: from an SAE, its model and a corpus to a page. Reads top to bottom: plan, read, explain, assemble, write."""

import json
import os
import shutil
import warnings
from collections.abc import Iterator, Mapping, Sequence, Sized
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from saelab.base.errors import ConfigError, DataError
from saelab.base.protocols import Dictionary
from saelab.dashboards.collecting.collect import MEMORY, Collection, collect, default_folder
from saelab.dashboards.collecting.examples import selected
from saelab.dashboards.collecting.one_pass import Reader
from saelab.dashboards.collecting.prompts import prompt_columns, prompts_of
from saelab.dashboards.collecting.vocab import Ids, Vocab
from saelab.dashboards.plan import Plan
from saelab.dashboards.result import Dashboard
from saelab.dashboards.writing import bundle as bundles
from saelab.dashboards.writing.chunks import Chunk, Inverted, Part
from saelab.dashboards.writing.codec import encode, texts
from saelab.dashboards.writing.manifest import manifest_of
from saelab.dashboards.writing.tables import Data, write_parquet
from saelab.models.identity import warn_of_other_weights
from saelab.reading.corpus import contexts_for, load_corpus

if TYPE_CHECKING:
    from saelab.models.language import LanguageModel
    from saelab.reading.corpus import Corpus
    from saelab.reading.packing import Contexts

FEW_PAGES = (
    4096  # up to here the vocabulary holds the tokens that are shown; beyond, chunks are not kept until they are known
)


def build(
    sae: Dictionary,
    lm: "LanguageModel",
    corpus: Any,
    path: str | os.PathLike[str],
    latents: int | Sequence[int] | None = None,
    tokens: int = 200_000,
    windows: int = 45,
    window: int = 48,
    effects: str | None = "direct",
    prompts: Any = (),
    labels: Mapping[int, str] | str | os.PathLike[str] | None = None,
    compare: Any = None,
    bundle: bool | None = None,
    *,
    split: str = "train",
    context_length: int | None = None,
    prepend_bos: bool | None = None,
    evaluation: Any = True,
    seeds: Sequence[Any] = (),
    null: Any = None,
    sweeps: Any = None,
    parquet: bool = True,
    title: str | None = None,
    seed: int = 0,
    shards: int | None = None,
    batch_tiles: int = 4,
    memory: int = MEMORY,
    work: str | os.PathLike[str] | None = None,
    progress: bool = True,
) -> Dashboard:
    """Make a dashboard of an SAE's latents: one self-contained HTML file, or a bundle for more than a file should hold.

    The corpus is read once, for any number of latents. All latents are in the index; those asked for have a page. The
    examples of an SAE of an attention layer's `hook_z` are read once more, as far as that layer, for where their peaks come
    from.

    Args:
        corpus: what `saelab.load_corpus` gives or takes.
        path: `.html` makes a single file (at most 100 MiB), anything else a folder.
        latents: how many live latents have a page (evenly over the ranks of their density, chosen by `seed`), a list
            of them, or None for all. Those with a page are compared with all latents (nearest, duplicates, matches,
            other seeds), so that None takes time with the square of the SAE's size.
        tokens: tokens of the corpus to read, rounded up to whole contexts; a corpus that has fewer is read whole, with
            a warning.
        windows: examples a latent.
        window: tokens an example, at most 255.
        effects: what ablating the latent does to the loss. For "direct" and "full" every shown token gets the
            first-order effect -f (d . gradient), and three contexts of up to 32 latents (of fewer where few
            contexts are read) are ablated in full, their
            rank correlation being printed; "direct" adds the direct path to the logits for the strongest examples of
            late and attention sites, "full" ablates three contexts of every latent. None leaves effects out: they take
            a backward pass of every context that is shown.
        prompts: texts that get a page of their own, as does every latent that fires on them.
        split: "train", "heldout" or "all" of the corpus.
        context_length: tokens in a context, where not that of the SAE's training.
        prepend_bos: whether contexts and prompts begin with the model's BOS, where not as in the SAE's training.
        labels: text by latent, a JSON file of such, an export of Neuronpedia or results of delphi (`dashboards.read_labels`).
        compare: a second SAE of the same model, read on the same pass, with an index and pages of its own.
        evaluation: True prints `saelab.evaluate` of each SAE on 2,048 held-out tokens (20,000 for silent latents), a
            `saelab.Report` that one for the first SAE, None nothing.
        seeds: SAEs of other seeds; latents with a page that they have too (decoder cosine at least 0.9) get a badge.
        null: a re-initialised model (`LanguageModel`) whose figures stand behind the real ones; it is read once too.
        sweeps: a `saelab.steering.Sweep`, or rows {"latent", "text", "baseline" (the unsteered text), ...}, shown on the
            latents' pages.
        bundle: a folder (True) or a single file (False), whatever the path ends in.
        parquet: also write tables.
        title: of the page.
        seed: of the latents and examples that are chosen.
        shards, batch_tiles, memory, work: of the collector (`saelab.dashboards.collecting.collect`): a killed build goes on in
            `work` (a folder in the cache by default), and the result is the same for any of them.
        progress: show a bar with the rate and the time left.

    Raises `ConfigError` for arguments that cannot work, with the numbers where memory, disk or a single file would not
    do; `SiteError` where an SAE does not fit the model; `DataError` for text or activations that cannot be used.

    >>> import saelab
    >>> page = saelab.dashboards.build(sae, lm, corpus, "features.html", latents=512)  # doctest: +SKIP
    """
    plan = Plan.of(locals())
    for each in plan.saes:
        warn_of_other_weights(lm, each)
    corpus = load_corpus(corpus)
    contexts = contexts_for(sae, lm, corpus, split, context_length, prepend_bos, progress)
    asked = prompts_of(lm, prompts, contexts.prepend_bos) if not isinstance(prompts, Sized) or len(prompts) else []
    reader = Reader.of(lm, plan.saes, contexts, plan.tokens, plan.seed)
    _warn_of_short_corpus(reader, plan.tokens, split)
    folder = plan.work or default_folder(reader)
    collections = collect(reader, folder, **plan.collecting)
    nulls = _nulls(reader, plan, folder)
    shown = [
        prompt_columns(lm, sae, reader.sites[0], reader.targets[0], collections[0], prompt.tokens, bool(plan.effects))
        for prompt in asked
    ]
    fired = np.concatenate([np.zeros(0, "<u4"), *(columns["latent"] for columns in shown)])
    parts = [
        _part(plan, reader, i, collection, null, fired if i == 0 else fired[:0])
        for i, (collection, null) in enumerate(zip(collections, nulls, strict=True))
    ]
    given = [] if evaluation in (True, None) else [evaluation]
    measured = [_evaluated(each, lm, corpus, contexts, progress) for each in plan.saes[len(given) :] if evaluation]
    manifest = manifest_of(parts, reader, corpus, plan, asked, [*given, *measured])
    page = _written(plan, _all_chunks(parts, shown, plan), parts[0], manifest)
    if work is None:  # what a killed build would have gone on from
        shutil.rmtree(folder, ignore_errors=True)
    return Dashboard(page)


def _warn_of_short_corpus(reader: Reader, tokens: int, split: str) -> None:
    available = reader.n_contexts * reader.length
    if available < tokens:
        warnings.warn(
            f"the corpus has {available:,} tokens in split {split!r}, {tokens:,} were asked for: the dashboard is made "
            "from those",
            stacklevel=3,
        )


def _evaluated(sae: Dictionary, lm: "LanguageModel", corpus: "Corpus", contexts: "Contexts", progress: bool) -> Any:
    """Held-out figures; None, with a warning, where there is nothing held out to read."""
    from saelab.evaluation.fidelity import evaluate

    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".* split ends after")
            return evaluate(
                sae, lm, corpus, tokens=2_048, sparsity_tokens=20_000, context_length=contexts.ids.shape[1],
                prepend_bos=contexts.prepend_bos, progress=progress,
            )  # fmt: skip
    except (ConfigError, DataError) as error:
        warnings.warn(f"the page has no evaluation: {error}", stacklevel=3)
        return None


def _nulls(reader: Reader, plan: Plan, folder: Path) -> Sequence[Collection | None]:
    """What the re-initialised model does, for each SAE."""
    if plan.null is None:
        return [None] * len(plan.saes)
    other = Reader.of(plan.null, reader.saes, reader.contexts, reader.n_contexts * reader.length, reader.seed)
    return collect(other, folder / "null", **plan.collecting)


def _part(
    plan: Plan, reader: Reader, i: int, collection: Collection, null: Collection | None, fired: np.ndarray
) -> Part:
    """SAE `i`, with what takes passes of its own: where peaks come from, and effects. Latents that `fired` on a prompt have
    a page too."""
    sae, others = plan.saes[i], plan.saes[:i] + plan.saes[i + 1 :]
    part = Part(
        reader.lm, sae, reader.sites[i], reader.targets[i], collection, reader.contexts,
        np.union1d(selected(plan.latents, collection.counts, plan.seed), fired), plan.layout, plan.seed, "b-" if i else "",
        () if i else plan.seeds, null, next((one for one in others if one.d_out == sae.d_out), None),
    )  # fmt: skip
    part.trace(plan.progress)
    if plan.effects:
        part.explain(plan.effects, plan.progress)
    return part


def _written(plan: Plan, chunks: Iterator[Chunk], first: Part, manifest: dict[str, Any]) -> Path:
    """The page, and the tables beside it where they are wanted."""
    containers: dict[str, bytes] = {}

    def encoded() -> Iterator[tuple[str, bytes]]:
        for name, container in _encoded(chunks, first):
            if plan.parquet:
                containers[name] = container
            yield name, container

    def beside(folder: Path) -> None:
        write_parquet(Data(manifest, containers), folder)

    return bundles.write(plan.path, encoded(), manifest, plan.bundle, beside if plan.parquet else None)


def _all_chunks(parts: list[Part], prompts: list[dict[str, Any]], plan: Plan) -> Iterator[Chunk]:
    labels, sweeps = plan.labels, plan.sweeps
    for part in parts:
        yield from part.chunks()
    if labels:
        sources = sorted({label.source for label in labels.values()})
        columns = {"latent": np.array(list(labels), "<u4"), **texts([label.text for label in labels.values()]),
                   "source": np.array([sources.index(label.source) for label in labels.values()], "u1"),
                   "score": np.array([label.score for label in labels.values()], float).astype("<f2")}  # fmt: skip
        yield "lab", "labels", columns, {"sources": sources}
    if sweeps:
        rows = [json.dumps(row, sort_keys=True) for mine in sweeps.values() for row in mine]
        columns = {
            "latent": np.array(list(sweeps), "<u4"),
            "rows": np.array([len(mine) for mine in sweeps.values()], "<u4"),
        }
        yield "steer", "steer", {**columns, **texts(rows)}, {}
    for i, columns in enumerate(prompts):
        yield f"p-{i:03d}", "prompt", columns, {}


def _encoded(chunks: Iterator[Chunk], part: Part) -> Iterator[tuple[str, bytes]]:
    """Containers, token ids made rows of the vocabulary, which comes last."""
    d_vocab = part.lm.d_vocab
    waiting: list[Chunk] | Iterator[Chunk] = chunks
    if len(part.pages) <= FEW_PAGES:
        waiting = list(chunks)
        shown = [_ids_of(column) for _, _, columns, _ in waiting for column in columns.values()]
        vocab = Vocab(np.concatenate([ids for ids in shown if ids is not None]))
    else:
        vocab = Vocab(np.arange(d_vocab))
    for name, kind, columns, extra in waiting:
        resolved: dict[str, Any] = {}
        for column, value in columns.items():
            resolved |= value.columns(column, vocab) if isinstance(value, Inverted) else {column: value}
        yield name, encode(kind, vocab.resolved(resolved), **extra)
    yield "vocab", encode("vocab", vocab.columns(part.lm, part.reads))


def _ids_of(column: Any) -> np.ndarray | None:
    return (
        column.ids.ravel()
        if isinstance(column, Ids)
        else column.tokens.ravel()
        if isinstance(column, Inverted)
        else None
    )
