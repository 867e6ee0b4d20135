"""What a user may give along: labels and steering sweeps, from the forms they come in."""

import json
import math
import os
from collections.abc import Mapping
from typing import Any

import numpy as np

from saelab.errors import ConfigError
from saelab.files import user_path
from saelab.steering.grid import NONE, STEERED
from saelab.steering.sweep_table import Sweep


def labels_of(labels: Mapping[int, str] | str | os.PathLike | None) -> dict[int, str]:
    """Labels by latent, from a mapping or a JSON file: {"12": "..."} or [{"index" or "latent": 12, "description" or
    "label": "..."}]."""
    if labels is None:
        return {}
    if not isinstance(labels, Mapping):
        source = user_path(labels)
        try:
            read = json.loads(source.read_text(encoding="utf-8"))
            if isinstance(read, list):
                read = {
                    _first(row, "latent", "index", "feature"): _first(row, "label", "description", "explanation")
                    for row in read
                }
            labels = {int(key): value for key, value in read.items()}
        except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            raise ConfigError(f"cannot read labels from {source}: {error}") from error
    return {int(latent): str(text) for latent, text in sorted(labels.items())}


def _first(row: Mapping[str, Any], *names: str) -> Any:
    return next(row[name] for name in names if name in row)


def sweep_rows(sweeps: Any) -> dict[int, list[dict[str, Any]]]:
    """Rows of a steering sweep by latent, as JSON can hold them: those given, or of a `steering.Sweep` the steered texts,
    each with the unsteered one of its prompt and seed as `baseline`."""
    if sweeps is None:
        return {}
    rows = _steered(sweeps) if isinstance(sweeps, Sweep) else list(sweeps)
    found: dict[int, list[dict[str, Any]]] = {}
    for row in rows:
        latent = row.get("latent")
        if latent is None or (isinstance(latent, float) and math.isnan(latent)) or not str(row.get("text", "")):
            continue
        kept = {str(key): plain(value) for key, value in row.items() if key != "latent"}
        found.setdefault(int(latent), []).append(kept)
    return dict(sorted(found.items()))


def _steered(sweep: Sweep) -> list[dict[str, Any]]:
    rows: list[Any] = sweep.to_pandas().to_dict("records")
    unsteered = {(row["prompt_id"], row["seed"]): row["text"] for row in rows if row["baseline"] == NONE}
    return [
        {name: row[name] for name in ("latent", "operation", "strength", "unit", "prompt", "seed", "text")}
        | {"baseline": unsteered[row["prompt_id"], row["seed"]], "kl": row["kl_text"]}
        for row in rows
        if row["baseline"] == STEERED
    ]


def plain(value: Any) -> Any:
    value = value.item() if isinstance(value, np.generic) else value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if value is None or isinstance(value, bool | int | str) else str(value)
