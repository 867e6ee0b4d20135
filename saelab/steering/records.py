"""The rows of a sweep, in memory or in a folder: each batch a file of its own, whole or not at all."""

import contextlib
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from saelab.base.errors import CheckpointError, FormatError
from saelab.base.files import check_free, remove_left_over, user_path, whole_file
from saelab.base.locks import locked
from saelab.base.manifests import COUNT, INTEGER, NUMBER, TEXT, Kind, Schema, exactly, read_json
from saelab.steering.grid import BASELINES, STEERED
from saelab.training.checkpoint import check_fingerprint

SWEEP, SCORES = "sweep.json", "scores.json"

# Figures of a steered text, beside those of the text itself; an unsteered one has none of them.
OF_THE_TEXT = (
    "repetition_4", "distinct_2", "changed_share", "first_divergence", "perplexity", "perplexity_ranked"
)  # fmt: skip
OF_THE_STEERING = (
    "kl_next", "kl_text", "kl_max", "mass_next", "mass_text", "rise_next", "rise_text", "own_mass_next",
    "own_mass_text", "own_rise_next", "own_rise_text", "relative_change", "norm_ratio", "target_before", "target_after",
    "off_target_l1", "off_target_flipped", "target_before_later", "target_after_later", "off_target_l1_later",
    "off_target_flipped_later",
)  # fmt: skip
MEASURES = OF_THE_STEERING + OF_THE_TEXT

# What the files hold, as far as it is read.
WRITTEN = Kind(
    "a number, null or an infinity",
    lambda value: value in (None, "inf", "-inf") or type(value) is int and abs(value) < 2**63 or type(value) is float,
)
IDS = Kind(
    "a list of token ids or null", lambda value: value is None or type(value) is list and all(map(COUNT.holds, value))
)
OF_SWEEP: Schema = {
    "latents": [COUNT], "operations": [TEXT], "prompts": [TEXT], "seeds": [INTEGER], "texts": COUNT, "model": TEXT,
    "site": TEXT,
    "unit?": TEXT.or_null(), "later_site?": TEXT.or_null(), "scope?": TEXT, "temperature?": NUMBER,
}  # fmt: skip
OF_ROW: Schema = {
    "row": COUNT, "baseline": exactly(*BASELINES, STEERED), "latent": COUNT.or_null(), "operation": TEXT.or_null(),
    "strength": WRITTEN, "draw": COUNT.or_null(), "control": COUNT.or_null(), "prompt_id": COUNT, "seed": INTEGER,
    "text": TEXT.or_null(), "ids": IDS, **{f"{name}?": WRITTEN for name in MEASURES},
}  # fmt: skip
OF_SCORES: Schema = {"top_tokens": [[TEXT]], "output_score": [WRITTEN], "input_score": [WRITTEN]}


class Records:
    """`rows` by their number, in the order of being added; `scores` of the latents, None until kept; `settings` asked for."""

    def __init__(self, settings: dict[str, Any], path: Path | None = None) -> None:
        self.settings, self.path = settings, path
        self.rows: dict[int, dict[str, Any]] = {}
        self.scores: dict[str, Any] | None = None

    @property
    def complete(self) -> bool:
        return self.scores is not None and len(self.rows) == self.settings.get("texts")

    def add(self, rows: list[dict[str, Any]]) -> None:
        """Keep the rows of one batch."""
        self.rows |= {row["row"]: row for row in rows}
        if self.path is None:
            return
        if not (
            self.path / SWEEP
        ).exists():  # somebody removed the folder: it is made again, with the rows before these
            self.begin()
            rows = list(self.rows.values())
        self._write(f"rows/{rows[0]['row']:08d}.json", [_written(row) for row in rows])

    def keep_scores(self, scores: dict[str, Any]) -> None:
        """Keep the scores of the latents."""
        self.scores = scores
        if self.path is not None:
            self._write(SCORES, _written(scores))

    def begin(self) -> None:
        """Write what the sweep is of."""
        self._write(SWEEP, {"format": 1, "fingerprint": self.settings})
        if self.scores is not None:
            self._write(SCORES, _written(self.scores))

    def _write(self, name: str, content: Any) -> None:
        assert self.path is not None
        with whole_file(self.path / name) as temporary:
            temporary.write_text(json.dumps(content, allow_nan=False))


@contextlib.contextmanager
def opened(out: str | Path | None, settings: dict[str, Any]) -> Iterator[Records]:
    """The records of a sweep with these settings: new, or what the folder holds of it.

    Raises `CheckpointError` when the folder holds another sweep (with the keys that differ) or something else, when
    another process writes there, and when a file is not readable.
    """
    if out is None:
        yield Records(settings)
        return
    folder = user_path(out)
    records = of_folder(folder, settings)
    if records is not None and records.complete:  # to give what is finished back, nothing need be writable
        yield records
        return
    with locked(folder):
        records = of_folder(folder, settings)
        if records is None:
            records = Records(settings, folder)
            records.begin()
        remove_left_over(folder / "rows")
        yield records


def of_folder(folder: Path, settings: dict[str, Any] | None = None) -> Records | None:
    """What a folder holds of a sweep, None where nothing is in it; with settings, of the sweep that has these.

    Raises `CheckpointError` when it holds another sweep (with the keys that differ) or something else.
    """
    if not (folder / SWEEP).exists():
        check_free(folder, "sweep")
        return None
    try:
        found = read_json(folder / SWEEP, {"format": exactly(1), "fingerprint": OF_SWEEP})["fingerprint"]
        if settings is not None:
            check_fingerprint(folder, found, settings)
        records = Records(found, folder)
        if (folder / SCORES).exists():
            records.scores = _figures(read_json(folder / SCORES, OF_SCORES))
            if any(len(values) != len(found["latents"]) for values in records.scores.values()):
                raise FormatError(f"{folder / SCORES} is not of the {len(found['latents'])} latents of the sweep")
        for path in sorted((folder / "rows").glob("*.json")):
            for row in read_json(path, [OF_ROW]):
                if row["row"] >= found["texts"] or row["prompt_id"] >= len(found["prompts"]):
                    raise FormatError(
                        f"{path} holds row {row['row']} of {found['texts']:,}, of prompt {row['prompt_id']}"
                    )
                records.rows[row["row"]] = _figures(row)
    except FormatError as error:
        raise CheckpointError(f"{error}: remove that file, and what was in it is made again") from error
    return records


def _written(row: dict[str, Any]) -> dict[str, Any]:
    """JSON has no NaN and no infinity: they are written as null and as a string."""
    return {key: _plain(value) for key, value in row.items()}


def _plain(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None if math.isnan(value) else str(value)
    return [_plain(item) for item in value] if isinstance(value, list) else value


def _figures(row: dict[str, Any]) -> dict[str, Any]:
    """Undoes `_written` in the figures."""

    def number(value: Any) -> Any:
        if isinstance(value, list):
            return [number(item) for item in value]
        return float("nan" if value is None else value)

    figures = (*MEASURES, "output_score", "input_score")
    return {key: number(value) if key in figures else value for key, value in row.items()}
