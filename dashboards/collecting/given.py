"""What a user may give along: labels and steering sweeps, from the forms they come in."""

import math
from collections.abc import Iterable, Mapping
from typing import Any

from saelab.base import checks
from saelab.base.errors import ConfigError
from saelab.dashboards.labels import Label, read_labels
from saelab.pages.packing import plain
from saelab.steering.grid import NONE, STEERED
from saelab.steering.sweep_table import Sweep


def labels_of(labels: Any, d_sae: int) -> dict[int, Label]:
    """What `read_labels` makes of them, ascending. `ConfigError` for a latent that is not there."""
    found = {} if labels is None else read_labels(labels)
    return {_latent("labels", latent, d_sae): found[latent] for latent in sorted(found)}


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
