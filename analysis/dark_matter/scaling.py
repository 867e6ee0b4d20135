"""How the parts of the error scale over a family of SAEs of one site: widths, sparsities, and token by token."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from saelab.analysis.dark_matter.coded_rows import for_sae
from saelab.analysis.dark_matter.decomposition import Decomposition, decompose
from saelab.analysis.dark_matter.power_law import PowerLaw, fit_power_law, interval
from saelab.analysis.dark_matter.rows import LEARN, SCORE
from saelab.base.errors import ConfigError, DataError
from saelab.base.moments import Moments, divided
from saelab.base.protocols import Dictionary

DRAWS = 1000
TOLERANCE = 0.02


@dataclass(frozen=True)
class Scaling:
    """The fit of one sparsity: the law of the FVU over widths, and the nonlinear part beside it.

    With c the law's floor, the error of a width splits into bands: `absent`, features that a wider SAE would have (FVU - c);
    `linear`, c - mean FVU_nonlinear; `nonlinear`, mean FVU_nonlinear (the paper's reading, by our notes: FVU_nonlinear is about
    constant in the width). `nonlinear_slope` is that of FVU_nonlinear over log2 W, `slope` that of FVU; their intervals are
    of drawing the documents again with the SAEs as they are, not of other seeds.
    """

    sparsity: float
    law: PowerLaw
    fvu: dict[int, float]
    fvu_nonlinear: dict[int, float]
    slope: float
    slope_interval: tuple[float, float]
    nonlinear_slope: float
    nonlinear_slope_interval: tuple[float, float]

    def bands(self) -> Any:
        """A pandas.DataFrame, one row a width: width, fvu, absent, linear, nonlinear. NaN where the law is not identifiable."""
        import pandas

        floor = self.law.floor if self.law.identifiable else float("nan")
        nonlinear = sum(self.fvu_nonlinear.values()) / len(self.fvu_nonlinear)
        return pandas.DataFrame(
            [
                {"width": w, "fvu": fvu, "absent": fvu - floor, "linear": floor - nonlinear, "nonlinear": nonlinear}
                for w, fvu in self.fvu.items()
            ]
        )

    def plot(self) -> Any:
        """A plotly figure: the bands stacked over the width, or the two measured curves where there is no law."""
        import plotly.graph_objects as go

        figure, table = go.Figure(), self.bands()
        if self.law.identifiable:
            for name in ("nonlinear", "linear", "absent"):
                figure.add_scatter(x=table.width, y=table[name], name=name, stackgroup="error", mode="lines")
        figure.add_scatter(x=table.width, y=table.fvu, name="FVU", mode="markers+lines", line={"color": "black"})
        figure.add_scatter(
            x=table.width, y=list(self.fvu_nonlinear.values()), name="FVU nonlinear", mode="markers+lines"
        )
        figure.update_xaxes(type="log", title_text="latents", tickvals=list(table.width))
        figure.update_yaxes(title_text="fraction of the variance", rangemode="tozero")
        figure.update_layout(title=f"L0 about {self.sparsity:g}: {self.law}")
        return figure


class Family(Sequence[Decomposition]):
    """Decompositions of several SAEs on the same held-out rows; made by `family`."""

    def __init__(self, decompositions: Sequence[Decomposition]) -> None:
        self.decompositions = list(decompositions)

    def __len__(self) -> int:
        return len(self.decompositions)

    def __getitem__(self, i: Any) -> Any:
        return Family(self.decompositions[i]) if isinstance(i, slice) else self.decompositions[i]

    def to_pandas(self) -> Any:
        """One row an SAE: its sparsity and the figures of `Decomposition.to_pandas`."""
        import pandas

        table = pandas.concat([parts.to_pandas() for parts in self.decompositions], ignore_index=True)
        table.insert(1, "sparsity", [sparsity(parts) for parts in self.decompositions])
        return table

    def fit(self, draws: int = DRAWS, seed: int = 0) -> list[Scaling]:
        """The scaling over widths at each sparsity, intervals from a bootstrap over documents, paired between SAEs.

        SAEs of one sparsity have the same k, or the same rounded L0. Raises `ConfigError` for a sparsity with under five
        widths.
        """
        groups: dict[float, list[Decomposition]] = {}
        for parts in self.decompositions:
            groups.setdefault(sparsity(parts), []).append(parts)
        return [_scaling(level, members, draws, seed) for level, members in sorted(groups.items())]


def family(saes: Sequence[Dictionary], x: Any, holdout: float = 0.5, bias: bool = True, **options: Any) -> Family:
    """Decompose each SAE on the same rows; `options` are those of `decompose`.

    >>> import saelab
    >>> saes = [saelab.SAE(saelab.TopK(k=2, d_sae=f), d_in=4) for f in (8, 16)]
    >>> found = family(saes, torch.randn(1000, 4, generator=torch.Generator().manual_seed(0)))
    >>> found.to_pandas().d_sae.tolist()
    [8, 16]
    """
    return Family([decompose(sae, x, holdout, bias, **options) for sae in saes])


def sparsity(parts: Decomposition) -> float:
    """The k of the SAE where it has one, else its L0 rounded."""
    return float(getattr(parts.sae.cfg, "k", None) or round(parts.l0))


def settled(run: Any, tolerance: float = TOLERANCE) -> bool:
    """Whether a run's FVU moved by less than `tolerance` of itself over the last quarter of its tokens.

    Compares the means of the quarter's first and last third, because single batches scatter. Widths that still fall are no
    points of a scaling law. Raises `DataError` for a history too short to tell.
    """
    history = run.history
    last = 1 - history.explained_variance[history.tokens >= 0.75 * history.tokens.max()].to_numpy()
    if len(last) < 6:
        raise DataError(f"{len(last)} logged steps in the last quarter of the run are too few to tell: lower log_every")
    third = len(last) // 3
    return bool(abs(last[-third:].mean() / last[:third].mean() - 1) < tolerance)


def per_token_scaling(family: Family, x: Any) -> Any:
    """How well the error norm of one SAE on a token tells that of the next, and what its nonlinear part adds.

    For SAEs i, j next to each other in width: |e_j| regressed on |e_i|, then on |e_i| and |nonlinear_i|, with a bias, on
    one half of the held-out rows, R^2 on the other (norms, not squared, as in our notes of the paper). A pandas.DataFrame:
    sparsity, width, larger, r2, r2_both, explained_of_rest = 100 (r2_both - r2) / (1 - r2), in percent. Raises `ConfigError`
    where no sparsity has two widths.
    """
    import pandas

    ordered = sorted(family, key=lambda parts: (sparsity(parts), parts.sae.d_sae))
    pairs = [(a, b) for a, b in zip(ordered, ordered[1:], strict=False) if sparsity(a) == sparsity(b)]
    if not pairs:
        raise ConfigError("per-token scaling compares two SAEs of one sparsity: there are none")
    table = []
    for small, large in pairs:
        alone, both = ({use: Moments(m, 1) for use in (LEARN, SCORE)} for m in (1, 2))
        for of_small in small.chunks(x):
            if not of_small.held:
                continue
            chunk, _ = for_sae(large.sae, of_small, large.high_norm)
            if not len(chunk.x):
                continue
            _, linear, nonlinear = small.split(chunk.x)
            inputs = torch.stack([_norm(linear + nonlinear), _norm(nonlinear)], 1)
            target = _norm(chunk.x - large.split(chunk.x)[0])[:, None]
            alone[chunk.use].add(inputs[:, :1], target)
            both[chunk.use].add(inputs, target)
        r2, r2_both = (float(m[SCORE].r2(m[LEARN].fit())[0]) for m in (alone, both))
        table.append(
            {
                "sparsity": sparsity(small), "width": small.sae.d_sae, "larger": large.sae.d_sae, "r2": r2,
                "r2_both": r2_both, "explained_of_rest": 100 * divided(r2_both - r2, 1 - r2),
            }
        )  # fmt: skip
    return pandas.DataFrame(table)


def _norm(x_ND: Tensor) -> Tensor:
    return torch.linalg.vector_norm(x_ND, dim=1).cpu()


def _scaling(level: float, members: list[Decomposition], draws: int, seed: int) -> Scaling:
    members = sorted(members, key=lambda parts: parts.sae.d_sae)
    widths = [parts.sae.d_sae for parts in members]
    fvu, nonlinear = [parts.fvu for parts in members], [parts.fvu_nonlinear for parts in members]
    fvu_BW, nonlinear_BW = _bootstrap(members, draws, seed)
    law = fit_power_law(widths, torch.tensor(fvu), fvu_BW)
    log_W = torch.tensor(widths).double().log2()
    return Scaling(
        level,
        law,
        dict(zip(widths, fvu, strict=True)),
        dict(zip(widths, nonlinear, strict=True)),
        *_slope(log_W, torch.tensor(fvu), fvu_BW),
        *_slope(log_W, torch.tensor(nonlinear), nonlinear_BW),
    )


def _bootstrap(members: list[Decomposition], draws: int, seed: int) -> tuple[Tensor, Tensor]:
    """FVU and FVU_nonlinear [draws, widths] over documents drawn with replacement, the same for every SAE."""
    if any(not torch.equal(parts.groups, members[0].groups) for parts in members):
        raise ConfigError("the SAEs were decomposed on different rows: pass them together to `family`")
    sums_WG3 = torch.stack([parts.sums for parts in members])
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.randint(0, sums_WG3.shape[1], (draws, sums_WG3.shape[1]), generator=generator)
    counts_BG = torch.zeros(draws, sums_WG3.shape[1], dtype=torch.float64)
    counts_BG.scatter_add_(1, chosen, torch.ones_like(chosen, dtype=torch.float64))
    variation, error, nonlinear = (torch.einsum("bg,wg->bw", counts_BG, sums_WG3[..., i]) for i in range(3))
    return error / variation, nonlinear / variation


def _slope(x_W: Tensor, y_W: Tensor, y_BW: Tensor) -> tuple[float, tuple[float, float]]:
    x = x_W - x_W.mean()
    return float((y_W.double() @ x) / x.square().sum()), interval((y_BW @ x) / x.square().sum())
