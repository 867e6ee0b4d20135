"""What a user may give along: labels and steering sweeps, from the forms they come in."""

import json
import math
from collections.abc import Iterable, Mapping
from typing import Any

from saelab.base import checks
from saelab.base.errors import ConfigError
from saelab.base.files import user_path
from saelab.pages.packing import plain
from saelab.steering.grid import NONE, STEERED
from saelab.steering.sweep_table import Sweep


def labels_of(labels: Any, d_sae: int) -> dict[int, str]:
    """Labels by latent, from a mapping or a JSON file: {"12": "..."} or [{"index" or "latent": 12, "description" or
    "label": "..."}]. `ConfigError` for a file of another form or a latent that is not there."""
    if labels is None:
        return {}
    where, read = "labels", labels
    try:
        if not isinstance(read, Mapping):
            source = user_path(labels)
            where = f"labels in {source}"
            read = json.loads(source.read_text(encoding="utf-8"))
        if isinstance(read, list):
            read = {
                _first(row, "latent", "index", "feature"): _first(row, "label", "description", "explanation")
                for row in read
            }
        found = {int(latent): str(text) for latent, text in read.items()}
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise ConfigError(f"cannot read {where}: {error}; give {{latent: text}}, or a JSON file of such") from error
    return {_latent("labels", latent, d_sae): found[latent] for latent in sorted(found)}


def _first(row: Mapping[str, Any], *names: str) -> Any:
    for name in names:
        if name in row:
            return row[name]
    raise KeyError(f"no {' or '.join(names)} in {row}")


def _latent(name: str, latent: Any, d_sae: int) -> int:
    return checks.count(f"a latent of {name}", latent, least=0, most=d_sae - 1, of="those of the autoencoder")


def sweep_rows(sweeps: Any, d_sae: int) -> dict[int, list[dict[str, Any]]]:
    """Rows of a steering sweep by latent, as JSON can hold them: those given, or of a `steering.Sweep` the steered texts,
    each with the unsteered one of its prompt and seed as `baseline`. A table is a list of its rows; `ConfigError` for another
    form or a latent that is not there."""
    if sweeps is None:
        return {}
    rows = _steered(sweeps) if isinstance(sweeps, Sweep) else sweeps
    rows = rows.to_dict("records") if hasattr(rows, "to_dict") else rows
    rows = list(rows) if isinstance(rows, Iterable) else [rows]
    if not all(isinstance(row, Mapping) for row in rows):
        raise ConfigError(f"sweeps is {type(sweeps).__name__}: give a steering.Sweep, or rows with a latent and a text")
    found: dict[int, list[dict[str, Any]]] = {}
    for row in rows:
        latent = row.get("latent")
        if latent is None or (isinstance(latent, float) and math.isnan(latent)) or not str(row.get("text", "")):
            continue
        kept = {str(key): plain(value) for key, value in row.items() if key != "latent"}
        latent = int(latent) if isinstance(latent, float) and latent.is_integer() else latent  # of a table with gaps
        found.setdefault(_latent("sweeps", latent, d_sae), []).append(kept)
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
