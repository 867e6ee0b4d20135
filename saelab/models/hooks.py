"""The hook plumbing under `record` and `intervene`: read or replace the first tensor on one side of a module.

PyTorch's own forward hooks and nothing else; they are gone afterwards, also after an exception or an interrupt.
"""

import contextlib
import copy
import threading
from collections.abc import Callable, Iterator, Mapping
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Shaped
from torch import Tensor, nn

from saelab.base.errors import InterventionError, SiteError
from saelab.models.checkpointing import Call, Recomputed, recomputing
from saelab.models.reach import opened, reached
from saelab.models.site_names import Side
from saelab.models.wrappers import eager


class StopForward(Exception):
    """Raised in a hook to end a forward pass after the last site; never leaves this package."""


_registering = threading.Lock()
_silent: ContextVar[bool] = ContextVar("silent", default=False)


@contextlib.contextmanager
def interventions_silent() -> Iterator[None]:
    """Within it no intervention acts (a probe for a site's width is not the user's forward pass)."""
    token = _silent.set(True)
    try:
        yield
    finally:
        _silent.reset(token)


_aside: ContextVar[bool] = ContextVar("aside", default=False)


@contextlib.contextmanager
def aside() -> Iterator[None]:
    """Within it neither interventions act nor recordings that are open read: for a pass beside the one that they wait for."""
    token = _aside.set(True)
    try:
        with interventions_silent():
            yield
    finally:
        _aside.reset(token)


@dataclass(eq=False)
class Intervention:
    """One open `editing`, and the module whose activation it replaces."""

    target: nn.Module


def open_interventions(module: nn.Module) -> int:
    """How many interventions act on a module, or on something in it, for the caller (see `saelab.models.reach`).

    >>> net = nn.Sequential(nn.Identity())
    >>> with editing({net: lambda args, kwargs: args}, net[0], "output", lambda x, where: x):
    ...     open_interventions(net)
    1
    >>> open_interventions(net)
    0
    """
    targets = [item.target for item in reached() if isinstance(item, Intervention)]
    inside = set(module.modules()) if targets else set()
    return sum(target in inside for target in targets)


def first_runs(
    targets: Mapping[Any, tuple[nn.Module, Side]],
    run: Callable[[], Any],
    keep: Callable[
        [Shaped[Tensor, "..."]], Shaped[Tensor, "..."]
    ] = Tensor.clone,  # a copy: later modules may write into what they read
    stop: bool = True,
    partly: bool = False,
) -> dict[Any, Shaped[Tensor, "..."]]:
    """What `keep` makes of the activation at each target when it first runs; `stop` ends the pass after the last.

    Passes that other threads make at the same time are not read.
    """
    found: dict[str, Tensor] = {}
    mine = threading.get_ident()

    def reader(name: str) -> Callable[[Tensor], None]:
        def read(x: Tensor) -> None:
            if name not in found and threading.get_ident() == mine and not _aside.get():
                found[name] = keep(x)
                if stop and len(found) == len(targets):
                    raise StopForward

        return read

    def register() -> Iterator[Any]:
        for name, (target, side) in targets.items():
            yield _on_tensor(target, side, reader(name))

    with _hooked(register):
        try:
            run()
        except Exception:  # StopForward, or what torch makes of it when another thread puts up a hook meanwhile
            if not stop or len(found) < len(targets):
                raise
    missing = [name for name in targets if name not in found]
    if missing and not partly:
        raise SiteError(f"the forward pass never ran {', '.join(missing)}, or no tensor passes there: choose another")
    return {name: found[name] for name in targets if name in found}


