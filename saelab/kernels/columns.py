"""The m[f] largest pre-activations of each latent over the tokens of a batch, without the dense [n_tokens, n_latents] matrix.

As in `threshold.py`, a sample of the tokens gives a guess, here a threshold for each latent, what exceeds the guesses is
collected in row tiles, and the exact cut is taken among that. Latents whose guess collects too few are done again, a tile
of columns at a time. Masks equal those of the dense fp32 product: where rounding could decide, it does.
Shapes: N tokens, D inputs, F latents.
"""

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from saelab.base import processes as distributed
from saelab.base.codes import SparseCodes, counted
from saelab.kernels import mixed
from saelab.kernels.selection import fp32_bound
from saelab.kernels.threshold import as_codes, collect, in_order, settle

_SAMPLE = 256
_COLUMNS = 64


def per_latent(
    x_ND: Float[Tensor, "n d"],
    W_FD: Float[Tensor, "f d"],
    b_F: Float[Tensor, " f"],
    m_F: Int64[Tensor, " f"],
    shortlist: bool | None = None,
) -> SparseCodes:
    """The codes of the `m_F[f]` largest positive pre-activations x W^T + b of each latent f; of equal ones, the lower
    token. A latent with fewer positive ones gets only those. Not differentiable.

    >>> import torch
    >>> x = torch.tensor([[3.0, 1.0], [2.0, 9.0], [2.0, 4.0]])
    >>> per_latent(x, torch.eye(2), torch.zeros(2), torch.tensor([2, 1])).to_dense()
    tensor([[3., 0.],
            [2., 9.],
            [0., 0.]])
    """
    n, n_latents = len(x_ND), len(W_FD)
    with torch.no_grad():
        wanted_F = m_F > 0
        if x_ND.device.type != "cpu":
            return as_codes(*_on_device(x_ND, W_FD, b_F, m_F), n, n_latents)
        if not bool(wanted_F.any()):
            none = m_F.new_empty(0)
            return as_codes(none, none, x_ND.new_empty(0), n, n_latents)
        cut_F = _guess(x_ND, W_FD, b_F, m_F)
        cut_F = torch.where(wanted_F, cut_F, cut_F[wanted_F].amax())
        rows, indices, values = collect(x_ND, W_FD, b_F, cut_F, shortlist)
        found = wanted_F[indices]
        count_F = counted(indices[found], n_latents)
        short_F = wanted_F & (count_F < m_F) & (cut_F > 0)
        found &= ~short_F[indices]
        rows, indices, values = rows[found], indices[found], values[found]
        if bool(short_F.any()):
            again = _columns(x_ND, W_FD, b_F, m_F, short_F.nonzero().squeeze(1))
            rows, indices, values = (torch.cat(pair) for pair in zip((rows, indices, values), again, strict=True))
            rows, indices, values = in_order(rows, indices, values, n_latents)
        rank = _ranks(indices, values, n_latents)
        near = _doubtful(x_ND, W_FD, b_F, m_F, indices, values, rank)
        if bool(near.any()):
            in_reach = near | (rank < m_F[indices])  # no other can enter
            rows, indices, values, near = (each[in_reach] for each in (rows, indices, values, near))
            values = settle(x_ND, W_FD, b_F, rows, indices, values, near)
            rank = _ranks(indices, values, n_latents)
        keep = (rank < m_F[indices]) & (values > 0)
        return as_codes(rows[keep], indices[keep], values[keep], n, n_latents)


