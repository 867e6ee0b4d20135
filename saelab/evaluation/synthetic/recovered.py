"""What an autoencoder recovers of known features. Shapes: N rows, F features, S latents."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float, Int64
from torch import Tensor
from torch.nn.functional import normalize

from saelab.base import checks
from saelab.base.codes import SparseCodes
from saelab.base.errors import ConfigError
from saelab.base.lazy import provided
from saelab.base.protocols import Dictionary
from saelab.base.seeds import named_generator
from saelab.evaluation.matching import matched
from saelab.evaluation.reconstruction import Reconstruction
from saelab.evaluation.scores import Score, Scores, named
from saelab.evaluation.synthetic.features import Planted

if TYPE_CHECKING:
    from pandas import DataFrame

IN_PLANE = 0.9  # length of a unit decoder row's share in the plane of a circle, for the latent to belong to it
TASK = "recovery"


def recovery(saes: Any, planted: Planted, *, tokens: int = 8192, seed: int = 0) -> Scores:
    """What autoencoders recover of the features of `make`, measured on rows that nothing was trained on.

    Features and latents are matched one to one (Hungarian method) by the cosine of their directions; the matched latent of a
    feature is what the following figures are about, each a mean over features, with a bootstrap interval over them. A feature
    for which no latent is left counts 0.

    - "matched cosine"; beside it that of random directions, as many. SynthSAEBench calls it MCC.
    - "mean maximum cosine": of each feature with the nearest latent, which may be near to others too.
    - "f1": of the rows on which the latent fires against those on which the feature does. "precision" and "recall".
    - "mcc": the mean correlation coefficient of the identifiability literature: absolute Pearson correlation of activations,
      with a matching of its own that makes it largest.
    - "absorbed", of features with children: how much less often the latent of a parent fires where a child fires too.
    - "circle" of each: share of its rows on which one of the latents within its plane fires, less that of the other rows;
      "latents in a circle": how many those are.
    - "l0" and "explained variance" over the rows, without intervals.

    They are given of all features, of parents, children and the rarest quarter, where there are such; `details["recovery"]`
    has a row a feature.

    Args:
        saes: an autoencoder, a run, or a list, sweep or mapping of them.
        planted: what they were trained on.
        tokens: rows to measure on.
        seed: of these rows.

    Raises `ConfigError` for an autoencoder of another width.

    >>> planted = saelab.synthetic.make(features=8, d_in=16, l0=1.0)  # doctest: +SKIP
    >>> recovery(saelab.sweep(planted, [...], tokens=500_000), planted).to_pandas()  # doctest: +SKIP
    """
    x_ND, codes = planted.sample(checks.count("tokens", tokens), checks.seed(seed))
    scores = Scores([])
    for name, sae in named(saes).items():
        if sae.d_in != planted.d_in or sae.d_out != planted.d_in:
            raise ConfigError(f"{name} reads vectors of width {sae.d_in} and these are {planted.d_in} wide")
        scores += _recovered(name, sae, planted, x_ND.to(sae.W_dec), codes)
    return scores


def compare(architectures: Sequence[Any], planted: Planted, *, tokens: int, seed: int = 0, **training: Any) -> Scores:
    """Train each architecture on the features and say what it recovers: `recovery(saelab.sweep(...))` in one call.

    Args:
        architectures: configurations, such as `saelab.TopK(k=3, d_sae=64)`.
        planted: what `make` gives.
        tokens: rows to train on.
        seed: of the training.
        training: other arguments of `saelab.sweep`.

    >>> planted = saelab.synthetic.make(features=8, d_in=16, l0=1.0)  # doctest: +SKIP
    >>> scores = compare([saelab.TopK(k=1, d_sae=8)], planted, tokens=200_000)  # doctest: +SKIP
    """
    runs = provided("sweep")(planted, list(architectures), tokens=tokens, seed=seed, **training)
    return recovery(runs, planted)


@torch.no_grad()
def _recovered(name: str, sae: Dictionary, planted: Planted, x_ND: Tensor, truth: SparseCodes) -> Scores:
    import pandas

    codes = sae.encode_sparse(x_ND)
    n_flat = len(planted.directions)
    rows_SD = normalize(sae.W_dec.float().cpu(), dim=1)
    cosine_FS = planted.directions @ rows_SD.T
    latents_F = matched(cosine_FS)
    fires_NF, active_NS = truth.to_dense(), codes.to_dense().float().cpu()
    correlation_FS = _correlation(fires_NF[:, :n_flat], active_NS).abs()
    table = pandas.DataFrame(
        {
            name: column.numpy()
            for name, column in {
                "feature": torch.arange(n_flat),
                "parent": planted.parents[:n_flat],
                "density": planted.densities[:n_flat],
                "latent": latents_F,
                "matched cosine": _at(cosine_FS, latents_F),
                "mean maximum cosine": cosine_FS.amax(1),
                **_firing(fires_NF[:, :n_flat] > 0, active_NS > 0, latents_F),
                "mcc": _at(correlation_FS, matched(correlation_FS)),
                "absorbed": _absorbed(planted.parents[:n_flat], fires_NF > 0, active_NS > 0, latents_F),
            }.items()
        }
    )
    figures = ["matched cosine", "mean maximum cosine", "f1", "precision", "recall", "mcc", "absorbed"]
    scores = [
        Score.mean(figure, part[figure].dropna(), of)
        for of, part in _parts(table)
        for figure in figures
        if part[figure].notna().any()
    ]
    noise = torch.randn(rows_SD.shape, generator=named_generator(f"random directions {planted.seed}"))
    null_FS = planted.directions @ normalize(noise, dim=1).T
    scores.append(Score.mean("matched cosine", _at(null_FS, matched(null_FS)).tolist(), source="random directions"))
    for number, plane in enumerate(planted.planes):
        inside_S = (rows_SD @ plane.T).norm(dim=1) > IN_PLANE
        fires_N, any_N = fires_NF[:, n_flat + number] > 0, (active_NS[:, inside_S] > 0).any(1)
        rate = any_N[fires_N].float().mean() - any_N[~fires_N].float().mean()
        scores.append(_alone("circle", float(rate), len(x_ND), f"circle {number}"))
        scores.append(_alone("latents in a circle", int(inside_S.sum()), len(x_ND), f"circle {number}"))
    sums = Reconstruction(planted.d_in)
    sums.add(x_ND, sae.decode(codes, x_ND))
    scores += [_alone("l0", codes.l0, len(x_ND)), _alone("explained variance", sums.explained_variance, len(x_ND))]
    return Scores.of(name, TASK, scores, table)


def _alone(figure: str, value: float, n: int, of: str = "") -> Score:
    return Score(figure, value, float("nan"), float("nan"), n, of)


def _parts(table: "DataFrame") -> "list[tuple[str, DataFrame]]":
    parents = table.parent[table.parent >= 0]
    rare = table.density <= table.density.quantile(0.25)
    parts = {"": table, "parents": table[table.feature.isin(parents)], "children": table[table.parent >= 0]}
    return [
        *((of, part) for of, part in parts.items() if len(part)),
        *([("rarest quarter", table[rare])] if not rare.all() else []),
    ]


def _firing(fires_NF: Tensor, active_NS: Tensor, latents_F: Tensor) -> dict[str, Tensor]:
    """Precision, recall and F1 of each feature's latent."""
    of_NF = _columns(active_NS, latents_F)
    both_F, here_F, there_F = (fires.sum(0).double() for fires in (fires_NF & of_NF, fires_NF, of_NF))
    return {
        "precision": both_F / there_F.clamp(min=1),
        "recall": both_F / here_F.clamp(min=1),
        "f1": 2 * both_F / (here_F + there_F).clamp(min=1),
    }


