"""Can what a probe learnt in another attribute's place be taken out? Shapes: N texts, D inputs, S latents, R resamples."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from jaxtyping import Bool, Float

from saelab.base import checks
from saelab.base.errors import ConfigError, DataError
from saelab.base.protocols import Dictionary
from saelab.evaluation.labelled import LEAST, LabelledTexts, labelled
from saelab.evaluation.perturbation import CHANCE, by_chance, raising, sources
from saelab.evaluation.probes import accuracy, fitted, interval, resampled
from saelab.evaluation.scores import Scores
from saelab.evaluation.text_means import text_means

if TYPE_CHECKING:
    from saelab.models.language import LanguageModel

UNTOLD = 0.025  # of the resamples, that may have no gap


@dataclass(frozen=True)
class SpuriousCorrelation:
    """Spurious-correlation removal (SCR): latents of an attribute are taken out of a probe that learnt it in another's place.

    Texts have two attributes, each yes or no. A probe of the wanted one learns from texts on which both agree; on held-out
    texts, as many of each of the four kinds, it is wrong as far as it goes by the other. "scr" `of` "n 5": how much of the way
    to the accuracy of a probe that learnt from all four kinds alike is made by taking out the n latents that raise the probe of
    the unwanted attribute most; "accuracy" `of` "biased", "unbiased" and "n 5". Intervals by a bootstrap over the held-out
    texts; "scr" is NaN where the biased probe is as good as the other, and has no interval where it is so in more than one of
    forty resamples: these texts do not tell the two apart. The controls are those of `Perturbation`.

    Args:
        wanted, unwanted: sets by name, or labelled texts, each of two classes; the texts that both have are used.
        ns: numbers of latents taken out.
        seed: of the choice of texts.

    Raises `DataError` where one of the four kinds has fewer than six texts.

    >>> SpuriousCorrelation((list("abcdef"), list("yyynnn")), (list("abcdef"), list("ynynyn")))
    Traceback (most recent call last):
    saelab.base.errors.DataError: the class 'n' of texts has 3 different texts; give at least 6 of each
    """

    wanted: Any = "politicians"
    unwanted: Any = "gender"
    ns: Sequence[int] = (2, 5, 10, 20, 50)
    seed: int = 0
    crossed: LabelledTexts = field(init=False)
    """the texts, of the kinds "00", "01", "10", "11": wanted and unwanted"""
    name: ClassVar[str] = "spurious correlation"

    def __post_init__(self) -> None:
        sets = [labelled(given) for given in (self.wanted, self.unwanted)]
        for data in sets:
            if len(data.classes) != 2:
                raise ConfigError(f"{data.name} has {len(data.classes)} classes: an attribute that is removed has two")
        known = [dict(zip(data.texts, data.labels, strict=True)) for data in sets]
        both = [text for text in sets[0].texts if text in known[1]]
        kinds = ["".join(str(one.classes.index(of[t])) for one, of in zip(sets, known, strict=True)) for t in both]
        missing = [kind for kind in ("00", "01", "10", "11") if kinds.count(kind) < LEAST]
        name = f"{sets[0].name} by {sets[1].name}"
        if missing:
            raise DataError(
                f"{name} has {kinds.count(missing[0])} texts of one of its four kinds; give at least {LEAST}"
            )
        object.__setattr__(self, "wanted", sets[0])
        object.__setattr__(self, "unwanted", sets[1])
        object.__setattr__(self, "crossed", labelled((both, kinds), name))
        object.__setattr__(self, "ns", tuple(checks.counts("ns", self.ns)))

    def run(self, saes: Mapping[str, Dictionary], lm: "LanguageModel") -> Scores:
        return sum((self._of(name, sae, lm) for name, sae in saes.items()), Scores([]))

    def _of(self, name: str, sae: Dictionary, lm: "LanguageModel") -> Scores:
        means = text_means(lm, sae, self.crossed)
        x, kept = means.x.double().numpy(), means.kept.numpy()
        scores = []
        for source, codes, rows in sources(sae, means):
            drawn = str(self.seed) if source == CHANCE else None
            found, told = removed(x, codes, rows, self.crossed, kept, self.ns, drawn)
            gap = found["unbiased"] - found["biased"]
            gap[gap <= 0] = np.nan
            if np.isnan(gap[1:]).mean() > UNTOLD:
                gap[1:] = np.nan
            for of, values in found.items():
                if source == "sae" or of.startswith("n "):
                    scores.append(interval("accuracy", values, told, of, source))
                if of.startswith("n "):
                    scores.append(interval("scr", (values - found["biased"]) / gap, told, of, source))
        return Scores.of(name, self.name, scores)


def removed(
    x: Float[np.ndarray, "n d"],
    codes: Float[np.ndarray, "n s"],
    rows: Float[np.ndarray, "s d"],
    data: LabelledTexts,
    kept: Bool[np.ndarray, " n"],
    ns: Sequence[int],
    drawn: str | None = None,
) -> tuple[dict[str, Float[np.ndarray, " r"]], int]:
    """Accuracy of the probes on held-out texts, as many of each kind, of each resample: biased, unbiased, without n latents."""
    labels, heldout = np.array(data.labels), data.heldout().numpy()
    kinds = data.classes
    sides = {}
    for part, among in (("learnt", ~heldout & kept), ("told", heldout & kept)):
        cells = [np.flatnonzero((labels == kind) & among) for kind in kinds]
        n = min(map(len, cells))
        if not n:
            raise DataError(
                f"too few texts of {data.name} have tokens that the autoencoder is for: give more or longer ones"
            )
        sides[part] = [cell[:n] for cell in cells]
    wanted = np.isin(labels, ["10", "11"])
    unwanted = np.isin(labels, ["01", "11"])
    every, biased = np.concatenate(sides["learnt"]), np.concatenate([sides["learnt"][0], sides["learnt"][3]])
    told = np.concatenate(sides["told"])
    weights = resampled(len(told))
    probe, unbiased, other = (fitted(x[t], y[t]) for t, y in ((biased, wanted), (every, wanted), (every, unwanted)))
    found = {
        of: accuracy((one(x[told]) > 0) == wanted[told], weights)
        for of, one in (("biased", probe), ("unbiased", unbiased))
    }
    for n in ns:
        latents = (
            by_chance(codes, n, f"{drawn} {n}") if drawn else raising(codes[every], unwanted[every], rows, other, n)
        )
        without = x[told] - codes[np.ix_(told, latents)] @ rows[latents]
        found[f"n {n}"] = accuracy((probe(without) > 0) == wanted[told], weights)
    return found, len(told)