def _on_device(x_ND: Tensor, W_FD: Tensor, b_F: Tensor, m_F: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The same as (rows, indices, values) on a device, which has one product only and is waited for twice: for how much there
    is above the guesses, and for how much of that is kept."""
    cut_F = torch.where(m_F > 0, _guess(x_ND, W_FD, b_F, m_F), torch.inf)
    rows, indices, values = collect(x_ND, W_FD, b_F, cut_F, shortlist=False)
    short_F = (counted(indices, len(W_FD)) < m_F) & (cut_F > 0)
    keep = (_ranks(indices, values, len(W_FD)) < m_F[indices]) & ~short_F[indices]
    kept = keep.nonzero_static(size=len(keep), fill_value=0).squeeze(1)
    n_kept, n_short = torch.stack([keep.sum(), short_F.sum()]).cpu().tolist()
    rows, indices, values = (t[kept[:n_kept]] for t in (rows, indices, values))
    if n_short:
        again = _columns(x_ND, W_FD, b_F, m_F, short_F.nonzero().squeeze(1))
        rows, indices, values = (torch.cat(pair) for pair in zip((rows, indices, values), again, strict=True))
        rows, indices, values = in_order(rows, indices, values, len(W_FD))
        kept = ((_ranks(indices, values, len(W_FD)) < m_F[indices]) & (values > 0)).nonzero().squeeze(1)
        rows, indices, values = rows[kept], indices[kept], values[kept]
    return rows, indices, values


def keep_largest(codes: SparseCodes, m_F: Int64[Tensor, " f"]) -> SparseCodes:
    """Of given codes, those of all processes, only the `m_F[f]` largest of each latent, of equal ones the lower token;
    differentiable."""
    indices, own = distributed.gathered(codes.indices)
    values, _ = distributed.gathered(codes.values.detach())
    return codes.where((_ranks(indices, values, codes.n_latents) < m_F[indices])[own])


def _guess(x_ND: Tensor, W_FD: Tensor, b_F: Tensor, m_F: Tensor) -> Tensor:
    """Thresholds [F] a little below the batch's cuts, from evenly spaced tokens; 0 where a sample cannot tell."""
    sample_ND = x_ND[:: max(1, len(x_ND) // _SAMPLE)]
    scores_FS = mixed.linear(sample_ND, W_FD, b_F).T.contiguous()
    share_F = m_F * (len(sample_ND) / len(x_ND))
    rank_F = (
        (share_F + 2 * share_F.sqrt() + 1).ceil().long()
    )  # two standard deviations of a Poisson count: few fall short
    most = int(rank_F.amax().clamp_max(len(sample_ND))) if x_ND.device.type == "cpu" else len(sample_ND)
    ranked_FS = scores_FS.topk(most, dim=1).values
    cut_F = ranked_FS.gather(1, (rank_F - 1).clamp(0, most - 1)[:, None]).squeeze(1)
    return torch.where(rank_F > len(sample_ND), 0, cut_F.clamp_min(0))


def _columns(x_ND: Tensor, W_FD: Tensor, b_F: Tensor, m_F: Tensor, some: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(rows, indices, values) of at least the m largest of these latents, from the products of all tokens with them."""
    slack = fp32_bound(x_ND, W_FD, b_F).amax()
    rows, indices, values = [], [], []
    for part in some.split(_COLUMNS):
        scores_FN = torch.nn.functional.linear(W_FD[part].to(x_ND.dtype), x_ND) + b_F[part, None]
        m = m_F[part].clamp_max(len(x_ND))
        ranked_FM = scores_FN.topk(int(m.amax()), dim=1).values
        cut = ranked_FM.gather(1, m[:, None] - 1)
        latent, row = ((scores_FN >= cut - slack) & (scores_FN > -slack)).nonzero(as_tuple=True)
        rows.append(row)
        indices.append(part[latent])
        values.append(scores_FN[latent, row])
    return torch.cat(rows), torch.cat(indices), torch.cat(values)


def _doubtful(
    x_ND: Tensor, W_FD: Tensor, b_F: Tensor, m_F: Tensor, indices: Tensor, values: Tensor, rank: Tensor
) -> Tensor:
    """Entries [nnz] that rounding could move over their latent's cut, or over zero."""
    slack = fp32_bound(x_ND, W_FD, b_F).amax()
    last_F = values.new_full((len(W_FD),), torch.inf)  # the smallest that is kept, and the largest that is not
    next_F = values.new_full((len(W_FD),), -torch.inf)
    at_last, at_next = rank == m_F[indices] - 1, rank == m_F[indices]
    last_F[indices[at_last]] = values[at_last]
    next_F[indices[at_next]] = values[at_next]
    close_F = last_F - next_F <= slack
    return (close_F[indices] & ((values - last_F[indices]).abs() <= 2 * slack)) | (values.abs() <= slack)


def _ranks(indices: Tensor, values: Tensor, n_latents: int) -> Tensor:
    """The rank [nnz], from 0, of each entry among those of its latent, largest first; entries come in row-major order."""
    order = values.argsort(descending=True, stable=True)
    order = order[indices[order].argsort(stable=True)]
    counts_F = counted(indices, n_latents)
    first_F = counts_F.cumsum(0) - counts_F
    rank = torch.empty_like(indices)
    rank[order] = torch.arange(len(order), device=order.device) - first_F[indices[order]]
    return rank
