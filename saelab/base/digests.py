"""SHA-256 of what things are: files, texts, plain values and tensors, in hexadecimal."""

import hashlib
import json
import os
from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Shaped
from torch import Tensor


def of_file(path: str | os.PathLike[str]) -> str:
    """Over a file's bytes."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def entry(path: str | os.PathLike[str]) -> dict[str, Any]:
    """What a manifest says of a file: its size and digest."""
    return {"bytes": os.stat(path).st_size, "sha256": of_file(path)}


def of_json(value: Any) -> str:
    """Over a plain value as JSON, whatever the order of its tables.

    >>> of_json({"a": 1, "b": 2}) == of_json({"b": 2, "a": 1})
    True
    """
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def of_tensors(tensors: Mapping[str, Shaped[Tensor, "..."]]) -> str:
    """Over names, dtypes, shapes and bytes, whatever the order of the mapping.

    >>> of_tensors({"a": torch.zeros(2)}) == of_tensors({"a": torch.zeros(3)})
    False
    """
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(f"{name} {tensors[name].dtype} {tuple(tensors[name].shape)}\n".encode())
        digest.update(content(tensors[name]))
    return digest.hexdigest()


def content(tensor: Shaped[Tensor, "..."]) -> memoryview:
    """The bytes of a tensor, wherever it is and however it lies; on the CPU and in one piece without a copy."""
    if not tensor.numel():  # an empty one that came from numpy cannot be viewed as bytes
        return memoryview(b"")
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data
