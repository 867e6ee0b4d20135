"""results/dark_matter.md from the files that dark_matter.py left: tables, and the paper's orderings beside what was found."""

import json
from pathlib import Path
from typing import Any

import pandas as pd
import torch
import workers

from saelab.files import whole_file

SHOWN = ["k", "d_sae", "settled", "l0", "fvu", "fvu_nonlinear", "r2_error", "r2_error_pooled", "rescaled_r2_error"]
NORMS = [f"r2_norm_{part}" for part in ("x", "sae", "error", "linear", "nonlinear")]


def write(folder: Path, out: Path) -> None:
    """Write the report of the steps that are there."""
    found = {path.stem: json.loads(path.read_text()) for path in folder.glob("*.json")}
    parts = ["# Dark matter of SAEs on SmolLM2", workers.machine(torch.get_num_threads())]
    parts += [make(found[name]) for name, make in SECTIONS.items() if name in found]
    if {"family", "downstream", "pursuit", "earlier"} <= set(found):
        parts.append("## The paper's orderings\n\n" + table(orderings(found)))
    with whole_file(out) as temporary:
        temporary.write_text("\n\n".join(parts) + "\n")
    print(f"written: {out}")


def table(rows: Any) -> str:
    """Markdown of records or of a data frame."""
    frame = pd.DataFrame(rows)
    shown = frame.map(lambda value: f"{value:.4g}" if isinstance(value, float) else str(value))
    return workers.table(list(map(str, frame.columns)), shown.values.tolist())


def speed(figures: dict[str, Any]) -> str:
    f = figures
    return (
        f"## Speed ({f['threads']} threads, d {f['d']}, d_sae {f['d_sae']:,}, k {f['k']})\n\n"
        f"Decomposing {f['rows']:,} rows takes {f['beyond']:.1f} s beyond the SAE's encoding ({f['encoding']:.1f} s). Resident "
        f"memory is {f['rss'] / 2**20:,.0f} MiB, after a tenth of the rows {f['rss_tenth'] / 2**20:,.0f}; up to 512 MiB of it "
        f"are codes kept for the second pass.\n\n"
        f"Pursuit a token: dense loop {f['loop']:,.0f} us, gradient {f['gradient']:,.0f} us ({f['loop'] / f['gradient']:.1f} "
        f"times as fast), orthogonal {f['orthogonal']:,.0f} us ({f['loop'] / f['orthogonal']:.1f})."
    )


def family(figures: dict[str, Any]) -> str:
    sections = ["## Widths and sparsities"]
    for rows, title in (("ordinary", "Tokens within the norm limit"), ("all", "All tokens past the first position")):
        frame = pd.DataFrame(figures[rows]).rename(columns={"sparsity": "k"})
        frame = frame[[name for name in SHOWN + NORMS if name in frame]]
        first = figures[rows][0]
        sections.append(
            f"{title} ({first['tokens_heldout']:,} held out by {first['held_out_by']}, {first['tokens_per_dimension']:.0f} of "
            f"the fit a dimension)\n\n{table(frame)}"
        )
    for chosen, laws in figures["laws"].items():
        shown = laws if isinstance(laws, str) else table(laws) if laws else "none is settled"
        sections.append(f"Power laws over {chosen} widths (slopes over log2 width)\n\n{shown}")
    sections.append("The error's norm token by token, from one width to the next\n\n" + table(figures["per_token"]))
    return "\n\n".join(sections)


def downstream(figures: list[dict[str, Any]]) -> str:
    rows = [
        {"k": f["k"], "d_sae": f["d_sae"], **row} for f in figures for row in f["table"] if row["setting"] != "clean"
    ]
    return "## Downstream cost with each part restored\n\n" + table(rows)


def planted(figures: dict[str, Any]) -> str:
    frame = pd.DataFrame(figures["correlations"]).rename_axis("part").reset_index()
    return "## Planted errors: correlation of each part's size with each sigma\n\n" + table(frame)


