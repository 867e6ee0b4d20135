"""The k largest pre-activations of each token, without keeping the dense [n_tokens, n_latents] matrix.

Two ways to the same masks:

* exact: the fp32 product tile by tile, then the k largest;
* shortlist: where the processor has bf16 dot products, a bf16 product chooses 3 k candidates a token (k + 16 at least),
  which are scored again in fp32. A token falls back to the exact way when rounding could have changed its mask.

Of equal scores the lower index wins. Shapes: N tokens, D inputs, F latents, K kept, M candidates.
"""

import functools
from collections.abc import Iterator

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from saelab.base.codes import SparseCodes
from saelab.kernels import gpu, mixed
from saelab.kernels.sparse import sampled_product

_TILE_ROWS, _TILE_SCORES = 1024, 2**24  # the larger of a product's parts on a CPU, in rows and in scores
_DEVICE_SCORES = 2**27  # on a device
_PER_TILE = 256  # the most that a program keeps of a tile
PAD = 64  # an fp32 product of 64 rows or more has the same bits whatever its number of rows
_BF16_UNIT = 2.0**-9
_CANDIDATES = 3  # times k: far enough down for the rigorous bound on bf16's error to clear nearly every token
_SHORTLIST_LATENTS = 2048  # below this many latents the product is too small for a shortlist to pay


@functools.cache
def bf16_products_are_fast() -> bool:
    """Whether this processor has bf16 dot products (AVX-512 BF16 or AMX)."""
    supported = getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
    tiles = getattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    return bool(supported()) or bool(tiles())


def shortlist_pays(x_ND: Float[Tensor, "n d"], W_FD: Float[Tensor, "f d"], k: int) -> bool:
    """Whether a bf16 product first is the faster way for problems of this size on this processor."""
    return (
        x_ND.device.type == "cpu"
        and x_ND.dtype == torch.float32
        and len(W_FD) >= max(_SHORTLIST_LATENTS, 8 * k)
        and len(x_ND) >= PAD
        and bf16_products_are_fast()
    )


def top_k(
    x_ND: Float[Tensor, "n d"],
    W_FD: Float[Tensor, "f d"],
    b_F: Float[Tensor, " f"],
    k: int,
    shortlist: bool | None = None,
) -> SparseCodes:
    """The codes of the k largest positive pre-activations x W^T + b of each token, in fp32 (or fp64).

    `W_FD` is [n_latents, d_in], `b_F` [n_latents]. `shortlist=None` decides by processor and size. Not
    differentiable: `encode_at` adds the gradients.

    >>> import torch
    >>> x, W = torch.tensor([[3.0, 1.0, 3.0]]), torch.eye(3)
    >>> top_k(x, W, torch.zeros(3), k=1).indices
    tensor([0])
    """
    if shortlist is None:
        shortlist = shortlist_pays(x_ND, W_FD, k)
    choose = _shortlisted if shortlist else _exact
    with torch.no_grad():
        values_NK, indices_NK = choose(x_ND, W_FD, b_F, k)
    return SparseCodes.from_rows(values_NK, indices_NK, len(W_FD))


def candidate_count(k: int, n_latents: int) -> int:
    """How many latents a shortlist for the k largest holds."""
    return min(max(_CANDIDATES * k, k + 16), n_latents)


