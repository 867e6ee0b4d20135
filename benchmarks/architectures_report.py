"""The tables of architectures.py: results/architectures.md and .csv, from the cells that are finished.

Intervals are 95% percentile bootstraps, 10,000 resamples of the 12 held-out documents and, where there are three or more, of
the seeds; differences are paired by seed (initialisation, data order) and document. `documents.json` beside the cells has
the document of each of the 483 held-out contexts (of the 11 that span two, the one with most of the tokens). Of 12 documents
such intervals are too narrow, so that an SAE is called better or worse only where a t interval excludes 0 as well.
"""

import csv
import functools
import json
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import numpy as np
import workers
from architectures_data import FINISHED, read_row

RESAMPLES = 10_000
T_11 = 2.201  # of 12 documents
Row = dict[str, Any]


def cells() -> list[Row]:
    """Every finished cell."""
    return [read_row(path) for path in sorted(FINISHED.glob("*.json.gz"))]


class Ratio(NamedTuple):
    """sum(top) / sum(bottom), its 95% bootstrap interval, and half the width of its t interval."""

    value: float
    low: float
    high: float
    half: float

    @property
    def verdict(self) -> str:
        """Better (lower), worse, or not told apart."""
        if self.low <= 0 <= self.high or abs(self.value) <= self.half:
            return "not told apart"
        return "better" if self.value < 0 else "worse"

    def shown(self, whole: float = 1.0) -> str:
        """In shares of `whole`."""
        return f"{self.value / whole:+.1%} [{self.low / whole:+.1%}, {self.high / whole:+.1%}]"


def compared(top: np.ndarray, bottom: np.ndarray) -> Ratio:
    """Both intervals of sum(top) / sum(bottom); [seeds, documents] each.

    The t interval is of the ratio estimator (Cochran 1977), with the variances over documents and over seeds added.
    """
    generator = np.random.default_rng(0)
    seeds, documents = top.shape
    of_documents = generator.multinomial(documents, [1 / documents] * documents, RESAMPLES)
    of_seeds = (
        generator.multinomial(seeds, [1 / seeds] * seeds, RESAMPLES) if seeds >= 3 else np.ones((RESAMPLES, seeds))
    )
    ratios = np.einsum("rs,sd,rd->r", of_seeds, top, of_documents) / np.einsum(
        "rs,sd,rd->r", of_seeds, bottom, of_documents
    )
    low, high = np.quantile(ratios, [0.025, 0.975])
    value = float(top.sum() / bottom.sum())
    sums = [(top - value * bottom).sum(axis) for axis in (0, 1)]
    variance = sum(len(x) / (len(x) - 1) * np.square(x).sum() for x in sums if len(x) > 1)
    return Ratio(value, float(low), float(high), T_11 * float(np.sqrt(variance)) / float(bottom.sum()))


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
                base = np.array([of_heldout(by["TopK", s]["stages"][stage]["error"]) for s in paired])
                mine = np.array([of_heldout(by[label, s]["stages"][stage]["equal_error"]) for s in paired])
                variation = np.array([of_heldout(by["TopK", s]["variation"]) for s in paired])
                found = compared(mine - base, variation)
                fvu = float(base.sum() / variation.sum())
                share = float(mine.sum() / variation.sum())
                table.append(
                    [
                        site, which, k, f"{tokens:,}", label, len(paired), f"{fvu:.4f}", f"{share:.4f}",
                        found.shown(fvu), found.verdict,
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
        error, before = (np.array([of_heldout(pair[i]["error"]) for pair in pairs]) for i in (0, 1))
        found = compared(error - before, before)
        silent, rare = (", ".join(f"{a[name] - b[name]:+,}" for a, b in pairs) for name in ("silent", "rare"))
        lines.append(
            f"- {label} against {other}: FVU {found.shown()} ({found.verdict}); silent {silent}; "
            f"density below 1e-4 {rare}."
        )
    return "\n".join(lines)


def by_document(values: list[float], documents: list[int]) -> np.ndarray:
    """Sums over the contexts of each document."""
    return np.bincount(np.unique(documents, return_inverse=True)[1], weights=values)


@functools.cache
def heldout_documents() -> list[int]:
    """The document of each held-out context."""
    return json.loads((FINISHED / "documents.json").read_text())


def of_heldout(values: list[float]) -> np.ndarray:
    """What a cell holds of every held-out context, by document."""
    return by_document(values, heldout_documents())


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
                found = against(mine, [base[r["seed"]] for r in mine], base, name)
                cells += [f"{total / n:.4f}", *(("", "") if label == "TopK" else (found.shown(), found.verdict))]
            table.append(cells)
            if label == "beta=1" and all((mode, r["seed"]) in control for r in mine):
                others = [control[mode, r["seed"]] for r in mine]
                ce, kl = (against(mine, others, base, name) for name in ("delta_ce", "kl"))
                lines.append(
                    f"- beta=1 against its control of shuffled gradients, {mode}, {contexts} contexts, {len(mine)} seeds, in "
                    f"shares of TopK's: delta CE {ce.shown()} ({ce.verdict}), KL {kl.shown()} ({kl.verdict})."
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


def against(mine: list[Row], others: list[Row], base: dict[int, Row], name: str) -> Ratio:
    """The difference of a figure to other SAEs of the same seeds, in shares of TopK's."""

    def figure(row: Row) -> np.ndarray:
        return by_document(row[name], row["documents"])

    return compared(
        np.array([figure(a) - figure(b) for a, b in zip(mine, others, strict=True)]),
        np.array([figure(base[r["seed"]]) for r in mine]),
    )


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
