"""How a denoiser's features change from step to step, at any of its sites.

After Li et al. ("Faster Diffusion", NeurIPS 2024) and Ma et al. (DeepCache, CVPR 2024), with the relative change in place
of the raw one, because scales differ between blocks. Their reading, that encoder features change little and decoder
features much, is not clean in small networks: look, do not assume.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor

from saelab.base import checks
from saelab.base.errors import DataError

if TYPE_CHECKING:
    from pandas import DataFrame

    from saelab.hspace.trajectory import Trajectory
    from saelab.models.denoiser import Denoiser


@dataclasses.dataclass(frozen=True)
class Dynamics:
    """`table`: a row for each site and pair of neighbouring steps (`t` -> `t_next`): `relative` |f' - f| / |f|, `cosine`,
    `mse`, and the `norm` of f, means over samples. `cosines` [S, S] for each site: the mean cosine of its features at every
    two steps."""

    table: "DataFrame"
    cosines: dict[str, Float[Tensor, "S S"]]

    def to_pandas(self) -> "DataFrame":
        """The whole table."""
        return self.table

    def summary(self) -> "DataFrame":
        """Means over the steps, a row a site, and the share of pairs of steps whose cosine is above .95 (DeepCache's
        figure)."""
        means = self.table.groupby("site", sort=False)[["relative", "cosine", "norm"]].mean()
        share = [float((self.cosines[site] > 0.95).float().mean()) for site in means.index]
        return means.assign(similar=share).reset_index()


@torch.no_grad()
def feature_dynamics(denoiser: "Denoiser", trajectory: "Trajectory", sites: Sequence[str]) -> Dynamics:
    """Features at each site on the x_t of a trajectory, compared between steps.

    Raises `DataError` where x was not recorded or there is one step, `SiteError` for a site that is not there.

    >>> import saelab
    >>> denoiser = saelab.load_denoiser("digits-unet")
    >>> trajectory = saelab.hspace.sample(denoiser, n=2, steps=4, seed=0)
    >>> feature_dynamics(denoiser, trajectory, ["mid_block"]).table.shape
    (3, 7)
    """
    import pandas

    if trajectory.x is None or len(trajectory.timesteps) < 2:
        raise DataError('feature dynamics read x_t of two steps or more: sample with record=("x", ...)')
    timesteps = trajectory.timesteps.tolist()
    recorded = [denoiser.record(trajectory.x[:, s], t, list(sites), trajectory.cond) for s, t in enumerate(timesteps)]
    rows, cosines = [], {}
    for site in sites:
        f_SNd = torch.stack([found[site].flatten(1) for found in recorded])
        unit_SNd = torch.nn.functional.normalize(f_SNd, dim=2)
        cosines[site] = torch.einsum("snd,tnd->st", unit_SNd, unit_SNd) / f_SNd.shape[1]
        norms_SN = f_SNd.norm(dim=2)
        for s in range(len(timesteps) - 1):
            change_Nd = f_SNd[s + 1] - f_SNd[s]
            rows.append({"site": site, "t": timesteps[s], "t_next": timesteps[s + 1],
                         "relative": float((change_Nd.norm(dim=1) / norms_SN[s].clamp(min=1e-12)).mean()),
                         "cosine": float(cosines[site][s, s + 1]), "mse": float(change_Nd.square().mean()),
                         "norm": float(norms_SN[s].mean())})  # fmt: skip
    return Dynamics(pandas.DataFrame(rows), cosines)


@torch.no_grad()
def feature_reuse(
    denoiser: "Denoiser", trajectory: "Trajectory", sites: Sequence[str], lags: Sequence[int] = (1, 2, 4)
) -> "DataFrame":
    """What a site's features of k steps ago in place of today's do to the predicted noise: may they be reused?

    The causal side of `feature_dynamics`: features may change much where nothing depends on it. At each step s >= k the site is
    given what it had on the trajectory's x at step s - k, everything else being as it is at step s.

    Returns: a row for each site, lag and step: `site`, `lag`, `t` (of step s) and `error` (|e' - e| / |e|, mean over samples).

    Raises `DataError` where x was not recorded or no lag is shorter than the trajectory, `ConfigError` for a lag below 1.

    >>> import saelab
    >>> denoiser = saelab.load_denoiser("digits-unet")
    >>> trajectory = saelab.hspace.sample(denoiser, n=2, steps=4, seed=0)
    >>> feature_reuse(denoiser, trajectory, ["mid_block"], lags=[1, 3]).groupby("lag").size().to_dict()
    {1: 3, 3: 1}
    """
    import pandas

    timesteps = trajectory.timesteps.tolist()
    lags = sorted(checks.counts("lags", lags))
    if trajectory.x is None or lags[0] >= len(timesteps):
        raise DataError(f'reuse reads x_t of more than {lags[0]} steps: sample with more and record=("x", ...)')
    recorded = [denoiser.record(trajectory.x[:, s], t, list(sites), trajectory.cond) for s, t in enumerate(timesteps)]
    plain = [denoiser.epsilon(trajectory.x[:, s], t, trajectory.cond) for s, t in enumerate(timesteps)]
    rows = []
    for site in sites:
        for lag in lags:
            for s in range(lag, len(timesteps)):
                with denoiser.intervene(site, _given(recorded[s - lag][site])):
                    changed = denoiser.epsilon(trajectory.x[:, s], timesteps[s], trajectory.cond)
                error = (changed - plain[s]).flatten(1).norm(dim=1) / plain[s].flatten(1).norm(dim=1).clamp(min=1e-12)
                rows.append({"site": site, "lag": lag, "t": timesteps[s], "error": float(error.mean())})
    return pandas.DataFrame(rows)


def reuse_schedule(reuse: "DataFrame", tolerance: float = 0.05) -> "DataFrame":
    """The longest of the lags tried up to which every error at a site and timestep is within the tolerance, 0 where none is.

    A row a site, a column a timestep, of what `feature_reuse` gives. A schedule that these lags allow one by one: errors of
    steps and sites that are reused together may add up.

    >>> import pandas
    >>> found = pandas.DataFrame({"site": "mid_block", "lag": [1, 2], "t": 500, "error": [0.01, 0.2]})
    >>> int(reuse_schedule(found).loc["mid_block", 500])
    1
    """
    tolerance = checks.number("tolerance", tolerance, least=0)
    ordered = reuse.sort_values("lag")
    within = (ordered.error <= tolerance).groupby([ordered.site, ordered.t]).cummin()
    kept = ordered.lag.where(within, 0)
    return kept.groupby([ordered.site, ordered.t], sort=False).max().unstack("t").astype("Int64")


def _given(features: Tensor) -> Callable[..., Tensor]:
    return lambda own, where: own if where.unconditional else features
