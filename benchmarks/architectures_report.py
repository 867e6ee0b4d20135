"""The tables of architectures.py: results/architectures.md and .csv, from the cells that are finished.

Intervals are 95% percentile bootstraps, 10,000 resamples of the held-out contexts (downstream: documents) and, where there
are three or more, of the seeds; differences are paired by seed (initialisation, data order) and context or document.
"""

import csv
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import workers
from architectures_data import FINISHED, read_row

RESAMPLES = 10_000
Row = dict[str, Any]


def cells() -> list[Row]:
    """Every finished cell."""
    return [read_row(path) for path in sorted(FINISHED.glob("*.json.gz"))]


def interval(top: np.ndarray, bottom: np.ndarray) -> tuple[float, float, float]:
    """sum(top) / sum(bottom) with its bootstrap interval; [seeds, contexts] each."""
    generator = np.random.default_rng(0)
    seeds, contexts = top.shape
    of_contexts = generator.multinomial(contexts, [1 / contexts] * contexts, RESAMPLES)
    of_seeds = (
        generator.multinomial(seeds, [1 / seeds] * seeds, RESAMPLES) if seeds >= 3 else np.ones((RESAMPLES, seeds))
    )
    ratios = np.einsum("rs,sd,rd->r", of_seeds, top, of_contexts) / np.einsum(
        "rs,sd,rd->r", of_seeds, bottom, of_contexts
    )
    low, high = np.quantile(ratios, [0.025, 0.975])
    return float(top.sum() / bottom.sum()), float(low), float(high)


def verdict(low: float, high: float, good: str = "lower") -> str:
    """Better, equal (not told apart) or worse."""
    if low <= 0 <= high:
        return "not told apart"
    return "better" if (high < 0) == (good == "lower") else "worse"


def groups(rows: Iterable[Row], key: Callable[[Row], Any]) -> dict[Any, list[Row]]:
    """Rows by key, in the order of the keys."""
    found: dict[Any, list[Row]] = {}
    for row in rows:
        found.setdefault(key(row), []).append(row)
    return dict(sorted(found.items()))


def choice(rows: list[Row]) -> str:
    """FVU of Mutual and Feature Choice against TopK at equal measured L0."""
    table = []
    for (site, which, k), group in groups(rows, lambda r: (r["site"], r["rows"], r["k"])).items():
        by = {(r["label"], r["seed"]): r for r in group}
        seeds = sorted({r["seed"] for r in group})
        for stage in range(len(group[0]["stages"])):
            tokens = group[0]["stages"][stage]["tokens"]
            for label in ("MutualChoice", "FeatureChoice"):
                paired = [s for s in seeds if ("TopK", s) in by and (label, s) in by]
                if not paired or (label == "FeatureChoice" and stage < len(group[0]["stages"]) - 1):
                    continue
                base = np.array([by["TopK", s]["stages"][stage]["error"] for s in paired])
                mine = np.array([by[label, s]["stages"][stage]["equal_error"] for s in paired])
                variation = np.array([by["TopK", s]["variation"] for s in paired])
                value, low, high = interval(mine - base, variation)
                fvu = float(base.sum() / variation.sum())
                share = float(mine.sum() / variation.sum())
                table.append(
                    [
                        site, which, k, f"{tokens:,}", label, len(paired), f"{fvu:.4f}", f"{share:.4f}",
                        f"{value / fvu:+.1%} [{low / fvu:+.1%}, {high / fvu:+.1%}]", verdict(low, high),
                    ]
                )  # fmt: skip
    return workers.table(
        ["site", "rows", "k", "tokens", "SAE", "seeds", "FVU TopK", "FVU", "difference in shares of TopK's", "verdict"],
        table,
    )


def thresholds(rows: list[Row]) -> str:
    """Held-out L0 as deployed, and silent latents."""
    table = []
    last = [r | r["stages"][-1] for r in rows if r["label"] != "TopK"]
    for (site, which, k, label), group in groups(last, lambda r: (r["site"], r["rows"], r["k"], r["label"])).items():
        l0 = [r["l0"] for r in group]
        table.append(
            [
                site, which, k, label, len(group), ", ".join(f"{v:.2f}" for v in l0),
                f"{max(abs(v / k - 1) for v in l0):.1%}", ", ".join(str(r["silent"]) for r in group),
                f"{group[0]['heldout_rows']:,}",
            ]
        )  # fmt: skip
    return workers.table(
        ["site", "rows", "k", "SAE", "seeds", "held-out L0", "farthest from k", "silent latents", "held-out rows"],
        table,
    )


def plain_table(rows: list[Row], *names: str) -> str:
    """One row a cell: the last stage's figures."""
    table = [
        [
            r["site"],
            r["rows"],
            r["label"],
            r["k"],
            r["seed"],
            f"{s['l0']:.2f}",
            f"{s['fvu']:.4f}",
            s["silent"],
            s["rare"],
        ]
        for r in sorted(rows, key=lambda r: (r["site"], r["rows"], r["k"], r["label"], r["seed"]))
        for s in [r["stages"][-1]]
    ]
    return workers.table(
        ["site", "rows", names[0], names[1], "seed", "held-out L0", "held-out FVU", "silent", "density < 1e-4"], table
    )


