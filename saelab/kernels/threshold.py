"""Pre-activations above a threshold, and the M largest of a whole batch, without the dense [n_tokens, n_latents] matrix.

The M largest of 67 million scores are found by a guess: the cut of a sample of the tokens is a threshold a little below
the batch's own, what exceeds it is collected, and the exact cut is taken among that. A guess that collects too little is
lowered. Masks equal those of the dense fp32 product: where rounding could decide, it does. Shapes as in `selection.py`.
"""

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from saelab.base.codes import SparseCodes, counted
from saelab.kernels import mixed
from saelab.kernels.selection import PAD, bf16_bounds, dense_rows, fp32_bound, products, shortlist_pays
from saelab.kernels.sparse import sampled_product

_GROUP = 32
_SAMPLE = 128
_ROOM = 1024  # entries a token for which a device has room at first
_MARGIN = 1.3  # how many times its share of the budget a sample is asked for


def above(
    x_ND: Float[Tensor, "n d"],
    W_FD: Float[Tensor, "f d"],
    b_F: Float[Tensor, " f"],
    threshold: Float[Tensor, "*f"],
    shortlist: bool | None = None,
    floor: float = 0.0,
) -> SparseCodes:
    """The codes of all pre-activations greater than `threshold`, a scalar or [n_latents], and than `floor`. Not
    differentiable.

    >>> import torch
    >>> above(torch.tensor([[3.0, 1.0, 2.0]]), torch.eye(3), torch.zeros(3), torch.tensor(1.5)).indices
    tensor([0, 2])
    """
    with torch.no_grad():
        cut_F = threshold.to(x_ND).expand(len(W_FD)).clamp_min(floor)
        return as_codes(*collect(x_ND, W_FD, b_F, cut_F, shortlist), len(x_ND), len(W_FD))


def top_total(
    x_ND: Float[Tensor, "n d"],
    W_FD: Float[Tensor, "f d"],
    b_F: Float[Tensor, " f"],
    budget: int,
    shortlist: bool | None = None,
) -> SparseCodes:
    """The codes of the `budget` largest positive pre-activations of the whole batch; of equal ones, the first in
    row-major order. Not differentiable.

    >>> import torch
    >>> top_total(torch.tensor([[3.0, 1.0], [2.0, 9.0]]), torch.eye(2), torch.zeros(2), 2).to_dense()
    tensor([[3., 0.],
            [0., 9.]])
    """
    with torch.no_grad():
        guess = _guess(x_ND, W_FD, b_F, budget)
        while True:
            rows, indices, values = collect(x_ND, W_FD, b_F, guess.expand(len(W_FD)), shortlist)
            if len(values) >= budget or not bool(guess):
                break
            guess = torch.where(guess > 1e-3, guess / 2, 0)
        if len(values) > budget and x_ND.device.type != "cpu":
            kept = values.argsort(descending=True, stable=True)[:budget].sort().values
            rows, indices, values = rows[kept], indices[kept], values[kept]
        elif len(values) > budget:
            cut = values.kthvalue(len(values) - budget + 1).values
            near = (values - cut).abs() <= fp32_bound(x_ND, W_FD, b_F)[rows]
            values = settle(x_ND, W_FD, b_F, rows, indices, values, near)
            cut = values.kthvalue(len(values) - budget + 1).values
            keep = values > cut
            ties = (values == cut).nonzero().squeeze(1)
            keep[ties[: budget - int(keep.sum())]] = True
            rows, indices, values = rows[keep], indices[keep], values[keep]
        return as_codes(rows, indices, values, len(x_ND), len(W_FD))


