"""Is a latent more than a random direction? Its effect at an equal divergence, ranked among theirs.

Every direction, the latent and each random one alike, goes through the same steps on its own measurements: on one half of
the prompts the strength is found at which its KL is the common one, on the other half its effect is taken there, and the
halves change places. So under the null (the latent is as any direction of its norm) its rank is uniform, whatever the curves
look like; no figure is read where its strength was chosen.

Shapes: D directions, the latent first, S strengths, P prompts.
"""

import math
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Float

from saelab.steering.grid import RANDOM_DIRECTION, STEERED, WITH_STRENGTH
from saelab.steering.records import MEASURES

if TYPE_CHECKING:
    from pandas import DataFrame

ENOUGH = 20  # random directions: of fewer the smallest p is above .05
NEUTRAL = {"add": 0.0, "clamp": 0.0, "scale": 1.0}  # strengths on the other side of these do the opposite
AT_REST = ("kl_", "rise_", "own_rise_", "off_target_", "relative_change", "changed_share")  # 0 where nothing is done


def at_equal_divergence(
    effect_DSP: Float[np.ndarray, "D S P"], kl_DSP: Float[np.ndarray, "D S P"], budget: float, at_rest: float = 0.0
) -> tuple[float, Float[np.ndarray, " D"]]:
    """(the common KL, the effect of each direction there), strengths chosen on one half of the prompts for the other.

    The common KL is `budget`, or the most that all directions reach. Between two strengths KL goes as the square of the
    strength, and the effect is interpolated; below the smallest, between it and doing nothing, whose effect is `at_rest`.

    >>> kl = np.array([[[1.0, 1.0], [4.0, 4.0]], [[0.25, 0.25], [1.0, 1.0]]])  # of the second half as strong
    >>> effect = np.array([[[3.0, 3.0], [6.0, 6.0]], [[1.0, 1.0], [2.0, 2.0]]])
    >>> at_equal_divergence(effect, kl, budget=1.0)
    (1.0, array([3., 2.]))
    """
    upwards = kl_DSP.mean((0, 2)).argsort(kind="stable")
    n = kl_DSP.shape[2]
    halves = [np.arange(n) % 2 == 0, np.arange(n) % 2 == 1]
    curves = [np.pad(kl_DSP[:, upwards][..., half].mean(2), ((0, 0), (1, 0))) for half in halves]
    level = min(budget, *(float(curve.max(1).min()) for curve in curves))
    if not level > 0:
        return level, np.full(len(kl_DSP), math.nan)
    total = np.zeros(len(kl_DSP))
    for choosing, half in zip(curves, reversed(halves), strict=True):
        effects = effect_DSP[:, upwards][..., half].mean(2)
        effects = np.pad(effects, ((0, 0), (1, 0)), constant_values=at_rest)
        total += half.sum() / n * np.array([_crossing(*curve, level) for curve in zip(choosing, effects, strict=True)])
    return level, total


def p_by_rank(effects_D: Float[np.ndarray, " D"]) -> float:
    """The share of all directions whose effect is at least the first one's, itself included.

    >>> p_by_rank(np.array([2.0, 1.0, 3.0, 0.0])), p_by_rank(np.arange(21.0)[::-1])
    (0.5, 0.047619047619047616)
    """
    return float((effects_D >= effects_D[0]).mean())


def against_random(mine: "DataFrame", operation: str, effect: str, kl: str, budget: float) -> dict[str, float | str]:
    """The columns `matched_effect`, `matched_kl`, `matched_random`, `p`, `directions` and `note` of `Sweep.summary`."""
    strengths = sorted(set(mine.strength.dropna()))
    path = [s for s in strengths if s > NEUTRAL.get(operation, -math.inf)] or strengths
    chosen = mine[mine.strength.isin(path)] if path else mine
    measured = [_by_direction(chosen, name) for name in (effect, kl)]
    known = [table.columns[table.reindex([-1]).notna().iloc[0]] for table in measured]
    counts = known[0].intersection(known[1]).get_level_values("prompt_id").value_counts()
    size = max(len(path), 1)
    prompts = sorted(counts.index[counts == size])  # at all strengths: a sweep may be unfinished
    columns = [(strength, prompt) for strength in (path or [0.0]) for prompt in prompts]
    tables = [table.reindex(columns=columns).dropna() for table in measured]
    draws = tables[0].index.intersection(tables[1].index).sort_values()
    found: dict[str, float | str] = dict.fromkeys(("matched_effect", "matched_kl", "matched_random", "p"), math.nan)
    found |= {"directions": max(len(draws) - 1, 0), "note": ""}
    if not prompts:
        return found | {"note": f"{effect} is not known"}
    cubes = [table.loc[draws].to_numpy().reshape(len(draws), size, len(prompts)) for table in tables]
    if operation in WITH_STRENGTH:
        if len(prompts) < 2:
            return found | {"note": "1 prompt: a strength has to be chosen on others than its effect is measured on"}
        at_rest = 0.0 if effect.startswith(AT_REST) else math.nan
        level, effects = at_equal_divergence(cubes[0], cubes[1], budget, at_rest)
        if np.isnan(effects).any():
            why = (
                "no strength changes anything" if not level > 0 else f"the smallest strength is above {level:.2g} nats"
            )
            return found | {"matched_kl": level, "note": why}
    else:
        level, effects = float(cubes[1][0].mean()), cubes[0].mean((1, 2))
        found["note"] = "no strength to match the KL by: at equal norm"
    found |= {"matched_effect": float(effects[0]), "matched_kl": level}
    if len(effects) > 1:
        found["matched_random"] = float(effects[1:].mean())
    if len(effects) <= ENOUGH:
        return found | {"note": f"{len(effects) - 1} random directions: p needs {ENOUGH}"}
    return found | {"p": p_by_rank(effects)}


def _by_direction(mine: "DataFrame", name: str) -> "DataFrame":
    """Means over the seeds: a row a direction (-1 the latent, else the draw), a column a strength and prompt.

    What a random direction does is measured on its own top tokens, as what the latent does is on the latent's.
    """
    own = f"own_{name}" if f"own_{name}" in MEASURES else name
    some = mine[mine.baseline.isin([STEERED, RANDOM_DIRECTION])]
    value = some[name].where(some.baseline == STEERED, some[own])
    keys = [some.draw.fillna(-1).astype(int), some.strength.fillna(0.0), some.prompt_id]
    return value.groupby(keys).mean().unstack(["strength", "prompt_id"])


def _crossing(kl_S: Float[np.ndarray, " S"], effect_S: Float[np.ndarray, " S"], level: float) -> float:
    """The effect where the KL first comes up to the level, from the first of the points on."""
    above = int((kl_S >= level).argmax())
    low, high = math.sqrt(kl_S[above - 1]), math.sqrt(kl_S[above])
    share = (math.sqrt(level) - low) / (high - low)
    return float(effect_S[above] if share == 1 else (1 - share) * effect_S[above - 1] + share * effect_S[above])
