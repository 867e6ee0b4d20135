"""The programs, in Triton. Sums are in IEEE fp32 and in one order: no atomics, no tensor cores.

Shapes: N tokens, D inputs, F latents, E entries; a bag is a run of entries, from offsets[bag] to offsets[bag + 1].
"""

import triton
import triton.language as tl


@triton.jit
def _sum_of_rows(indices, weights, table, d, D, start, stop, BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr):
    """The weighted sum over these entries of rows of the table, at the columns d: [BLOCK_D]."""
    total = tl.zeros((BLOCK_D,), dtype=tl.float32)
    for first in range(start, stop, BLOCK_E):
        e = first + tl.arange(0, BLOCK_E)
        inside = e < stop
        weight = tl.load(weights + e, mask=inside, other=0.0).to(tl.float32)
        row = tl.load(indices + e, mask=inside, other=0)
        there = inside[:, None] & (d < D)[None, :]
        values = tl.load(table + row[:, None] * D + d[None, :], mask=there, other=0.0).to(tl.float32)
        total += tl.sum(weight[:, None] * values, 0)
    return total


@triton.jit
def bags_program(
    indices, weights, offsets, table, out, D, longest, BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr
):  # one program a bag and block of columns
    """out[bag] = the sum over its first `longest` entries e of weights[e] table[indices[e]]."""
    bag = tl.program_id(0).to(tl.int64)
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    start = tl.load(offsets + bag)
    stop = tl.minimum(tl.load(offsets + bag + 1), start + longest)
    total = _sum_of_rows(indices, weights, table, d, D, start, stop, BLOCK_D, BLOCK_E)
    tl.store(out + bag * D + d, total, mask=d < D)


@triton.jit
def rest_program(
    indices, weights, offsets, bags, starts, table, out, D, longest, BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr
):  # one program a part and block of columns
    """out[part] = the same over the `longest` entries of its bag that begin at starts[part]; nothing where that is past it."""
    part = tl.program_id(0).to(tl.int64)
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    start = tl.load(starts + part)
    stop = tl.minimum(tl.load(offsets + tl.load(bags + part) + 1), start + longest)
    total = _sum_of_rows(indices, weights, table, d, D, start, stop, BLOCK_D, BLOCK_E)
    tl.store(out + part * D + d, total, mask=d < D)


@triton.jit
def join_program(first_part, parts, out, D, BLOCK_D: tl.constexpr):  # one program a bag and block of columns
    """out[bag] += its parts, in their order, from first_part[bag] to first_part[bag + 1]."""
    bag = tl.program_id(0).to(tl.int64)
    start, stop = tl.load(first_part + bag), tl.load(first_part + bag + 1)
    if start < stop:
        d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
        total = tl.load(out + bag * D + d, mask=d < D, other=0.0)
        for part in range(start, stop):
            total += tl.load(parts + part * D + d, mask=d < D, other=0.0)
        tl.store(out + bag * D + d, total, mask=d < D)


@triton.jit
def sampled_program(
    x, W, rows, indices, out, n_entries, D, BLOCK_E: tl.constexpr, BLOCK_D: tl.constexpr
):  # one program a block of entries
    """out[e] = x[rows[e]] . W[indices[e]]."""
    e = tl.program_id(0) * BLOCK_E + tl.arange(0, BLOCK_E)
    inside = e < n_entries
    row = tl.load(rows + e, mask=inside, other=0)
    latent = tl.load(indices + e, mask=inside, other=0)
    total = tl.zeros((BLOCK_E,), dtype=tl.float32)
    for first in range(0, D, BLOCK_D):
        d = first + tl.arange(0, BLOCK_D)
        there = inside[:, None] & (d < D)[None, :]
        left = tl.load(x + row[:, None] * D + d[None, :], mask=there, other=0.0).to(tl.float32)
        right = tl.load(W + latent[:, None] * D + d[None, :], mask=there, other=0.0).to(tl.float32)
        total += tl.sum(left * right, 1)
    tl.store(out + e, total, mask=inside)


@triton.jit
def top_program(scores, keys, F, K: tl.constexpr, BLOCK_F: tl.constexpr):  # one program a token and tile of latents
    """keys[token, tile] = the K largest of the tile: a positive score's bits above the latent's place from the end, so that
    one integer orders both. Scores at or below zero are zero; what lies past the last latent is below all."""
    token, tile = tl.program_id(0).to(tl.int64), tl.program_id(1)
    latent = tile * BLOCK_F + tl.arange(0, BLOCK_F)
    score = tl.load(scores + token * F + latent, mask=latent < F, other=0.0)
    bits = tl.maximum(score, 0.0, propagate_nan=tl.PropagateNan.ALL).to(tl.int32, bitcast=True).to(tl.int64)
    key = tl.where(latent < F, (bits << 32) | (F - latent).to(tl.int64), -1)
    place = (token * tl.num_programs(1) + tile) * K + tl.arange(0, K)
    tl.store(keys + place, tl.topk(key, K))
