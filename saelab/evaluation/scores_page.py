"""The data of a page of scores: a part a task, a group a figure, a row an autoencoder or control."""

from typing import Any

from saelab.evaluation.scores import SAE_ITSELF, Scores, whose, written
from saelab.pages.packing import plain
from saelab.pages.shell import report

ASKS = {
    "stability": "Would another seed, or another size, find the same latents?",
    "absorption": "Is a concept split over latents, or taken over by others where they fire? Words by their first letter.",
    "sparse probing": "Can the class of a text be read from few latents?",
    "perturbation": "Does taking out the latents of a class move its probe, and no other's?",
    "spurious correlation": "Can what a probe learnt in another attribute's place be taken out?",
    "recovery": "Are the features that were planted found?",
}


def page(scores: Scores) -> str:
    """The HTML of `Scores.to_html`."""
    parts: dict[str, dict[str, list[dict[str, Any]]]] = {}
    for row in scores.rows:
        own = {"who": whose(row), "control": row["source"] != SAE_ITSELF}
        own |= {name: plain(row[name]) for name in ("value", "low", "high", "n")}
        parts.setdefault(row["task"], {}).setdefault(written(row), []).append(own)
    return report("scores", {
        "saes": list(dict.fromkeys(row["sae"] for row in scores.rows)),
        "parts": [
            {"task": task, "asks": ASKS.get(task, ""), "groups": [
                {"figure": figure, "rows": rows} for figure, rows in groups.items()]}
            for task, groups in parts.items()
        ],
    })  # fmt: skip
