"""What can be made again, kept in one file: tensors and strings, checksummed, replaced in one stroke.

One file rather than a folder, so that two processes that fill the cache at once cannot meet half-way: the last
`os.replace` wins and both wrote the same.
"""

import hashlib
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from saelab.base.files import whole_file
from saelab.base.tensors import save_tensors

CHECKSUM = "saelab_checksum"


def write(path: Path, tensors: Mapping[str, Tensor], strings: Mapping[str, str]) -> None:
    """Write a safetensors file whole, with the strings and a checksum of everything in its header.

    Raises `CheckpointError` when the disk is full or the folder cannot be written.
    """
    with whole_file(path) as temporary:
        save_tensors(temporary, tensors, {**strings, CHECKSUM: checksum(tensors, strings)})


def read(path: Path) -> tuple[dict[str, Tensor], dict[str, str]] | None:
    """The tensors and strings of a file written by `write`; None when it is missing, cut short or changed.

    The tensors lie in the memory-mapped file; writing to them never reaches it.

    >>> import tempfile
    >>> path = Path(tempfile.mkdtemp()) / "a.safetensors"
    >>> read(path) is None
    True
    >>> write(path, {"x": torch.arange(3)}, {"made by": "a test"})
    >>> read(path)
    ({'x': tensor([0, 1, 2])}, {'made by': 'a test'})
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            strings = dict(file.metadata() or {})
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
    except (OSError, SafetensorError):
        return None
    if strings.pop(CHECKSUM, None) != checksum(tensors, strings):
        return None
    return tensors, strings


def checksum(tensors: Mapping[str, Tensor], strings: Mapping[str, str]) -> str:
    """Hexadecimal SHA-256 over everything that a file of tensors and strings holds."""
    digest = hashlib.sha256()
    for name in sorted(strings):
        digest.update(f"{len(name)}:{name}={len(strings[name])}:{strings[name]}".encode())
    digest.update(tensors_digest(tensors).encode())
    return digest.hexdigest()


def tensors_digest(tensors: Mapping[str, Tensor]) -> str:
    """Hexadecimal SHA-256 over names, dtypes, shapes and bytes, whatever the order of the mapping.

    >>> tensors_digest({"a": torch.zeros(2)}) == tensors_digest({"a": torch.zeros(3)})
    False
    """
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        if tensor.numel():  # an empty one that came from numpy cannot be viewed as bytes
            digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
