"""Non-negative least squares on a few atoms a token, batched, each move lowering the error.

Shapes: N tokens, S slots, D inputs.
"""

import torch
from torch import Tensor

_RIDGE = 1e-9  # atoms that depend on each other still have a solution


def descend(atoms_NSD: Tensor, x_ND: Tensor, values_NS: Tensor, on_NS: Tensor) -> Tensor:
    """Values [n, s] with sum of values * atoms nearer to x [n, d], least squares on the slots that stay on.

    Starts from `values_NS`, non-negative and zero where `on_NS` is False. Moves towards the least-squares solution on the
    slots that are on; where that would cross zero it stops there, puts those slots off and goes on (the inner loop of Lawson
    and Hanson's algorithm, 1974). The error is convex along each move, so it never rises; slots that go off do not come back,
    so the end is the optimum of its own support rather than of all non-negative values.

    >>> atoms = torch.eye(3)[None]
    >>> descend(atoms, torch.tensor([[2.0, -1.0, 5.0]]), torch.zeros(1, 3), torch.tensor([[True, True, False]]))
    tensor([[2., 0., 0.]])
    """
    gram_NSS = torch.bmm(atoms_NSD, atoms_NSD.transpose(1, 2)).double()
    target_NS = torch.bmm(atoms_NSD, x_ND[:, :, None])[:, :, 0].double()
    values, on = values_NS.double(), on_NS.clone()
    todo = on.any(1).nonzero().squeeze(1)
    while len(todo):
        start, mask = values[todo], on[todo]
        goal = _solve(gram_NSS[todo], target_NS[todo], mask)
        crossing = mask & (goal <= 0)
        # how far along the way each slot reaches zero; those at zero that would fall do so at once
        reach = torch.where(crossing, start / (start - goal).clamp(min=1e-300), torch.inf)
        share = reach.amin(1, keepdim=True).clamp(max=1.0)
        moved = torch.where(mask, start + share * (goal - start), 0.0)
        off = crossing & (reach <= share)
        values[todo] = torch.where(off, 0.0, moved).clamp(min=0)
        on[todo] = mask & ~off
        todo = todo[off.any(1) & on[todo].any(1)]
    return values.to(values_NS)


def _solve(gram_NSS: Tensor, target_NS: Tensor, on_NS: Tensor) -> Tensor:
    """The least-squares values on the slots that are on; the others get 0."""
    both = on_NS[:, :, None] & on_NS[:, None, :]
    identity = torch.eye(on_NS.shape[1], dtype=gram_NSS.dtype, device=gram_NSS.device)
    system = torch.where(both, gram_NSS, 0.0) + identity * torch.where(on_NS, _RIDGE, 1.0)[:, :, None]
    factor = torch.linalg.cholesky(system)
    return torch.cholesky_solve(torch.where(on_NS, target_NS, 0.0)[:, :, None], factor)[:, :, 0]