def tile_rows(n_latents: int, device: torch.device) -> int:
    """Rows of a part of the dense product: few enough for a cache, or on a device for its memory."""
    most = min(_TILE_ROWS, _TILE_SCORES // n_latents) if device.type == "cpu" else _DEVICE_SCORES // n_latents
    return max(2 * PAD, most)


def tiles(n: int, n_latents: int, device: torch.device) -> list[slice]:
    """Equal parts of at most `tile_rows` rows, so that none is small enough to change the bits of a product."""
    count = -(-n // tile_rows(n_latents, device))
    return [slice(n * i // count, n * (i + 1) // count) for i in range(count)]


def products(
    x_ND: Float[Tensor, "n d"], W_FD: Float[Tensor, "f d"], b_F: Float[Tensor, " f"]
) -> Iterator[tuple[slice, Float[Tensor, "m f"]]]:
    """The dense scores part by part, (rows, scores [rows, n_latents]), all in the same memory: use one before the next."""
    parts = tiles(len(x_ND), len(W_FD), x_ND.device)
    memory = x_ND.new_empty(max((part.stop - part.start for part in parts), default=0), len(W_FD))
    for part in parts:
        yield part, mixed.linear_into(memory[: part.stop - part.start], x_ND[part], W_FD, b_F)


def _exact(x_ND: Tensor, W_FD: Tensor, b_F: Tensor, k: int) -> tuple[Tensor, Tensor]:
    values_NK = x_ND.new_empty(len(x_ND), k)
    indices_NK = torch.empty(len(x_ND), k, dtype=torch.int64, device=x_ND.device)
    for rows, scores in products(x_ND, W_FD, b_F):
        values_NK[rows], indices_NK[rows] = largest(scores, k)
    return values_NK, indices_NK


def largest(scores_NF: Float[Tensor, "n f"], k: int) -> tuple[Float[Tensor, "n k"], Int64[Tensor, "n k"]]:
    """The k largest of each row, ordered by index; torch's top-k leaves open which of equal values it takes."""
    if scores_NF.device.type != "cpu" and scores_NF.dtype == torch.float32:
        chosen_NK = _by_tiles(scores_NF, k) if gpu.serves(scores_NF) and k <= _PER_TILE else _by_key(scores_NF, k)
        indices_NK = chosen_NK.sort(dim=1).values
        return scores_NF.gather(1, indices_NK), indices_NK
    top = scores_NF.topk(min(k + 1, scores_NF.shape[1]), dim=1)
    indices_NK = top.indices[:, :k]
    if top.values.shape[1] > k:
        tied = ((top.values[:, k - 1] == top.values[:, k]) & (top.values[:, k] > 0)).nonzero().squeeze(1)
        if len(tied):
            indices_NK = indices_NK.clone()
            indices_NK[tied] = scores_NF[tied].sort(dim=1, descending=True, stable=True).indices[:, :k]
    indices_NK = indices_NK.sort(dim=1).values
    return scores_NF.gather(1, indices_NK), indices_NK


def _by_tiles(scores_NF: Tensor, k: int) -> Tensor:
    """The same places [n, k] as of `_by_key`, without a key for every score."""
    from saelab.kernels.gpu import launch

    return launch.largest(scores_NF, k)


def _by_key(scores_NF: Tensor, k: int) -> Tensor:
    """The places [n, k] of the k largest positive scores, of equal ones the lower, without waiting to know whether any are.

    One integer orders both: the bits of a positive float ascend as it does, and below them stands the place from the end.
    """
    from_end_F = torch.arange(scores_NF.shape[1], 0, -1, device=scores_NF.device)
    key_NF = scores_NF.relu().view(torch.int32).long().bitwise_left_shift_(32).bitwise_or_(from_end_F)
    return key_NF.topk(k, dim=1).indices


def _shortlisted(x_ND: Tensor, W_FD: Tensor, b_F: Tensor, k: int) -> tuple[Tensor, Tensor]:
    n_candidates = candidate_count(k, len(W_FD))
    x_low, W_low, b_low = x_ND.bfloat16(), W_FD.bfloat16(), b_F.bfloat16()
    low_NM = x_low.new_empty(len(x_ND), n_candidates)
    candidates_NM = torch.empty(len(x_ND), n_candidates, dtype=torch.int64)
    for rows, scores in products(x_low, W_low, b_low):
        torch.topk(scores, n_candidates, dim=1, out=(low_NM[rows], candidates_NM[rows]))
    kth_N, cut_N = low_NM[:, k - 1].float(), low_NM[:, -1].float()
    bound_N = bf16_bounds(x_ND, x_low, W_FD, W_low, b_F, kth_N)

    # what lies two bounds below the k-th score cannot be among the k largest
    possible_NM = low_NM.float() >= (kth_N - 2 * bound_N)[:, None]
    candidates_NM = candidates_NM.masked_fill_(~possible_NM, len(W_FD)).sort(dim=1).values
    scores_NM = _score(x_ND, W_FD, b_F, candidates_NM)

    top = scores_NM.topk(min(k + 1, n_candidates), dim=1)
    places_NK = top.indices[:, :k].sort(dim=1).values
    values_NK, indices_NK = scores_NM.gather(1, places_NK), candidates_NM.gather(1, places_NK)
    doubtful = _in_doubt(top.values, k, cut_N + bound_N, fp32_bound(x_ND, W_FD, b_F)).nonzero().squeeze(1)
    for some in doubtful.split(tile_rows(len(W_FD), x_ND.device)):
        values_NK[some], indices_NK[some] = largest(dense_rows(x_ND, W_FD, b_F, some), k)
    return values_NK, indices_NK


def dense_rows(
    x_ND: Float[Tensor, "n d"], W_FD: Float[Tensor, "f d"], b_F: Float[Tensor, " f"], rows: Int64[Tensor, " m"]
) -> Float[Tensor, "m f"]:
    """The dense product at these rows, with the bits that a product of all rows would have."""
    padded = torch.cat([rows, rows[:1].expand(-len(rows) % PAD)])
    return mixed.linear(x_ND[padded], W_FD, b_F)[: len(rows)]


def _score(x_ND: Tensor, W_FD: Tensor, b_F: Tensor, indices_NM: Tensor) -> Tensor:
    """fp32 scores [n, m] of the candidates; -inf where there is none (an index of n_latents)."""
    real_NM = indices_NM < len(W_FD)
    counts = real_NM.sum(1)
    offsets = torch.zeros(len(counts) + 1, dtype=torch.int64)
    torch.cumsum(counts, 0, out=offsets[1:])
    places = SparseCodes(x_ND.new_empty(0), indices_NM[real_NM], offsets, len(W_FD))
    scores = sampled_product(x_ND, W_FD, places) + b_F[places.indices]
    return x_ND.new_full(indices_NM.shape, -torch.inf).masked_scatter_(real_NM, scores)


def _in_doubt(top_NK: Tensor, k: int, reach_N: Tensor, fp32_N: Tensor) -> Tensor:
    """Tokens [n] whose mask rounding could have changed: a latent outside the shortlist, which scores `reach_N` at most,
    could be the k-th; two scores at the cut could change places; a kept score could change sign."""
    smallest_N = top_NK[:, k - 1]
    missed_N = reach_N >= smallest_N.clamp(min=0)
    near_zero_N = (top_NK[:, :k].abs() <= fp32_N[:, None]).any(1)
    close_N = torch.zeros_like(missed_N)
    if top_NK.shape[1] > k:
        close_N = (smallest_N > 0) & (smallest_N - top_NK[:, k] <= fp32_N)
    return missed_N | near_zero_N | close_N | ~torch.isfinite(reach_N)


def fp32_bound(x_ND: Float[Tensor, "n d"], W_FD: Float[Tensor, "f d"], b_F: Float[Tensor, " f"]) -> Float[Tensor, " n"]:
    """How far apart [n] two fp32 scores must be to keep their order in any order of summation.

    Products of D terms differ by far less than sqrt(D) u |x||W| (the probabilistic bound of Higham and Mary 2019).
    """
    reach_N = torch.linalg.vector_norm(x_ND, dim=1) * mixed.row_norms(W_FD, x_ND.dtype).amax() + b_F.abs().amax()
    return 2 * x_ND.shape[1] ** 0.5 * torch.finfo(x_ND.dtype).eps / 2 * reach_N


def bf16_bounds(
    x_ND: Float[Tensor, "n d"],
    x_low: Float[Tensor, "n d"],
    W_FD: Float[Tensor, "f d"],
    W_low: Float[Tensor, "f d"],
    b_F: Float[Tensor, " f"],
    near_N: Float[Tensor, " n"],
) -> Float[Tensor, " n"]:
    """How far [n] a bf16 score of about `near_N` can lie from the fp32 one.

    With dx and dW the rounding of x and W, |xW - x'W'| <= |dx||W| + |x'||dW| (Cauchy-Schwarz, no assumption on the data),
    plus the fp32 accumulation and the rounding of the bias and of the stored bf16 result.
    """
    x_norm, W_norm = torch.linalg.vector_norm(x_ND, dim=1), mixed.row_norms(W_FD, x_ND.dtype).amax()
    x_lost = torch.linalg.vector_norm(x_ND - x_low, dim=1)
    W_lost = mixed.row_norms(W_FD - W_low, x_ND.dtype).amax()
    rounding = _BF16_UNIT * (b_F.abs().amax() + 2 * near_N.abs())
    return x_lost * W_norm + (x_norm + x_lost) * W_lost + rounding + fp32_bound(x_ND, W_FD, b_F)
