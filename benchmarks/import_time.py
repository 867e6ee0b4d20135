"""`import saelab` against `import torch`: wall time of fresh processes, taken in turns.

python benchmarks/import_time.py [--rounds 15]
"""

import argparse
import statistics
import subprocess
import sys
import time

import workers


def seconds(statement: str) -> float:
    """Wall time of a new interpreter that runs `statement`."""
    start = time.perf_counter()
    subprocess.run([sys.executable, "-c", statement], check=True, env=workers.environment(threads=1))
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    args = parser.parse_args()
    every_name = "import saelab; [getattr(saelab, name) for name in saelab.__all__]"
    statements = ("pass", "import torch", "import saelab", every_name)
    times: dict[str, list[float]] = {statement: [] for statement in statements}
    for statement in statements:
        seconds(statement)  # compiled files and the page cache
    machine = workers.machine(threads=1)
    for _ in range(args.rounds):
        for statement in statements:
            times[statement].append(seconds(statement))
    rows = [
        [f"`{statement}`", f"{statistics.median(t):.3f}", f"{min(t):.3f} to {max(t):.3f}"]
        + [f"{statistics.median(a / b for a, b in zip(t, times['import torch'], strict=True)):.2f}x"]
        for statement, t in times.items()
    ]
    workers.write_result(
        "import_time.md",
        "# Import time\n\n"
        + workers.table(["statement", "s, median", "s, range", "against torch"], rows)
        + f"\n\n{args.rounds} interleaved rounds, ratios paired by round. saelab loads its parts, torch too, when "
        + f"a name is first used: the last line uses all of them. {machine}.",
    )


if __name__ == "__main__":
    main()
