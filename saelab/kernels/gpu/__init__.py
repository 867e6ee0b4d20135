"""Kernels in Triton for CUDA, behind the functions of this room: where Triton is not installed torch's own do the same."""

import functools
import importlib.util

from jaxtyping import Shaped
from torch import Tensor


@functools.cache
def installed() -> bool:
    """Whether Triton is there (the extra `triton`; torch for CUDA on Linux brings it)."""
    return importlib.util.find_spec("triton") is not None


def serves(tensor: Shaped[Tensor, "..."]) -> bool:
    """Whether what is done with this tensor is done by these kernels."""
    return tensor.device.type == "cuda" and installed()
