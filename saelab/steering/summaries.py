"""One row for each latent and operation: best strength under a budget, frontier, rank among random directions."""

import math
from typing import TYPE_CHECKING, Any

from saelab.base.errors import ConfigError
from saelab.base.statistics import mean_interval, spearman
from saelab.steering.grid import RANDOM_DIRECTION, RANDOM_LATENT, STEERED
from saelab.steering.ranks import against_random
from saelab.steering.records import MEASURES

if TYPE_CHECKING:
    from collections.abc import Sequence

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
                **_figures(mine, str(operation), effect, kl, budget, resamples),
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


def _figures(mine: "DataFrame", operation: str, effect: str, kl: str, budget: float, resamples: int) -> dict[str, Any]:
    by_strength = curve(mine, effect, kl)
    within = by_strength[by_strength[kl] <= budget]
    found = {
        **against_random(mine, operation, effect, kl, budget),
        "area": area(list(zip(by_strength[kl], by_strength[effect], strict=True)), budget),
        "monotonicity": spearman(by_strength.strength, by_strength[effect]),
    }
    names = "best_strength effect effect_low effect_high kl random_direction random_latent".split()
    names += ["perplexity_ranked", "looping", "relative_change", "target_after_later"]
    if not len(within) or within[effect].isna().all():
        return dict.fromkeys(names, math.nan) | found
    best = within.sort_values(effect, kind="stable", na_position="first").iloc[-1]
    at = mine[mine.strength.isna() if math.isnan(best.strength) else mine.strength == best.strength]
    steered = at[at.baseline == STEERED]
    means = at.groupby("baseline")[effect].mean()
    low, high = mean_interval(steered.groupby("prompt_id")[effect].mean(), resamples)
    return {
        "best_strength": best.strength,
        "effect": best[effect],
        "effect_low": low,
        "effect_high": high,
        "kl": best[kl],
        "random_direction": float(means.get(RANDOM_DIRECTION, math.nan)),
        "random_latent": float(means.get(RANDOM_LATENT, math.nan)),
        "perplexity_ranked": float(steered.perplexity_ranked.mean()),
        "looping": float((steered.perplexity_ranked.isna() & steered.perplexity.notna()).mean()),
        "relative_change": float(steered.relative_change.mean()),
        "target_after_later": float(steered.target_after_later.mean()),
        **found,
    }


def _score(scores: dict[str, Any], name: str, place: int) -> float:
    return float(scores[name][place]) if scores.get(name) else math.nan
