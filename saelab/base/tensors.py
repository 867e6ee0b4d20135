"""Tensors to a safetensors file, byte for byte as the library of that name writes it; `saelab.base.manifests` reads.

The library's own function writes to a temporary file of its own, which a kill leaves behind, with mode 600 whatever the umask,
and refuses tensors that share memory.
"""

import hashlib
import json
import os
from collections.abc import Mapping

import torch
from jaxtyping import Shaped
from torch import Tensor

from saelab.base import digests
from saelab.base.files import whole_file

CHECKSUM = "saelab_checksum"

DTYPES = {
    torch.int64: "I64", torch.float64: "F64", torch.float32: "F32", torch.int32: "I32", torch.bfloat16: "BF16",
    torch.float16: "F16", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip
"""In the order in which the format lays them down: the widest first."""


def save_tensors(
    path: str | os.PathLike[str],
    tensors: Mapping[str, Shaped[Tensor, "..."]],
    strings: Mapping[str, str] | None = None,
) -> None:
    """Write the tensors, wherever they are, and strings for the header, to a file that is replaced.

    >>> import tempfile
    >>> from safetensors.torch import load_file
    >>> save_tensors(path := tempfile.mkdtemp() + "/a.safetensors", {"x": torch.arange(3)})
    >>> load_file(path)
    {'x': tensor([0, 1, 2])}
    """
    header: dict[str, object] = {"__metadata__": dict(strings)} if strings else {}
    ranks = list(DTYPES)
    order = sorted(tensors, key=lambda name: (ranks.index(tensors[name].dtype), name))
    end = 0
    for name in order:
        start, end = end, end + tensors[name].numel() * tensors[name].element_size()
        shape, dtype = list(tensors[name].shape), DTYPES[tensors[name].dtype]
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in order:
            file.write(digests.content(tensors[name]))


def write_tensors(
    path: str | os.PathLike[str], tensors: Mapping[str, Shaped[Tensor, "..."]], strings: Mapping[str, str]
) -> None:
    """Write one safetensors file, whole, with the strings and a checksum of everything in its header.

    Raises `CheckpointError` on a full or read-only disk.
    """
    with whole_file(path) as temporary:
        save_tensors(temporary, tensors, {**strings, CHECKSUM: checksum(tensors, strings)})


def checksum(tensors: Mapping[str, Shaped[Tensor, "..."]], strings: Mapping[str, str]) -> str:
    """Hexadecimal SHA-256 over everything that a file of tensors and strings holds."""
    digest = hashlib.sha256()
    for name in sorted(strings):
        digest.update(f"{len(name)}:{name}={len(strings[name])}:{strings[name]}".encode())
    digest.update(digests.of_tensors(tensors).encode())
    return digest.hexdigest()
