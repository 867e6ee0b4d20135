"""QuickSelection against Laplacian score, MCFS, random and all features, and what its training costs.

    python benchmarks/quickselection.py                      everything; resumable, cell by cell
    python benchmarks/quickselection.py accuracy --threads 1 accuracies, peak memory, parameters (the machine may be busy)
    python benchmarks/quickselection.py timing costs kernels  seconds (the machine must be idle)
    python benchmarks/quickselection.py report               the tables anew, from what was measured
    python benchmarks/quickselection.py --toy                a trial of all parts in a minute

A cell is one ranking: (data, method, seed), in a process of its own where it is more than a draw. The seeds were fixed
beforehand: they count from 0, to 2 for planted data and in ablations, to 4 elsewhere and to 19 for random selection. On
Isolet and Fashion-MNIST, where five runs could not be told from chance, QuickSelection was drawn further, to 19, and random to
49, after looking: the report says so. Cells go to
results/quickselection.csv (accuracy), quickselection_timing.csv (one run a cell on an idle machine), quickselection_costs.csv
and quickselection_kernels.csv as they finish; results/quickselection.md is written from them.
"""

import argparse
import csv
import itertools
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import selection_probes
import workers

DATA = ("planted", "Madelon", "digits", "Isolet", "MNIST subset", "Fashion-MNIST")
TIMED = ("QuickSelection", "QuickSelection, 10 epochs", "Laplacian score", "MCFS")
METHODS = (*TIMED, "random", "all")
LONGER = "QuickSelection, 500 epochs"  # on Isolet: as many steps as the paper's, whose Isolet has five times the rows
ABLATIONS = (
    LONGER,
    "summed strength",
    "fresh noise",
    "static topology",
    "dense twin",
    "output strength",
    "both strengths",
    "degree",
)
ABLATED = ("planted", "digits", "Isolet", "toy")
CLOSE = ("Isolet", "Fashion-MNIST")  # where five runs could not be told from chance
COSTS = ("madelon_size", "wide", "huge")
PARTS = ("accuracy", "timing", "costs", "kernels")
KEY = ("data", "method", "seed", "epochs")
PAPER = (
    "The paper has 90.3 for Madelon, trees, 100 epochs; its Isolet is a larger set, not comparable with these 1,560 rows. It "
    "has MCFS at 88.7 on all of MNIST. Ours was at 17.1 on the subset while a heat kernel of one width weighed neighbours: "
    "on scaled pixels its smoothest eigenvectors were islands of two to six images. Neighbours weigh 1 "
    "now, which was chosen on "
    "MNIST and lowers Isolet (81.5 before) and digits (94.8 before)."
)


def cells(names: list[str], epochs: int) -> list[dict[str, Any]]:
    """Every cell, the comparison before the ablations."""
    found = []
    for methods, where in ((METHODS, names), (ABLATIONS, [name for name in names if name in ABLATED])):
        for name in where:
            found += [cell(name, method, seed, epochs) for method in methods for seed in range(runs(name, method))]
    return found


def cell(*values: Any) -> dict[str, Any]:
    return dict(zip(KEY, values, strict=True))


def runs(name: str, method: str) -> int:
    if method == LONGER:
        return 5 if name == "Isolet" else 0
    if name in CLOSE and method in ("QuickSelection", "random"):
        return 50 if method == "random" else 20
    if (name, method) == ("toy", "random"):
        return 3
    return 20 if method == "random" else 3 if name in ("planted", "toy") or method in ABLATIONS else 5


def child(function: str, threads: int, **arguments: Any) -> dict[str, Any]:
    """The answer of a function of selection_probes.py, run in a process of its own."""
    command = [sys.executable, __file__, "--child", function, "--arguments", json.dumps(arguments)]
    done = subprocess.run(command, env=workers.environment(threads), capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{function} {arguments} failed:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def read(path: Path) -> list[dict[str, str]]:
    return list(csv.DictReader(path.open(newline=""))) if path.exists() else []


def append(path: Path, row: dict[str, Any]) -> None:
    new = not path.exists()
    path.parent.mkdir(exist_ok=True)
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(row))
        if new:
            writer.writeheader()
        writer.writerow(row)


def key(row: dict[str, Any]) -> tuple[str, ...]:
    return tuple(str(row[name]) for name in KEY)


