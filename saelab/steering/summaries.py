"""One row for each latent and operation: best strength under a budget, frontier, z against random directions."""

import math
from typing import TYPE_CHECKING, Any

from saelab.errors import ConfigError
from saelab.steering.grid import RANDOM_DIRECTION, RANDOM_LATENT, STEERED
from saelab.steering.records import MEASURES

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy import ndarray
    from pandas import DataFrame


def summarise(
    table: "DataFrame",
    settings: dict[str, Any],
    scores: dict[str, Any],
    effect: str,
    kl: str,
    budget: float,
    resamples: int,
) -> "DataFrame":
    """See `Sweep.summary`."""
    import pandas as pd

    check_columns(effect, kl)
    if not budget > 0:
        raise ConfigError(f"the KL budget is {budget}: it has to be above 0 nats")
    rows = []
    for (latent, operation), mine in table[table.latent.notna()].groupby(["latent", "operation"], sort=False):
        place = settings["latents"].index(latent)
        rows.append(
            {
                "latent": latent,
                "operation": operation,
                "unit": mine.unit.iloc[0],
                **_figures(mine, effect, kl, budget, resamples),
                "output_score": _score(scores, "output_score", place),
                "input_score": _score(scores, "input_score", place),
                "top_tokens": " ".join(map(repr, scores["top_tokens"][place])) if scores.get("top_tokens") else "",
                "texts": int((mine.baseline == STEERED).sum()),
            }
        )
    return pd.DataFrame(rows)


def check_columns(*names: str) -> None:
    """Raise `ConfigError` unless these are measures."""
    for name in names:
        if name not in MEASURES:
            raise ConfigError(f"there is no measure {name!r}: choose one of {', '.join(MEASURES)}")


def curve(table: "DataFrame", *columns: str) -> "DataFrame":
    """Means of the steered texts at each strength, ascending (one row for an operation without)."""
    steered = table[table.baseline == STEERED]
    return steered.groupby("strength", dropna=False, sort=True)[list(dict.fromkeys(columns))].mean().reset_index()


def area(points: "Sequence[tuple[float, float]]", budget: float) -> float:
    """Mean over budgets uniform in [0, budget] of the largest effect whose KL is within, not steering included.

    `points` are (KL, effect).

    >>> area([(0.5, 2.0), (0.75, 1.0), (3.0, 9.0)], budget=1.0)  # nothing up to .5, then 2
    1.0
    """
    reached, best, total = 0.0, 0.0, 0.0
    for divergence, effect in sorted((k, e) for k, e in points if k <= budget):
        total += best * (divergence - reached)
        reached, best = divergence, max(best, effect)
    return (total + best * (budget - reached)) / budget


def spearman(x: Any, y: Any) -> float:
    """Rank correlation, ties at their mean rank; NaN for fewer than two points or a constant.

    >>> spearman([1, 2, 3], [1, 4, 9])
    1.0
    """
    import pandas as pd

    ranks = pd.DataFrame({"x": x, "y": y}).astype(float).rank()
    if len(ranks) < 2 or ranks.x.nunique() < 2 or ranks.y.nunique() < 2:
        return math.nan
    return round(float(ranks.x.corr(ranks.y)), 12)


def z_score(effects_C: "ndarray", controls_RC: "ndarray") -> float:
    """(mean effect - mean of the controls) / standard deviation over the R controls of their means over the C cells.

    >>> import numpy as np
    >>> z_score(np.array([4.0, 6.0]), np.array([[0.0, 2.0], [2.0, 4.0]]))  # (5 - 2) / sd(1, 3)
    2.1213203435596424
    """
    means_R = controls_RC.mean(1)
    spread = float(means_R.std(ddof=1)) if len(means_R) > 1 else 0.0
    return float(effects_C.mean() - means_R.mean()) / spread if spread > 0 else math.nan


def intervals(effects_C: "ndarray", controls_RC: "ndarray", resamples: int) -> dict[str, float]:
    """95% percentile bootstrap intervals of the mean effect and of z, resampling the cells (prompt, seed) together."""
    import numpy as np

    generator = np.random.default_rng(0)
    picks = generator.integers(len(effects_C), size=(resamples, len(effects_C)))
    means = effects_C[picks].mean(1)
    zs = np.array([z_score(effects_C[pick], controls_RC[:, pick]) for pick in picks if len(controls_RC) > 1])
    zs = zs[~np.isnan(zs)]
    low, high = np.percentile(means, [2.5, 97.5])
    z_low, z_high = np.percentile(zs, [2.5, 97.5]) if len(zs) else (math.nan, math.nan)
    return {"effect_low": float(low), "effect_high": float(high), "z_low": float(z_low), "z_high": float(z_high)}


def _figures(mine: "DataFrame", effect: str, kl: str, budget: float, resamples: int) -> dict[str, float]:
    by_strength = curve(mine, effect, kl)
    within = by_strength[by_strength[kl] <= budget]
    found = {
        "area": area(list(zip(by_strength[kl], by_strength[effect], strict=True)), budget),
        "monotonicity": spearman(by_strength.strength, by_strength[effect]),
    }
    names = "best_strength effect effect_low effect_high kl random_direction random_latent z z_low z_high".split()
    names += ["perplexity_ranked", "looping", "relative_change", "target_after_later"]
    if not len(within) or within[effect].isna().all():
        return dict.fromkeys(names, math.nan) | found
    best = within.sort_values(effect, kind="stable", na_position="first").iloc[-1]
    at = mine[mine.strength.isna() if math.isnan(best.strength) else mine.strength == best.strength]
    steered = at[at.baseline == STEERED].set_index(["prompt_id", "seed"])
    controls = at[at.baseline == RANDOM_DIRECTION].pivot(index="draw", columns=["prompt_id", "seed"], values=effect)
    controls = controls.reindex(columns=steered.index).dropna()
    effects_C, controls_RC = steered[effect].to_numpy(), controls.to_numpy(dtype=float)
    means = at.groupby("baseline")[effect].mean()
    return {
        "best_strength": best.strength,
        "effect": best[effect],
        "kl": best[kl],
        "random_direction": float(means.get(RANDOM_DIRECTION, math.nan)),
        "random_latent": float(means.get(RANDOM_LATENT, math.nan)),
        "z": z_score(effects_C, controls_RC),
        **intervals(effects_C, controls_RC, resamples),
        "perplexity_ranked": float(steered.perplexity_ranked.mean()),
        "looping": float((steered.perplexity_ranked.isna() & steered.perplexity.notna()).mean()),
        "relative_change": float(steered.relative_change.mean()),
        "target_after_later": float(steered.target_after_later.mean()),
        **found,
    }


def _score(scores: dict[str, Any], name: str, place: int) -> float:
    return float(scores[name][place]) if scores.get(name) else math.nan
