"""Prompts of indirect object identification: two names, one of them again, and whom the sentence ends with.

"When Mary and John went to the school, John gave a book to" -> " Mary": the indirect object, not the repeated subject (Wang
et al., arXiv 2211.00593). Sentences and names are ours. In the order ABBA the indirect object comes first, in BABA the
subject.
"""

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from jaxtyping import Shaped
from torch import Tensor

from saelab.base.errors import ConfigError
from saelab.models.tokens import Tokens, encode, padded

if TYPE_CHECKING:
    from saelab.models.language import LanguageModel

NAMES = (
    "Mary", "John", "Anna", "Peter", "Sarah", "David", "Laura", "James", "Emma", "Paul", "Alice", "Tom", "Kate", "Mark",
    "Lisa", "Michael", "Jane", "Robert", "Susan", "Daniel", "Julia", "Frank", "Helen", "George", "Rachel", "Simon", "Amy",
    "Kevin", "Maria", "Brian", "Linda", "Jack", "Rose", "Henry", "Claire", "Adam",
)  # fmt: skip
PLACES = ("school", "store", "park", "office", "station", "library", "garden", "hospital")
THINGS = ("book", "ball", "letter", "drink", "ring", "map", "coat", "key")
# What stands before the two names, between them and the second subject, and after it.
FRAMES = (
    ("When", " went to the {place},", " gave a {thing} to"),
    ("After", " had met at the {place},", " handed the {thing} to"),
    ("While", " were waiting at the {place},", " passed a {thing} to"),
    ("Then", " came back from the {place} where", " had promised a {thing} to"),
)
AND, ALONGSIDE = " and", " alongside"
OPENING, FILLER = "It was a long day. ", ", tired but happy,"


@dataclass(frozen=True)
class _Sentence:
    """One prompt before it is tokens; `indirect` is the name that should come next."""

    frame: tuple[str, str, str]
    indirect: str
    subject: str
    abba: bool
    place: str
    thing: str
    link: str = AND
    opening: str = ""
    filler: str = ""

    def pieces(self) -> list[str]:
        """start, first name, link, second name, middle, subject, end: the text, cut where the names are."""
        start, middle, end = (part.format(place=self.place, thing=self.thing) for part in self.frame)
        first, second = (self.indirect, self.subject) if self.abba else (self.subject, self.indirect)
        return [
            self.opening + start,
            f" {first}",
            self.link,
            f" {second}",
            self.filler + middle,
            f" {self.subject}",
            end,
        ]


@dataclass(frozen=True)
class Prompts:
    """IOI prompts as tokens, with the places that matter; every tensor but `tokens` is int64 [n].

    `indirect` and `subject` are token ids of the two names; `s1` and `s2` the positions of the subject, `end` the last one,
    where the model answers; `abba` says whether the indirect object comes first.
    """

    tokens: Tokens
    indirect: Tensor
    subject: Tensor
    s1: Tensor
    s2: Tensor
    end: Tensor
    abba: Tensor
    names: tuple[str, ...]  # of this tokenizer, to draw others from
    sentences: tuple[_Sentence, ...]

    def __len__(self) -> int:
        return len(self.indirect)

    @property
    def texts(self) -> list[str]:
        """The prompts as text."""
        return ["".join(sentence.pieces()) for sentence in self.sentences]

    def __getitem__(self, rows: slice | Shaped[Tensor, " _"]) -> "Prompts":
        """Some of them, in the order asked for."""
        numbers = torch.arange(len(self))[rows]
        chosen = {name: getattr(self, name)[numbers] for name in ("indirect", "subject", "s1", "s2", "end", "abba")}
        tokens = Tokens(self.tokens.ids[numbers], self.tokens.mask[numbers])
        return replace(self, tokens=tokens, sentences=tuple(self.sentences[i] for i in numbers.tolist()), **chosen)

    def batches(self, size: int) -> Iterator["Prompts"]:
        """All of them, `size` at a time."""
        for start in range(0, len(self), size):
            yield self[start : start + size]

    def with_other_names(self, lm: "LanguageModel", seed: int = 0) -> "Prompts":
        """Other names and two more phrases, a sentence before and one in the middle; " and" and the order of names stay."""
        draw = random.Random(seed)
        others = []
        for sentence in self.sentences:
            free = [name for name in self.names if name not in (sentence.indirect, sentence.subject)]
            indirect, subject = draw.sample(free, 2)
            others.append(replace(sentence, indirect=indirect, subject=subject, opening=OPENING, filler=FILLER))
        return _tokenized(lm, others, self.names)

    def alongside(self, lm: "LanguageModel") -> "Prompts":
        """The same prompts with " alongside" between the names in place of " and"."""
        return _tokenized(lm, [replace(sentence, link=ALONGSIDE) for sentence in self.sentences], self.names)


def prompts(lm: "LanguageModel", n: int = 100, seed: int = 0) -> Prompts:
    """`n` prompts, ABBA and BABA in turn, with names that are one token for this model.

    Raises `ConfigError` where fewer than four of our names are a token of their own, or the model has no tokenizer.

    >>> import saelab
    >>> from saelab.analysis.attention import ioi
    >>> some = ioi.prompts(saelab.load_model("smollm2-135m"), n=2)  # doctest: +SKIP
    >>> some.texts[0]  # doctest: +SKIP
    'Then Rachel and Amy came back from the school where Amy had promised a ring to'
    """
    if n < 1:
        raise ConfigError(f"{n} prompts were asked for: n must be at least 1")
    names = single_tokens(lm, NAMES)
    if len(names) < 4:
        raise ConfigError(
            f"{len(names)} of {len(NAMES)} names are one token of {lm.name}'s tokenizer, and the experiments need 4 (two in a "
            "prompt, two others in its control): the task compares the logits of names, one token each"
        )
    draw = random.Random(seed)
    sentences = []
    for number in range(n):
        indirect, subject = draw.sample(names, 2)
        place, thing = draw.choice(PLACES), draw.choice(THINGS)
        sentences.append(_Sentence(draw.choice(FRAMES), indirect, subject, number % 2 == 0, place, thing))
    return _tokenized(lm, sentences, tuple(names))


def single_tokens(lm: "LanguageModel", words: Sequence[str]) -> list[str]:
    """The words that are, after a space, one token each, and no other word's (or the unknown token)."""
    rows = encode(lm.tokenizer, [f" {word}" for word in words])
    unknown = getattr(lm.tokenizer, "unk_token_id", None)
    seen = {row[0] for row in rows if len(row) == 1} - {unknown}
    return [word for word, row in zip(words, rows, strict=True) if len(row) == 1 and row[0] in seen]


def _tokenized(lm: "LanguageModel", sentences: Sequence[_Sentence], names: tuple[str, ...]) -> Prompts:
    """Tokenised piece by piece, which gives the places of the names."""
    rows, places = [], []
    for sentence in sentences:
        pieces = encode(lm.tokenizer, sentence.pieces())
        starts = [sum(len(piece) for piece in pieces[:i]) for i in range(len(pieces))]
        other, s1 = (starts[1], starts[3]) if sentence.abba else (starts[3], starts[1])
        row = [token for piece in pieces for token in piece]
        rows.append(row)
        places.append((row[other], row[s1], s1, starts[5], len(row) - 1, int(sentence.abba)))
    indirect, subject, s1, s2, end, abba = torch.tensor(places).T.contiguous()
    tokens = padded(rows, fill=rows[0][0]).to(lm.device)
    return Prompts(tokens, indirect, subject, s1, s2, end, abba, names, tuple(sentences))
