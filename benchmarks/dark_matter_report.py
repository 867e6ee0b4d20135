"""results/dark_matter.md from the files that dark_matter.py left: tables, and the paper's orderings beside what was found."""

import json
from pathlib import Path
from typing import Any

import pandas as pd
import torch
import workers

from saelab.base.files import whole_file

SHOWN = [
    "k", "d_sae", "settled", "l0", "fvu_training", "fvu", "fvu_nonlinear", "r2_error", "r2_error_pooled", "rescaled_scale",
    "rescaled_r2_error", "other_bias_r2_error",
]  # fmt: skip
NORMS = [f"r2_norm_{part}" for part in ("x", "sae", "error", "linear", "nonlinear")]


def write(folder: Path, out: Path) -> None:
    """Write the report of the steps that are there."""
    found = {path.stem: json.loads(path.read_text()) for path in folder.glob("*.json")}
    parts = ["# Dark matter of SAEs on SmolLM2", workers.machine(torch.get_num_threads()), ABOUT]
    if "scaling" in found:
        parts.append(lead(found["scaling"]["all"]))
    parts += [make(found[name]) for name, make in SECTIONS.items() if name in found]
    parts.append(
        "## The paper's orderings\n\nOver every SAE that was measured: the range of what the ordering compares, and on how "
        "many it holds.\n\n" + table(orderings(found))
    )
    with whole_file(out) as temporary:
        temporary.write_text("\n\n".join(parts) + "\n")
    print(f"written: {out}")


ABOUT = (
    "TopK SAEs of blocks.3.hook_resid_post, one seed, tokens within the norm limit unless said. Every R2 and FVU is on "
    "documents that neither the SAE nor the map has seen; what is learnt from the parts (norms, earlier SAEs, token by token) "
    "is learnt on one half of these and scored on the other."
)


def lead(laws: list[dict[str, Any]]) -> str:
    slopes = [law["nonlinear_slope"] for law in laws]
    return (
        f"FVU of the nonlinear part {'rises' if min(slopes) > 0 else 'does not rise'} with the width (by "
        f"{', '.join(f'{slope:.2g}' for slope in slopes)} each time it doubles); in the paper, by our notes of it, it is about "
        "constant."
    )


def table(rows: Any) -> str:
    """Markdown of records or of a data frame."""
    frame = pd.DataFrame(rows)
    return workers.table(list(map(str, frame.columns)), frame.map(_shown).values.tolist())


def _shown(value: Any) -> str:
    if isinstance(value, list):
        return " to ".join(map(_shown, value))
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def speed(f: dict[str, Any]) -> str:
    resident = ", ".join(f"{size / 2**20:,.0f} after {rows:,} rows" for rows, size in f["resident"])
    loops = [
        f"{name}: {f[name]:,.0f} us a token over {f['pursuit_rows']:,} tokens, loop {f[f'{name}_loop']:,.0f} us "
        f"({f[f'{name}_loop'] / f[name]:.1f} times as fast)"
        for name in ("gradient", "orthogonal")
    ]
    return (
        f"## Speed ({f['threads']} threads, d {f['d']}, d_sae {f['d_sae']:,}, k {f['k']}, synthetic rows)\n\n"
        f"Decomposing {f['rows']:,} rows takes {f['beyond']:.1f} s beyond the SAE's encoding ({f['encoding']:.1f} s). "
        "Resident memory in MiB over the two passes, with no codes kept for the second one (they take up to 512 more): "
        f"{resident}.\n\n"
        f"Pursuit against a dense loop over tokens. {'; '.join(loops)}."
    )


def family(rows: list[dict[str, Any]], title: str = "Widths and sparsities") -> str:
    frame, first = pd.DataFrame(rows).rename(columns={"sparsity": "k"}), rows[0]
    note = (
        f"{first['tokens_heldout']:,} rows held out by {first['held_out_by']}; the map is fitted on "
        f"{first['tokens_per_dimension']:.0f} rows a dimension; left out for their norm: {first['dropped']:.2%}, with "
        f"{first['dropped_variance']:.0%} of the variance. "
        "`r2_error` is the mean over dimensions; `fvu_training` that of the last five batches; `rescaled`: after the "
        "best multiple of the reconstruction; `other_bias`: without intercept. A dead SAE in its place: R2 of the error "
        f"{min(row['dead_r2_error'] for row in rows):.6f} or more."
    )
    tables = [frame[[name for name in names if name in frame]] for names in (SHOWN, ["k", "d_sae", *NORMS])]
    return f"## {title}\n\n{note}\n\n" + "\n\n".join(map(table, tables))


def scaling(found: dict[str, Any]) -> str:
    about = (
        "Slopes of FVU and FVU_nonlinear over log2 width. The exponent's interval is that of the law (F test on its residuals)."
        " Intervals of slopes draw the held-out documents again, of which there are few, with the SAEs as "
        "they are: one seed of "
        "each, so that they say nothing of another training."
    )
    sections = ["## Power laws of the FVU over widths", about]
    for chosen, laws in found.items():
        sections.append(f"Of {chosen} widths:\n\n{table(laws)}")
    return "\n\n".join(sections)


def downstream(rows: list[dict[str, Any]]) -> str:
    return "## Downstream cost with each part restored\n\n" + table([r for r in rows if r["setting"] != "clean"])


def pursuit(rows: list[dict[str, Any]]) -> str:
    names = ["encoder", "support least squares", "gradient pursuit", "orthogonal pursuit"]
    frame = pd.DataFrame(rows)[["dictionary", "k", "d_sae", *names, *(f"{name} L0" for name in names)]]
    return "## Pursuit: FVU at the SAE's own number of latents a token\n\n" + table(frame)


