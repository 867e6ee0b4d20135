"""Gradient checkpointing: parts of a pass run again in the backward pass, and an intervention has to act there as before.

A part that runs again does not say of which call it is one. The node of the graph that asks for it does: nodes are
numbered as they are made, so that its number lies between the first and the last of its call.
"""

import sys
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from types import FrameType
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor

from saelab.base.errors import InterventionError


def recomputing() -> bool:
    """Whether this runs in a backward pass: what was counted in the forward pass is not counted again."""
    return bool(torch._C._current_graph_task_id() != -1)


def _next_number() -> int:
    """The number of the node of this thread's graphs that is made now; -1 where there are none."""
    if not torch.is_grad_enabled() or torch.is_inference_mode_enabled():
        return -1
    node: Any = torch.ones((), requires_grad=True).view(()).grad_fn
    return int(node._sequence_nr())


@dataclass(eq=False)
class Call:
    """One forward pass: what an intervention's function gets as `where`, its thread and the numbers of its nodes."""

    where: Any
    thread: int = field(default_factory=threading.get_ident)
    first: int = field(default_factory=_next_number)
    last: int = -1
    runs_again: bool = False

    def look_for_checkpoints(self) -> None:
        """Note whether the part that runs now will run again; `InterventionError` for a checkpoint within another."""
        if self.first < 0:
            return
        depth = 0
        frame: FrameType | None = sys._getframe(1)
        while frame is not None:
            depth += (
                frame.f_globals.get("__name__") == "torch.utils.checkpoint" and frame.f_code.co_name == "checkpoint"
            )
            frame = frame.f_back
        if depth > 1:
            raise InterventionError("gradient checkpoints stand within others here, and which call a part belongs to that runs "
                                    "again in the backward pass cannot be told: turn one of them off "
                                    "(model.gradient_checkpointing_disable())")  # fmt: skip
        self.runs_again |= depth == 1


class Recomputed:
    """The calls of one intervention of which parts will run again; each as long as its graph lives."""

    def __init__(self) -> None:
        self._calls: WeakSet[Call] = WeakSet()
        self.open = True

    def keep(self, call: Call, output: Any) -> None:
        """At the end of a call: hang it on its graph."""

        def check(*_: Any) -> None:
            if not self.open and call.runs_again:
                raise InterventionError("the backward pass comes after the intervention was closed, and with gradient "
                                        "checkpointing it runs parts of the model again, without it: call backward() "
                                        "within the context, or model.gradient_checkpointing_disable()")  # fmt: skip

        if call.runs_again:
            call.last = _next_number()
            self._calls.add(call)
            for node in {tensor.grad_fn for tensor in _tensors(output)}:
                if node is not None:
                    node.register_prehook(check)

    def call(self) -> Call | None:
        """The call of which a part runs again now; None where it is none of these."""
        node: Any = torch._C._current_autograd_node()
        # the backward pass of a GPU runs in threads of autograd's own
        me = threading.get_ident()
        own = isinstance(threading.current_thread(), threading._DummyThread)
        number = node._sequence_nr()
        found = [call for call in self._calls if call.first < number < call.last and (own or call.thread == me)]
        if len(found) > 1:
            raise InterventionError(f"{len(found)} calls of several threads have a part that may run again here: take the "
                                    "gradients of one thread at a time, or switch gradient checkpointing off")  # fmt: skip
        return found[0] if found else None


def _tensors(output: Any) -> Iterator[Tensor]:
    if isinstance(output, Tensor):
        yield output
    elif isinstance(output, Mapping | tuple | list):
        for part in output.values() if isinstance(output, Mapping) else output:
            yield from _tensors(part)
