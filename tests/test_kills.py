"""Every long call, killed at its file events and called again: the same files, and all of the user's.

At a thousand kills, at every event and at random moments: `benchmarks/kills.py`.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

NAMES = (
    "train", "train on a model", "sweep", "harvest", "steering.sweep", "bundle", "page", "SAE.save", "Trajectory.save",
    "QuickSelection",
)  # fmt: skip
MOST = 6  # kills a call, spread over its events; saving, which is quick, is killed at every one
KILLING = """
import os, sys, warnings
from pathlib import Path
warnings.simplefilter("ignore")
folder, most = Path(sys.argv[1]), int(sys.argv[2])
os.environ["SAELAB_CACHE"] = str(folder / "cache")
from tests import killing
for number, (name, kind) in enumerate(killing.kinds().items()):
    where = folder / str(number)
    (where / "whole").mkdir(parents=True)
    kind.prepare(where / "whole")
    events = killing.events_of(lambda: kind.call(where / "whole"))
    whole, step = killing.tree(where / "whole", kind.changing), max(1, events // most) if events > 40 else 1
    try:
        died = [killing.survives(kind, where / str(event), whole, [{"event": event}]) for event in range(0, events, step)]
        print(f"{name}: {'survives' if died and all(died) else 'was not killed'}")
    except Exception as error:
        print(f"{name}: {error!r}".replace(chr(10), " ")[-1500:])
"""


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory) -> dict[str, str]:
    """By the call's name; in a process of its own, whose children inherit no threads."""
    root = Path(__file__).parents[1]
    path = os.pathsep.join([str(root), *sys.path[1:]])
    done = subprocess.run(
        [sys.executable, "-c", KILLING, str(tmp_path_factory.mktemp("kills")), str(MOST)],
        cwd=root, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}, timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return dict(line.split(": ", 1) for line in done.stdout.splitlines() if line.startswith(NAMES))


@pytest.mark.parametrize("name", NAMES)
def test_killed_at_a_file_event_the_call_goes_on_to_the_same_files(outcomes, name):
    assert outcomes[name] == "survives"