def revival(rows: list[Row]) -> str:
    """Each SAE, then what the auxiliary losses change: FVU and silent and rare latents, paired by seed."""
    lines = [plain_table(rows, "auxiliary loss", "k"), ""]
    last = {(r["label"], r["seed"]): r["stages"][-1] for r in rows}
    for label, other in (("aux_k", "none"), ("aux_zipf", "none"), ("aux_zipf", "aux_k")):
        seeds = sorted(s for name, s in last if name == label and (other, s) in last)
        pairs = [(last[label, s], last[other, s]) for s in seeds]
        error, before = (np.array([pair[i]["error"] for pair in pairs]) for i in (0, 1))
        value, low, high = interval(error - before, before)
        silent, rare = (", ".join(f"{a[name] - b[name]:+,}" for a, b in pairs) for name in ("silent", "rare"))
        lines.append(
            f"- {label} against {other}: FVU {value:+.1%} [{low:+.1%}, {high:+.1%}]; silent {silent}; "
            f"density below 1e-4 {rare}."
        )
    return "\n".join(lines)


def by_document(row: Row, name: str) -> np.ndarray:
    """A figure's sums over the contexts of each document."""
    return np.bincount(np.unique(row["documents"], return_inverse=True)[1], weights=row[name])


def downstream() -> str:
    """Differences of delta CE and KL to TopK, paired by seed and document, then those of beta 1 to its shuffled control."""
    rows = [read_row(path) for path in sorted((FINISHED / "downstream").glob("*.json.gz"))]
    rows = [r for r in rows if r["study"] == "gradient"]
    table, lines = [], ["", ""]
    for (site, k, contexts), group in groups(rows, lambda r: (r["site"], r["k"], len(r["documents"]))).items():
        base = {r["seed"]: r for r in group if r["label"] == "TopK"}
        control = {(r["mode"], r["seed"]): r for r in group if r["label"] == "beta=1 shuffled"}
        for (label, mode), mine in groups(
            [r for r in group if r["seed"] in base], lambda r: (r["label"], r["mode"])
        ).items():
            cells = [site, k, f"{contexts:,}", label, mode, len(mine)]
            for name, count in (("delta_ce", "targets"), ("kl", "positions")):
                total, n = (sum(np.array(r[key]).sum() for r in mine) for key in (name, count))
                shown, said = against(mine, [base[r["seed"]] for r in mine], base, name)
                cells += [f"{total / n:.4f}", *(("", "") if label == "TopK" else (shown, said))]
            table.append(cells)
            if label == "beta=1" and all((mode, r["seed"]) in control for r in mine):
                others = [control[mode, r["seed"]] for r in mine]
                ce, kl = (against(mine, others, base, name) for name in ("delta_ce", "kl"))
                lines.append(
                    f"- beta=1 against its control of shuffled gradients, {mode}, {contexts} contexts, {len(mine)} seeds, in "
                    f"shares of TopK's: delta CE {ce[0]} ({ce[1]}), KL {kl[0]} ({kl[1]})."
                )
    head = [
        "site",
        "k",
        "contexts",
        "SAE",
        "selection",
        "seeds",
        "delta CE",
        "against TopK",
        "",
        "KL",
        "against TopK",
        "",
    ]
    return workers.table(head, table) + "\n".join(lines)


def against(mine: list[Row], others: list[Row], base: dict[int, Row], name: str) -> tuple[str, str]:
    """The difference of a figure to other SAEs of the same seeds in shares of TopK's, with its interval, and what it says."""
    value, low, high = interval(
        np.array([by_document(a, name) - by_document(b, name) for a, b in zip(mine, others, strict=True)]),
        np.array([by_document(base[r["seed"]], name) for r in mine]),
    )
    return f"{value:+.1%} [{low:+.1%}, {high:+.1%}]", verdict(low, high)


SECTIONS = (
    ("choice", "Mutual Choice and Feature Choice against TopK (a finding)", choice),
    ("choice", "Thresholds at inference", thresholds),
    ("revival", "aux_zipf against aux_k (a finding)", revival),
    ("jumprelu", "JumpReLU reaches its target", lambda rows: plain_table(rows, "thresholds at the start", "target")),
    ("gradient", "g-SAE: reconstruction", lambda rows: plain_table(rows, "SAE", "k")),
    ("baselines", "Baselines", lambda rows: plain_table(rows, "SAE", "k")),
)


def write() -> None:
    """Write both files."""
    rows = cells()
    lines = [
        "# Architectures",
        "",
        workers.machine(1),
        "",
        (workers.HERE / "architectures_notes.md").read_text().strip(),
    ]
    for study, title, make in SECTIONS:
        mine = [r for r in rows if r["study"] == study]
        if mine:
            lines += ["", f"## {title}", "", make(mine)]
    lines += ["", "## g-SAE downstream (a finding)", "", downstream()]
    (workers.RESULTS / "architectures.md").write_text("\n".join(lines) + "\n")
    plain = ["study", "site", "rows", "label", "k", "seed", "d_sae", "tokens", "distinct", "heldout_rows"]
    figures = ["stage", "l0", "fvu", "silent", "rare", "equal_l0", "equal_fvu"]
    with (workers.RESULTS / "architectures.csv").open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow([*plain, *figures])
        for row in rows:
            for stage in row["stages"]:
                writer.writerow([*(row[n] for n in plain), *(stage.get(n, "") for n in figures)])
