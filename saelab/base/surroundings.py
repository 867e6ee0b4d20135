"""What the user set PyTorch and the random generators to: put aside for the length of a call, and given back."""

import contextlib
import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch


@contextlib.contextmanager
def torch_defaults(allows_meta: bool = False) -> Iterator[None]:
    """Within, as in a fresh process: gradients are recorded, tensors are made in float32 on the CPU, nothing is autocast.

    Afterwards, also after an exception, everything is as it was. Also a decorator, of what trains or computes gradients.
    Where `allows_meta`, whoever asked for the device meta (shapes, no storage) gets it.

    >>> with torch.no_grad(), torch_defaults():
    ...     torch.is_grad_enabled()
    True
    """
    dtype = torch.get_default_dtype()
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        for kind in ("cpu", "cuda"):
            if torch.is_autocast_enabled(kind):
                stack.enter_context(torch.autocast(kind, enabled=False))
        if torch.get_default_device().type not in (("cpu", "meta") if allows_meta else ("cpu",)):
            stack.enter_context(torch.device("cpu"))
        if dtype != torch.float32:
            torch.set_default_dtype(torch.float32)
            stack.callback(torch.set_default_dtype, dtype)
        yield


class OwnRandomness:
    """Global random generators (torch's of the CPU, NumPy's, Python's) of its own, for others' code that draws from them.

    >>> own, before = OwnRandomness(seed=0), torch.get_rng_state()
    >>> with own:
    ...     first = torch.rand(1)
    >>> torch.equal(torch.get_rng_state(), before)
    True
    """

    def __init__(self, seed: int) -> None:
        python = random.Random(seed)
        self._states: tuple[Any, ...] = (
            torch.Generator().manual_seed(seed).get_state(),
            np.random.RandomState(seed % 2**32).get_state(),
            python.getstate(),
        )

    def _swap(self) -> None:
        there = torch.get_rng_state(), np.random.get_state(), random.getstate()
        torch_state, numpy_state, python_state = self._states
        torch.set_rng_state(torch_state)
        np.random.set_state(numpy_state)
        random.setstate(python_state)
        self._states = there

    def __enter__(self) -> None:
        self._swap()

    def __exit__(self, *error: object) -> None:
        self._swap()
