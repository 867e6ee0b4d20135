"""Checkpoints: whole or not at all, verified before use, the last two kept.

A run's folder holds `run.json` (fingerprint, configuration, status), `checkpoints/step_00000123/` (`tensors.safetensors`,
`history.json` and a checksummed `manifest.json` each), and once finished or interrupted `sae/` and `history.csv`.
"""

import contextlib
import json
import re
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jaxtyping import Shaped
from torch import Tensor

from saelab.autoencoders import serialization
from saelab.base.errors import CheckpointError, FormatError
from saelab.base.files import (
    MANIFEST,
    check_free,
    check_replaceable,
    remove_left_over,
    remove_listed,
    try_folder,
    whole_file,
    whole_folder,
)
from saelab.base.locks import locked as locked
from saelab.base.manifests import ALL, COUNT, FIGURE, SCALAR, TABLE, exactly, read_json, read_manifest, read_tensors
from saelab.base.tensors import save_tensors

RUN, HISTORY, TENSORS = "run.json", "history.json", "tensors.safetensors"
KEEP = 2
_STEP = re.compile(r"step_\d{8,}")
RUN_SCHEMA = {
    "status": exactly("running", "interrupted", "finished"), "fingerprint": TABLE, "metadata": TABLE, "report": TABLE
}  # fmt: skip
HISTORY_ROW = {
    "step": COUNT, "tokens": COUNT, "dead": COUNT,
    **dict.fromkeys(("loss", "l0", "explained_variance", "lr", "tokens_per_second"), FIGURE), "*": SCALAR,
}  # fmt: skip


def read_run(folder: Path) -> dict[str, Any] | None:
    """What `run.json` says; None where there is none. Raises `CheckpointError` when the folder holds something else."""
    if not (folder / RUN).exists():
        check_free(folder, "run")
        return None
    try:
        return read_json(folder / RUN, RUN_SCHEMA)
    except FormatError as error:
        raise CheckpointError(f"{error}; without it the run cannot go on: remove {folder} to start again") from error


def write_run(folder: Path, content: dict[str, Any]) -> None:
    with whole_file(folder / RUN) as temporary:
        temporary.write_text(json.dumps(content, indent=1))


def check_fingerprint(folder: Path, found: dict[str, Any], wanted: dict[str, Any]) -> None:
    """Raise `CheckpointError`, listing the keys that differ, unless the folder's run is the one asked for."""
    differences = _differences(found, wanted)
    if differences:
        raise CheckpointError(
            f"{folder} holds another run ({differences}): give another `out`, or the same arguments to continue it"
        )


def _differences(found: dict[str, Any], wanted: dict[str, Any]) -> str:
    found = {
        Path(name).name: value for name, value in found.items()
    }  # older sweeps have the whole paths of their runs there
    there, asked = leaves(found), leaves(json.loads(json.dumps(wanted)))
    differ = {key for key in there.keys() | asked.keys() if there.get(key) != asked.get(key)}
    keys = sorted(key for key in differ if key.rpartition(".")[2] != "device")  # older runs hold to the device
    return "; ".join(f"{key}: {there.get(key)!r} there, {asked.get(key)!r} asked" for key in keys)


def finished(folder: Path, wanted: dict[str, Any]) -> bool:
    """Whether the folder holds the run asked for, finished."""
    found = read_run(folder)
    return found is not None and found["status"] == "finished" and not _differences(found["fingerprint"], wanted)


@dataclass(frozen=True)
class Before:
    """What a run was when it ended, that now goes on: its tokens and steps, and where in its data it stood."""

    tokens: int = 0
    steps: int = 0
    place: list[int] = field(default_factory=list)


