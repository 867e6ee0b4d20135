"""Pursuit: codes found by search in an SAE's decoder, in place of its encoder's, at the same number of latents a token.

* `gradient_pursuit`: one latent more and one gradient step on all that are on, at each step (Blumensath and Davies 2008 with
  the codes kept positive; as inference of SAEs in the dark-matter paper, arXiv 2410.14670).
* `orthogonal_pursuit`: one latent more and the exact non-negative least squares on all that are on (OMP).
* `support_least_squares`: the encoder's own latents with their best values.

Tokens go in tiles, those with the largest budget first, so that finished ones drop off the end. A step costs one row of
inner products with the dictionary a token; everything else is on the few latents that are on.

Shapes: N tokens of a tile, D inputs, F latents, S slots (latents that were ever on).
"""

from collections.abc import Iterator

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import embedding_bag

from saelab.analysis.dark_matter.support import GrowingSupport, descend
from saelab.base import checks
from saelab.base.codes import SparseCodes, check_finite
from saelab.base.errors import ConfigError
from saelab.base.protocols import Dictionary

_TILE_ROWS, _TILE_SCORES = 512, 2**21  # 8 MiB of products: what comes out is read again while it is in the cache
_GRAM_LATENTS = 16_384  # up to which the Gram matrix of the directions, 1 GiB then, is made
_EPS = 1e-12
_NOTHING = 1e-6  # of a row's norm: an inner product below it is rounding

Budget = int | Tensor | None


def gradient_pursuit(sae: Dictionary, x: Float[Tensor, "*rows d"], budget: Budget = None) -> SparseCodes:
    """Codes of x [..., d] by gradient pursuit in the decoder's directions, its leading dimensions flattened to rows.

    At each step the latent with the largest inner product with the residual joins those that are on, all take a step along
    the gradient with exact line search, and what falls below zero goes off. So a token may use fewer latents than its budget.

    Args:
        sae: any SAE (no transcoder). Directions are the decoder's rows at unit length; codes are for the rows as they are.
        x: activations in raw units.
        budget: latents a token at most: a number, a tensor [n], or None for as many as the SAE itself uses on each token.

    Raises `ConfigError` for another width, a transcoder or a negative budget, `DataError` for NaN.

    >>> import torch, saelab
    >>> sae = saelab.SAE(saelab.TopK(k=2, d_sae=32), d_in=8)
    >>> x = 3 * sae.W_dec[[5]].detach() + sae.W_dec[[9]].detach()
    >>> codes = gradient_pursuit(sae, x)
    >>> codes.l0, 5 in codes.indices
    (2.0, True)
    """
    return _pursue(sae, x, budget, exact=False)


def orthogonal_pursuit(sae: Dictionary, x: Float[Tensor, "*rows d"], budget: Budget = None) -> SparseCodes:
    """Codes of x [..., d] by orthogonal matching pursuit with non-negative codes.

    As `gradient_pursuit`, but after each new latent the values are the least-squares ones on those that are on, reached
    without leaving the non-negative ones (`saelab.analysis.dark_matter.support`). A little slower, and a little closer.
    """
    return _pursue(sae, x, budget, exact=True)


def support_least_squares(
    sae: Dictionary, x: Float[Tensor, "*rows d"], codes: SparseCodes | None = None
) -> SparseCodes:
    """The codes with the values that reconstruct x [..., d] best on the same latents, none below zero.

    `codes` are the SAE's own unless given. No token is reconstructed worse than before; latents whose best value is zero go
    off. Separates what an encoder loses by its values from what it loses by its choice of latents.
    """
    x_ND = _rows(sae, x)
    with torch.no_grad():
        codes = sae.encode_sparse(x_ND) if codes is None else codes
        if len(codes) != len(x_ND):
            raise ConfigError(f"codes of {len(codes):,} tokens for {len(x_ND):,} rows of x")
        directions_FD, lengths_F = _directions(sae)
        x_ND = _wanted(sae, x_ND, directions_FD)
        found = []
        for tile, budgets in _tiles(codes.offsets.diff(), sae.d_sae):
            slots_NS = torch.arange(int(budgets.max()), device=x_ND.device).expand(len(tile), -1)
            on_NS = slots_NS < budgets[:, None]
            place = (codes.offsets[tile][:, None] + slots_NS).clamp(max=max(len(codes.indices) - 1, 0))
            latents_NS = torch.where(on_NS, codes.indices[place], 0)
            values_NS = torch.where(on_NS, codes.values[place] * lengths_F[latents_NS], 0.0)
            atoms_NSD = directions_FD[latents_NS]
            gram_NSS = torch.bmm(atoms_NSD, atoms_NSD.transpose(1, 2))
            target_NS = torch.bmm(atoms_NSD, x_ND[tile][:, :, None])[:, :, 0]
            found.append((tile, latents_NS, descend(gram_NSS, target_NS, values_NS, on_NS)))
        return _gathered(found, lengths_F, len(x_ND))


