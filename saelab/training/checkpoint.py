"""Checkpoints: whole or not at all, verified before use, the last two kept.

A run's folder holds `run.json` (fingerprint, configuration, status), `checkpoints/step_00000123/` (`tensors.safetensors`,
`history.json` and a checksummed `manifest.json` each), and once finished or interrupted `sae/` and `history.csv`.
"""

import contextlib
import json
import os
import shutil
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from saelab.errors import CheckpointError, FormatError
from saelab.files import read_manifest, whole_file, whole_folder

RUN, HISTORY, TENSORS = "run.json", "history.json", "tensors.safetensors"
KEEP = 2


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold the run's folder; `CheckpointError` when another process does."""
    folder.mkdir(parents=True, exist_ok=True)
    handle = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT)
    try:
        try:
            import fcntl

            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except ImportError:  # Windows has no flock: two writers are not kept apart there
            pass
        except OSError as error:
            raise CheckpointError(
                f"another process is writing into {folder}: wait for it or give another `out`"
            ) from error
        yield
    finally:
        os.close(handle)


def read_run(folder: Path) -> dict[str, Any] | None:
    """What `run.json` says; None where there is none. Raises `CheckpointError` when the folder holds something else."""
    if not (folder / RUN).exists():
        strangers = [p.name for p in folder.iterdir() if p.name != ".lock"] if folder.is_dir() else [folder.name]
        if folder.exists() and strangers:
            raise CheckpointError(
                f"{folder} holds other files ({', '.join(sorted(strangers)[:3])}) and no run: give a new or empty folder"
            )
        return None
    try:
        return json.loads((folder / RUN).read_text())
    except ValueError as error:
        raise CheckpointError(f"{folder / RUN} is not readable: remove the folder to start again") from error


def write_run(folder: Path, content: dict[str, Any]) -> None:
    with whole_file(folder / RUN) as temporary:
        temporary.write_text(json.dumps(content, indent=1))


def check_fingerprint(folder: Path, found: dict[str, Any], wanted: dict[str, Any]) -> None:
    """Raise `CheckpointError`, listing the keys that differ, unless the folder's run is the one asked for."""
    there, asked = _leaves(found), _leaves(json.loads(json.dumps(wanted)))
    keys = sorted(key for key in there.keys() | asked.keys() if there.get(key) != asked.get(key))
    if keys:
        differences = "; ".join(f"{key}: {there.get(key)!r} there, {asked.get(key)!r} asked" for key in keys)
        raise CheckpointError(
            f"{folder} holds another run ({differences}): give another `out`, or the same arguments to continue it"
        )


def _leaves(fields: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested fields by dotted name."""
    found: dict[str, Any] = {}
    for name, value in fields.items():
        found |= _leaves(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value}
    return found


def save(folder: Path, step: int, tensors: dict[str, Tensor], history: list[list[dict[str, Any]]]) -> Path:
    """Write the checkpoint of this step, then remove all but the last two."""
    target = folder / "checkpoints" / f"step_{step:08d}"
    with whole_folder(target, manifest={"format": 1, "step": step}) as temporary:
        save_file({name: tensor.detach().contiguous().clone() for name, tensor in tensors.items()}, temporary / TENSORS)
        (temporary / HISTORY).write_text(json.dumps(history))
    for older in _steps(folder)[:-KEEP]:
        shutil.rmtree(older)
    return target


def load_latest(folder: Path) -> tuple[int, dict[str, Tensor], list[list[dict[str, Any]]]] | None:
    """(step, tensors, a history for each SAE) of the newest whole checkpoint; a damaged one is passed over with a warning.

    Raises `CheckpointError` when there are checkpoints and none is whole.
    """
    steps = _steps(folder)
    problems = []
    for path in reversed(steps):
        try:
            manifest = read_manifest(path)
            return manifest["step"], load_file(path / TENSORS), json.loads((path / HISTORY).read_text())
        except (FormatError, OSError, ValueError, KeyError) as error:
            problems.append(str(error))
            if path != steps[0]:
                warnings.warn(f"{error}; going back to the checkpoint before it", stacklevel=2)
    if problems:
        raise CheckpointError(
            f"no checkpoint of {folder} is whole: {'; '.join(problems)}. Remove the folder to start again"
        )
    return None


def part(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The tensors whose names begin so, without the beginning."""
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def remove_all(folder: Path) -> None:
    """The checkpoints of a finished run are no longer needed."""
    shutil.rmtree(folder / "checkpoints", ignore_errors=True)


def _steps(folder: Path) -> list[Path]:
    return sorted((folder / "checkpoints").glob("step_*"))
