"""Sweep: what `steering.sweep` gives back."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from saelab.steering.records import MEASURES

if TYPE_CHECKING:
    from pandas import DataFrame

IDENTITY = [
    "row",
    "baseline",
    "latent",
    "operation",
    "strength",
    "unit",
    "draw",
    "control",
    "prompt_id",
    "prompt",
    "seed",
]


class Sweep:
    """The rows of a sweep: a text each, and its measures.

    `rows` are they as dicts, `settings` what was asked for, `scores` the top logit tokens and scores of each
    latent, `path` the folder (None without one).

    Columns of `to_pandas()`, one row a text or measurement. A control ("random_direction", "random_latent") is measured
    on the latent that it stands beside. "Text" figures are means over the positions that predict the unsteered continuation,
    teacher-forced on it; "next" is the first of them, after the prompt.

    | column | meaning |
    |---|---|
    | baseline | "steered", "none", "random_direction" or "random_latent" |
    | latent, operation, strength, unit | what was done; strength in units of `unit`, none for ablate and project_out |
    | draw, control | which of the controls; the latent that a random latent is |
    | kl_next, kl_text, kl_max | KL(clean, steered) of the next-token distribution, nats: first, mean and largest |
    | mass_next, mass_text | probability of the latent's 10 top logit tokens, steered |
    | rise_next, rise_text | the same minus its unsteered value |
    | own_... | the same four on the top tokens of the direction that a control really steers with |
    | target_before, target_after | activation of the latent at the site, re-encoded |
    | off_target_l1 | sum of abs changes of all other latents |
    | off_target_flipped | number of other latents that went on or off |
    | ..._later | the four at the later site, where they are not simply what was written |
    | relative_change, norm_ratio | mean of norm(change) / norm(h); of norm(steered) / norm(h), at the site |
    | perplexity | of the text under the unsteered model, given the prompt |
    | perplexity_ranked | NaN where repetition_4 exceeds .2, because loops have a low perplexity |
    | repetition_4, distinct_2 | 1 - distinct / all 4-grams; distinct / all 2-grams |
    | changed_share, first_divergence | tokens that differ from the unsteered text; the first of them, NaN if none |
    | text | the continuation; None, with its figures NaN, of random directions after the first three |

    >>> Sweep([], {"prompts": [], "texts": 0}, {})
    Sweep of 0 rows
    """

    def __init__(
        self, rows: list[dict[str, Any]], settings: dict[str, Any], scores: dict[str, Any], path: Path | None = None
    ) -> None:
        self.rows = sorted(rows, key=lambda row: row["row"])
        self.settings, self.scores, self.path = settings, scores, path

    @property
    def total(self) -> int:
        """Rows asked for."""
        return int(self.settings["texts"])

    @property
    def interrupted(self) -> bool:
        """Whether some are missing."""
        return len(self) < self.total

    def to_pandas(self) -> "DataFrame":
        """One row a cell of the grid, a pandas.DataFrame; see the class for the columns."""
        import pandas as pd

        own = [name for name in IDENTITY if name not in ("unit", "prompt")]
        table = pd.DataFrame([{name: row.get(name) for name in (*own, *MEASURES)} for row in self.rows],
                             columns=[*own, *MEASURES])  # fmt: skip
        with_unit = table.operation.isin(["add", "clamp", "cap"])
        table["unit"] = with_unit.map({True: self.settings.get("unit"), False: None})
        # as objects: pandas' own strings refuse halves of surrogate pairs
        table["prompt"] = pd.Series([self.settings["prompts"][i] for i in table.prompt_id], dtype=object)
        table["text"] = pd.Series([row["text"] for row in self.rows], dtype=object)
        whole = {name: "Int64" for name in ("latent", "draw", "control")}
        numbers = {name: "float64" for name in ("strength", *MEASURES)}
        return table.astype({**whole, **numbers})[[*IDENTITY, *MEASURES, "text"]]

    def summary(
        self, effect: str = "rise_text", kl: str = "kl_text", budget: float = 1.0, resamples: int = 1000
    ) -> "DataFrame":
        """One row a latent and operation, a pandas.DataFrame.

        `best_strength` has the largest mean `effect` among the strengths whose mean `kl` is at most `budget`, and `effect`
        to `random_latent` and the text's figures are at it: a description of these prompts, which flatters, because they chose
        the strength. `effect_low`, `effect_high` are a 95% bootstrap interval over prompts at that strength (`resamples`,
        percentile, seeded; NaN for one prompt); `random_direction` and `random_latent` the controls' mean effects on the
        latent's tokens at the same strength.

        What is to be believed is `p`: the share of the latent and its random directions together whose effect is at least the
        latent's (at best 1 / (directions + 1)), each on its own top tokens and at its own strength for the same KL
        (`matched_kl`: `budget`, or the most that all reach), the strength chosen on the other half of the prompts
        (`saelab.steering.ranks`). `matched_effect` and `matched_random` are the latent's effect and the directions' mean there.
        Strengths below the neutral one (0, or 1 of "scale") are left out where there are others. An operation that has none
        is compared at equal norm; what takes away has a p near 1. Of many latents tested one in twenty is at .05 by
        chance. p is NaN, and `note` says why, with fewer than 20 random directions or a single prompt.

        `area`: mean attainable effect over budgets uniform in [0, budget], not steering included (the area under the
        step-wise frontier over its width). `monotonicity`: Spearman correlation of strength and mean effect.
        Definitions are our choice. Raises `ConfigError` for an unknown column.
        """
        from saelab.steering.summaries import summarise

        return summarise(self.to_pandas(), self.settings, self.scores, effect, kl, budget, resamples)

    def plot(self, kind: str = "effect", effect: str = "rise_text", kl: str = "kl_text") -> Any:
        """A plotly figure: "effect" (strength against effect, the band is the random directions' mean and standard
        deviation) or "frontier" (KL against effect). Raises `ConfigError` for another kind or an unknown column."""
        from saelab.steering.sweep_figures import figure

        return figure(self.to_pandas(), self.settings, kind, effect, kl)

    def to_html(self, path: str | Path, effect: str = "rise_text", kl: str = "kl_text", budget: float = 1.0) -> Path:
        """Write one self-contained page: summary, curves, and texts side by side. It needs no network;
        whatever the texts hold is shown, not obeyed. Raises `CheckpointError` on a full or read-only disk."""
        from saelab.base.files import user_path, whole_file
        from saelab.steering.sweep_page import page

        target = user_path(path)
        with whole_file(target) as temporary:
            temporary.write_text(page(self, effect, kl, budget), encoding="utf-8")
        return target

    def __len__(self) -> int:
        return len(self.rows)

    def __repr__(self) -> str:
        missing = f" of {self.total:,}, the others are missing" if len(self.rows) < self.total else ""
        return f"Sweep of {len(self.rows):,} rows{missing}" + (f", in {self.path}" if self.path else "")
