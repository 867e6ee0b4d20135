"""Held-out explained variance of saelab and the peers on the same real activations, with the same tuning effort.

    python benchmarks/quality.py                        everything: harvest once, then cell by cell, resumable
    python benchmarks/quality.py --minutes 60 --rates 1 3 --scales unit
    python benchmarks/quality.py --synthetic --tokens 40000 --d-sae 256      no language model; a smoke test

A cell is one SAE: (site, token set, library, input scale, learning-rate multiplier). Every library gets the same rows
in the same order: position 0 left out, shuffled once over the whole of the data, without replacement; the set
"ordinary" also leaves out rows above 4 times the median norm. Rates multiply a library's own default. Peers choose
among raw inputs and inputs of unit mean square; saelab scales by itself. The choice falls on validation rows that
nobody trains on; the table shows the chosen cell on held-out documents. Cells go to results/quality.csv as they finish,
the likeliest first.
"""

import argparse
import csv
import os
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, get_type_hints

import quality_data
import workers

LIBRARIES = ("saelab", *workers.PEER_NAMES)
GRID = [("unit", 1.0), ("unit", 3.0), ("raw", 1.0), ("unit", 10.0), ("unit", 1 / 3)]
GRID += [("raw", 3.0), ("raw", 10.0), ("raw", 1 / 3)]
LOCK = threading.Lock()


@dataclass(frozen=True)
class Cell:
    """What is trained; the key of a row in the table of results."""

    site: str
    rows: str
    library: str
    scale: str
    rate: float
    tokens: int
    d_sae: int
    k: int
    batch_size: int
    seed: int


@dataclass(frozen=True)
class Result:
    """What came out: explained variance on validation and held-out rows, latents silent on the held-out rows."""

    validation: float
    heldout: float
    dead_fraction: float
    heldout_rows: int
    seconds: float
    threads: int


def run(cell: Cell, data: quality_data.Data, threads: int) -> Result:
    """Trains and scores one SAE in a process of its own."""
    steps = cell.tokens // cell.batch_size
    scale = data.unit_scale if cell.scale == "unit" else 1.0
    task = {"d_in": data.d_in, "d_sae": cell.d_sae, "k": cell.k, "batch_size": cell.batch_size, "steps": steps}
    train = {"rows": data.train_rows, "order": data.train_order, "scale": scale}
    heldout = {"rows": data.heldout_rows, "order": data.heldout_order, "scale": scale, "first": 0}
    with workers.Worker(cell.library, threads) as worker:
        trained = worker.ask(
            "train",
            task=task | {"rate": cell.rate, "seed": cell.seed},
            rows=train | {"first": 0, "count": steps * cell.batch_size},
        )
        validation = worker.ask("score", rows=train | {"first": data.n_train, "count": data.n_validation})
        final = worker.ask("score", rows=heldout | {"count": data.n_heldout})
    return Result(
        validation=validation["explained_variance"],
        heldout=final["explained_variance"],
        dead_fraction=final["dead_fraction"],
        heldout_rows=final["rows"],
        seconds=trained["seconds"],
        threads=threads,
    )


def read(path: Path) -> dict[Cell, Result]:
    """The cells finished so far."""
    if not path.exists():
        return {}
    with path.open(newline="") as file:
        return {parse(Cell, row): parse(Result, row) for row in csv.DictReader(file)}


def parse(kind: type, row: dict[str, str]) -> Any:
    """A dataclass from the columns of the same names."""
    return kind(**{name: convert(row[name]) for name, convert in get_type_hints(kind).items()})


def append(path: Path, cell: Cell, result: Result) -> None:
    """One row more, whole."""
    row = asdict(cell) | asdict(result)
    new = not path.exists()
    path.parent.mkdir(exist_ok=True)
    with LOCK, path.open("a", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(row))
        if new:
            writer.writeheader()
        writer.writerow(row)