def longer(found: dict[str, Any], fingerprint: Callable[[int], dict[str, Any]], tokens: int) -> Before | None:
    """What the found run was, where it is finished and is the one asked for but for its fewer tokens."""
    each = found["fingerprint"]
    first = each if "tokens" in each else next(iter(each.values()), {})
    there, steps = first.get("tokens", tokens), -(-first.get("tokens", 0) // first.get("batch_size", 1))
    if found["status"] != "finished" or there >= tokens or _differences(each, fingerprint(there)):
        return None
    earlier = Before(**found.get("before", {}))
    if earlier.tokens:
        steps = earlier.steps - (-(there - earlier.tokens) // first["batch_size"])
    return Before(there, steps, found.get("place", []))


def leaves(fields: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested fields by dotted name."""
    found: dict[str, Any] = {}
    for name, value in fields.items():
        found |= leaves(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value}
    return found


def try_out(folder: Path, runs: Sequence[Path]) -> None:
    """Raise `CheckpointError`, before anything long is done, where the folder cannot take a run: it holds something else, or
    cannot be written (which that of a finished run need not). `runs` are the folders of the single SAEs."""
    found = read_run(folder)
    if found is None or found.get("status") != "finished":
        try_folder(folder)
        for run in runs:
            check_replaceable(run / "sae", serialization.listed, "an SAE folder")


def standing(folder: Path) -> list[str]:
    """In words, where the run of a folder stands: its status, its checkpoints."""
    found = read_run(folder)
    return [] if found is None else [found["status"], *(path.name for path in _steps(folder))]


def save(
    folder: Path, step: int, tensors: dict[str, Shaped[Tensor, "..."]], history: list[list[dict[str, Any]]]
) -> Path:
    """Write the checkpoint of this step, then remove all but the last two."""
    target = folder / "checkpoints" / f"step_{step:08d}"
    with whole_folder(target, manifest={"format": 1, "step": step}, listed=_written) as temporary:
        save_tensors(temporary / TENSORS, tensors)
        (temporary / HISTORY).write_text(json.dumps(history))
    for older in _steps(folder)[:-KEEP]:
        remove_listed(older, _written)
    return target


def _written(folder: Path) -> list[str] | None:
    """What `save` writes: so named in a folder of this name it is ours, also where a manifest was damaged."""
    return [TENSORS, HISTORY, MANIFEST] if folder.is_dir() else None


def load_latest(folder: Path) -> tuple[int, dict[str, Shaped[Tensor, "..."]], list[list[dict[str, Any]]]] | None:
    """(step, tensors, a history for each SAE) of the newest whole checkpoint; a damaged one is passed over with a warning.

    Raises `CheckpointError` when there are checkpoints and none is whole.
    """
    steps = _steps(folder)
    problems = []
    for path in reversed(steps):
        try:
            manifest = read_manifest(path, {"format": exactly(1), "step": COUNT}, [TENSORS, HISTORY])
            history = read_json(path / HISTORY, [[HISTORY_ROW]])
            return manifest["step"], read_tensors(path / TENSORS, {"*": (ALL, "...")})[0], history
        except FormatError as error:
            problems.append(str(error))
            if path != steps[0]:
                warnings.warn(f"{error}; going back to the checkpoint before it", stacklevel=2)
    if problems:
        raise CheckpointError(
            f"no checkpoint of {folder} is whole: {'; '.join(problems)}. Remove the folder to start again"
        )
    return None


def part(tensors: dict[str, Shaped[Tensor, "..."]], prefix: str) -> dict[str, Shaped[Tensor, "..."]]:
    """The tensors whose names begin so, without the beginning."""
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def remove_all(folder: Path) -> None:
    """The checkpoints of a finished run are no longer needed. Whoever may not remove them leaves them."""
    checkpoints = folder / "checkpoints"
    remove_left_over(checkpoints, listed=_written)
    with contextlib.suppress(OSError):  # also where there are none, or something of the user's is beside them
        for step in _steps(folder):
            remove_listed(step, _written)
        checkpoints.rmdir()


def _steps(folder: Path) -> list[Path]:
    return sorted(path for path in (folder / "checkpoints").glob("step_*") if _STEP.fullmatch(path.name))
