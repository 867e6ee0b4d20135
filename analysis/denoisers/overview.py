"""A denoiser from inside in one call: the tables of this package that need nothing but the denoiser, and their figures."""

import dataclasses
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from jaxtyping import Float, Int
from torch import Tensor

from saelab.analysis.denoisers.dynamics import feature_dynamics, feature_reuse, reuse_schedule
from saelab.analysis.denoisers.geometry import LARGEST, jacobian_spectrum
from saelab.analysis.denoisers.probes import posterior_gap, probe_timesteps
from saelab.base import checks
from saelab.base.errors import ConfigError
from saelab.hspace.sampling import sample
from saelab.models.diffusion import bundled_names

if TYPE_CHECKING:
    from pandas import DataFrame

    from saelab.models.denoiser import Denoiser

# What each figure shows over the timestep: the columns, and what tells its lines apart.
SHOWN = {
    "spectrum": (["rank", "effective_dimension"], "variable"),
    "dynamics": (["relative"], "site"),
    "reuse": (["error"], "site"),
    "gap": (["x0_mse"], "variable"),
    "probes": (["accuracy"], "site"),
}


@dataclasses.dataclass(frozen=True, repr=False)
class Overview:
    """`tables` by name, in the order in which they read: "spectrum" (`jacobian_spectrum`), "dynamics" (`feature_dynamics`),
    "reuse" (`feature_reuse`), "schedule" (`reuse_schedule`), "gap" (`posterior_gap`) and "probes" (`probe_timesteps`); the
    first only of images of at most 4,096 entries, the last two only where there are images, and labels."""

    tables: dict[str, "DataFrame"]

    def plot(self, name: str) -> Any:
        """A plotly figure of one of the tables over the timestep; of "reuse" one panel a lag. `ConfigError` for others."""
        import plotly.express

        checks.choice("name", name, [known for known in SHOWN if known in self.tables])
        columns, line = SHOWN[name]
        table = self.tables[name]
        keys = [key for key in ("t", "site", "lag") if key in table]
        long = table.melt(keys, columns)
        panel = {"facet_col": "lag"} if "lag" in table else {}
        title = f"{name}: {', '.join(columns)}"
        return plotly.express.line(long, x="t", y="value", color=line, markers=True, title=title, **panel)

    def __repr__(self) -> str:
        rows = ", ".join(f"{name} {len(table)}" for name, table in self.tables.items())
        return f"Overview(rows: {rows})"


def overview_of(
    denoiser: "Denoiser",
    images: Float[Tensor, "N C H W"] | None = None,
    labels: Int[Tensor, " N"] | None = None,
    *,
    sites: Sequence[str] = (),
    n: int = 8,
    steps: int = 20,
    lags: Sequence[int] = (1, 2, 4),
    tolerance: float = 0.05,
    seed: int = 0,
) -> Overview:
    """Geometry, dynamics and representation of an unconditional denoiser, on runs of its own without noise.

    Args:
        images: clean ones for "gap" (default: those that come with a bundled denoiser).
        labels: their classes, for "probes" (default: the bundled ones').
        sites: whose features are compared and probed (default: every block).
        n: samples; the Jacobian is that of the first two.
        steps: of the runs.
        lags: steps back, whose features are put in place of today's.
        tolerance: error of the predicted noise that the schedule allows.
        seed: of the runs and the noise.

    Raises `ConfigError` for a conditional denoiser, and what the functions of the tables raise.

    >>> import saelab
    >>> found = overview_of(saelab.load_denoiser("digits-unet"), sites=["mid_block"], n=2, steps=3, lags=[1])
    >>> found
    Overview(rows: spectrum 3, dynamics 2, reuse 2, schedule 1, gap 3, probes 6)
    """
    if denoiser.conditional:
        raise ConfigError(
            "the overview draws runs without a cond: call the functions of saelab.analysis.denoisers one by one"
        )
    if images is None and denoiser.name in bundled_names():
        images, labels = denoiser.examples()
    table = denoiser.sites()
    chosen = list(sites) or table[table.kind == "block"].module.tolist()
    run = sample(denoiser, n, steps, seed=seed, record=("x",), progress=False)
    timesteps = run.timesteps.tolist()
    tables: dict[str, DataFrame] = {}
    if math.prod(denoiser.sample_shape) <= LARGEST:
        tables["spectrum"] = jacobian_spectrum(denoiser, run[:2])
    tables["dynamics"] = feature_dynamics(denoiser, run, chosen).to_pandas()
    tables["reuse"] = feature_reuse(denoiser, run, chosen, lags)
    tables["schedule"] = reuse_schedule(tables["reuse"], tolerance).reset_index()
    if images is not None:
        tables["gap"] = posterior_gap(denoiser, images, timesteps, seed)
        if labels is not None:
            tables["probes"] = probe_timesteps(denoiser, images, labels, timesteps, chosen, seed=seed)
    return Overview(tables)
