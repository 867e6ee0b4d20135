"""Tensors to a safetensors file, byte for byte as the library of that name writes it.

The library's own function writes to a temporary file of its own, which a kill leaves behind, with mode 600 whatever the umask,
and refuses tensors that share memory.
"""

import json
import os
from collections.abc import Mapping

import torch
from torch import Tensor

DTYPES = {
    torch.int64: "I64", torch.float64: "F64", torch.float32: "F32", torch.int32: "I32", torch.bfloat16: "BF16",
    torch.float16: "F16", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip
"""In the order in which the format lays them down: the widest first."""


def save_tensors(
    path: str | os.PathLike, tensors: Mapping[str, Tensor], strings: Mapping[str, str] | None = None
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
            tensor = tensors[name].detach().cpu().contiguous()
            if tensor.numel():
                file.write(tensor.reshape(-1).view(torch.uint8).numpy().data)
