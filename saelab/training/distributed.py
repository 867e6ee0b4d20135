"""The one seam for many processes: what is global to a batch or a run goes through here.

On one process every function is the identity. No other file knows of ranks.
"""

import torch
import torch.distributed as dist
from torch import Tensor


def world_size() -> int:
    """Number of processes that train together."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """This process's number among them."""
    return dist.get_rank() if world_size() > 1 else 0


def sum_(tensor: Tensor) -> Tensor:
    """Sum over the processes, in place."""
    if world_size() > 1:
        dist.all_reduce(tensor)
    return tensor


def max_(tensor: Tensor) -> Tensor:
    """Maximum over the processes, in place."""
    if world_size() > 1:
        dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
    return tensor


def mean_gradients(parameters: list[torch.nn.Parameter]) -> None:
    """Average each gradient over the processes."""
    if world_size() > 1:
        for parameter in parameters:
            if parameter.grad is not None:
                dist.all_reduce(parameter.grad)
                parameter.grad /= world_size()


def same_everywhere(tensor: Tensor) -> Tensor:
    """The first process's tensor, in place."""
    if world_size() > 1:
        dist.broadcast(tensor, 0)
    return tensor