def report(done: dict[Cell, Result], datasets: list[quality_data.Data], machine: str) -> str:
    """For each data set and library the cell with the best validation score; the library's plain default beside it."""
    rows = []
    for data in datasets:
        for library in LIBRARIES:
            mine = {c: r for c, r in done.items() if (c.site, c.rows, c.library) == (data.site, data.rows, library)}
            if not mine:
                continue
            best = max(mine, key=lambda cell: mine[cell].validation)
            default = next((r for c, r in mine.items() if c.rate == 1 and c.scale == GRID[0][0]), None)
            default = default or next((r for c, r in mine.items() if c.rate == 1), None)
            rows.append(
                [data.site, data.rows, library, f"{mine[best].heldout:.4f}", f"{mine[best].dead_fraction:.3f}"]
                + [f"{best.rate:.3g}x", "its own" if library == "saelab" else best.scale]
                + [f"{mine[best].validation:.4f}", f"{default.heldout:.4f}" if default else "-", len(mine)]
            )
    header = ["site", "tokens", "library", "held-out EV", "dead", "rate", "scale", "validation EV"]
    header += ["EV at the default rate", "cells tried"]
    c = next(iter(done))
    notes = "\n".join(f"- {data.site}, {data.rows}: {data.describe()}" for data in datasets)
    return (
        f"# Quality: d_sae {c.d_sae}, k {c.k}, {c.tokens:,} tokens, batch {c.batch_size}, seed {c.seed}\n\n"
        + workers.table(header, rows)
        + "\n\nEV = 1 - sum ||x - x_hat||^2 / sum ||x - mean||^2 over held-out documents; dead = share of latents that "
        "fire on none of them. The same rows in the same order for all; the cell of a library is chosen on validation "
        "rows among learning rates (multiples of its own default) and, for the peers, input scales. In runs of fewer "
        "than 20,000 steps dictionary_learning's warm-up is 5% of them, as 1,000 would be refused or too long; in runs "
        "under 1,000 steps sae-lens's auxiliary loss, which waits for 1,000 without firing, stays off; everything else "
        f"is each library's default.\n\n{notes}\n\n{machine}."
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=1_000_000)
    parser.add_argument("--d-sae", type=int, default=4096)
    parser.add_argument("--k", type=int, default=32)
    parser.add_argument("--batch", type=int, default=4096)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--libraries", nargs="+", default=list(LIBRARIES), choices=LIBRARIES)
    parser.add_argument("--sites", nargs="+", default=list(quality_data.SITES))
    parser.add_argument("--rows", nargs="+", default=["all", "ordinary"], choices=("all", "ordinary"))
    parser.add_argument("--rates", nargs="+", type=float, help="of 1 3 10 0.333; default all")
    parser.add_argument("--scales", nargs="+", choices=("unit", "raw"), default=["unit", "raw"])
    parser.add_argument("--minutes", type=float, default=float("inf"), help="start no cell after this time")
    parser.add_argument("--jobs", type=int, default=1, help="cells at a time")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="of each cell")
    parser.add_argument("--synthetic", action="store_true", help="small made-up rows instead of the language model's")
    parser.add_argument("--out", default="quality", help="name of the .csv and .md under benchmarks/results/")
    args = parser.parse_args()

    machine = workers.machine(args.threads)
    n_train = args.tokens // args.batch * args.batch
    prepare = quality_data.synthetic if args.synthetic else quality_data.harvested
    datasets = prepare(n_train, args.sites, args.rows)
    path = workers.RESULTS / f"{args.out}.csv"
    done = read(path)
    wanted = [
        (Cell(data.site, data.rows, library, scale, rate, n_train, args.d_sae, args.k, args.batch, args.seed), data)
        for scale, rate in GRID
        for data in datasets
        for library in args.libraries
        if (args.rates is None or any(abs(rate - r) < 0.01 for r in args.rates))
        and (scale in args.scales if library != "saelab" else scale == "unit")
    ]
    deadline = time.monotonic() + 60 * args.minutes

    def finish(cell: Cell, data: quality_data.Data) -> None:
        if cell in done or time.monotonic() > deadline:
            return
        result = run(cell, data, args.threads)
        append(path, cell, result)
        done[cell] = result
        name = f"{cell.site} {cell.rows} {cell.library} {cell.scale} x{cell.rate:.3g}"
        figures = f"validation {result.validation:.4f}, dead {result.dead_fraction:.3f}, {result.seconds:.0f} s"
        print(f"{name}: held out {result.heldout:.4f}, {figures}", flush=True)

    with ThreadPoolExecutor(args.jobs) as pool:
        for future in [pool.submit(finish, cell, data) for cell, data in wanted]:
            future.result()
    size = (n_train, args.d_sae, args.k, args.batch, args.seed)
    shown = {c: r for c, r in done.items() if (c.tokens, c.d_sae, c.k, c.batch_size, c.seed) == size}
    if shown:
        workers.write_result(f"{args.out}.md", report(shown, datasets, machine))


if __name__ == "__main__":
    main()
