"""What is read from disk is checked before it is believed, here and nowhere else.

Only plain files are opened, and of a folder only those inside it; JSON has to fit a schema; the header of a safetensors file
has to fit a layout before one of its tensors is made. Whatever does not is a `FormatError` that names the file and the entry.
"""

import contextlib
import json
import math
import os
import re
import reprlib
import stat
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

import torch
from jaxtyping import Shaped
from torch import Tensor

from saelab.base import digests
from saelab.base.errors import FormatError
from saelab.base.files import MANIFEST, user_path
from saelab.base.tensors import CHECKSUM, DTYPES, checksum


@dataclass(frozen=True)
class Kind:
    """What a value of a JSON file has to be: in words, and as a test."""

    name: str
    holds: Callable[[Any], bool]

    def or_null(self) -> "Kind":
        return Kind(f"{self.name} or null", lambda value: value is None or self.holds(value))


Schema = Kind | dict[str, Any] | list[Any]
"""A kind; a table {"name": schema}, where "name?" may be missing, "*" is for all other entries and entries that are not
named are left alone; or a list [schema]."""

ANYTHING = Kind("anything", lambda value: True)
TABLE = Kind("a table", lambda value: isinstance(value, dict))
FLAG = Kind("true or false", lambda value: isinstance(value, bool))
TEXT = Kind("a text", lambda value: isinstance(value, str))
COUNT = Kind("a whole number from 0 to 2^63", lambda value: type(value) is int and 0 <= value < 2**63)
INTEGER = Kind("a whole number within 64 bits", lambda value: type(value) is int and abs(value) < 2**63)
SIZE = Kind("a whole number from 1 to 2^63", lambda value: type(value) is int and 0 < value < 2**63)
NUMBER = Kind("a finite number", lambda value: type(value) in (int, float) and _finite(value))
FIGURE = Kind("a number", lambda value: type(value) in (int, float))  # NaN and infinity are figures too
SCALAR = Kind("a number, a text, true, false or null", lambda value: not isinstance(value, dict | list))
DIGITS = Kind(
    "a whole number in digits",
    lambda value: isinstance(value, str) and re.fullmatch("-?[0-9]{1,18}", value) is not None,
)
DIGEST = Kind("a SHA-256", lambda value: isinstance(value, str) and re.fullmatch("[0-9a-f]{64}", value) is not None)
METADATA: Schema = {  # what is known of an SAE's or a store's activations; there may be more
    **{f"{name}?": TEXT.or_null() for name in ("site", "target_site", "model", "corpus")},
    **{f"{name}?": COUNT.or_null() for name in ("context_length", "skip_positions", "seed")},
}
DEEPEST = 64
FILE: Schema = {"bytes": COUNT, "sha256": DIGEST}


def exactly(*values: Any) -> Kind:
    """One of these values, of the same type (true is not 1)."""
    return Kind(
        " or ".join(map(repr, values)), lambda value: any(type(value) is type(v) and value == v for v in values)
    )


def _finite(value: float) -> bool:
    try:
        return math.isfinite(value)
    except OverflowError:  # a whole number beyond every float
        return False


def check(value: Any, schema: Schema, where: str) -> None:
    """Raise `FormatError` unless the value fits; `where` names it, and the message the entry in it.

    >>> check({"n": -1}, {"n": COUNT}, "a.json")
    Traceback (most recent call last):
    saelab.base.errors.FormatError: a.json: n is -1, not a whole number from 0 to 2^63
    """
    _check(value, schema, where, "")


