"""Non-negative least squares on a few atoms a token, batched, each move lowering the error.

Shapes: N tokens, S slots.
"""

import torch
from jaxtyping import Bool, Float
from torch import Tensor

_SPANNED = 1e-6  # squared distance from the span of the others, of a unit atom in fp32, below which it is in it


class GrowingSupport:
    """Least squares on supports that grow by one atom a step, kept non-negative, for n tokens at once.

    Keeps L^-1 of each token's Gram matrix G = L L^T of the atoms that are on. An atom with inner products g with them adds one
    row, (-g^T G^-1, 1) / delta with delta^2 = 1 - g^T G^-1 g its squared distance from their span; and as the residual is
    orthogonal to that span, the solution moves by (its product with the residual / delta) times that row. So nothing in a step
    is cubic. Only tokens where a value would cross zero are solved anew, by `descend`.

    `gram_NSS` (float64) are the inner products of the atoms, filled in by the caller before an atom joins.
    """

    def __init__(self, gram_NSS: Float[Tensor, "n s s"]) -> None:
        self.gram_NSS, self.inverse_NSS = gram_NSS, torch.zeros_like(gram_NSS)

    def join(
        self,
        target_NS: Float[Tensor, "n s"],
        values_NS: Float[Tensor, "n s"],
        product_N: Float[Tensor, " n"],
        joins_N: Bool[Tensor, " n"],
    ) -> Float[Tensor, "n s"]:
        """The values [n, s] with the last atom, where it joins; of the first n tokens.

        `values_NS` are what the step before gave, 0 in the last slot; `target_NS` are the atoms' inner products with x,
        `product_N` that of the last one with the residual.
        """
        n, last = len(values_NS), values_NS.shape[1] - 1
        inverse_NSS = self.inverse_NSS[:n, :last, :last]
        along_NS = torch.bmm(inverse_NSS, self.gram_NSS[:n, :last, last, None])[:, :, 0]
        distance_N = 1 - along_NS.square().sum(1)
        joins_N = joins_N & (distance_N > _SPANNED)
        one_N1 = torch.ones_like(distance_N)[:, None]
        row_NS = torch.cat([-torch.bmm(along_NS[:, None], inverse_NSS)[:, 0], one_N1], 1)
        row_NS = torch.where(joins_N[:, None], row_NS * distance_N.clamp(min=_SPANNED).rsqrt()[:, None], 0.0)
        self.inverse_NSS[:n, last, : last + 1] = row_NS
        goal_NS = values_NS + row_NS * (product_N * row_NS[:, -1])[:, None]
        on_NS = values_NS > 0
        on_NS[:, -1] = joins_N
        crossing = (on_NS & (goal_NS <= 0)).any(1).nonzero().squeeze(1)
        if len(crossing):
            gram = self.gram_NSS[crossing, : last + 1, : last + 1]
            found = descend(gram, target_NS[crossing], values_NS[crossing], on_NS[crossing])
            goal_NS[crossing] = found.double()
            self.inverse_NSS[crossing, : last + 1, : last + 1] = _inverse_factor(gram, found > 0)
        return goal_NS.to(values_NS)


def descend(
    gram_NSS: Float[Tensor, "n s s"],
    target_NS: Float[Tensor, "n s"],
    values_NS: Float[Tensor, "n s"],
    on_NS: Bool[Tensor, "n s"],
) -> Float[Tensor, "n s"]:
    """Values [n, s] with sum of values * atoms nearer to x, least squares on the slots that stay on.

    `gram_NSS` are the inner products of the atoms, `target_NS` those with x. Starts from `values_NS`, non-negative and zero
    where `on_NS` is False. Moves towards the least-squares solution on the slots that are on; where that would cross zero it
    stops there, puts those slots off and goes on (the inner loop of Lawson and Hanson's algorithm, 1974). The error is convex
    along each move, so it never rises; slots that go off do not come back, so the end is the optimum of its own support rather
    than of all non-negative values. Atoms that depend on each other share.

    >>> on = torch.tensor([[True, True, False]])
    >>> descend(torch.eye(3)[None], torch.tensor([[2.0, -1.0, 5.0]]), torch.zeros(1, 3), on).round(decimals=4)
    tensor([[2., 0., 0.]])
    """
    ridge = max(1e-9, 10 * torch.finfo(gram_NSS.dtype).eps)
    gram_NSS, target_NS, values, on = gram_NSS.double(), target_NS.double(), values_NS.double(), on_NS.clone()
    todo = on.any(1).nonzero().squeeze(1)
    while len(todo):
        start, mask = values[todo], on[todo]
        factor = torch.linalg.cholesky(_masked(gram_NSS[todo], mask, ridge))
        goal = torch.cholesky_solve(torch.where(mask, target_NS[todo], 0.0)[:, :, None], factor)[:, :, 0]
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


def _masked(gram_NSS: Tensor, on_NS: Tensor, ridge: float) -> Tensor:
    """The Gram matrices of the slots that are on, the identity on the others."""
    both = on_NS[:, :, None] & on_NS[:, None, :]
    identity = torch.eye(on_NS.shape[1], dtype=gram_NSS.dtype, device=gram_NSS.device)
    return torch.where(both, gram_NSS, 0.0) + identity * torch.where(on_NS, ridge, 1.0)[:, :, None]


def _inverse_factor(gram_NSS: Tensor, on_NS: Tensor) -> Tensor:
    """L^-1 for `GrowingSupport`, rows of slots that are off zero."""
    factor = torch.linalg.cholesky(_masked(gram_NSS, on_NS, 0.0))
    identity = torch.eye(on_NS.shape[1], dtype=factor.dtype, device=factor.device)
    return torch.linalg.solve_triangular(factor, identity, upper=False) * on_NS[:, :, None]
