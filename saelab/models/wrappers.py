"""What people put around a model: peft, `torch.compile`, data parallelism, modules of their own.

The outermost is what runs, as it may add to what the model does; sites, settings and what a call may be given are those of the
model inside.
"""

import contextlib
import inspect
import sys
import threading
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from saelab.base.errors import ConfigError


def looked_through(model: nn.Module) -> nn.Module:
    """The model inside: through every module that has one module in it, up to one of a library that has names for sites.

    Raises `ConfigError` for wrappers under which a position or a pass is not what it is without.

    >>> class Wrapped(nn.Module):
    ...     def __init__(self, model):
    ...         super().__init__()
    ...         self.model = model
    >>> looked_through(Wrapped(Wrapped(nn.Bilinear(2, 2, 3))))
    Bilinear(in1_features=2, in2_features=2, out_features=3, bias=True)
    """
    while not (hasattr(type(model), "base_model_prefix") or hasattr(type(model), "hook_dict")):
        if isinstance(model, nn.DataParallel) and len(model.device_ids) > 1:
            raise ConfigError(f"a DataParallel over {len(model.device_ids)} devices runs copies of the model, on which no site "
                              "can be read: give its model.module")  # fmt: skip
        adapted: Any = model
        inside: Any = adapted.get_base_model() if hasattr(type(model), "get_base_model") else None
        if inside is not None and getattr(getattr(model, "active_peft_config", None), "is_prompt_learning", False):
            raise ConfigError("the active peft adapter puts virtual tokens before the text, so that positions are not the "
                              "text's: give the model inside (model.get_base_model()), or another adapter")  # fmt: skip
        children = list(model.children())
        if inside is None and len(children) == 1 and not any(True for _ in model.parameters(recurse=False)):
            inside = children[0]
        if inside is None:
            break
        model = inside
    return model


def call_names(outer: nn.Module, inner: nn.Module) -> list[str]:
    """Names of the positional arguments of a call of `outer`: its own, or the inner model's where it takes any."""
    parameters = inspect.signature(outer.forward).parameters
    if any(p.kind is p.VAR_POSITIONAL for p in parameters.values()):
        parameters = inspect.signature(inner.forward).parameters
    return list(parameters)


_lock = threading.Lock()
_open: list[Any] = []  # the stance while anybody is in `eager`, once for each


@contextlib.contextmanager
def eager(model: nn.Module) -> Iterator[None]:
    """Within it, a model that `torch.compile` was given runs as it is written.

    Compiled code does not call the hooks that were set after it was made: a site would not be read, and an intervention would
    silently do nothing.
    """
    if not _compiled(model):
        yield
        return
    with _lock:
        if not _open:
            stance = torch.compiler.set_stance("force_eager")
            stance.__enter__()
            _open.append(stance)
        else:
            _open.append(_open[0])
    try:
        yield
    finally:
        with _lock:
            stance = _open.pop()
            if not _open:
                stance.__exit__(None, None, None)


def _compiled(model: nn.Module) -> bool:
    if "torch._dynamo" not in sys.modules:  # nothing can have been compiled
        return False
    return any(
        hasattr(module, "_orig_mod") or module._compiled_call_impl is not None
        or hasattr(vars(module).get("forward"), "_torchdynamo_orig_callable")
        for module in model.modules()
    )  # fmt: skip