def _check(value: Any, schema: Schema, where: str, entry: str) -> None:
    kind = schema if isinstance(schema, Kind) else TABLE if isinstance(schema, dict) else Kind("a list", _is_list)
    if not kind.holds(value):
        raise FormatError(f"{where}: {entry or 'it'} is {reprlib.repr(value)}, not {kind.name}")
    if isinstance(schema, dict):
        names = {name.removesuffix("?"): inner for name, inner in schema.items()}
        for name in schema:
            if name != "*" and not name.endswith("?") and name not in value:
                raise FormatError(f"{where}: {entry + ' has ' if entry else ''}no entry {name!r}")
        for name, found in value.items():
            inner = names.get(name, names.get("*", ANYTHING)) if name != "*" else names.get("*", ANYTHING)
            _check(found, inner, where, f"{entry}.{name}" if entry else str(name))
    elif isinstance(schema, list):
        for i, item in enumerate(value):
            _check(item, schema[0], where, f"{entry}[{i}]")


def _is_list(value: Any) -> bool:
    return isinstance(value, list | tuple)  # a tuple is what JSON makes a list of


def plain_file(path: str | os.PathLike[str]) -> int:
    """The size of a plain file, in bytes.

    Raises `FormatError` for what is missing or not to be read, and for a folder, a device or a pipe, which are not opened. A
    link to a plain file is one (caches are made of such).
    """
    with _named(path):
        found = os.stat(path)
    if not stat.S_ISREG(found.st_mode):
        what = "a folder" if stat.S_ISDIR(found.st_mode) else "a device, pipe or socket"
        raise FormatError(f"{path} is {what}, not a file")
    return found.st_size


@contextlib.contextmanager
def _named(path: str | os.PathLike[str]) -> Iterator[None]:
    try:
        yield
    except PermissionError as error:
        raise FormatError(f"{path} cannot be read: {error.strerror}. Change its permissions, or copy it") from error
    except (OSError, ValueError) as error:  # ValueError: a path that no system could have
        if isinstance(error, FormatError):
            raise
        raise FormatError(f"{path} cannot be read: {getattr(error, 'strerror', None) or error}") from error


def inside(folder: Path, name: str) -> Path:
    """The path of a file of this folder; `FormatError` for a name that leads out of it."""
    parts = PurePosixPath(name.replace("\\", "/")).parts
    if not parts or ".." in parts or parts[0] == "/" or PureWindowsPath(name).anchor or "\0" in name:
        raise FormatError(f"{folder} lists a file {name!r}, which is not inside it: nothing is read from there")
    return folder / name


def held(folder: Path, name: str) -> Path:
    """`inside`, and where the file is a link it leads to nowhere outside the folder, or the hub's cache that it is part of."""
    path, root = inside(folder, name), folder.resolve()
    if "snapshots" in root.parts:  # files of a snapshot are links to the blobs beside it
        root = Path(*root.parts[: len(root.parts) - root.parts[::-1].index("snapshots") - 1])
    with _named(path):
        real = Path(os.path.realpath(path))  # `Path.resolve` raises for links in a circle
    if not real.is_relative_to(root):
        raise FormatError(
            f"{path} is a link out of its folder, to {real}, which is not followed: put the file itself there"
        )
    return path


def verify_file(path: Path, size: int, digest: str) -> None:
    """Raise `FormatError` unless this is a plain file of this size and SHA-256."""
    verify_size(path, size)
    with _named(path):
        found = digests.of_file(path)
    _refuse_changed(path, found, digest)


@contextlib.contextmanager
def verifying(path: Path, size: int, digest: str) -> Iterator[None]:
    """`verify_file` beside what is done within, which reads the file: a checksum takes longer than reading.

    Its error comes at the end, in place of any other: nothing that was read may be used before.
    """
    verify_size(path, size)
    with ThreadPoolExecutor(1) as pool:
        found = pool.submit(digests.of_file, path)
        try:
            yield
        finally:
            with _named(path):
                checksum = found.result()
            _refuse_changed(path, checksum, digest)


def _refuse_changed(path: Path, found: str, digest: str) -> None:
    if found != digest:
        raise FormatError(f"{path} does not have the checksum of its manifest: it was changed; make it again")


