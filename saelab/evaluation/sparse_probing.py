"""Can a concept be read from few latents? Shapes: N texts, M columns."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch

from saelab.base import checks
from saelab.base.errors import DataError
from saelab.base.protocols import Dictionary
from saelab.base.seeds import named_generator
from saelab.evaluation.labelled import LabelledTexts, labelled
from saelab.evaluation.probes import accuracy, auroc, fitted, interval, resampled
from saelab.evaluation.scores import Scores
from saelab.evaluation.text_means import TextMeans, text_means

if TYPE_CHECKING:
    from saelab.models.language import LanguageModel

ACTIVATION, COMPONENTS = "activation", "principal components"


@dataclass(frozen=True)
class SparseProbing:
    """Probes of a text's class on the mean codes over its tokens: on the k latents whose class means differ most, and on all.

    For each class of a set, as many other texts as it has are drawn against it; two thirds are learnt from, and every figure
    is of the other third. "accuracy" and "auroc", `of` "k 1", ..., "all latents": the mean over classes and sets; of several
    sets also `of` "news, k 1", the mean over the classes of one. Intervals are by a bootstrap over the held-out texts (`n`):
    how the figure varies with the texts that are told, not with those that are learnt from.

    Controls, each with the same probes on its own columns: "activation" (the coordinates of the vector itself), "principal
    components" (of the texts learnt from; all of them are the vector again), "random directions" (rows with the mean and
    covariance of the SAE's) and "untrained SAE". `details["sparse probing"]` has a row a class, source and k, with the first
    of the latents chosen.

    Defined as SAEBench's sparse probing but for: columns are standardised before the regression and latents count in units of
    their decoder rows, so that rescaling changes nothing; tokens are those that the SAE is for.

    Args:
        data: a set by name, or labelled texts (`saelab.evaluation.labelled.labelled`), or a list of such.
        ks: numbers of latents; None is all.
        texts: at most so many of each class.
        seed: of the choice of texts.

    >>> texts = ["war " + x for x in "abcdef"] + ["peace " + x for x in "abcdef"]
    >>> SparseProbing((texts, ["war"] * 6 + ["peace"] * 6)).data[0].classes
    ['peace', 'war']
    """

    data: Any = ("news",)
    ks: Sequence[int | None] = (1, 2, 5, 20, None)
    texts: int = 200
    seed: int = 0
    name: ClassVar[str] = "sparse probing"

    def __post_init__(self) -> None:
        several = isinstance(self.data, list) or (
            isinstance(self.data, tuple) and all(isinstance(one, str | LabelledTexts) for one in self.data)
        )
        per_class, seed = checks.count("texts", self.texts), checks.seed(self.seed)
        sets = tuple(labelled(given).some(per_class, seed) for given in (self.data if several else [self.data]))
        object.__setattr__(self, "data", sets)
        object.__setattr__(self, "ks", tuple(checks.maybe(checks.count, "one of ks", k) for k in self.ks))

    def run(self, saes: Mapping[str, Dictionary], lm: "LanguageModel") -> Scores:
        return sum((self._of(name, sae, lm) for name, sae in saes.items()), Scores([]))

    def _of(self, name: str, sae: Dictionary, lm: "LanguageModel") -> Scores:
        import pandas

        scores, rows, told = [], [], {}
        for data in self.data:
            means = text_means(lm, sae, data)
            for source, columns in _sources(means, data.heldout() & means.kept).items():
                for k in self.ks if source != COMPONENTS else filter(None, self.ks):
                    found = probed(columns, data, means.kept.numpy(), k, self.seed)
                    told[data.name, source, k] = found
                    rows += [{"set": data.name, "source": source, "k": k, **row} for row in found.classes]
        for source, k in dict.fromkeys((source, k) for _, source, k in told):
            of = "all latents" if k is None else f"k {k}"
            parts = {data.name: told[data.name, source, k] for data in self.data}
            n = sum(part.n for part in parts.values())
            for figure in ("accuracy", "auroc"):
                each = {name: getattr(part, figure) for name, part in parts.items()}
                scores.append(interval(figure, np.mean(list(each.values()), axis=0), n, of, source))
                if len(each) > 1:
                    scores += [interval(figure, v, parts[s].n, f"{s}, {of}", source) for s, v in each.items()]
        return Scores.of(name, self.name, scores, pandas.DataFrame(rows))


@dataclass(frozen=True)
class Probed:
    """Means over the classes of a set, of each resample of its `n` held-out texts; and a row a class."""

    accuracy: np.ndarray
    auroc: np.ndarray
    n: int
    classes: list[dict[str, Any]]


def probed(x: np.ndarray, data: LabelledTexts, kept: np.ndarray, k: int | None, seed: int) -> Probed:
    """Probes of each class of a set against the others, on the columns of x [n, m]."""
    labels, heldout = np.array(data.labels), data.heldout().numpy()
    weights = resampled(int((heldout & kept).sum()), seed)
    place = np.cumsum(heldout & kept) - 1
    right, ranked, rows = [], [], []
    classes = data.classes if len(data.classes) > 2 else data.classes[:1]
    for label in classes:
        learnt, tested = (
            balanced(labels == label, part & kept, f"{seed} {data.name} {label}") for part in (~heldout, heldout)
        )
        y = labels == label
        for rows_of in (learnt, tested):
            if not 0 < y[rows_of].sum() < len(rows_of):
                raise DataError(f"too few texts of the class {label!r} of {data.name} have tokens that the autoencoder "
                                "is for: give more or longer texts")  # fmt: skip
        probe = fitted(x[learnt], y[learnt], k)
        said, mine = probe(x[tested]), weights[:, place[tested]]
        right.append(accuracy((said > 0) == y[tested], mine))
        ranked.append(auroc(said, y[tested], mine))
        first = int(np.abs(probe.weights * x[learnt].std(0)).argmax())
        rows.append(
            {"class": label, "accuracy": right[-1][0], "auroc": ranked[-1][0], "n": len(tested), "first": first}
        )
    return Probed(np.mean(right, axis=0), np.mean(ranked, axis=0), weights.shape[1], rows)


def balanced(y: np.ndarray, among: np.ndarray, name: str) -> np.ndarray:
    """Numbers of as many texts of the class as of the others, drawn by name."""
    sides = [np.flatnonzero(side & among) for side in (y, ~y)]
    n = min(map(len, sides))
    generator = named_generator(f"balanced {name}")
    return np.concatenate([side[torch.randperm(len(side), generator=generator).numpy()[:n]] for side in sides])


def _sources(means: TextMeans, told: torch.Tensor) -> dict[str, np.ndarray]:
    """Columns to probe: the codes of the SAE and of its controls, the activation, and its principal components."""
    x_ND = means.x.double()
    learnt = x_ND[means.kept & ~told]
    axes = torch.linalg.svd(learnt - learnt.mean(0), full_matrices=False).Vh
    codes = {name: table.numpy() for name, table in means.codes.items()}
    return {**codes, ACTIVATION: x_ND.numpy(), COMPONENTS: ((x_ND - learnt.mean(0)) @ axes.T).numpy()}