def planted(found: dict[str, Any]) -> str:
    frame = pd.DataFrame(found["correlations"]).rename_axis("part").reset_index()
    return "## Planted errors: correlation of each part's size with each sigma\n\n" + table(frame)


def orderings(found: dict[str, Any]) -> list[dict[str, str]]:
    """Each ordering of the steps that are there: what was found, and on how many SAEs it holds."""
    rows: list[tuple[str, pd.Series, pd.Series]] = []
    if "family" in found:
        family = pd.DataFrame(found["family"])
        norm = {part: family[f"r2_norm_{part}"] for part in ("x", "sae", "error", "linear", "nonlinear")}
        rows += [
            ("norm R2 of x >= of Sae - .02 (difference)", norm["x"] - norm["sae"], norm["x"] >= norm["sae"] - 0.02),
            ("norm R2 of Sae > of the error (difference)", norm["sae"] - norm["error"], norm["sae"] > norm["error"]),
            ("norm R2 of the error > of its nonlinear part (difference)", norm["error"] - norm["nonlinear"],
             norm["error"] > norm["nonlinear"]),
            ("norm R2 of the linear part is high (over .7)", norm["linear"], norm["linear"] > 0.7),
            ("norm R2 of the error is over .9 (the paper's large models)", norm["error"], norm["error"] > 0.9),
            ("vector R2 between .2 and .7", family.r2_error, family.r2_error.between(0.2, 0.7)),
            ("FVU_nonlinear < FVU (ratio)", family.fvu_nonlinear / family.fvu, family.fvu_nonlinear < family.fvu),
        ]  # fmt: skip
    if "scaling" in found:
        laws = pd.DataFrame(found["scaling"]["all"])
        ratio = laws.nonlinear_slope / laws.slope
        rows += [("FVU_nonlinear does not rise with the width (slope over log2 width)", laws.nonlinear_slope,
                  laws.nonlinear_slope <= 0),
                 ("FVU_nonlinear is much flatter in the width than FVU (ratio of the slopes, under .5)", ratio,
                  ratio.abs() < 0.5)]  # fmt: skip
    if "downstream" in found:
        cost = pd.DataFrame(found["downstream"]).set_index(["k", "d_sae"])
        linear, nonlinear = (cost[cost.setting == f"sae + {part}"] for part in ("linear", "nonlinear"))
        both = linear.recovered + nonlinear.recovered
        rows.append(("recovered by linear + nonlinear is 80 to 120%", both, both.between(80, 120)))
        for name, part in (("linear", linear), ("nonlinear", nonlinear)):
            for share in ("norm", "variance"):
                off = part.recovered - part[f"{share}_share"]
                rows.append((f"the {name} part recovers within 15 points of its share of the {share} (difference)", off,
                             off.abs() <= 15))  # fmt: skip
    if "pursuit" in found:
        codes = pd.DataFrame(found["pursuit"]).query("dictionary == 'trained'")
        for name in ("gradient pursuit", "orthogonal pursuit"):
            fall = codes[name] / codes.encoder - 1
            rows.append((f"{name} lowers FVU (relative change)", fall, fall < 0))
    if "pursuit_parts" in found:
        parts = pd.DataFrame(found["pursuit_parts"]).set_index("codes").fvu_nonlinear
        change = parts[["gradient_pursuit", "orthogonal_pursuit"]] / parts.encoder - 1
        rows.append(("pursuit changes FVU_nonlinear by under 5% (relative change)", change, change.abs() < 0.05))
    if "earlier" in found:
        r2 = pd.DataFrame(found["earlier"]).set_index("source").nonlinear
        rows.append(("earlier SAEs predict the nonlinear part better than the same SAE (difference of R2)",
                     r2.iloc[1:] - r2.iloc[0], r2.iloc[1:] > r2.iloc[0]))  # fmt: skip
    if "parts" in found:
        fvu = pd.DataFrame(found["parts"]).set_index("part").fvu
        more = fvu[["nonlinear"]] - fvu.linear
        rows.append(
            ("an SAE of the nonlinear part has a higher FVU than one of the linear part (difference)", more, more > 0)
        )
    return [
        {
            "ordering": name,
            "found": f"{values.min():.3g} to {values.max():.3g}",
            "holds": f"{int(holds.sum())} of {len(holds)}",
        }
        for name, values, holds in rows
    ]


def training(f: dict[str, Any]) -> str:
    return (
        f"## Training\n\n{f['how']}, of {f['rows']:,} rows in {f['dtype']}, in batches of {f['batch']:,}. An SAE counts as "
        "settled when its FVU moved by less than 2% within the last quarter of this."
    )


SECTIONS = {
    "speed": speed,
    "training": training,
    "family": family,
    "high_norm": lambda rows: family(rows, "The same with high-norm tokens"),
    "scaling": scaling,
    "baselines": lambda r2: "## R2 of the error's squared norm from less than the activation\n\n" + table([r2]),
    "per_token": lambda rows: "## The error's norm token by token, from one width to the next\n\n" + table(rows),
    "downstream": downstream,
    "pursuit": pursuit,
    "pursuit_parts": lambda rows: "## What pursuit changes in the parts of one SAE\n\n" + table(rows),
    "parts": lambda rows: "## SAEs trained on the parts of the error\n\n" + table(rows),
    "earlier": lambda rows: "## R2 of the parts from the reconstructions of earlier SAEs\n\n" + table(rows),
    "planted": planted,
}
