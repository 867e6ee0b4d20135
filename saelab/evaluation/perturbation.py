"""Does taking latents out change what they are chosen for and nothing else? Shapes: N texts, D inputs, S latents, R resamples.

Everything is linear in the means over tokens: without some latents the mean activation is less by their mean codes times
their decoder rows, so that nothing passes through the model again.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch.nn.functional import normalize

from saelab.base import checks
from saelab.base.errors import DataError
from saelab.base.protocols import Dictionary
from saelab.base.seeds import named_generator
from saelab.evaluation.labelled import LabelledTexts, labelled
from saelab.evaluation.probes import Probe, accuracy, fitted, interval, resampled
from saelab.evaluation.scores import Scores
from saelab.evaluation.sparse_probing import balanced
from saelab.evaluation.text_means import TextMeans, controls, text_means

if TYPE_CHECKING:
    from saelab.models.language import LanguageModel

CHANCE = "random latents"


@dataclass(frozen=True)
class Perturbation:
    """Targeted probe perturbation (TPP): taking out the latents of a class moves that class's probe and no other's.

    Each class of a set has a probe on the mean activation (as in sparse probing). Its n latents are those that raise its
    probe most: the difference of class means of the code, times what the decoder row adds to the probe, over the texts learnt
    from. `of` "n 5":

    - "own": fall in accuracy of a class's probe where its own latents are taken out, mean over classes.
    - "others": the same of the probes of all other classes.
    - "tpp": own less others.

    Over held-out texts, with a bootstrap over them (`n`). Controls: an SAE of random directions and an untrained one, each
    with the latents chosen in the same way, and "random latents", as many of the SAE's that fire, by chance.

    Defined as SAEBench's TPP but for the probe (logistic regression, standardised) and the tokens, which are those that the
    SAE is for.

    Args:
        data: a set by name, or labelled texts (`saelab.evaluation.labelled.labelled`), of two classes or more.
        ns: numbers of latents taken out.
        texts: at most so many of each class.
        seed: of the choice of texts.

    >>> Perturbation((["war " + x for x in "abcdef"] + ["peace " + x for x in "abcdef"], list("wwwwwwpppppp"))).ns
    (2, 5, 10, 20, 50)
    """

    data: Any = "news"
    ns: Sequence[int] = (2, 5, 10, 20, 50)
    texts: int = 200
    seed: int = 0
    name: ClassVar[str] = "perturbation"

    def __post_init__(self) -> None:
        per_class, seed = checks.count("texts", self.texts), checks.seed(self.seed)
        object.__setattr__(self, "data", labelled(self.data).some(per_class, seed))
        object.__setattr__(self, "ns", tuple(checks.counts("ns", self.ns)))

    def run(self, saes: Mapping[str, Dictionary], lm: "LanguageModel") -> Scores:
        return sum((self._of(name, sae, lm) for name, sae in saes.items()), Scores([]))

    def _of(self, name: str, sae: Dictionary, lm: "LanguageModel") -> Scores:
        means = text_means(lm, sae, self.data)
        x, kept = means.x.double().numpy(), means.kept.numpy()
        scores = []
        for source, codes, rows in sources(sae, means):
            for n in self.ns:
                drawn = f"{self.seed} {n}" if source == CHANCE else None
                own, others, told = perturbed(x, codes, rows, self.data, kept, n, drawn)
                for figure, values in (("tpp", own - others), ("own", own), ("others", others)):
                    scores.append(interval(figure, values, told, f"n {n}", source))
        return Scores.of(name, self.name, scores)


def perturbed(
    x: Float[np.ndarray, "n d"],
    codes: Float[np.ndarray, "n s"],
    rows: Float[np.ndarray, "s d"],
    data: LabelledTexts,
    kept: Bool[np.ndarray, " n"],
    n: int,
    drawn: str | None = None,
) -> tuple[Float[np.ndarray, " r"], Float[np.ndarray, " r"], int]:
    """Fall in accuracy of own and of other probes, of each resample, and over how many texts.

    `drawn`: a name, by which the latents are drawn rather than chosen.
    """
    labels, heldout = np.array(data.labels), data.heldout().numpy() & kept
    learnt = ~data.heldout().numpy() & kept
    weights, place = resampled(int(heldout.sum())), np.cumsum(heldout) - 1
    probes, tested, latents = {}, {}, {}
    for label in data.classes:
        y = labels == label
        chosen = balanced(y, learnt, f"{data.name} {label}")
        tested[label] = balanced(y, heldout, f"{data.name} {label} heldout")
        if not len(chosen) or not len(tested[label]):
            raise DataError(
                f"too few texts of the class {label!r} of {data.name} have tokens that the autoencoder is for"
            )
        probes[label] = fitted(x[chosen], y[chosen])
        latents[label] = (
            by_chance(codes, n, f"{drawn} {label}")
            if drawn
            else raising(codes[chosen], y[chosen], rows, probes[label], n)
        )
    own: list[np.ndarray] = []
    others: list[np.ndarray] = []
    for label in data.classes:
        without = x - codes[:, latents[label]] @ rows[latents[label]]
        for other, probe in probes.items():
            texts = tested[other]
            y, mine = labels[texts] == other, weights[:, place[texts]]
            before, after = (accuracy((probe(of[texts]) > 0) == y, mine) for of in (x, without))
            (own if other == label else others).append(before - after)
    return np.mean(own, axis=0), np.mean(others, axis=0), len(place[heldout])


def raising(
    codes: Float[np.ndarray, "n s"], y: Bool[np.ndarray, " n"], rows: Float[np.ndarray, "s d"], probe: Probe, n: int
) -> Int[np.ndarray, " few"]:
    """At most n latents that raise a probe most for the class against the others; none that lowers it."""
    effect = (codes[y].mean(0) - codes[~y].mean(0)) * (rows @ probe.weights)
    order = np.argsort(-effect, kind="stable")[:n]
    return order[effect[order] > 0]


def by_chance(codes: Float[np.ndarray, "n s"], n: int, name: str) -> Int[np.ndarray, " few"]:
    """n of the latents that fire, drawn by a name."""
    live = np.flatnonzero(codes.any(0))
    return live[torch.randperm(len(live), generator=named_generator(f"latents {name}")).numpy()[:n]]


def sources(
    sae: Dictionary, means: TextMeans
) -> Iterator[tuple[str, Float[np.ndarray, "n s"], Float[np.ndarray, "s d"]]]:
    """The autoencoder, its latents drawn by chance, and each control: name, codes, and the unit decoder rows they count in."""
    for name, one in {"sae": sae, CHANCE: sae, **controls(sae)}.items():
        codes = means.codes["sae" if name == CHANCE else name].double().numpy()
        yield name, codes, normalize(one.W_dec.detach().double().cpu(), dim=1).numpy()