def compared(sae: Dictionary, x: Float[Tensor, "*rows d"]) -> dict[str, SparseCodes]:
    """The codes of the encoder, with least-squares values, of both pursuits, at the SAE's own number of latents a token."""
    with torch.no_grad():
        codes = sae.encode_sparse(x)
    budget = codes.offsets.diff()
    return {
        "encoder": codes,
        "support least squares": support_least_squares(sae, x, codes),
        "gradient pursuit": gradient_pursuit(sae, x, budget),
        "orthogonal pursuit": orthogonal_pursuit(sae, x, budget),
    }


def _pursue(sae: Dictionary, x: Tensor, budget: Budget, exact: bool) -> SparseCodes:
    x_ND = _rows(sae, x)
    with torch.no_grad():
        budget_N = _budgets(sae, x_ND, budget)
        directions_FD, lengths_F = _directions(sae)
        x_ND = _wanted(sae, x_ND, directions_FD)
        # the Gram matrix pays once more latents are chosen than there are
        pays = _GRAM_LATENTS >= sae.d_sae <= int(budget_N.sum())
        gram_FF = directions_FD @ directions_FD.T if pays else None
        found = []
        for tile, budgets in _tiles(budget_N, sae.d_sae):
            found.append((tile, *_tile(_Products(x_ND[tile], directions_FD, gram_FF), budgets, exact)))
        return _gathered(found, lengths_F, len(x_ND))


class _Products:
    """Inner products of a dictionary's directions with the rows of a tile, and with one another.

    With the directions' Gram matrix G the products with what codes w leave of x are D x - G w, for which only the rows of G
    that are on are read: cheaper than D (x - w D) as long as these are fewer than the dimensions.
    """

    def __init__(self, x_ND: Tensor, directions_FD: Tensor, gram_FF: Tensor | None) -> None:
        self.x_ND, self.directions_FD, self.gram_FF = x_ND, directions_FD, gram_FF
        self.start_NF = x_ND @ directions_FD.T

    def left(self, latents_NS: Tensor, values_NS: Tensor) -> Tensor:
        """[n, f], with what the codes of the first n rows leave."""
        n = len(latents_NS)
        if self.gram_FF is not None:
            return self.start_NF[:n] - embedding_bag(latents_NS, self.gram_FF, per_sample_weights=values_NS, mode="sum")
        made_ND = embedding_bag(latents_NS, self.directions_FD, per_sample_weights=values_NS, mode="sum")
        return (self.x_ND[:n] - made_ND) @ self.directions_FD.T

    def between(self, latents_NS: Tensor, latent_N: Tensor) -> Tensor:
        """[n, s], of the directions of `latents_NS` with that of `latent_N`."""
        if self.gram_FF is not None:
            return self.gram_FF[latent_N[:, None], latents_NS]
        return torch.bmm(self.directions_FD[latents_NS], self.directions_FD[latent_N][:, :, None])[:, :, 0]


def _tile(products: _Products, budget_N: Tensor, exact: bool) -> tuple[Tensor, Tensor]:
    """Latents and values [n, slots] of tokens with falling budgets; slots of value 0 are off."""
    start_NF, n, steps = products.start_NF, len(budget_N), int(budget_N[0])
    latents_NS = torch.zeros(n, steps, dtype=torch.int64, device=start_NF.device)
    values_NS = start_NF.new_zeros(n, steps)
    gram_NSS = torch.zeros(n, steps, steps, dtype=torch.float64, device=start_NF.device)
    solution = GrowingSupport(gram_NSS) if exact else None
    nothing_N = _NOTHING * torch.linalg.vector_norm(products.x_ND, dim=1)
    scores_NF = start_NF
    for step in range(steps):
        m = int((budget_N > step).sum())  # the others are done
        if step:
            scores_NF = products.left(latents_NS[:m, :step], values_NS[:m, :step])
        best = scores_NF.max(1)
        latents_NS[:m, step] = best.indices
        latents, values = latents_NS[:m, : step + 1], values_NS[:m, : step + 1]
        between_NS = products.between(latents, best.indices).double()
        gram_NSS[:m, step, : step + 1], gram_NSS[:m, : step + 1, step] = between_NS, between_NS
        known = ((latents[:, :-1] == best.indices[:, None]) & (values[:, :-1] > 0)).any(1)
        joins = (best.values > nothing_N[:m]) & ~known
        if solution is None:
            on = values > 0
            on[:, -1] = joins
            new = _gradient_step(gram_NSS[:m, : step + 1, : step + 1], values, scores_NF.gather(1, latents) * on)
        else:
            new = solution.join(start_NF[:m].gather(1, latents), values, best.values, joins)
        values_NS[:m, : step + 1] = new
    return latents_NS, values_NS


