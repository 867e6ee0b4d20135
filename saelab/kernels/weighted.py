"""The k latents of each token with the largest weighted pre-activations, in row tiles.

As in `selection.py` there are two ways to the same masks: exact, and where the processor has bf16 dot products by a shortlist.
The shortlist ranks upper bounds: whatever is not on it scores less in fp32 than the last bound on it, so a token whose k-th
score is above that is settled; the others go the exact way. Shapes: N tokens, D inputs, F latents, K kept, M candidates.
"""

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from saelab.base.codes import SparseCodes
from saelab.kernels import mixed
from saelab.kernels.selection import (
    bf16_bounds,
    candidate_count,
    dense_rows,
    fp32_bound,
    largest,
    shortlist_pays,
    tile_rows,
    tiles,
)
from saelab.kernels.sparse import sampled_product

_BF16_STORED = 1 + 2.0**-5  # eight roundings to bf16, 2^-9 each, twice over


class _Weighted(NamedTuple):
    """What the weighted scores z (1 + strength |g W_dec^T|) with z = relu(x W^T + b) are made of."""

    x_ND: Tensor
    W_FD: Tensor
    b_F: Tensor
    gradient_ND: Tensor
    W_dec_FD: Tensor
    strength: float


def top_k_weighted(
    x_ND: Float[Tensor, "n d"],
    W_FD: Float[Tensor, "f d"],
    b_F: Float[Tensor, " f"],
    gradient_ND: Float[Tensor, "n d"],
    W_dec_FD: Float[Tensor, "f d"],
    strength: float,
    k: int,
    shortlist: bool | None = None,
) -> SparseCodes:
    """The codes z = x W^T + b > 0 of the k largest z (1 + strength |gradient W_dec^T|) of each token.

    The values are z, the weights only choose. Of equal weighted scores the lower index wins. Not differentiable.
    `shortlist=None` decides by processor and size.

    >>> import torch
    >>> x, g = torch.tensor([[3.0, 2.0]]), torch.tensor([[0.0, -1.0]])
    >>> top_k_weighted(x, torch.eye(2), torch.zeros(2), g, torch.eye(2), 1.0, k=1).to_dense()
    tensor([[0., 2.]])
    """
    if shortlist is None:
        shortlist = shortlist_pays(x_ND, W_FD, k)
    values_NK = x_ND.new_empty(len(x_ND), k)
    indices_NK = torch.empty(len(x_ND), k, dtype=torch.int64, device=x_ND.device)

    def exactly(rows: slice | Tensor, scores_NF: Tensor, influence_NF: Tensor) -> None:
        weights_NF = influence_NF.abs_().mul_(strength).add_(1)
        indices_NK[rows] = largest(weights_NF.mul_(scores_NF.relu()), k)[1]
        values_NK[rows] = scores_NF.gather(1, indices_NK[rows])

    with torch.no_grad():
        if not shortlist:
            for rows in tiles(len(x_ND), len(W_FD), x_ND.device):
                scores_NF = mixed.linear(x_ND[rows], W_FD, b_F)
                exactly(rows, scores_NF, mixed.linear(gradient_ND[rows], W_dec_FD))
            return SparseCodes.from_rows(values_NK, indices_NK, len(W_FD))
        made_of = _Weighted(x_ND, W_FD, b_F, gradient_ND, W_dec_FD, strength)
        candidates_NM, reach_N = _candidates(made_of, k)
        doubtful_N = _choose(made_of, candidates_NM, reach_N, values_NK, indices_NK)
        none_F = torch.zeros_like(b_F)
        for some in doubtful_N.nonzero().squeeze(1).split(tile_rows(len(W_FD), x_ND.device)):
            influence_NF = dense_rows(gradient_ND, W_dec_FD, none_F, some)
            exactly(some, dense_rows(x_ND, W_FD, b_F, some), influence_NF)
    return SparseCodes.from_rows(values_NK, indices_NK, len(W_FD))


def _candidates(made_of: _Weighted, k: int) -> tuple[Tensor, Tensor]:
    """The latents [n, m] with the largest bounds of their weighted scores, by index, and what [n] no other one exceeds."""
    x_ND, W_FD, b_F, gradient_ND, W_dec_FD, strength = made_of
    m = candidate_count(k, len(W_FD))
    x_low, W_low, b_low, g_low, W_dec_low = (t.bfloat16() for t in (x_ND, W_FD, b_F, gradient_ND, W_dec_FD))
    zero_N, zero_F = x_ND.new_zeros(len(x_ND)), torch.zeros_like(b_F)
    score_bound_N = bf16_bounds(x_ND, x_low, W_FD, W_low, b_F, zero_N)
    influence_bound_N = bf16_bounds(gradient_ND, g_low, W_dec_FD, W_dec_low, zero_F, zero_N)
    bounds_NM = x_low.new_empty(len(x_ND), m)
    candidates_NM = torch.empty(len(x_ND), m, dtype=torch.int64)
    for rows in tiles(len(x_ND), len(W_FD), x_ND.device):
        scores_NF = torch.nn.functional.linear(x_low[rows], W_low, b_low)
        scores_NF.add_(score_bound_N[rows, None].bfloat16()).relu_()
        weights_NF = torch.nn.functional.linear(g_low[rows], W_dec_low).abs_()
        weights_NF.mul_(strength).add_((1 + strength * influence_bound_N[rows, None]).bfloat16())
        torch.topk(scores_NF.mul_(weights_NF), m, dim=1, out=(bounds_NM[rows], candidates_NM[rows]))
    return candidates_NM.sort(dim=1).values, bounds_NM[:, -1].float() * _BF16_STORED


def _choose(
    made_of: _Weighted, candidates_NM: Tensor, reach_N: Tensor, values_NK: Tensor, indices_NK: Tensor
) -> Tensor:
    """Fill in the k best candidates of each token; True [n] where rounding, or what is not a candidate, could change them."""
    x_ND, W_FD, b_F, gradient_ND, W_dec_FD, strength = made_of
    n, m = candidates_NM.shape
    k = values_NK.shape[1]
    offsets = torch.arange(0, n * m + 1, m)
    places = SparseCodes(x_ND.new_empty(0), candidates_NM.flatten(), offsets, len(W_FD))
    values_NM = (sampled_product(x_ND, W_FD, places) + b_F[places.indices]).view(n, m)
    weights_NM = sampled_product(gradient_ND, W_dec_FD, places).view(n, m).abs_().mul_(strength).add_(1)
    scores_NM = weights_NM * values_NM.relu()
    top = scores_NM.topk(min(k + 1, m), dim=1)
    places_NK = top.indices[:, :k].sort(dim=1).values
    values_NK.copy_(values_NM.gather(1, places_NK))
    indices_NK.copy_(candidates_NM.gather(1, places_NK))

    value_slack_N = fp32_bound(x_ND, W_FD, b_F)
    influence_slack_N = fp32_bound(gradient_ND, W_dec_FD, torch.zeros_like(b_F))
    slack_N = value_slack_N * weights_NM.amax(1) + values_NM.amax(1).relu() * strength * influence_slack_N
    kth_N = top.values[:, k - 1]
    doubtful_N = (reach_N >= kth_N) | (values_NK.abs() <= value_slack_N[:, None]).any(1) | ~torch.isfinite(reach_N)
    if top.values.shape[1] > k:
        doubtful_N |= kth_N - top.values[:, k] <= slack_N
    return doubtful_N