def fill(path: Path, function: str, wanted: list[dict[str, Any]], threads: int, deadline: float) -> None:
    """Run the cells that are not in the table yet; draws of one kind share a process."""
    done = {key(row) for row in read(path)}
    missing = [row for row in wanted if key(row) not in done]
    draws = [list(rows) for _, rows in itertools.groupby(missing, lambda row: (row["data"], row["method"]))]
    groups = [part for rows in draws for part in ([rows] if rows[0]["method"] == "random" else [[row] for row in rows])]
    for together in groups:
        if time.monotonic() > deadline:
            return
        for row, result in zip(together, child(function, threads, cells=together), strict=True):
            append(path, row | result | {"threads": threads})
            print(*row.values(), {name: value for name, value in result.items() if value != ""}, flush=True)


def spread(rows: list[dict[str, str]], column: str, scale: float, digits: int) -> str:
    values = [scale * float(row[column]) for row in rows if row[column] != ""]
    if not values:
        return "-"
    deviation = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):,.{digits}f}{deviation}"


def section(name: str, methods: tuple[str, ...], rows: list[dict[str, str]], timed: list[dict[str, str]]) -> str:
    lines = []
    for method in methods:
        mine = [row for row in rows if (row["data"], row["method"]) == (name, method)]
        clock = [row for row in timed if (row["data"], row["method"]) == (name, method)]
        if mine:
            lines.append(
                [
                    method,
                    spread(mine, "trees", 100, 1),
                    spread(mine, "clusters", 100, 1),
                    spread(mine, "recovered", 1, 2),
                ]
                + [spread(clock, "seconds", 1, 1), spread(mine, "peak_mib", 1, 0), spread(mine, "parameters", 1, 0)]
                + [len(mine)]
            )
    header = [
        "method",
        "trees, %",
        "k-means, %",
        "true features",
        "seconds",
        "MiB above the data",
        "parameters",
        "runs",
    ]
    return f"## {name}\n\n{workers.table(header, lines)}" if lines else ""


def against_random(names: list[str], rows: list[dict[str, str]]) -> str:
    """Is QuickSelection ahead of random subsets? Differences of means, with the standard error over runs and subsets."""
    lines = []
    for name in names:
        ours, drawn = (
            [row for row in rows if (row["data"], row["method"]) == (name, method)]
            for method in ("QuickSelection", "random")
        )
        if min(len(ours), len(drawn)) > 1:
            leads = [lead(ours, drawn, column) for column in ("trees", "clusters")]
            lines.append(
                [
                    name,
                    len(ours),
                    len(drawn),
                    *(f"{by:+.1f} ± {error:.1f}: {verdict(by, error)}" for by, error in leads),
                ]
            )
    header = ["data", "runs", "random subsets", "trees, points", "k-means, points"]
    return f"## QuickSelection less random selection\n\n{workers.table(header, lines)}" if lines else ""


def lead(ours: list[dict[str, str]], drawn: list[dict[str, str]], column: str) -> tuple[float, float]:
    samples = [[100 * float(row[column]) for row in rows] for rows in (ours, drawn)]
    error = sum(statistics.variance(values) / len(values) for values in samples) ** 0.5
    return statistics.mean(samples[0]) - statistics.mean(samples[1]), error


def verdict(by: float, error: float) -> str:
    return "not told apart" if abs(by) < 2 * error else "ahead" if by > 0 else "behind"


def kernels_section(rows: list[dict[str, str]]) -> str:
    widths = sorted({row["features"] for row in rows}, key=int)
    of = {(row["product"], row["way"], row["features"]): f"{float(row['ns']):.1f}" for row in rows}
    lines = [
        [product, way, *(of[product, way, d] for d in widths)] for product, way in dict.fromkeys(k[:2] for k in of)
    ]
    header = ["product", "way", *(f"{int(d):,} features" for d in widths)]
    return f"## Kernels: ns a link for 100 samples, one thread\n\n{workers.table(header, lines)}" if rows else ""


