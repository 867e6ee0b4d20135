"""Labels of latents: texts with a score and where they are from, read from and written for Neuronpedia and delphi."""

import gzip
import json
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from saelab.base import checks
from saelab.base.errors import ConfigError
from saelab.base.files import user_path, whole_file, whole_folder

GIVEN = "given when the dashboard was made"
LONGEST = 2**22  # bytes of a line of an export, whose embeddings take thousands
_FILE = re.compile(r"(.+)_latent(\d+)\.txt")
_NUMBER, _TEXT = ("latent", "index", "feature"), ("label", "description", "explanation")
_SCORES = ("detection", "fuzz")  # of delphi, in the order in which one is taken


class Label(NamedTuple):
    """The text of a latent, a score of it where there is one (higher is better), and where it is from."""

    text: str
    score: float | None = None
    source: str = GIVEN


def read_labels(source: Any, which: str | None = None) -> dict[int, Label]:
    """Labels by latent.

    * A mapping {latent: text, `Label` or (text, score, source)}, or a JSON file {"12": "..."} or [{"index" or "latent": 12,
      "description" or "label": "..."}].
    * Neuronpedia's export: a `.jsonl` or `.jsonl.gz` file of explanations, or the folder of them. Of several of one latent the
      one with the best score is taken, else the first; the score is the mean of its `scores`, else `scoreV2`.
    * A results folder of delphi (`explanations/` and, where there are, `scores/`). The score is the balanced accuracy of
      detection, else of fuzzing: the mean of the shares answered rightly of examples that fire and that do not.

    Args:
        source: any of these.
        which: of a source with several: Neuronpedia's "12-gemmascope-res-16k", delphi's "layers.12".

    Raises `ConfigError` for what cannot be read, and for several where `which` does not say one.

    >>> read_labels({3: "years"})[3].text
    'years'
    """
    try:
        if isinstance(source, Mapping):
            return _plain(source)
        if not isinstance(source, (str, os.PathLike)):
            raise ConfigError(f"labels are a mapping {{latent: text}}, or a path of them, and this is {source!r}")
        path = user_path(source)
        if path.is_dir():
            rows = _delphi(path) if (path / "explanations").is_dir() and any(_texts(path)) else _exported(path)
        elif path.name.endswith((".jsonl", ".jsonl.gz")):
            rows = _lines(path)
        else:
            return _plain(json.loads(path.read_text(encoding="utf-8")))
        return _best(rows, which)
    except ConfigError:
        raise
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError, EOFError) as error:
        where = "labels" if isinstance(source, Mapping) else f"labels in {source}"
        raise ConfigError(f"cannot read {where}: {error}; give {{latent: text}}, or a JSON file of such") from error


def write_labels(labels: Any, path: str | os.PathLike[str], format: str, *, model: str = "", which: str = "") -> Path:
    """Write labels for another tool.

    Args:
        labels: what `read_labels` takes.
        path: for "neuronpedia" the file ("batch-0.jsonl.gz" in its exports), for "delphi" the results folder.
        format: "neuronpedia" or "delphi".
        model: Neuronpedia's id of the model ("gemma-2-2b").
        which: Neuronpedia's id of the source ("12-gemmascope-res-16k"), delphi's hookpoint ("layers.12").

    Raises `ConfigError` where `which` is missing, or `model` for Neuronpedia; `CheckpointError` where nothing can be written.
    """
    found = read_labels(labels)
    checks.choice("format", format, ("neuronpedia", "delphi"))
    if not which or (format == "neuronpedia" and not model):
        raise ConfigError(
            f"{format} names latents by {'model= and which=' if format == 'neuronpedia' else 'which='}: give them"
        )
    target = user_path(path)
    if format == "neuronpedia":
        rows = [
            {"modelId": model, "layer": which, "index": str(latent), "description": label.text, "scoreV2": label.score}
            for latent, label in sorted(found.items())
        ]
        text = "".join(json.dumps(row) + "\n" for row in rows).encode()
        with whole_file(target) as temporary:
            temporary.write_bytes(gzip.compress(text, mtime=0) if target.suffix == ".gz" else text)
        return target
    with whole_folder(target, {"format": "delphi"}) as folder:
        (folder / "explanations").mkdir()
        for latent, label in found.items():
            file = folder / "explanations" / f"{which.replace('/', '--')}_latent{latent}.txt"
            file.write_text(json.dumps(label.text), encoding="utf-8")
    return target