def orderings(found: dict[str, Any]) -> list[dict[str, str]]:
    """Each ordering, what was found, and on how many SAEs it holds."""
    family = pd.DataFrame(found["family"]["ordinary"])
    codes = pd.DataFrame(found["pursuit"]).query("dictionary == 'trained'")
    by_codes = codes.pivot(index=["k", "d_sae"], columns="codes", values=["fvu", "fvu_nonlinear"])
    change = by_codes["fvu_nonlinear"]["gradient pursuit"] / by_codes["fvu_nonlinear"]["encoder"] - 1
    fall = by_codes["fvu"]["gradient pursuit"] / by_codes["fvu"]["encoder"] - 1
    cost = pd.DataFrame([{"of": i, **row} for i, f in enumerate(found["downstream"]) for row in f["table"]])
    linear, nonlinear = (
        cost[cost.setting == f"sae + {part}"].set_index("of")[["recovered", "variance_share", "norm_share"]]
        for part in ("linear", "nonlinear")
    )
    earlier = pd.DataFrame(found["earlier"]).set_index("source").nonlinear
    norm = {part: family[f"r2_norm_{part}"] for part in ("x", "sae", "error", "linear", "nonlinear")}
    rows = [
        ("norm R2 of x >= of Sae - .02", norm["x"] - norm["sae"], norm["x"] >= norm["sae"] - 0.02),
        ("norm R2 of Sae > of the error", norm["sae"] - norm["error"], norm["sae"] > norm["error"]),
        ("norm R2 of the error > of its nonlinear part", norm["error"] - norm["nonlinear"], norm["error"] > norm["nonlinear"]),
        ("norm R2 of the linear part is high (over .7)", norm["linear"], norm["linear"] > 0.7),
        ("norm R2 of the error is over .9 (the paper's large models)", norm["error"], norm["error"] > 0.9),
        ("vector R2 between .2 and .7", family.r2_error, family.r2_error.between(0.2, 0.7)),
        ("FVU_nonlinear < FVU", family.fvu_nonlinear / family.fvu, family.fvu_nonlinear < family.fvu),
        ("recovered by linear + nonlinear is 80 to 120%", linear.recovered + nonlinear.recovered,
         (linear.recovered + nonlinear.recovered).between(80, 120)),
        ("the linear part recovers within 15 points of its share of the norm", linear.recovered - linear.norm_share,
         (linear.recovered - linear.norm_share).abs() <= 15),
        ("the linear part recovers within 15 points of its share of the variance", linear.recovered - linear.variance_share,
         (linear.recovered - linear.variance_share).abs() <= 15),
        ("pursuit lowers FVU", fall, fall < 0),
        ("pursuit changes FVU_nonlinear by under 5%", change, change.abs() < 0.05),
        ("earlier SAEs predict the nonlinear part better than the same SAE", earlier.iloc[1:] - earlier.iloc[0],
         earlier.iloc[1:] > earlier.iloc[0]),
    ]  # fmt: skip
    if isinstance(laws := found["family"]["laws"]["all"], list):
        flat = pd.DataFrame(laws)
        rows.append(
            ("FVU_nonlinear is flatter in the width than FVU (ratio of the slopes)", flat.nonlinear_slope / flat.slope,
             flat.nonlinear_slope.abs() < 0.5 * flat.slope.abs())
        )  # fmt: skip
    return [
        {
            "ordering": name,
            "found": f"{values.min():.3g} to {values.max():.3g}",
            "holds": f"{int(holds.sum())} of {len(holds)}",
        }
        for name, values, holds in rows
    ]


SECTIONS = {
    "speed": speed,
    "family": family,
    "downstream": downstream,
    "pursuit": lambda rows: "## Pursuit at the SAE's own number of latents\n\n" + table(rows),
    "parts": lambda rows: "## SAEs trained on the parts of the error\n\n" + table(rows),
    "earlier": lambda rows: "## R2 from the reconstructions of earlier SAEs\n\n" + table(rows),
    "planted": planted,
}