@contextlib.contextmanager
def editing(
    roots: Mapping[nn.Module, Callable[[tuple[Any, ...], dict[str, Any]], Any]],
    target: nn.Module,
    side: Side,
    fn: Callable[[Shaped[Tensor, "..."], Any], Shaped[Tensor, "..."]],
    shared: bool = False,
) -> Iterator[None]:
    """Hook `fn` to one side of `target`, with `where` as a root makes it of its call; see `intervene`.

    Roots are the modules that may be called: a model, and what wraps it, the outermost first.
    With `shared` the result is written into the tensor itself, which reaches every reader of it.
    """
    me = Intervention(target)
    here = threading.local()  # a pass runs in one thread, and passes of several may run at once
    again = Recomputed()

    def acts() -> bool:
        return me in reached() and not _silent.get()

    def entering(locate: Callable[[tuple[Any, ...], dict[str, Any]], Any]) -> Callable[..., None]:
        def enter(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any] | None = None) -> None:
            here.call = Call(locate(args, kwargs)) if kwargs is not None and acts() else None

        return enter

    def leave(_: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        call, here.call = getattr(here, "call", None), None
        if call is not None:
            again.keep(call, output)

    def edit(x: Tensor) -> Tensor | None:
        call = getattr(here, "call", None)
        if call is not None:
            call.look_for_checkpoints()
        elif recomputing():
            call = again.call()
        elif acts():
            raise InterventionError("part of the model ran on its own, where tokens and positions are unknown: "
                                    "call the model that was loaded, not a submodule of it")  # fmt: skip
        if call is None or _silent.get():
            return None
        # autograd may keep what fn reads, which must then not change under it
        new = _checked(fn(x.clone() if shared else x, call.where), x)
        if not shared:
            return None if new is x else new
        x.copy_(new)
        return None

    def register() -> Iterator[Any]:
        for root, locate in roots.items():
            yield root.register_forward_pre_hook(entering(locate), with_kwargs=True)
        yield _on_tensor(target, side, edit)
        for root in roots:
            yield root.register_forward_hook(leave, always_call=True)

    with opened(me), _hooked(register), eager(next(iter(roots))):
        try:
            yield
        finally:
            again.open = False


@contextlib.contextmanager
def _hooked(register: Callable[[], Iterator[Any]]) -> Iterator[None]:
    """Within it the hooks are up whose handles `register` gives.

    One thread at a time: torch would give two the same number. For a moment a hook that takes keywords is up without
    being known for it, or going down; a pass of another thread then calls it without them, and it has to let that pass.
    """
    handles: list[Any] = []
    try:
        with _registering:
            for handle in register():
                handles.append(handle)
        yield
    finally:
        with _registering:
            for handle in handles:
                handle.remove()


def plus(x: Float[Tensor, "*shape"], change: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """x + change in the wider dtype of the two, given in that of x; the very bits of x where the change is zero.

    >>> plus(torch.tensor([-0.0, 1.0]), torch.tensor([0.0, 2.0]))
    tensor([-0., 3.])
    """
    # -0.0 + 0.0 is 0.0, but 0.0 - change is never -0.0, and taking 0.0 away leaves every number's sign; unlike a choice by
    # torch.where this has the derivative of a sum everywhere
    exact = torch.promote_types(x.dtype, change.dtype)
    return (x.to(exact) - (0.0 - change.to(exact))).to(x.dtype)


def _checked(new: Any, x: Tensor) -> Tensor:
    if not isinstance(new, Tensor):
        raise InterventionError(f"the intervention gave {type(new).__name__}: it has to return the activation")
    if new.shape != x.shape:
        raise InterventionError(f"the intervention made {list(new.shape)} of an activation {list(x.shape)}: "
                                "keep the shape")  # fmt: skip
    return new.to(x)


def _on_tensor(module: nn.Module, side: Side, fn: Callable[[Tensor], Tensor | None]) -> Any:
    """Call `fn` on the first tensor that passes, and put what it gives (if anything) in its place."""

    def before(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any] | None = None) -> Any:
        if kwargs is None:
            return None
        place = _first_tensor(args)
        if place is not None:
            new = fn(args[place])
            return None if new is None else (_with(args, place, new), kwargs)
        place = _first_tensor(kwargs)
        if place is None:
            return None
        new = fn(kwargs[place])
        return None if new is None else (args, _with(kwargs, place, new))

    def after(_: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        if isinstance(output, Tensor):
            return fn(output)
        place = _first_tensor(output)
        new = None if place is None else fn(output[place])
        return None if new is None else _with(output, place, new)

    if side == "input":
        return module.register_forward_pre_hook(before, with_kwargs=True)
    return module.register_forward_hook(after)


def _first_tensor(container: Any) -> Any:
    """Index or key of the first tensor of a tuple, list or mapping; None where there is none."""
    if isinstance(container, Mapping):
        return next((key for key, value in container.items() if isinstance(value, Tensor)), None)
    if isinstance(container, tuple | list):
        return next((i for i, value in enumerate(container) if isinstance(value, Tensor)), None)
    return None


def _with(container: Any, place: Any, value: Tensor) -> Any:
    """A copy of the container with one item replaced."""
    if isinstance(container, tuple):
        items = [*container[:place], value, *container[place + 1 :]]
        return type(container)(*items) if hasattr(container, "_fields") else tuple(items)
    changed = copy.copy(container)
    changed[place] = value
    return changed