def _gradient_step(gram_NSS: Tensor, values_NS: Tensor, gradient_NS: Tensor) -> Tensor:
    """max(w + eta g, 0) with g the inner products of the residual r with the atoms that are on, u = sum g_i atom_i.

    eta = <u, r> / <u, u> = g g / g G g minimises |r - eta u|.
    """
    gradient = gradient_NS.double()
    length_N = (torch.bmm(gram_NSS, gradient[:, :, None])[:, :, 0] * gradient).sum(1)
    eta_N = (gradient.square().sum(1) / (length_N + _EPS)).to(values_NS)
    return (values_NS + eta_N[:, None] * gradient_NS).clamp_(min=0)


def _rows(sae: Dictionary, x: Tensor) -> Tensor:
    checks.autoencoder("sae", sae)
    if sae.d_in != sae.d_out or not sae.cfg.centres_input:
        raise ConfigError(
            f"{sae!r} is a transcoder: pursuit searches its decoder for its own input, give an autoencoder"
        )
    if not isinstance(x, Tensor):
        raise ConfigError(f"x is {type(x).__name__}: give a tensor, torch.as_tensor(x)")
    if x.shape[-1] != sae.d_in:
        raise ConfigError(f"x is {x.shape[-1]:,} wide and the SAE reads {sae.d_in:,}")
    rows = x.detach().reshape(-1, sae.d_in).to(sae.device)
    check_finite(rows, "input of the pursuit")
    return rows


def _budgets(sae: Dictionary, x_ND: Tensor, budget: Budget) -> Tensor:
    if budget is None:
        return sae.encode_sparse(x_ND).offsets.diff()
    if not isinstance(budget, Tensor):
        budget = checks.count("budget", budget, least=0)
    budgets = torch.as_tensor(budget, device=x_ND.device).long()
    if budgets.ndim and budgets.shape != (len(x_ND),):
        raise ConfigError(
            f"budget has shape {list(budgets.shape)} for {len(x_ND):,} tokens: give a number or one a token"
        )
    if bool((budgets < 0).any()):
        raise ConfigError(f"a budget is {int(budgets.min())}: it must be a number of latents, 0 or more")
    return budgets.expand(len(x_ND)).clamp(max=sae.d_sae)


def _wanted(sae: Dictionary, x_ND: Tensor, directions_FD: Tensor) -> Tensor:
    """What codes are to sum up to: x - b_dec, of vectors normalised one by one those minus b_dec."""
    x_ND = x_ND.to(directions_FD)
    return (sae.scaled(x_ND) if sae.cfg.per_token else x_ND) - sae.b_dec.to(directions_FD)


def _directions(sae: Dictionary) -> tuple[Tensor, Tensor]:
    """The decoder's rows at unit length [F, D], zero where they are zero, and their lengths [F]."""
    W_FD = sae.W_dec.detach().to(sae.params().b_dec.dtype)
    lengths_F = torch.linalg.vector_norm(W_FD, dim=1)
    safe_F = torch.where(lengths_F > 0, lengths_F, 1.0)
    return (W_FD / safe_F[:, None]).contiguous(), safe_F


def _tiles(budget_N: Tensor, n_latents: int) -> Iterator[tuple[Tensor, Tensor]]:
    """(token numbers, budgets), the largest budgets first; tokens without one are left out."""
    budgets, order = budget_N.sort(descending=True, stable=True)
    order = order[: int((budgets > 0).sum())]
    if not len(order):
        return
    for tile in order.split(max(1, min(_TILE_ROWS, _TILE_SCORES // n_latents))):
        yield tile, budget_N[tile]


def _gathered(found: list[tuple[Tensor, Tensor, Tensor]], lengths_F: Tensor, n: int) -> SparseCodes:
    """Codes in the order of the tokens, latents ascending, from tiles of (tokens, latents, values of unit directions)."""
    width = max((latents.shape[1] for _, latents, _ in found), default=1)
    latents_NS = torch.zeros(n, width, dtype=torch.int64, device=lengths_F.device)
    values_NS = torch.zeros(n, width, dtype=lengths_F.dtype, device=lengths_F.device)
    for tile, latents, values in found:
        latents_NS[tile, : latents.shape[1]] = latents
        values_NS[tile, : latents.shape[1]] = values / lengths_F[latents]
    ordered, order = torch.where(values_NS > 0, latents_NS, len(lengths_F)).sort(1)
    return SparseCodes.from_rows(values_NS.gather(1, order), ordered, len(lengths_F))
