"""Validation on activations whose dense and introduced error are known, because they were put there."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from saelab.analysis.moments import Moments
from saelab.errors import ConfigError

SIGMAS = (0.0, 1.0, 2.0, 3.0, 4.0)


@dataclass(frozen=True)
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

    def plot(self) -> Any:
        """A plotly figure: both parts over both sigmas."""
        import plotly.express

        long = self.table.melt(["ablated", "dense", "introduced"], ["linear", "nonlinear"], "part", "size")
        return plotly.express.line(
            long, x="dense", y="size", color="introduced", facet_col="part", line_dash="ablated", markers=True,
            title="Planted errors: the size of each part",
        )  # fmt: skip


def planted_experiment(
    sae: Any,
    x: Any,
    *,
    sigmas: Sequence[float] = SIGMAS,
    ablated: Sequence[float] = (0.0, 0.25, 0.5),
    rows: int = 20_000,
    seed: int = 0,
    progress: bool = True,
) -> Planted:
    """Plant dense noise and introduced error of known size, and see which part of the decomposition follows which.

    With x0 = Sae(x) as the truth: the `ablated` share of the latents with the least mean activation is taken out of the codes
    (features that the SAE has not learnt), x' = x0 + dense N is what the SAE sees, decode(codes) + introduced N what it makes
    of it, with Gaussian N; the error x' - reconstruction is regressed on x' (arXiv 2410.14670, the synthetic experiment).
    There the linear part follows the dense noise and the nonlinear part the introduced one.

    The noise is in units of the SAE's own error (our choice; the paper's are absolute), its rows are the first `rows` of x, a
    tensor or a store; every second one is held out. Raises `ConfigError` for an ablated share outside [0, 1).

    >>> import saelab
    >>> sae = saelab.SAE(saelab.TopK(k=2, d_sae=16), d_in=4)
    >>> found = planted_experiment(sae, torch.randn(1000, 4), sigmas=(0.0, 2.0), ablated=(0.0,))
    >>> found.correlations.shape, len(found.table)
    ((2, 2), 4)
    """
    import pandas
    from tqdm import tqdm

    if not all(0 <= share < 1 for share in ablated):
        raise ConfigError(f"ablated is {tuple(ablated)}: shares of the latents, from 0 to below 1")
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        x_ND = x[:rows].to(sae.device).float()
        x_ND = x_ND[sae.replaceable(x_ND)]
        truth_ND = sae(x_ND)
        unit = float((x_ND - truth_ND).square().mean().sqrt())
        codes = sae.encode_sparse(truth_ND)
        mean_F = codes.values.new_zeros(sae.d_sae).index_add_(0, codes.indices, codes.values)
        noise, error = (torch.randn(truth_ND.shape, generator=generator).to(truth_ND) * unit for _ in range(2))
        cells = [(share, dense, made) for share in ablated for dense in sigmas for made in sigmas]
        table = []
        for share, dense, made in tqdm(cells, desc="planting errors", delay=2, disable=not progress):
            kept_F = torch.ones(sae.d_sae, dtype=torch.bool, device=mean_F.device)
            kept_F[mean_F.argsort(stable=True)[: int(share * sae.d_sae)]] = False
            seen_ND = truth_ND + dense * noise
            reconstruction_ND = sae.decode(codes.where(kept_F[codes.indices])) + made * error
            linear, nonlinear, r2 = _parts(seen_ND, seen_ND - reconstruction_ND)
            table.append((share, dense, made, linear / unit, nonlinear / unit, r2))
    frame = pandas.DataFrame(table, columns=["ablated", "dense", "introduced", "linear", "nonlinear", "r2_error"])
    correlations = frame[["linear", "nonlinear", "dense", "introduced"]].corr().loc[["linear", "nonlinear"]]
    return Planted(frame, correlations[["dense", "introduced"]], unit)


def _parts(x_ND: Tensor, error_ND: Tensor) -> tuple[float, float, float]:
    """Root mean squares of the linear and the nonlinear part, and R^2, on every second row."""
    fitted, held = (Moments(x_ND.shape[1], x_ND.shape[1]) for _ in range(2))
    fitted.add(x_ND[::2].cpu(), error_ND[::2].cpu())
    held.add(x_ND[1::2].cpu(), error_ND[1::2].cpu())
    fit = fitted.fit()
    linear = float(fit(x_ND[1::2].cpu()).double().square().mean().sqrt())
    nonlinear = float((held.residual(fit).sum() / (held.n * x_ND.shape[1])).sqrt())
    return linear, nonlinear, held.r2_pooled(fit)