def verify_size(path: Path, size: int) -> None:
    """Raise `FormatError` unless this is a plain file of this size."""
    found = plain_file(path) if os.path.lexists(path) else None
    if found != size:
        raise FormatError(
            f"{path} should have {size:,} bytes and has {'none' if found is None else f'{found:,}'}: "
            "it was cut short or removed; make it again"
        )


def read_text(path: str | os.PathLike[str]) -> str:
    """The text of a plain file in UTF-8; `FormatError` for any other."""
    size = plain_file(path)
    with _named(path), open(path, "rb") as file:
        return file.read(size).decode()


def read_json(path: str | os.PathLike[str], schema: Schema = ANYTHING) -> Any:
    """The JSON of a plain file that fits the schema; `FormatError` for any other. A key that stands twice is an error."""
    return parse_json(read_text(path), schema, str(path))


def parse_json(text: str | bytes, schema: Schema, where: str) -> Any:
    """`read_json` of a text that is here already."""
    try:
        value = json.loads(text, object_pairs_hook=_once)
    except (ValueError, RecursionError) as error:
        raise FormatError(f"{where} is no readable JSON: {error}") from error
    if _too_deep(value):
        raise FormatError(f"{where} is nested more than {DEEPEST} deep: nothing that saelab writes is")
    check(value, schema, where)
    return value


def _too_deep(value: Any) -> bool:
    level = [value]
    for _ in range(DEEPEST):
        level = [
            item
            for one in level
            for item in (one.values() if isinstance(one, dict) else one if isinstance(one, list) else ())
        ]
        if not level:
            return False
    return True


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table = dict(pairs)
    if len(table) != len(pairs):
        raise ValueError(f"a key stands twice in a table with the keys {', '.join(sorted(table)[:8])}")
    return table


def read_manifest(folder: str | os.PathLike[str], schema: Mapping[str, Any], files: Sequence[str]) -> dict[str, Any]:
    """The manifest of a folder written by `whole_folder`, after every file that it lists was checked; `files` must be listed.

    Raises `FormatError` when the manifest is missing or says something else, or a file is missing, truncated or changed; the
    message names it.
    """
    folder = Path(folder)
    manifest = read_json(folder / MANIFEST, {**schema, "files": {**dict.fromkeys(files, FILE), "*": FILE}})
    for name, expected in manifest["files"].items():
        verify_file(inside(folder, name), expected["bytes"], expected["sha256"])
    return manifest


OF_NAME = {name: dtype for dtype, name in DTYPES.items()}
ALL = tuple(DTYPES)
WHOLE = (torch.int64, torch.int32)
FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)

Layout = Mapping[str, tuple[Sequence[torch.dtype], str]]
"""name -> (dtypes it may have, its shape in words): "n 3 S+1" where a letter is one size, 1 or more, "_" is any
and a last "..." any number of them. A name that ends with "?" may be missing; "detail.*" is for all whose names begin so."""


@contextlib.contextmanager
def open_tensors(path: str | os.PathLike[str]) -> Iterator[Any]:
    """An open safetensors file, as `safe_open` gives it; `FormatError` for any other file, also while it is read."""
    from safetensors import SafetensorError, safe_open

    plain_file(path)
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except (OSError, SafetensorError) as error:
        raise FormatError(f"{path} cannot be read as safetensors: {error}") from error


def read_tensors(
    path: str | os.PathLike[str], layout: Layout, form: str | None = None, strings: Schema = ANYTHING
) -> tuple[dict[str, Shaped[Tensor, "..."]], dict[str, str]]:
    """The tensors of a safetensors file, and the strings of its header; `form` is the format that its writer gave it.

    Raises `FormatError` for another file, part of one, and a header that does not fit; no tensor is made before it does.
    """
    path = user_path(path)
    with open_tensors(path) as file:
        found = file.metadata() or {}
        if form is not None and found.get("format") != form:
            raise FormatError(f"{path} is not of the format {form}: it says {found.get('format', 'none')}")
        check(found, strings, f"the header of {path}")
        fit(shapes_of(file, str(path)), layout, str(path))
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
    said = found.pop(CHECKSUM, None)  # files of before, and of others, have none
    if said is not None and said != checksum(tensors, found):
        raise FormatError(f"{path} does not have the checksum of its header: it was changed; make it again")
    return tensors, found


