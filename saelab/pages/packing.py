"""Plain data on its way into a page: JSON, compressed, as base64, the only bytes that enter HTML or script."""

import base64
import gzip
import json
import math
from collections.abc import Mapping
from typing import Any


def plain(value: Any) -> Any:
    """A scalar as JSON can hold it: numpy's as Python's, None for NaN and infinities, text for anything else.

    >>> plain(float("nan")), plain(2), plain(1 + 2j)
    (None, 2, '(1+2j)')
    """
    value = value.item() if hasattr(value, "item") else value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if value is None or isinstance(value, bool | int | str) else str(value)


def json_bytes(value: Any) -> bytes:
    """Compact JSON: ASCII, sorted keys, no NaN."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False).encode("ascii")


def compress(data: bytes) -> bytes:
    """One gzip member whose bytes depend on the data alone."""
    return gzip.compress(data, compresslevel=9, mtime=0)


def to_text(member: bytes) -> str:
    """Base64 of a gzip member: the only bytes that enter HTML or script."""
    return base64.b64encode(member).decode("ascii")


def packed(data: Any) -> str:
    """Mappings, lists and scalars (each as `plain` has it) as the text of a chunk.

    >>> json.loads(gzip.decompress(base64.b64decode(packed({"x": [1.5, float("nan")]}))))
    {'x': [1.5, None]}
    """
    return to_text(compress(json_bytes(_deeply_plain(data))))


def _deeply_plain(data: Any) -> Any:
    if isinstance(data, Mapping):
        return {str(key): _deeply_plain(value) for key, value in data.items()}
    if isinstance(data, list | tuple):
        return [_deeply_plain(value) for value in data]
    return plain(data)
