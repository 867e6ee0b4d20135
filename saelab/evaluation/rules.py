"""What a latent fires on as a few rules that a reader can check: tokens, beginnings of words, neighbours, positions."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from jaxtyping import Bool, Int

MOST_RULES = 12
LEAST_GAIN = 0.01  # of F1, that a rule has to bring
LEAST_FIRINGS = 2  # that a rule has to be right about: one is no pattern
BEGINNING = 4  # letters


@dataclass(frozen=True)
class Rule:
    """Fires where all that is given holds: the token is one of some, the one before it is, the position is this."""

    text: str
    tokens: tuple[int, ...] | None = None
    previous: tuple[int, ...] | None = None
    position: int | None = None

    def matches(self, ids: Int[np.ndarray, "n pos"]) -> Bool[np.ndarray, "n pos"]:
        """Where in some contexts it holds."""
        holds = np.ones(ids.shape, bool)
        if self.tokens is not None:
            holds &= np.isin(ids, self.tokens)
        if self.previous is not None:
            holds[:, 1:] &= np.isin(ids[:, :-1], self.previous)
            holds[:, 0] = False
        if self.position is not None:
            holds &= np.arange(ids.shape[1]) == self.position
        return holds


@dataclass(frozen=True)
class Rules:
    """A latent fires where one of these holds.

    >>> rules = Rules((Rule("' war'", tokens=(7,)), Rule("any token after 'of'", previous=(3,))))
    >>> rules.text
    "' war'; any token after 'of'"
    >>> rules.matches(np.array([[3, 5, 7, 3]])).tolist()
    [[False, True, True, False]]
    """

    rules: tuple[Rule, ...] = ()

    @property
    def text(self) -> str:
        """All of them, the one that says most first."""
        return "; ".join(rule.text for rule in self.rules) or "no rule found"

    def matches(self, ids: Int[np.ndarray, "n pos"]) -> Bool[np.ndarray, "n pos"]:
        """Where in some contexts one of them holds."""
        found = np.zeros(ids.shape, bool)
        for rule in self.rules:
            found |= rule.matches(ids)
        return found


@dataclass(frozen=True)
class ReadTokens:
    """Contexts that were read: `ids` [n, position], `counted` (where the SAE is applied), and the text of a token."""

    ids: Int[np.ndarray, "n pos"]
    counted: Bool[np.ndarray, "n pos"]
    token_text: Callable[[int], str]

    @cached_property
    def patterns(self) -> list[tuple[np.ndarray, Callable[[int], Rule]]]:
        """Of each kind of rule: which one holds at each counted place (-1: none), and the rule of a number."""
        rows, places = np.nonzero(self.counted)
        tokens = self.ids[rows, places].astype(np.int64)
        before = np.where(places > 0, self.ids[rows, places - 1], -1).astype(np.int64)
        pairs, pair_of = np.unique(np.stack([before, tokens]), axis=1, return_inverse=True)
        text = {int(token): self.token_text(int(token)) for token in np.unique(self.ids)}
        beginnings: dict[str, list[int]] = {}
        for token, said in text.items():
            letters = said.strip().lower()
            if len(letters) >= BEGINNING and letters.isalpha():
                beginnings.setdefault(letters[:BEGINNING], []).append(token)
        names = list(beginnings)
        begins = {token: number for number, name in enumerate(names) for token in beginnings[name]}
        begins_at = np.array([begins.get(int(token), -1) for token in tokens], dtype=np.int64)

        def pair(number: int) -> Rule:
            first, second = (int(token) for token in pairs[:, number])
            return Rule(f"{text[second]!r} after {text[first]!r}", tokens=(second,), previous=(first,))

        return [
            (tokens, lambda token: Rule(repr(text[token]), tokens=(token,))),
            (begins_at, lambda i: Rule(f"words in {names[i]!r}...", tokens=tuple(beginnings[names[i]]))),
            (np.where(before >= 0, pair_of.reshape(-1), -1), pair),
            (before, lambda token: Rule(f"any token after {text[token]!r}", previous=(token,))),
            (places, lambda place: Rule(f"position {place}", position=place)),
        ]


def learn_rules(read: ReadTokens, fires: Bool[np.ndarray, "n pos"]) -> Rules:
    """The rules under which a latent fires, chosen one after the other by what each adds to F1 over the counted places.

    At most `MOST_RULES`, each of which raises F1 by `LEAST_GAIN`; none where nothing helps. Among equals the simpler kind is
    taken: a token, a beginning of words, a pair of neighbours, the token before, a position.
    """
    return Rules(tuple(_chosen(read, fires[read.counted])))


def _chosen(read: ReadTokens, wanted: Bool[np.ndarray, " counted"]) -> Iterator[Rule]:
    left, n, right, said, reached = np.ones(len(wanted), bool), int(wanted.sum()), 0, 0, 0.0
    for _ in range(MOST_RULES):
        best = (reached + LEAST_GAIN, 0, 0)
        for kind, (numbers, _rule) in enumerate(read.patterns):
            here = left & (numbers >= 0)
            size = int(numbers.max(initial=0)) + 1
            hits = np.bincount(numbers[here & wanted], minlength=size)
            all_of = np.bincount(numbers[here], minlength=size)
            f1 = np.where(hits >= LEAST_FIRINGS, 2 * (right + hits) / np.maximum(n + said + all_of, 1), 0)
            number = int(f1.argmax())
            if f1[number] > best[0]:
                best = (float(f1[number]), kind, number)
        if best[0] == reached + LEAST_GAIN:
            return
        reached, kind, number = best
        numbers, rule = read.patterns[kind]
        taken = left & (numbers == number)
        right, said, left = right + int((taken & wanted).sum()), said + int(taken.sum()), left & ~taken
        yield rule(number)
