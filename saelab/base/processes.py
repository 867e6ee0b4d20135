"""The one seam for many processes: what is global to a batch or a run goes through here.

On one process every function is the identity. No other file knows of ranks. The processes have equal numbers of rows in a
batch; those of process 0 come first.
"""

import torch
import torch.distributed as dist
from jaxtyping import Shaped
from torch import Tensor


def world_size() -> int:
    """Number of processes that train together."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def sum_(tensor: Shaped[Tensor, "*shape"]) -> Shaped[Tensor, "*shape"]:
    """Sum over the processes, in place."""
    if world_size() > 1:
        dist.all_reduce(tensor)
    return tensor


def max_(tensor: Shaped[Tensor, "*shape"]) -> Shaped[Tensor, "*shape"]:
    """Maximum over the processes, in place."""
    if world_size() > 1:
        dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
    return tensor


def mean(tensor: Shaped[Tensor, "*shape"]) -> Shaped[Tensor, "*shape"]:
    """Mean over the processes; without gradients."""
    return sum_(tensor.detach().clone()) / world_size() if world_size() > 1 else tensor


def total(n: int) -> int:
    """Sum of a count over the processes."""
    return int(sum_(torch.tensor(n))) if world_size() > 1 else n


def gathered(tensor: Shaped[Tensor, "n *row"]) -> tuple[Shaped[Tensor, "total *row"], slice]:
    """The rows of all processes, and which of them are this one's. Processes may have different numbers of rows."""
    if world_size() == 1:
        return tensor, slice(None)
    counts = torch.zeros(world_size(), dtype=torch.int64)
    counts[dist.get_rank()] = len(tensor)
    lengths = sum_(counts).tolist()
    padded = tensor.detach().new_zeros(max(lengths), *tensor.shape[1:])
    padded[: len(tensor)] = tensor.detach()
    parts = [torch.empty_like(padded) for _ in lengths]
    dist.all_gather(parts, padded)
    start = sum(lengths[: dist.get_rank()])
    return torch.cat([part[:n] for part, n in zip(parts, lengths, strict=True)]), slice(start, start + len(tensor))


def mean_gradients(parameters: list[torch.nn.Parameter]) -> None:
    """Average each gradient over the processes."""
    if world_size() > 1:
        for parameter in parameters:
            if parameter.grad is not None:
                dist.all_reduce(parameter.grad)
                parameter.grad /= world_size()


def same_everywhere(tensor: Shaped[Tensor, "*shape"]) -> Shaped[Tensor, "*shape"]:
    """The first process's tensor, in place."""
    if world_size() > 1:
        dist.broadcast(tensor, 0)
    return tensor
