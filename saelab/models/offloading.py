"""Models that accelerate has split over devices or put off to memory or disk: their parameters are on "meta" between passes."""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from jaxtyping import Shaped
from torch import Tensor, nn

from saelab.base.errors import ConfigError


def device_of(model: nn.Module) -> torch.device:
    """Where a model takes its input: where its first hook of accelerate's puts it, else where its first parameter is.

    >>> device_of(nn.Linear(2, 2))
    device(type='cpu')
    """
    placed = (getattr(hook, "execution_device", None) for module in model.modules() for hook in _hooks(module))
    first = next((device for device in placed if device is not None), None)
    return next(model.parameters()).device if first is None else torch.device(first)


def weights(model: Any) -> Iterator[tuple[str, Shaped[Tensor, "..."]]]:
    """The tensors of a module's state by name, one at a time: those that were put off are read from where they are.

    Raises `ConfigError` for one that is nowhere.
    """
    for name, tensor in sorted(model.state_dict().items()):
        if isinstance(tensor, Tensor):
            yield name, _put_off(model, name) if tensor.is_meta else tensor


@contextlib.contextmanager
def in_memory(module: nn.Module) -> Iterator[None]:
    """Within it the module's own parameters are there."""
    if any(parameter.is_meta for parameter in module.parameters(recurse=False)) and any(_hooks(module)):
        from accelerate.utils import align_module_device

        with align_module_device(module):
            yield
    else:
        yield


def _put_off(model: nn.Module, name: str) -> Tensor:
    parts = name.split(".")
    for depth in range(len(parts) - 1, -1, -1):  # a hook may be there for a module and all in it
        path, own = ".".join(parts[:depth]), ".".join(parts[depth:])
        for hook in _hooks(model.get_submodule(path)):
            if getattr(hook, "weights_map", None) is not None:
                return hook.weights_map[own]
    raise ConfigError(
        f"the weights {name} are not in memory (device meta), and no hook of accelerate's says where they are"
    )


def _hooks(module: nn.Module) -> Iterator[Any]:
    hook: Any = getattr(module, "_hf_hook", None)
    yield from getattr(hook, "hooks", [] if hook is None else [hook])
