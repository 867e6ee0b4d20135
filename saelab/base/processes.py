"""The one seam for many processes: what is global to a batch or a run goes through here.

On one process every function is the identity. No other file knows of ranks. The processes have equal numbers of rows in a
batch; those of process 0 come first.
"""

import atexit
import contextlib
import json
import os
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import safetensors.torch
import torch
import torch.distributed as dist
from jaxtyping import Shaped
from torch import Tensor

from saelab.base import errors, watch
from saelab.base.errors import ConfigError, SaelabError

Found = TypeVar("Found")
STARTED = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")  # what torchrun tells each process


def join() -> None:
    """Meet the processes that torchrun has started with this one, where it has and they have not met."""
    together = all(name in os.environ for name in STARTED) and int(os.environ["WORLD_SIZE"]) > 1
    if together and dist.is_available() and not dist.is_initialized():
        dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")
        atexit.register(dist.destroy_process_group)  # whose threads would end an interpreter that ends before them


def world_size() -> int:
    """Number of processes that train together."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """The number of this process among them."""
    return dist.get_rank() if world_size() > 1 else 0


def first() -> bool:
    """Whether this is the process that writes files, logs and progress."""
    return rank() == 0


def device(asked: torch.device) -> torch.device:
    """Of the GPUs of a machine this process's own, where none is named by number."""
    if asked.type != "cuda" or asked.index is not None or world_size() == 1:
        return asked
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", rank())) % torch.cuda.device_count())


def part(n: int) -> slice:
    """Which of n things in a row are this process's."""
    return slice(n * rank() // world_size(), n * (rank() + 1) // world_size())


def watched() -> contextlib.AbstractContextManager[None]:
    """Within: a process that is gone ends this one with an error that names it."""
    return watch.watched(rank(), world_size()) if world_size() > 1 else contextlib.nullcontext()


@contextlib.contextmanager
def _named() -> Iterator[None]:
    """Within: what torch says of a lost connection becomes a `ProcessError` that names the process that is gone."""
    try:
        yield
    except RuntimeError as error:
        raise watch.blamed(error) from error


def sum_(tensor: Shaped[Tensor, "*shape"]) -> Shaped[Tensor, "*shape"]:
    """Sum over the processes, in place."""
    if world_size() > 1:
        with _named():
            dist.all_reduce(tensor)
    return tensor


def max_(tensor: Shaped[Tensor, "*shape"]) -> Shaped[Tensor, "*shape"]:
    """Maximum over the processes, in place."""
    if world_size() > 1:
        with _named():
            dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
    return tensor


def mean(tensor: Shaped[Tensor, "*shape"]) -> Shaped[Tensor, "*shape"]:
    """Mean over the processes; without gradients."""
    return sum_(tensor.detach().clone()) / world_size() if world_size() > 1 else tensor


def total(n: int) -> int:
    """Sum of a count over the processes."""
    return int(sum_(torch.tensor(n))) if world_size() > 1 else n


def any_(flag: bool) -> bool:
    """Whether it holds in one process at least."""
    return total(int(flag)) > 0


def gathered(tensor: Shaped[Tensor, "n *row"]) -> tuple[Shaped[Tensor, "total *row"], slice]:
    """The rows of all processes, and which of them are this one's. Processes may have different numbers of rows."""
    if world_size() == 1:
        return tensor, slice(None)
    counts = torch.zeros(world_size(), dtype=torch.int64)
    counts[rank()] = len(tensor)
    lengths = sum_(counts).tolist()
    padded = tensor.detach().new_zeros(max(lengths), *tensor.shape[1:])
    padded[: len(tensor)] = tensor.detach()
    parts = [torch.empty_like(padded) for _ in lengths]
    with _named():
        dist.all_gather(parts, padded)
    start = sum(lengths[: rank()])
    return torch.cat([part[:n] for part, n in zip(parts, lengths, strict=True)]), slice(start, start + len(tensor))


def mean_gradients(parameters: list[torch.nn.Parameter]) -> None:
    """Average each gradient over the processes."""
    if world_size() > 1:
        for parameter in parameters:
            if parameter.grad is not None:
                sum_(parameter.grad)
                parameter.grad /= world_size()


def same_everywhere(tensor: Shaped[Tensor, "*shape"]) -> Shaped[Tensor, "*shape"]:
    """The first process's tensor, in place."""
    if world_size() > 1:
        with _named():
            dist.broadcast(tensor, 0)
    return tensor


def to_first(tensors: dict[str, Shaped[Tensor, "..."]]) -> dict[str, Shaped[Tensor, "..."]]:
    """In the first process those of all, in the others their own: one process after the other sends what it has."""
    everything = dict(tensors)
    for sender in range(1, world_size()):
        sends = rank() == sender
        message = _bytes(safetensors.torch.save({k: t.contiguous() for k, t in tensors.items()}) if sends else b"")
        length = total(len(message))
        with _named():
            if sends:
                dist.send(message, 0)
            elif first():
                message = torch.empty(length, dtype=torch.uint8)
                dist.recv(message, sender)
                everything |= safetensors.torch.load(message.numpy().tobytes())
    return everything


def _bytes(content: bytes) -> Tensor:
    return torch.frombuffer(bytearray(content), dtype=torch.uint8) if content else torch.empty(0, dtype=torch.uint8)


def _texts(text: str) -> list[str]:
    """What each process says."""
    return bytes(gathered(_bytes(text.encode() + b"\0"))[0].numpy()).decode().split("\0")[:-1]


def together(call: Callable[[], Found]) -> Found:
    """What the call gives in this process, once it has ended in all. An error of one is raised in each, with its rank.

    >>> together(lambda: 3)
    3
    """
    if world_size() == 1:
        return call()
    raised, found = None, None
    try:
        found = call()
    except SaelabError as error:
        raised = error
    said = _texts("" if raised is None else json.dumps([type(raised).__name__, str(raised)]))
    if raised is not None:
        raise raised
    for number, text in enumerate(said):
        if text:
            kind, message = json.loads(text)
            raise getattr(errors, kind, SaelabError)(f"in process {number} of {len(said)}: {message}")
    return found  # type: ignore[return-value]  # None where the call gives that


def by_first(call: Callable[[], Any]) -> None:
    """Let the first process do it, and the others wait; an error of it is raised in each."""
    together(call if first() else lambda: None)


def agree(fields: dict[str, Any]) -> None:
    """Raise `ConfigError` unless every process has the same plain values under the same names."""
    if world_size() == 1:
        return
    said = [json.loads(text) for text in _texts(json.dumps(fields, sort_keys=True, default=str))]
    for number, there in enumerate(said[1:], start=1):
        if names := [name for name in said[0] if said[0][name] != there.get(name)]:
            differ = "; ".join(f"{name}: {said[0][name]!r} in process 0, {there.get(name)!r} there" for name in names)
            raise ConfigError(
                f"process {number} of {len(said)} trains something else ({differ}): start all of them with the same "
                "arguments, data and versions, and with `out` in a folder that all of them see"
            )