Row = tuple[str, int, Label]
"""Which of several the label belongs to, the latent, and the label."""


def _plain(read: Any) -> dict[int, Label]:
    if isinstance(read, list):
        read = {_first(row, *_NUMBER): _first(row, *_TEXT) for row in read}
    return {
        int(latent): Label(*label) if isinstance(label, tuple) else Label(str(label))
        for latent, label in dict(read).items()
    }


def _first(row: Mapping[str, Any], *names: str) -> Any:
    for name in names:
        if name in row:
            return row[name]
    raise KeyError(f"no {' or '.join(names)} in {row}")


def _best(rows: Iterator[Row], which: str | None) -> dict[int, Label]:
    found: dict[str, dict[int, Label]] = {}
    for place, latent, label in rows:
        here = found.setdefault(place, {})
        if latent not in here or (label.score or 0) > (here[latent].score or 0):
            here[latent] = label
    if which is None and len(found) == 1:
        return next(iter(found.values()))
    if which not in found:
        raise ConfigError(f"there are labels of {', '.join(sorted(found)[:8]) or 'nothing'}: say which='...'")
    return found[which]


def _exported(folder: Path) -> Iterator[Row]:
    files = sorted([*folder.rglob("*.jsonl"), *folder.rglob("*.jsonl.gz")])
    if not files:
        raise ConfigError(f"{folder} has neither an export of Neuronpedia (*.jsonl.gz) nor explanations of delphi")
    for file in files:
        yield from _lines(file)


def _lines(file: Path) -> Iterator[Row]:
    """The explanations of an export, a line each."""
    with gzip.open(file, "rb") if file.suffix == ".gz" else file.open("rb") as stream:
        while line := stream.readline(LONGEST + 1):
            if len(line) > LONGEST:
                raise ValueError(f"a line of more than {LONGEST:,} bytes")
            if not line.strip():
                continue
            row = json.loads(line)
            values = [float(entry["value"]) for entry in row.get("scores") or () if entry.get("value") is not None]
            score = sum(values) / len(values) if values else row.get("scoreV2")
            maker = row.get("explanationModelName")
            label = Label(str(row["description"]), score, f"Neuronpedia{f', {maker}' if maker else ''}")
            yield str(row["layer"]), int(row["index"]), label


def _texts(folder: Path) -> Iterator[tuple[Path, re.Match[str]]]:
    for file in sorted((folder / "explanations").iterdir()):
        if found := _FILE.fullmatch(file.name):
            yield file, found


def _delphi(folder: Path) -> Iterator[Row]:
    for file, found in _texts(folder):
        text = json.loads(file.read_text(encoding="utf-8"))
        scorer = next((name for name in _SCORES if (folder / "scores" / name / file.name).is_file()), None)
        score = scorer and _balanced(json.loads((folder / "scores" / scorer / file.name).read_text(encoding="utf-8")))
        yield found[1], int(found[2]), Label(str(text), score or None, f"delphi{f', {scorer}' if scorer else ''}")


def _balanced(answers: list[dict[str, Any]]) -> float | None:
    """The balanced accuracy over examples that were answered; None where one kind has none."""
    rights = [
        [
            bool(answer["correct"])
            for answer in answers
            if answer["correct"] is not None and answer["activating"] is kind
        ]
        for kind in (True, False)
    ]
    return sum(sum(right) / len(right) for right in rights) / 2 if all(rights) else None
