"""Chunks of a dashboard: planar columns in a container, compressed, as base64. `docs/dashboard-format.md`."""

import base64
import binascii
import json
import math
import re
import struct
import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from saelab.base.errors import FormatError
from saelab.pages.packing import compress, json_bytes

MAGIC = b"SLD1"
_SLACK, _DENSEST = 2**20, 256  # what a member may unpack to: a page's data never do to more
NAME = re.compile(r"[a-z0-9-]+")
TYPES = {name: np.dtype(code) for name, code in {
    "u8": "u1", "i8": "i1", "u16": "<u2", "i16": "<i2", "u32": "<u4", "i32": "<i4",
    "f16": "<f2", "f32": "<f4", "f64": "<f8", "utf8": "u1",
}.items()}  # fmt: skip
TYPE_OF = {dtype: name for name, dtype in TYPES.items() if name != "utf8"}


class Half:
    """Values to be stored as f16 times a power of two, so that the largest neither overflows nor loses bits.

    >>> Half(np.array([1e6, 2e6])).scale
    64.0
    """

    def __init__(self, values: np.ndarray) -> None:
        finite = np.abs(values[np.isfinite(values)]) if values.size else values
        largest = float(finite.max(initial=0.0))
        self.scale = 2.0 ** (math.ceil(math.log2(largest)) - 15) if largest > 0 else 1.0
        self.stored = (np.asarray(values, np.float64) / self.scale).astype("<f2")


Column = np.ndarray | Half | str


def encode(kind: str, columns: Mapping[str, Column], **extra: Any) -> bytes:
    """The container of these columns: numpy arrays by their dtype, `Half` as scaled f16, strings as UTF-8.

    >>> decode(encode("toy", {"a": np.arange(3, dtype="<u2")}))[1]["a"]
    array([0, 1, 2], dtype=uint16)
    """
    described: list[dict[str, Any]] = []
    parts: list[bytes] = []
    for name, column in columns.items():
        entry: dict[str, Any] = {"name": name}
        if isinstance(column, str):
            data = column.encode("utf-8", "strict")
            entry |= {"type": "utf8", "length": len(data)}
        else:
            array = column.stored if isinstance(column, Half) else column
            array = np.ascontiguousarray(array).astype(array.dtype.newbyteorder("<"), copy=False)
            data = array.tobytes()
            entry |= {"type": TYPE_OF[array.dtype], "length": array.size}
            if isinstance(column, Half) and column.scale != 1.0:
                entry["scale"] = column.scale
        described.append(entry)
        parts.append(data)
    header = json_bytes({"kind": kind, "columns": described, **extra})
    out = bytearray(MAGIC + struct.pack("<I", len(header)) + header)
    for data in parts:
        out += bytes(-len(out) % 8)
        out += data
    return bytes(out)


def decode(container: bytes) -> tuple[dict[str, Any], dict[str, Any]]:
    """(header, columns) of a container: numpy arrays (scales applied, then float64), and strings.

    Raises `FormatError` for anything that is not a whole container.
    """
    try:
        if container[:4] != MAGIC:
            raise FormatError(f"a chunk begins with {container[:4]!r}, not {MAGIC!r}")
        (length,) = struct.unpack_from("<I", container, 4)
        header = json.loads(container[8 : 8 + length])
        position = 8 + length
        columns: dict[str, Any] = {}
        for entry in header["columns"]:
            position += -position % 8
            dtype, size = TYPES[entry["type"]], int(entry["length"])
            end = position + size * dtype.itemsize
            if size < 0 or end > len(container):
                raise FormatError(f"column {entry['name']} ends at byte {end:,} of {len(container):,}")
            raw = container[position:end]
            if entry["type"] == "utf8":
                columns[entry["name"]] = raw.decode("utf-8")
            else:
                array = np.frombuffer(raw, dtype)
                columns[entry["name"]] = array.astype(np.float64) * entry["scale"] if "scale" in entry else array
            position = end
    except (struct.error, ValueError, KeyError, TypeError, RecursionError) as error:
        if isinstance(error, FormatError):
            raise
        raise FormatError(f"not a readable chunk: {error}") from error
    if position != len(container):
        raise FormatError(f"{len(container) - position:,} bytes stand after the last column")
    return header, columns


def member(text: str) -> bytes:
    """The gzip member behind a chunk's base64. Raises `FormatError` for anything but base64."""
    try:
        return base64.b64decode(text, validate=True)
    except binascii.Error as error:
        raise FormatError(f"not base64: {error}") from error


def from_text(text: str) -> bytes:
    """The inflated bytes behind a chunk's base64. Raises `FormatError` when it is damaged."""
    packed = member(text)
    unpacker = zlib.decompressobj(wbits=31)  # one gzip member
    try:
        data = unpacker.decompress(packed, _SLACK + _DENSEST * len(packed))
    except zlib.error as error:
        raise FormatError(f"not a gzip member: {error}") from error
    if not unpacker.eof or unpacker.unused_data:
        raise FormatError(
            f"not a gzip member: its {len(packed):,} bytes are cut short, go on, or unpack beyond all measure"
        )
    return data


def script(name: str, text: str) -> str:
    """The one statement of a bundle's `data/<name>.js`."""
    if not NAME.fullmatch(name):
        raise FormatError(f"chunk name {name!r}: only a-z, 0-9 and - are allowed")
    return f'__sl("{name}","{text}")\n'


def manifest_bytes(manifest: Mapping[str, Any]) -> bytes:
    """The manifest as compressed JSON: ASCII, sorted keys, no NaN."""
    return compress(json_bytes(manifest))


def texts(strings: Sequence[str]) -> dict[str, Column]:
    """A text column: `length` in UTF-16 code units beside the joined `text`; lone surrogates become U+FFFD."""
    clean = [re.sub("[\ud800-\udfff]", "\ufffd", string) for string in strings]
    lengths = [len(string) + sum(map("\uffff".__lt__, string)) for string in clean]
    return {"length": np.array(lengths, "<u4"), "text": "".join(clean)}


def cut(text: str, lengths: np.ndarray) -> list[str]:
    """The strings of a text column.

    >>> columns = texts(["a", "\\U0001f600b", ""])
    >>> cut(columns["text"], columns["length"])
    ['a', '😀b', '']
    """
    data, ends = text.encode("utf-16-le"), 2 * np.cumsum(lengths, dtype=np.int64)
    starts = [0, *ends[:-1].tolist()] if len(ends) else []
    return [data[start:end].decode("utf-16-le") for start, end in zip(starts, ends.tolist(), strict=True)]


def none_of(dtype: Any) -> int:
    """The stored value that means None in an unsigned column."""
    return int(np.iinfo(dtype).max)
