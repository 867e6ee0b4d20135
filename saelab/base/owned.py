"""Tensors of large files, read piece by piece into memory of our own: the peak is the tensors and one piece."""

import math
from collections.abc import Callable
from pathlib import Path

import torch
from jaxtyping import Shaped
from torch import Tensor

from saelab.base.errors import FormatError
from saelab.base.manifests import open_tensors, shapes_of

PIECE = 2**24  # bytes

Shapes = dict[str, tuple[torch.dtype, tuple[int, ...]]]
Rows = Callable[[str, int, int], Tensor]  # rows [start, stop) of a tensor by its name


def rows_of(path: Path) -> tuple[Shapes, Rows]:
    """What tensors a safetensors file holds, and a function that reads rows of one. Raises `FormatError` for another file."""
    with open_tensors(path) as file:
        shapes = shapes_of(file, str(path))

    def rows(name: str, start: int, stop: int) -> Tensor:
        with open_tensors(path) as file:  # opened anew: a mapping keeps all that was read of it
            return file.get_slice(name)[start:stop] if shapes[name][1] else file.get_tensor(name)

    return shapes, rows


def owned(
    path: Path,
    name: str,
    found: tuple[torch.dtype, tuple[int, ...]],
    rows: Rows,
    kept: torch.dtype | None = None,
    turned: bool = False,
) -> Shaped[Tensor, "..."]:
    """The tensor of this name, `found` its dtype and shape: in the dtype `kept`, a matrix `turned` into its transpose.

    Raises `FormatError` for NaN or infinity.
    """
    dtype, shape = found
    kept = kept or dtype
    if not shape or not dtype.is_floating_point:
        return _finite(rows(name, 0, shape[0] if shape else 1).to(kept, copy=True), path, name)
    tensor = torch.empty(shape[::-1] if turned else shape, dtype=kept)
    step = max(1, PIECE // max(1, math.prod(shape[1:]) * dtype.itemsize))
    for start in range(0, shape[0], step):
        piece = _finite(rows(name, start, min(start + step, shape[0])), path, name)
        if turned:
            tensor[:, start : start + len(piece)] = piece.T.contiguous()  # by tiles, where the other copy strides
        else:
            tensor[start : start + len(piece)] = piece
    return tensor


def _finite(piece: Tensor, path: Path, name: str) -> Tensor:
    if piece.is_floating_point() and piece.numel() and not all(map(math.isfinite, map(float, piece.aminmax()))):
        raise FormatError(f"{path}: {name} holds NaN or infinite values: it was changed, or its training diverged")
    return piece
