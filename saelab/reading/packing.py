"""From documents to contexts: tokenised once, joined by separators, cut into rows of one length."""

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from saelab.base import cache, digests
from saelab.base.errors import DataError
from saelab.base.files import cache_folder
from saelab.base.progress import progress_bar
from saelab.base.tensors import write_tensors
from saelab.models.purpose import among, counted
from saelab.models.tokens import Tokens, checked

if TYPE_CHECKING:
    from saelab.models.language import LanguageModel

_BATCH_CHARACTERS = 1_000_000
_WORTH_CACHING = 1_000_000  # characters; less is tokenised faster than it is looked up


@dataclass(frozen=True, eq=False)
class Contexts:
    """Rows of tokens in the order in which they are read.

    `ids` int32 [n, context_length]; `documents` int32, the index into `Corpus.documents` of each token (the row
    number for a corpus of token ids), -1 for separators and BOS; `mask` bool, True where a token counts in statistics:
    neither padding nor a special token; `real` bool, False at padding only. `digest` is the SHA-256 of ids, documents
    and mask, and of `real` where anything is padded. `prepend_bos`: whether every row begins with the BOS.
    """

    ids: Tensor
    documents: Tensor
    mask: Tensor
    real: Tensor
    digest: str
    prepend_bos: bool = False

    @classmethod
    def of(
        cls,
        lm: "LanguageModel",
        ids: Int[Tensor, "n pos"],
        documents: Int[Tensor, "n pos"],
        real: Bool[Tensor, "n pos"] | None = None,
        prepend_bos: bool = False,
    ) -> "Contexts":
        """Contexts of these ids for a model; `DataError` when one is outside its vocabulary, or a row is all padding."""
        real = torch.ones((), dtype=torch.bool).expand(ids.shape) if real is None else real
        checked(Tokens(ids, real), lm.d_vocab)
        ids, documents = ids.to(torch.int32), documents.to(torch.int32)
        mask = real & ~among(ids, lm.special_ids)
        tensors = {"ids": ids, "documents": documents, "mask": mask} | ({} if bool(real.all()) else {"real": real})
        return cls(ids, documents, mask, real, digests.of_tensors(tensors), prepend_bos)

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def n_tokens(self) -> int:
        """Tokens that count: neither padding nor special."""
        return int(self.mask.sum())

    def tokens(self, numbers: Int[Tensor, " n"] | slice) -> Tokens:
        """Some of the contexts as a model reads them: padding masked, special tokens not."""
        return Tokens(self.ids[numbers].long(), self.real[numbers])

    def counted(self, numbers: Int[Tensor, " n"] | slice, skip_positions: int) -> Bool[Tensor, "_ pos"]:
        """Where some of the contexts count, past their first `skip_positions` real tokens: bool [len, context_length]."""
        return self.mask[numbers] & counted(self.tokens(numbers), skip_positions)

    def enough(self, tokens: int) -> int:
        """How many of the contexts, from the first on, hold so many tokens: all, where they are fewer."""
        return min(len(self), -(-tokens // self.ids.shape[1]))

    def targets(self, numbers: Int[Tensor, " n"] | slice) -> Bool[Tensor, "_ pairs"]:
        """Which tokens of some contexts count as predictions of the one before: bool [len, context_length - 1]."""
        return self.mask[numbers][:, 1:] & self.real[numbers][:, :-1]

    def __repr__(self) -> str:
        return f"Contexts({len(self):,} of {self.ids.shape[1]:,} tokens, digest {self.digest[:8]})"


def pack(
    ids: Int[Tensor, " T"],
    lengths: Int[Tensor, " documents"],
    order: Int[Tensor, " _"],
    separator: int | None,
    context_length: int,
    bos: int | None = None,
) -> tuple[Int[Tensor, "n pos"], Int[Tensor, "n pos"]]:
    """Join documents in `order`, cut into contexts: (ids, documents), both [n, context_length].

    `ids` [T] holds all documents one after the other, `lengths` [n_documents] how many ids each has. `separator` goes
    between documents (empty ones are left out); with `bos` each context starts with it. The last short context is
    dropped.

    >>> pack(torch.arange(7), torch.tensor([3, 0, 4]), torch.tensor([2, 1, 0]), 99, 4)
    (tensor([[ 3,  4,  5,  6],
            [99,  0,  1,  2]]), tensor([[ 2,  2,  2,  2],
            [-1,  0,  0,  0]]))
    """
    order = order[lengths[order] > 0]
    pieces = ids.split(lengths.tolist())
    parts = [pieces[document] for document in order.tolist()]
    labels, counts = order, lengths[order]
    if separator is not None and parts:
        mark = ids.new_tensor([separator])
        parts = list(chain.from_iterable((part, mark) for part in parts))[:-1]
        labels = torch.stack([labels, torch.full_like(labels, -1)], 1).flatten()[:-1]
        counts = torch.stack([counts, torch.ones_like(counts)], 1).flatten()[:-1]
    joined = torch.cat(parts) if parts else ids[:0]
    documents = torch.repeat_interleave(labels, counts)

    width = context_length if bos is None else context_length - 1
    n = len(joined) // width
    joined, documents = joined[: n * width].view(n, width), documents[: n * width].view(n, width)
    if bos is not None:
        joined = torch.cat([joined.new_full((n, 1), bos), joined], 1)
        documents = torch.cat([documents.new_full((n, 1), -1), documents], 1)
    return joined, documents


def tokenize_documents(
    documents: Sequence[str], corpus_digest: str, lm: "LanguageModel", progress: bool = True
) -> tuple[Int[Tensor, " T"], Int[Tensor, " documents"]]:
    """All ids one after the other (int32 [T]) and the number of each document's (int64 [n]), no special tokens added.

    Kept in the cache folder under the digests of corpus and tokenizer; a damaged file is made again.
    """
    if sum(map(len, documents)) < _WORTH_CACHING:
        return _tokenize(documents, lm.tokenizer, progress)
    path = cache_folder() / "tokens" / f"{corpus_digest[:32]}-{lm.tokenizer_digest[:32]}.safetensors"
    if found := cache.read(path):
        return found[0]["ids"], found[0]["lengths"]
    ids, lengths = _tokenize(documents, lm.tokenizer, progress)
    write_tensors(path, {"ids": ids, "lengths": lengths}, {})
    return ids, lengths


def _tokenize(documents: Sequence[str], tokenizer: Any, progress: bool) -> tuple[Tensor, Tensor]:
    if tokenizer is None:
        raise DataError("this model has no tokenizer: give load_model a tokenizer=, or the corpus as token ids")
    encode = _encoder(tokenizer)
    parts, lengths = [], []
    with progress_bar(sum(map(len, documents)), "tokenizing", "char", progress, unit_scale=True) as bar:
        for batch in _batches(documents):
            for ids in encode(batch):
                parts.append(torch.tensor(ids, dtype=torch.int32))
                lengths.append(len(ids))
            bar.update(sum(map(len, batch)))
    return torch.cat(parts), torch.tensor(lengths)


def _encoder(tokenizer: Any) -> Any:
    """A function from a list of texts to their ids, without special tokens, padding or truncation."""
    if getattr(tokenizer, "is_fast", False):
        # a copy: the padding and truncation of the user's last call stay set in the original
        backend = copy.deepcopy(tokenizer.backend_tokenizer)
        backend.no_padding()
        backend.no_truncation()
        return lambda texts: [x.ids for x in backend.encode_batch_fast(texts, add_special_tokens=False)]
    return lambda texts: tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]


def _batches(documents: Sequence[str]) -> list[list[str]]:
    batches: list[list[str]] = [[]]
    characters = 0
    for document in documents:
        if batches[-1] and characters + len(document) > _BATCH_CHARACTERS:
            batches.append([])
            characters = 0
        batches[-1].append(document)
        characters += len(document)
    return batches
