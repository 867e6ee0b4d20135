"""Labelled texts: a user's own, or a set of the package sae-probes, read as data from where it is installed."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool

from saelab.base import checks, digests
from saelab.base.errors import ConfigError, DataError
from saelab.base.seeds import named_generator
from saelab.models.texts import described

PACKAGE = "sae-probes"
SETS = {
    "news": "97_news_class",
    "tickets": "103_it_tick",
    "diseases": "101_disease_class",
    "states": "13_us_state",
    "sentiment": "113_movie_sent",
    "living": "57_wikidatais_alive",
    "gender": "56_wikidatasex_or_gender",
    "politicians": "62_wikidata_occupation_ispolitician",
    "singers": "63_wikidata_occupation_issinger",
}
LEAST = 6  # texts of a class: fewer cannot be split into those that are learnt from and those that are told
HELD_OUT = 3  # every third text of a class
COLUMNS = {"text": ("text", "prompt"), "label": ("label", "target")}


@dataclass(frozen=True, repr=False)
class LabelledTexts:
    """Texts and the class of each, no text twice.

    >>> LabelledTexts("letters", ("war", "peace"), ("w", "p"))
    LabelledTexts('letters', 2 texts, 2 classes, 862249)
    """

    name: str
    texts: tuple[str, ...]
    labels: tuple[str, ...]

    @property
    def classes(self) -> list[str]:
        return sorted(set(self.labels))

    def heldout(self) -> "Bool[torch.Tensor, ' n']":
        """Every third text of each class, in their order: nothing is learnt from these."""
        seen: Counter[str] = Counter()
        chosen = []
        for label in self.labels:
            seen[label] += 1
            chosen.append(seen[label] % HELD_OUT == 0)
        return torch.tensor(chosen)

    def some(self, per_class: int, seed: int) -> "LabelledTexts":
        """At most so many of each class, drawn by the seed."""
        order = torch.randperm(len(self.texts), generator=named_generator(f"texts {seed} {self.name}")).tolist()
        seen: Counter[str] = Counter()
        kept = []
        for number in order:
            seen[self.labels[number]] += 1
            if seen[self.labels[number]] <= per_class:
                kept.append(number)
        return LabelledTexts(self.name, *(tuple(part[i] for i in sorted(kept)) for part in (self.texts, self.labels)))

    def __repr__(self) -> str:
        digest = digests.of_json([self.texts, self.labels])[:6]
        return f"LabelledTexts({self.name!r}, {len(self.texts)} texts, {len(self.classes)} classes, {digest})"


def labelled(given: Any, name: str = "texts") -> LabelledTexts:
    """Labelled texts made plain.

    Args:
        given: the name of a set ("news", "tickets", "diseases", "states", "sentiment", "living", "gender", "politicians",
            "singers": of the package sae-probes, under the MIT licence, each set under that of its origin), a table with the
            columns text and label, or a pair of lists (texts, labels).
        name: what the figures call a table or a pair.

    A text that comes twice counts once. Raises `ConfigError` for a set that is not installed, `DataError` for texts without
    labels, fewer than two classes, or a class of fewer than six texts.

    >>> labelled((["war", "peace"] * 6, ["w", "p"] * 6))
    Traceback (most recent call last):
    saelab.base.errors.DataError: the class 'p' of texts has 1 different texts; give at least 6 of each
    """
    if isinstance(given, LabelledTexts):
        return given
    if isinstance(given, str):
        return _checked(given, *_installed(given))
    if isinstance(given, Sequence) and len(given) == 2:
        return _checked(name, *given)
    columns = [str(column) for column in getattr(given, "columns", ())]
    found = [next((column for column in names if column in columns), None) for names in COLUMNS.values()]
    if None in found:
        raise DataError(
            f"labelled texts are {described(given)}: give one of {', '.join(SETS)}, a table with the columns text and "
            "label, or two lists (texts, labels)"
        )
    return _checked(name, *(given[column].tolist() for column in found))


def _checked(name: str, texts: Sequence[Any], labels: Sequence[Any]) -> LabelledTexts:
    if len(texts) != len(labels):
        raise DataError(f"{name} has {len(texts):,} texts and {len(labels):,} labels: give a label for each")
    if bad := [i for i, text in enumerate(texts) if not isinstance(text, str) or not text.strip()]:
        raise DataError(f"text {bad[0]} of {name} is {texts[bad[0]]!r}: give texts, none of them empty")
    once = dict(reversed([(text, str(label)) for text, label in zip(texts, labels, strict=True)]))
    pairs = [(text, once.pop(text)) for text in texts if text in once]
    sizes = Counter(label for _, label in pairs)
    if len(sizes) < 2:
        raise DataError(f"{name} has {len(sizes)} class: give texts of two or more")
    for label, size in sorted(sizes.items()):
        if size < LEAST:
            raise DataError(f"the class {label!r} of {name} has {size} different texts; give at least {LEAST} of each")
    return LabelledTexts(name, tuple(text for text, _ in pairs), tuple(label for _, label in pairs))


def is_installed() -> bool:
    """Whether the sets are there."""
    try:
        return bool(distribution(PACKAGE))
    except PackageNotFoundError:
        return False


def _installed(name: str) -> tuple[list[str], list[str]]:
    """Texts and labels of a set of sae-probes, without an import of it or of what it needs."""
    import pyarrow
    import pyarrow.csv

    checks.choice("the set", name, list(SETS))
    try:
        path = distribution(PACKAGE).locate_file(f"sae_probes/data/cleaned_data/{SETS[name]}.csv.zst")
    except PackageNotFoundError:
        raise ConfigError(
            f"the set {name!r} is part of the package sae-probes, which is not installed: pip install --no-deps "
            "sae-probes==0.4.0 (45 MB, only its data are read), or give texts and labels of your own"
        ) from None
    with pyarrow.CompressedInputStream(Path(str(path)).open("rb"), "zstd") as stream:
        options = pyarrow.csv.ParseOptions(newlines_in_values=True)
        table = pyarrow.csv.read_csv(stream, parse_options=options).select(["prompt", "target"]).drop_null()
    pairs = [(str(t), str(y)) for t, y in zip(*(table[c].to_pylist() for c in ("prompt", "target")), strict=True)]
    pairs = [(text, label) for text, label in pairs if text.strip()]
    return [text for text, _ in pairs], [label for _, label in pairs]