def costs_section(rows: list[dict[str, str]]) -> str:
    of = {row["probe"]: row for row in rows}
    lines = []
    if "madelon_size" in of:
        row = of["madelon_size"]
        lines.append(["2,080 x 500, hidden 1,000, 100 epochs", f"{float(row['seconds']):.1f} s", "under 20 s"])
    if "wide" in of:
        row = {name: float(value) for name, value in of["wide"].items() if name != "probe" and value}
        ours = f"{row['seconds']:.2f} s, twin {row['twin_seconds']:.2f} s: {row['twin_seconds'] / row['seconds']:.1f}x"
        lines.append(["1,000 x 20,000, hidden 1,000: an epoch, against the dense masked twin", ours, "at least 5x"])
        held = f"{row['bytes'] / 2**20:.0f} MiB, twin {row['twin_bytes'] / 2**20:.0f} MiB"
        lines.append(
            [
                "the same: weights, momenta, indices or masks",
                f"{held}: 1/{row['twin_bytes'] / row['bytes']:.0f}",
                "1/10",
            ]
        )
    if "huge" in of:
        row = of["huge"]
        text = f"{float(row['peak_mib']) / 1024:.2f} GiB, {float(row['seconds']):.0f} s"
        lines.append(["1,000 x 200,000 float32, 2 epochs: peak of the whole process", text, "under 4 GB"])
    threads = f", threads: {rows[-1]['threads']}" if rows else ""
    return f"## Costs{threads}\n\n{workers.table(['what', 'measured', 'bar'], lines)}" if lines else ""


def report(out: str, names: list[str], machine: str) -> str:
    rows, timed, costs, kernels = (
        read(workers.RESULTS / f"{out}{part}.csv") for part in ("", "_timing", "_costs", "_kernels")
    )
    parts = [section(name, METHODS + ABLATIONS, rows, timed) for name in names]
    notes = (
        "Trees: accuracy on the test part of 50 extremely randomised trees that see only the K selected features. k-means: "
        "accuracy after the best matching, ten starts, on the training part. K is 20 for planted data and Madelon, 16 for "
        "digits, 50 for the others. Mean and standard deviation over the runs; Laplacian score, MCFS and all features "
        "vary only with the seed of the trees and of k-means. Below them the ablations. MiB is the growth of memory above the "
        "loaded data. "
        "Seconds: one run, two threads, nothing else running; the costs and kernels below likewise. The accuracies were made "
        "with one thread beside other work; the load in the last line is that of writing this. "
        f"{PAPER} Differences of means come with their standard error over runs and subsets, on the one split; within two of "
        "them the two are not told apart.\n\n"
        "To be read with these: Isolet and Fashion-MNIST were drawn further (20 runs, 50 subsets) after five runs had been "
        "looked at and were not told apart from random selection, so that two standard errors promise less there than "
        "elsewhere. On planted data k-means does not tell QuickSelection from random subsets, whatever the trees say. On "
        "Isolet 10 epochs are below random selection. On Fashion-MNIST the trees do not tell 100 epochs from random selection."
    )
    parts = [notes, against_random(names, rows), *parts, costs_section(costs), kernels_section(kernels)]
    return "\n\n".join(["# QuickSelection", *filter(None, parts), machine + "."])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", default=PARTS, help=f"of: {' '.join(PARTS)}, or report")
    parser.add_argument("--data", nargs="+", default=list(DATA), choices=(*DATA, "toy"))
    parser.add_argument("--epochs", type=int, default=100)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--minutes", type=float, default=float("inf"), help="start no cell after this time")
    parser.add_argument("--toy", action="store_true", help="small sizes, written to .cache/")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--arguments", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        print(json.dumps(getattr(selection_probes, args.child)(**json.loads(args.arguments))))
        return

    machine, deadline = workers.machine(args.threads), time.monotonic() + 60 * args.minutes
    out = "../.cache/toy" if args.toy else "quickselection"
    names, epochs = (["toy"], 3) if args.toy else (args.data, args.epochs)
    if "accuracy" in args.parts:
        fill(workers.RESULTS / f"{out}.csv", "scored", cells(names, epochs), args.threads, deadline)
    if "timing" in args.parts:
        wanted = [cell(name, method, 0, epochs) for name in names for method in TIMED]
        fill(workers.RESULTS / f"{out}_timing.csv", "timed", wanted, args.threads, deadline)
    if "costs" in args.parts:
        path = workers.RESULTS / f"{out}_costs.csv"
        path.unlink(missing_ok=True)
        empty = dict.fromkeys(("seconds", "twin_seconds", "bytes", "twin_bytes", "peak_mib"), "")
        for probe in COSTS:
            append(
                path, {"probe": probe, **empty, **child(probe, args.threads, small=args.toy), "threads": args.threads}
            )
    if "kernels" in args.parts:
        path = workers.RESULTS / f"{out}_kernels.csv"
        path.unlink(missing_ok=True)
        for row in child("kernels", 1, small=args.toy):
            append(path, row)
    workers.write_result(f"{out}.md", report(out, names, machine))


if __name__ == "__main__":
    main()
