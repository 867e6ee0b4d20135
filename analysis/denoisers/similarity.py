"""How alike two representations of the same samples are: CKA, CKNNA and mutual nearest neighbours, with their null.

Kornblith et al. (ICML 2019) with the unbiased HSIC of Song et al. (JMLR 2012); Huh et al. (ICML 2024) for the two of
neighbours, by which REPA (Yu et al., ICLR 2025) measures denoisers. Shapes: N = M samples, D and E dimensions.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from saelab.base import checks
from saelab.base.errors import DataError

if TYPE_CHECKING:
    from pandas import DataFrame


def hsic(K: Float[Tensor, "N N"], L: Float[Tensor, "N N"]) -> float:
    """The unbiased estimate of HSIC from two Gram matrices (Song et al. 2012): 0 in the mean for independent samples.

    With the diagonals set to zero: (sum K * L^T + sum K sum L / ((N - 1)(N - 2)) - 2 sum K L / (N - 2)) / (N (N - 3)).

    >>> hsic(torch.eye(5), torch.eye(5))
    0.0
    """
    n = len(K)
    K, L = (matrix.double() - torch.diag(matrix.double().diagonal()) for matrix in (K, L))
    total = (K * L.T).sum() + K.sum() * L.sum() / ((n - 1) * (n - 2)) - 2 * (K.sum(0) @ L.sum(1)) / (n - 2)
    return float(total / (n * (n - 3)))


def cka(a: Float[Tensor, "N D"], b: Float[Tensor, "M E"]) -> float:
    """Linear CKA from unbiased estimates: 1 with itself, about 0 for unrelated ones, the same after a rotation or a scaling.

    Raises `DataError` for fewer than 4 samples or other numbers of them.

    >>> a = torch.randn(20, 3, generator=torch.Generator().manual_seed(0))
    >>> round(cka(a, -2 * a), 6)
    1.0
    """
    K, L = _grams(a, b)
    return hsic(K, L) / (hsic(K, K) * hsic(L, L)) ** 0.5


def cknna(a: Float[Tensor, "N D"], b: Float[Tensor, "M E"], k: int = 10) -> float:
    """CKA of nearest neighbours: only pairs count that are among each other's k nearest in both representations.

    Rows are brought to length 1 first. The numerator has the neighbours common to both, each part of the denominator its own.
    k = N - 1 is CKA of these rows; for less a and b do not quite change places, for who is near to whom is not symmetric.

    Raises `DataError` as `cka`, `ConfigError` for a k that is not from 2 to N - 1.

    >>> a = torch.randn(20, 3, generator=torch.Generator().manual_seed(0))
    >>> round(cknna(a, a, k=5), 6)
    1.0
    """
    K, L = _grams(*(torch.nn.functional.normalize(rows.flatten(1).double(), dim=1) for rows in (a, b)))
    near_K, near_L = _nearest(K, k), _nearest(L, k)
    both = near_K & near_L
    return hsic(K * both, L * both) / (hsic(K * near_K, K * near_K) * hsic(L * near_L, L * near_L)) ** 0.5


def mutual_knn(a: Float[Tensor, "N D"], b: Float[Tensor, "M E"], k: int = 10) -> float:
    """The mean share of the k nearest neighbours (by cosine) that two representations have in common; k / (N - 1) by chance.

    Raises what `cknna` raises.

    >>> a = torch.randn(20, 3, generator=torch.Generator().manual_seed(0))
    >>> mutual_knn(a, a, k=5)
    1.0
    """
    K, L = _grams(*(torch.nn.functional.normalize(rows.flatten(1).double(), dim=1) for rows in (a, b)))
    return float((_nearest(K, k) & _nearest(L, k)).sum(1).double().mean() / k)


def alignment(
    a: Float[Tensor, "N *one"], b: Float[Tensor, "M *other"], k: int = 10, permutations: int = 100, seed: int = 0
) -> "DataFrame":
    """The three measures and what they are by chance: a row each, `measure`, `value`, `null_low`, `null_high`, `p`.

    The null pairs the samples at random; its interval is the middle 95%, and p the share of pairings that reach the value, the
    actual one counted.

    >>> a = torch.randn(20, 3, generator=torch.Generator().manual_seed(0))
    >>> bool(alignment(a, a, k=5, permutations=20).p.max() < 0.05)
    True
    """
    import pandas

    permutations = checks.count("permutations", permutations, least=20)
    a, b = a.flatten(1), b.flatten(1)
    generator = torch.Generator().manual_seed(checks.seed(seed))
    orders = [torch.randperm(len(b), generator=generator) for _ in range(permutations)]
    rows = []
    for name, measure in _MEASURES.items():
        value = measure(a, b, k)
        null = torch.tensor([measure(a, b[order], k) for order in orders], dtype=torch.float64)
        low, high = null.quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
        p = (1 + int((null >= value).sum())) / (1 + permutations)
        rows.append({"measure": name, "value": value, "null_low": low, "null_high": high, "p": p})
    return pandas.DataFrame(rows)


_MEASURES: dict[str, Callable[[Tensor, Tensor, int], float]] = {
    "cka": lambda a, b, k: cka(a, b), "cknna": cknna, "mutual_knn": mutual_knn,
}  # fmt: skip


def _grams(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    if len(a) != len(b) or len(a) < 4:
        raise DataError(f"two representations of {len(a):,} and {len(b):,} samples: give the same 4 or more to both")
    a, b = a.flatten(1).double(), b.flatten(1).double()
    return a @ a.T, b @ b.T


def _nearest(K: Tensor, k: int) -> Bool[Tensor, "N N"]:
    """Which columns are among the k largest of each row, itself left out."""
    k = checks.count("k", k, least=2, most=len(K) - 1, of="the samples less one")
    order = (K - torch.diag(torch.full((len(K),), torch.inf, dtype=K.dtype))).topk(k, dim=1).indices
    return torch.zeros_like(K, dtype=torch.bool).scatter_(1, order, True)
