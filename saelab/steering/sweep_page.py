"""The data of a sweep's page: summary, curves, texts side by side."""

from typing import TYPE_CHECKING, Any

from saelab.pages.shell import report
from saelab.steering.grid import NONE, RANDOM_DIRECTION, RANDOM_LATENT, STEERED
from saelab.steering.summaries import curve
from saelab.steering.sweep_figures import band

if TYPE_CHECKING:
    from pandas import DataFrame

    from saelab.steering.sweep_table import Sweep

SUMMARY = (
    "latent operation matched_effect matched_kl matched_random directions p note best_strength effect effect_low effect_high "
    "kl random_direction random_latent area monotonicity perplexity_ranked output_score input_score"
).split()
ABOUT = ("model", "site", "later_site", "unit", "scope", "temperature")


def page(sweep: "Sweep", effect: str, kl: str, budget: float) -> str:
    """The HTML of `Sweep.to_html`."""
    table, settings = sweep.to_pandas(), sweep.settings
    about = {name.replace("_", " "): str(settings[name]) for name in ABOUT if settings[name] is not None}
    latents = [
        {
            "latent": latent,
            "top_tokens": (sweep.scores.get("top_tokens") or [[]] * (place + 1))[place],
            "scores": {
                name: sweep.scores[name][place] for name in ("output_score", "input_score") if name in sweep.scores
            },
            "operations": _operations(table, latent, settings, effect, kl),
        }
        for place, latent in enumerate(settings["latents"])
    ]
    data = {
        "about": {**about, "rows": f"{len(sweep):,} of {sweep.total:,}"},
        "effect": effect, "kl": kl, "budget": budget, "columns": SUMMARY,
        "summary": _rows(sweep.summary(effect, kl, budget), *SUMMARY),
        "latents": [latent for latent in latents if latent["operations"]],
    }  # fmt: skip
    return report("sweep", data)


def _rows(table: "DataFrame", *columns: str) -> list[Any]:
    """Rows as dicts, None where nothing is."""
    some = table[list(columns)].astype(object) if len(table) else table
    return some.where(some.notna(), None).to_dict("records")


def _operations(
    table: "DataFrame", latent: int, settings: dict[str, Any], effect: str, kl: str
) -> list[dict[str, Any]]:
    mine, unsteered = table[table.latent == latent], table[table.baseline == NONE]
    found = []
    for operation in settings["operations"]:
        here = mine[mine.operation == operation]
        if not len(here):
            continue
        around = band(here, effect)
        prompts = []
        for (prompt_id, seed), texts in here.groupby(["prompt_id", "seed"]):
            plain = unsteered[(unsteered.prompt_id == prompt_id) & (unsteered.seed == seed)].text.iloc[0]
            prompts.append({"prompt": settings["prompts"][prompt_id], "seed": seed, "unsteered": plain,
                            "strengths": _strengths(texts, effect)})  # fmt: skip
        found.append({
            "operation": operation,
            "points": curve(here, effect, kl)[["strength", effect, kl]].to_numpy().tolist(),
            "band": [[row["strength"], row["mean"] - row["std"], row["mean"] + row["std"]]
                     for row in around.to_dict("records")],
            "prompts": prompts,
        })  # fmt: skip
    return found


def _strengths(texts: "DataFrame", effect: str) -> list[dict[str, Any]]:
    """Of each strength the steered text and the first text of each kind of control."""
    figures = list(dict.fromkeys(["kl_text", effect, "perplexity_ranked", "repetition_4"]))
    found = []
    for strength, at in texts.groupby("strength", dropna=False, sort=True):
        shown = []
        for kind in (STEERED, RANDOM_DIRECTION, RANDOM_LATENT):
            for row in _rows(at[(at.baseline == kind) & at.text.notna()].head(1), "control", "text", *figures):
                shown.append({"kind": kind, "control": row["control"] if kind == RANDOM_LATENT else None,
                              "text": row["text"], "figures": {name: row[name] for name in figures}})  # fmt: skip
        found.append({"strength": strength, "texts": shown})
    return found
