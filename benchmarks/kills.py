"""Kills every long call with SIGKILL, over and over, and compares what it ends with, byte by byte, with an undisturbed call's.

    python benchmarks/kills.py [--kills 1000] [--seed 0]

The calls are those of `tests/killing.py`, made small. Half of the kills come at a file event drawn from all that the call has
(opening, half of a write, flushing, locking, renaming, making, removing), half at a moment drawn from its time; up to three one
after the other before the call may end. After each kill what the call replaces must be readable, old or new, and the user's
files beside it must be there; at the end every file must be as without a kill, and nothing more be there. One process at a
time, one thread.
"""

import argparse
import os
import random
import shutil
import sys
import tempfile
import time
import warnings
from pathlib import Path

import workers

sys.path.insert(0, str(workers.HERE.parent))

from tests import killing

SHARED_MEMORY = Path("/dev/shm")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    folder = Path(tempfile.mkdtemp(dir=SHARED_MEMORY if SHARED_MEMORY.is_dir() else None))
    os.environ["SAELAB_CACHE"] = str(folder / "cache")
    rng, rows, faults, started = random.Random(args.seed), [], [], time.perf_counter()
    kinds = killing.kinds()
    for number, (name, kind) in enumerate(kinds.items()):
        row, found = kills_of(kind, folder / str(number), -(-args.kills // len(kinds)), rng)
        rows.append([name, *row, len(found)])
        faults += [f"{name}: {fault}" for fault in found]
        print(*rows[-1], flush=True)
    shutil.rmtree(folder)
    total = [sum(int(row[column]) for row in rows) for column in (2, 3, 4, 5)]
    header = [
        "call",
        "file events",
        "killed at an event",
        "killed at a moment",
        "had just ended",
        "refused or different",
    ]
    workers.write_result(
        "kills.md",
        f"# {total[0] + total[1]:,} kills over {len(rows)} long calls\n\n"
        + workers.table(header, [*rows, ["all", "", *total]])
        + f"\n\nSeed {args.seed}, {time.perf_counter() - started:.0f} s. {workers.machine(1)}."
        + "".join(f"\n\n    {fault}" for fault in faults),
    )
    if faults:
        sys.exit(1)


def kills_of(kind: killing.Kind, folder: Path, most: int, rng: random.Random) -> tuple[list[int], list[str]]:
    """(file events of the call, kills at one, kills at a moment, kills that came too late) and what went wrong."""
    (folder / "whole").mkdir(parents=True)
    kind.prepare(folder / "whole")
    events = killing.events_of(lambda: kind.call(folder / "whole"))
    whole = killing.tree(folder / "whole", kind.changing)
    begun = time.perf_counter()
    killing.survives(kind, folder / "again", whole, [])
    seconds = time.perf_counter() - begun
    at_event = at_moment = late = 0
    faults: list[str] = []
    while at_event + at_moment < most:
        events_now = rng.random() < 0.5
        several = [
            {"event": rng.randrange(events)} if events_now else {"seconds": rng.uniform(0, seconds)}
            for _ in range(rng.choice((1, 1, 2, 3)))
        ]
        where = folder / "killed"
        try:
            died = killing.survives(kind, where, whole, several)
        except Exception as error:
            faults.append(f"{several}: {error!r}"[:1500])
            died = len(several)
        late += len(several) - died
        at_event, at_moment = at_event + died * events_now, at_moment + died * (not events_now)
        shutil.rmtree(where)
    return [events, at_event, at_moment, late], faults


if __name__ == "__main__":
    main()
