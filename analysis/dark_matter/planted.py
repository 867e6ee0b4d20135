"""Validation on activations whose dense and introduced error are known, because they were put there."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from saelab.analysis.dark_matter.decomposition import TOKENS_PER_DIMENSION
from saelab.base.codes import SparseCodes
from saelab.base.errors import ConfigError
from saelab.base.moments import Moments
from saelab.base.progress import progress_bar
from saelab.base.protocols import Dictionary

SIGMAS = (0.0, 1.0, 2.0, 3.0, 4.0)


@dataclass(frozen=True, repr=False)
class Planted:
    """What a grid of planted errors gave.

    `table`: a pandas.DataFrame, one row a cell: ablated, dense, introduced (sigmas in units of `unit`), linear, nonlinear (root
    mean squares per dimension of the parts, in the same units, held out), r2_error.
    `correlations`: a pandas.DataFrame [linear, nonlinear] x [dense, introduced], Pearson over the cells.
    `unit`: root mean square per dimension of the SAE's own error.
    """

    table: Any
    correlations: Any
    unit: float

    def __repr__(self) -> str:
        worst = float(self.correlations.to_numpy().min())
        return (
            f"Planted({len(self.table)} cells, unit {self.unit:.4g} rms a dimension, correlations from {worst:.3f} up)"
        )

    def plot(self) -> Any:
        """A plotly figure: both parts over both sigmas."""
        import plotly.express

        long = self.table.melt(["ablated", "dense", "introduced"], ["linear", "nonlinear"], "part", "size")
        return plotly.express.line(
            long, x="dense", y="size", color="introduced", facet_col="part", line_dash="ablated", markers=True,
            title="Planted errors: the size of each part",
        )  # fmt: skip


def planted_experiment(
    sae: Dictionary,
    x: Any,
    *,
    sigmas: Sequence[float] = SIGMAS,
    ablated: Sequence[float] = (0.0, 0.25, 0.5),
    rows: int | None = None,
    seed: int = 0,
    progress: bool = True,
) -> Planted:
    """Plant dense noise and introduced error of known size, and see which part of the decomposition follows which.

    With x0 = Sae(x) as the truth: the `ablated` share of the latents with the least mean activation is taken out of the codes
    (features that the SAE has not learnt), x' = x0 + dense N is what the SAE sees, decode(codes) + introduced N what it makes
    of it, with Gaussian N; the error x' - reconstruction is regressed on x' (arXiv 2410.14670, the synthetic experiment).
    There the linear part follows the dense noise and the nonlinear part the introduced one.

    The noise is in units of the SAE's own error (our choice; absolute in our notes of the paper), its rows are the first
    `rows` of x, a tensor or a store (as many as give the map 40 a dimension, unless said); every second one is held out.

    Raises `ConfigError` for an ablated share outside [0, 1).

    >>> import saelab
    >>> sae = saelab.SAE(saelab.TopK(k=2, d_sae=16), d_in=4)
    >>> found = planted_experiment(sae, torch.randn(1000, 4), sigmas=(0.0, 2.0), ablated=(0.0,))
    >>> found.correlations.shape, len(found.table)
    ((2, 2), 4)
    """
    import pandas

    if not all(0 <= share < 1 for share in ablated):
        raise ConfigError(f"ablated is {tuple(ablated)}: shares of the latents, from 0 to below 1")
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        x_ND = x[: rows or 2 * TOKENS_PER_DIMENSION * sae.d_in].to(sae.device).float()
        x_ND = x_ND[sae.replaceable(x_ND)]
        truth_ND = sae(x_ND)
        unit = float((x_ND - truth_ND).square().mean().sqrt())
        codes = sae.encode_sparse(truth_ND)
        mean_F = codes.values.new_zeros(sae.d_sae).index_add_(0, codes.indices, codes.values)
        noise, introduced = (torch.randn(truth_ND.shape, generator=generator).to(truth_ND) * unit for _ in range(2))
        missing = [truth_ND - sae.decode(_without(codes, mean_F, share), truth_ND) for share in ablated]
        table = []
        for dense in progress_bar(len(sigmas), "planting errors", "noise", progress, iterable=sigmas):
            made_of = torch.cat([dense * noise, introduced, *missing], 1)
            held, linear = _held_out(truth_ND + dense * noise, made_of, sae.d_in)
            for share, lost, of_lost in zip(ablated, held[2:], linear[2:], strict=True):
                for made in sigmas:
                    error = held[0] - made * held[1] + lost
                    part = linear[0] - made * linear[1] + of_lost
                    figures = (float((rows_ND / unit).square().mean().sqrt()) for rows_ND in (part, error - part))
                    table.append((share, dense, made, *figures, _r2(error, part)))
    frame = pandas.DataFrame(table, columns=["ablated", "dense", "introduced", "linear", "nonlinear", "r2_error"])
    correlations = frame[["linear", "nonlinear", "dense", "introduced"]].corr().loc[["linear", "nonlinear"]]
    return Planted(frame, correlations[["dense", "introduced"]], unit)


def _without(codes: SparseCodes, mean_F: Tensor, share: float) -> SparseCodes:
    """The codes less the `share` of the latents with the least mean."""
    kept_F = torch.ones(len(mean_F), dtype=torch.bool, device=mean_F.device)
    kept_F[mean_F.argsort(stable=True)[: int(share * len(mean_F))]] = False
    return codes.where(kept_F[codes.indices])


def _held_out(x_ND: Tensor, y_NM: Tensor, d: int) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """Every second row of the targets [n, m] and of their least-squares prediction, in blocks of d.

    The prediction is linear in the target: that of a sum is the sum of the predictions, so that each piece of the error is
    fitted once for all cells that it is in.
    """
    moments = Moments(d, y_NM.shape[1])
    moments.add(x_ND[::2].cpu(), y_NM[::2].cpu())
    return y_NM[1::2].split(d, 1), moments.fit()(x_ND[1::2]).split(d, 1)


def _r2(error_ND: Tensor, linear_ND: Tensor) -> float:
    """Pooled over dimensions."""
    return 1 - float((error_ND - linear_ND).square().sum() / (error_ND - error_ND.mean(0)).square().sum())