def shapes_of(file: Any, where: str) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    """Dtype and shape of each tensor, from the header of an open file."""
    found = {}
    for name in file.keys():  # noqa: SIM118 (not a mapping)
        part = file.get_slice(name)
        if part.get_dtype() not in OF_NAME:
            raise FormatError(f"{where}: {name} is of {part.get_dtype()}; read are {', '.join(OF_NAME)}")
        found[name] = (OF_NAME[part.get_dtype()], tuple(part.get_shape()))
    return found


def fit(found: Mapping[str, tuple[torch.dtype, Sequence[int]]], layout: Layout, where: str) -> None:
    """Raise `FormatError` unless these dtypes and shapes are those of the layout, none missing and none too many.

    >>> fit({"x": (torch.float32, (3, 4))}, {"x": (FLOATS, "n n")}, "a file")
    Traceback (most recent call last):
    saelab.base.errors.FormatError: a file: x is float32 [3, 4], not float64 or float32 or float16 or bfloat16 [n, n], n being 3
    """
    named = {name.removesuffix("?"): wanted for name, wanted in layout.items()}
    missing = [name for name in layout if not name.endswith(("?", "*")) and name not in found]
    extra = [name for name in found if name not in named and not _pattern(name, named)]
    if missing or extra:
        parts = [f"{what} {', '.join(names)}" for what, names in (("lacks", missing), ("has also", extra)) if names]
        raise FormatError(f"{where} {' and '.join(parts)}: the tensors of this format are {', '.join(named)}")
    sizes: dict[str, int] = {}
    for pattern, (dtypes, shape) in named.items():  # in the order of the layout: its first tensors say what a letter is
        for name in (pattern,) if pattern in found else [name for name in found if _pattern(name, [pattern])]:
            dtype, dims = found[name]
            if dtype not in dtypes or not _fits(dims, shape.split(), sizes):
                kinds = " or ".join(_short(kind) for kind in dtypes)
                known = [f"{letter} being {sizes[letter]:,}" for letter in sizes if letter in re.split(r"[ +]", shape)]
                wanted = ", ".join([f"{kinds} [{', '.join(shape.split())}]", *known])
                raise FormatError(f"{where}: {name} is {_short(dtype)} {list(dims)}, not {wanted}")


def _pattern(name: str, patterns: Any) -> str | None:
    return next((p for p in patterns if p.endswith("*") and name.startswith(p.removesuffix("*"))), None)


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _fits(dims: Sequence[int], words: list[str], sizes: dict[str, int]) -> bool:
    if words[-1:] == ["..."]:
        words = words[:-1]
        dims = dims[: len(words)]
    if len(dims) != len(words):
        return False
    for size, word in zip(dims, words, strict=True):
        if word == "_" or word.isdigit() and size == int(word):
            continue
        letter, _, more = word.partition("+")
        if (
            word.isdigit()
            or sizes.setdefault(letter, size - int(more or 0)) != size - int(more or 0)
            or sizes[letter] < 1
        ):
            return False
    return True


def check_finite(tensors: Mapping[str, Shaped[Tensor, "..."]], where: str) -> None:
    """Raise `FormatError` where one of these holds a NaN or an infinity."""
    for name, tensor in tensors.items():
        if tensor.numel() and tensor.is_floating_point() and not all(map(math.isfinite, map(float, tensor.aminmax()))):
            raise FormatError(f"{where}: {name} holds NaN or infinite values: it was changed, or its training diverged")