def _absorbed(parents_F: Tensor, fires_NF: Tensor, active_NS: Tensor, latents_F: Tensor) -> Tensor:
    """Of each parent; NaN of others, and where one of the two kinds of rows is missing."""
    found = torch.full((len(parents_F),), float("nan"))
    of_NF = _columns(active_NS, latents_F)
    for parent in parents_F[parents_F >= 0].unique().tolist():
        child_N = fires_NF[:, : len(parents_F)][:, parents_F == parent].any(1)
        alone, with_child = (of_NF[fires_NF[:, parent] & rows, parent].float().mean() for rows in (~child_N, child_N))
        found[parent] = alone - with_child  # the mean of no row is NaN
    return found


def _columns(active_NS: Tensor, latents_F: Tensor) -> Tensor:
    """The column of each feature's latent; nothing where it has none."""
    return active_NS[:, latents_F.clamp(min=0)] & (latents_F >= 0)


def _at(values_FS: Float[Tensor, "f s"], latents_F: Int64[Tensor, " f"]) -> Float[Tensor, " f"]:
    chosen = values_FS.gather(1, latents_F.clamp(min=0)[:, None])[:, 0]
    return torch.where(latents_F >= 0, chosen, 0.0)


def _correlation(x_NF: Tensor, y_NS: Tensor) -> Tensor:
    """Pearson's, of each pair of columns [f, s]; 0 for a constant."""
    x, y = (normalize(columns - columns.mean(0), dim=0) for columns in (x_NF, y_NS))
    return x.T @ y
