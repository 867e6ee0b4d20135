"""Tensors from the files of other projects: safetensors, NumPy archives and PyTorch's, checked before one is made.

Nothing in a file is run: of a pickle only tensors of plain storages are taken, whatever else it names is refused unread.
"""

import contextlib
import math
import pickletools
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any

import torch
from jaxtyping import Shaped
from torch import Tensor

from saelab.base.errors import FormatError
from saelab.base.manifests import Layout, fit, plain_file
from saelab.base.owned import Rows, Shapes, owned, rows_of

_DENSEST = 20  # weights cannot be packed much tighter than this many times: what claims to be is a bomb
_LARGEST_PICKLE = 2**24
_REBUILT = {
    "collections OrderedDict", "torch Size", "torch._utils _rebuild_tensor_v2", "torch._utils _rebuild_parameter",
    *(f"torch {kind}Storage" for kind in ("Float", "Double", "Half", "BFloat16", "Int", "Long", "Short", "Byte", "Bool")),
}  # fmt: skip


def read(path: Path, layout: Layout) -> dict[str, Shaped[Tensor, "..."]]:
    """The tensors of a file that fits the layout (see `saelab.base.manifests`), floats in fp32 and latents first.

    In the layout "sae" is the number of latents: a matrix "in sae" comes as [d_sae, d_in], one "in out" as [d_out, d_in].
    Names lose the "?" and keep their case. Raises `FormatError` for another file, part of one, and for NaN or infinity.
    """
    shapes, rows = opened(path)
    fit(shapes, layout, str(path))
    words = {name.removesuffix("?"): shape.split() for name, (_, shape) in layout.items()}
    read = {}
    for name in (name for name in words if name in shapes):
        kept = torch.float32 if shapes[name][0].is_floating_point else None
        turned = len(words[name]) == 2 and (words[name][1] == "sae" or words[name] == ["in", "out"])
        read[name] = owned(path, name, shapes[name], rows, kept, turned)
    return read


def names(path: Path) -> Shapes:
    """Names, dtypes and shapes of the tensors of a file."""
    return opened(path)[0]


def opened(path: Path) -> tuple[Shapes, Rows]:
    """What tensors a file holds, and a function that reads rows [start, stop) of one."""
    size = plain_file(path)
    with open(path, "rb") as file:
        head = file.read(4)
    if head != b"PK\x03\x04":
        return rows_of(path)
    with _refusing(path, "a zip archive"), zipfile.ZipFile(path) as archive:
        entries = archive.infolist()
        if sum(entry.file_size for entry in entries) > _DENSEST * size:
            raise FormatError(f"it unpacks to more than {_DENSEST} times its {size:,} bytes, which no weights do")
        is_numpy = all(entry.filename.endswith(".npy") for entry in entries)
    return _numpy(path) if is_numpy else _pytorch(path)


def plain_values(path: Path) -> dict[str, Any]:
    """What a PyTorch file holds besides tensors, by name."""
    return {name: value for name, value in _unpickled(path).items() if not isinstance(value, Tensor)}


def _numpy(path: Path) -> tuple[Shapes, Rows]:
    import numpy
    from numpy.lib import format as npy

    shapes: Shapes = {}
    members = {}
    with _refusing(path, "a NumPy archive of weights"), zipfile.ZipFile(path) as archive:
        for entry in archive.infolist():
            with archive.open(entry) as stream:
                header = {(1, 0): npy.read_array_header_1_0, (2, 0): npy.read_array_header_2_0}[npy.read_magic(stream)]
                shape, by_column, dtype = header(stream)
                told = f"{entry.filename} is {dtype} {list(shape)} in {entry.file_size:,} bytes"
                if dtype.kind != "f" or math.prod(shape) * dtype.itemsize != entry.file_size - stream.tell():
                    raise FormatError(told)
                if by_column:
                    raise FormatError(f"{told}, column by column: save it again with numpy.ascontiguousarray")
                name = entry.filename.removesuffix(".npy")
                shapes[name] = torch.from_numpy(numpy.empty(0, dtype)).dtype, tuple(shape)
                members[name] = entry, stream.tell(), dtype

    left: dict[str, IO[bytes]] = {}  # at the next row: an entry can be read from its beginning only

    def rows(name: str, start: int, stop: int) -> Tensor:
        entry, begin, dtype = members[name]
        shape = shapes[name][1]
        each = math.prod(shape[1:])
        with _refusing(path, "a NumPy archive of weights"):
            if start == 0 or name not in left:
                with zipfile.ZipFile(path) as archive:
                    left[name] = archive.open(entry)
            stream = left[name] if shape and stop < shape[0] else left.pop(name)
            stream.seek(begin + start * each * dtype.itemsize)
            data = bytearray(stream.read((stop - start) * each * dtype.itemsize))
        array = numpy.frombuffer(data, dtype)
        return torch.from_numpy(array.reshape(stop - start, *shape[1:]) if shape else array.reshape(()))

    return shapes, rows


def _pytorch(path: Path) -> tuple[Shapes, Rows]:
    found = _unpickled(path)
    shapes = {name: (value.dtype, tuple(value.shape)) for name, value in found.items() if isinstance(value, Tensor)}

    def rows(name: str, start: int, stop: int) -> Tensor:
        value = _unpickled(path)[name].detach()  # mapped anew, as above
        return value[start:stop] if value.ndim else value

    return shapes, rows


def _unpickled(path: Path) -> dict[str, Any]:
    """What a PyTorch file holds by name, its tensors mapped."""
    with _refusing(path, "a PyTorch file of weights"):
        with zipfile.ZipFile(path) as archive:
            if packed := [entry.filename for entry in archive.infolist() if entry.compress_type != zipfile.ZIP_STORED]:
                raise FormatError(f"its entry {packed[0]} is compressed, which PyTorch does not write")
            entries = [entry for entry in archive.infolist() if entry.filename.endswith("/data.pkl")]
            if len(entries) != 1 or entries[0].file_size > _LARGEST_PICKLE:
                raise FormatError(
                    f"it has {len(entries)} descriptions of its tensors (data.pkl) of reasonable size, not 1"
                )
            _check_calls(archive.read(entries[0]))
        found = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        if not isinstance(found, Mapping) or not all(isinstance(name, str) for name in found):
            raise FormatError(f"it holds a {type(found).__name__}, not tensors by name")
        for name, value in found.items():
            if isinstance(value, Tensor) and (
                value.layout is not torch.strided
                or value.device.type != "cpu"
                or value.numel() * value.itemsize > value.untyped_storage().nbytes()
            ):
                raise FormatError(f"{name} is {list(value.shape)}, which its storage does not fill")
    return dict(found)


def _check_calls(pickle: bytes) -> None:
    """Raise `FormatError` where a pickle names anything but what tensors of plain storages are made of."""
    for operation, argument, _ in pickletools.genops(pickle):
        if operation.name in ("GLOBAL", "INST") and argument not in _REBUILT:
            raise FormatError(f"it would call {str(argument).replace(' ', '.')}: files that run code are not read")
        if operation.name in ("STACK_GLOBAL", "EXT1", "EXT2", "EXT4", "NEWOBJ", "NEWOBJ_EX", "OBJ"):
            raise FormatError(f"its pickle has {operation.name}, which plain tensors have no need of: it is not read")


@contextlib.contextmanager
def _refusing(path: Path, what: str) -> Iterator[None]:
    """Whatever goes wrong with the bytes of a file is a `FormatError` that names it."""
    try:
        yield
    except Exception as error:  # of zipfile, numpy, pickle and torch
        raise FormatError(f"{path} cannot be read as {what}: {error}") from error
