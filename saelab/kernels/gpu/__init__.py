"""Kernels in Triton for CUDA, behind the functions of this room: where Triton is not installed torch's own do the same."""

import functools
import importlib.util

import torch
from jaxtyping import Shaped
from torch import Tensor


@functools.cache
def installed() -> bool:
    """Whether Triton is there (the extra `triton`; torch for CUDA on Linux brings it)."""
    return importlib.util.find_spec("triton") is not None


def serves(tensor: Shaped[Tensor, "..."]) -> bool:
    """Whether what is done with this tensor is done by these kernels: in fp32 on CUDA."""
    return tensor.device.type == "cuda" and tensor.dtype == torch.float32 and installed()