def _guess(x_ND: Tensor, W_FD: Tensor, b_F: Tensor, budget: int) -> Tensor:
    """A threshold a little below the batch's cut, from evenly spaced tokens."""
    sample_ND = x_ND[:: max(1, len(x_ND) // _SAMPLE)]
    scores = mixed.linear(sample_ND, W_FD, b_F).flatten()
    share = min(len(scores), int(_MARGIN * budget * len(sample_ND) / len(x_ND)) + 8)
    return scores.topk(share, sorted=False).values.amin().clamp_min(0)


def collect(
    x_ND: Float[Tensor, "n d"],
    W_FD: Float[Tensor, "f d"],
    b_F: Float[Tensor, " f"],
    cut_F: Float[Tensor, " f"],
    shortlist: bool | None,
) -> tuple[Int64[Tensor, " nnz"], Int64[Tensor, " nnz"], Float[Tensor, " nnz"]]:
    """Row-major (rows, indices, values) of all scores above the cuts; those near a cut have the dense value."""
    if not len(x_ND):
        none = torch.empty(0, dtype=torch.int64, device=x_ND.device)
        return none, none, x_ND.new_empty(0)
    if shortlist is None:
        shortlist = shortlist_pays(x_ND, W_FD, 1)
    if x_ND.device.type != "cpu":
        return _collected_at_once(x_ND, W_FD, b_F, cut_F)
    if not shortlist:
        found = [_entries(scores, cut_F, None, part.start) for part, scores in products(x_ND, W_FD, b_F)]
        rows, indices, values = (torch.cat(parts) for parts in zip(*found, strict=True))
        return in_order(rows, indices, values, len(W_FD))
    x_low, W_low, b_low = x_ND.bfloat16(), W_FD.bfloat16(), b_F.bfloat16()
    loose_N = bf16_bounds(x_ND, x_low, W_FD, W_low, b_F, cut_F.amax().expand(len(x_ND)))
    found = [_entries(scores, cut_F, loose_N[part], part.start) for part, scores in products(x_low, W_low, b_low)]
    rows, indices, values = (torch.cat(parts) for parts in zip(*found, strict=True))
    rows, indices, _ = in_order(rows, indices, values, len(W_FD))
    places = as_codes(rows, indices, x_ND.new_empty(0), len(x_ND), len(W_FD))
    values = sampled_product(x_ND, W_FD, places) + b_F[indices]
    near = (values - cut_F[indices]).abs() <= fp32_bound(x_ND, W_FD, b_F)[rows]
    values = settle(x_ND, W_FD, b_F, rows, indices, values, near)
    above = values > cut_F[indices]
    return rows[above], indices[above], values[above]


def _collected_at_once(x_ND: Tensor, W_FD: Tensor, b_F: Tensor, cut_F: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The same on a device, which is waited for once: each part has room for a share of its scores, and only where that
    was too little is done again."""
    f = len(W_FD)
    parts, places, values, counts = [], [], [], []
    for part, scores_NF in products(x_ND, W_FD, b_F):
        above_NF = scores_NF > cut_F
        place = above_NF.flatten().nonzero_static(size=min(_ROOM, f) * len(scores_NF), fill_value=0).squeeze(1)
        parts.append(part)
        places.append(place + part.start * f)
        values.append(scores_NF.flatten()[place])
        counts.append(above_NF.sum())
    for i, count in enumerate(torch.stack(counts).cpu().tolist()):
        if count > len(places[i]):
            scores_NF = mixed.linear(x_ND[parts[i]], W_FD, b_F)
            place = (scores_NF > cut_F).flatten().nonzero().squeeze(1)
            places[i], values[i] = place + parts[i].start * f, scores_NF.flatten()[place]
        else:
            places[i], values[i] = places[i][:count], values[i][:count]
    place = torch.cat(places)
    return place // f, place % f, torch.cat(values)


def _entries(scores_NF: Tensor, cut_F: Tensor, loose_N: Tensor | None, first: int) -> tuple[Tensor, Tensor, Tensor]:
    """Entries above the cuts, less `loose_N`; latents in groups whose maximum is too small are never looked at."""
    n, f = scores_NF.shape
    groups = f // _GROUP if f % _GROUP == 0 and scores_NF.stride(1) == 1 else 0
    if not groups or f < 8 * _GROUP:
        margin = cut_F if loose_N is None else cut_F - loose_N[:, None]
        rows, indices = (scores_NF > margin).nonzero(as_tuple=True)
        return (
            rows + first,
            indices,
            scores_NF[rows, indices].float() if loose_N is not None else scores_NF[rows, indices],
        )
    grouped = scores_NF.view(n, _GROUP, groups)  # latent = member * groups + group
    lowest_G = cut_F.view(_GROUP, groups).amin(0)
    lowest = lowest_G if loose_N is None else lowest_G - loose_N[:, None]
    rows, group = (grouped.amax(1) > lowest).nonzero(as_tuple=True)
    inside = grouped[rows, :, group].to(cut_F.dtype)
    cuts = cut_F.view(_GROUP, groups).T[group]
    entry, member = (inside > (cuts if loose_N is None else cuts - loose_N[rows][:, None])).nonzero(as_tuple=True)
    return rows[entry] + first, member * groups + group[entry], inside[entry, member]


def settle(
    x_ND: Float[Tensor, "n d"],
    W_FD: Float[Tensor, "f d"],
    b_F: Float[Tensor, " f"],
    rows: Int64[Tensor, " nnz"],
    indices: Int64[Tensor, " nnz"],
    values: Float[Tensor, " nnz"],
    near: Bool[Tensor, " nnz"],
) -> Float[Tensor, " nnz"]:
    """The values with those that are `near` a cut taken from the dense product."""
    if x_ND.device.type != "cpu" or not bool(near.any()):  # a device has no product but the dense one
        return values
    asked, place = rows[near].unique(return_inverse=True)
    settled = values[near].clone()
    for start in range(0, len(asked), 8 * PAD):
        scores = dense_rows(x_ND, W_FD, b_F, asked[start : start + 8 * PAD])
        here = (place >= start) & (place < start + 8 * PAD)
        settled[here] = scores[place[here] - start, indices[near][here]]
    return values.masked_scatter(near, settled)


def in_order(
    rows: Int64[Tensor, " nnz"], indices: Int64[Tensor, " nnz"], values: Float[Tensor, " nnz"], f: int
) -> tuple[Int64[Tensor, " nnz"], Int64[Tensor, " nnz"], Float[Tensor, " nnz"]]:
    order = (rows * f + indices).argsort()
    return rows[order], indices[order], values[order]


def as_codes(
    rows: Int64[Tensor, " nnz"], indices: Int64[Tensor, " nnz"], values: Float[Tensor, " values"], n: int, f: int
) -> SparseCodes:
    offsets = torch.zeros(n + 1, dtype=torch.int64, device=rows.device)
    torch.cumsum(counted(rows, n), 0, out=offsets[1:])
    return SparseCodes(values, indices, offsets, f)
