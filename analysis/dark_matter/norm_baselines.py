"""What else tells how large the error of a token is: its norm, its identity, the number of its latents."""

from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from saelab.analysis.dark_matter.decomposition import Decomposition
from saelab.analysis.dark_matter.rows import LEARN, SCORE
from saelab.base.errors import DataError
from saelab.base.moments import Moments
from saelab.reading.store import ActivationStore


def norm_baselines(
    parts: Decomposition,
    x: Any,
    *,
    tokens: Int[Tensor, " n"] | None = None,
    others: Mapping[str, Float[Tensor, " n"]] | None = None,
) -> Any:
    """R^2 of the squared norm of the error predicted by less than the activation, which `parts.r2_norm["error"]` uses.

    Learnt on one half of the rows that the map has not seen, scored on the other. As in the code of arXiv 2410.14670: the
    norm of x and the number of latents by least squares with a bias, the identity of the token by the mean over its
    occurrences (over all rows for a token that was not seen); "activation" stands beside them.

    Args:
        parts: the decomposition of the rows x.
        x: the rows, a tensor or a store.
        tokens: ids of the rows' tokens; those of the store, where x is one.
        others: name -> a number a row, as the model's cross-entropy on it, regressed likewise.

    A pandas.Series of R^2 by predictor. Raises `DataError` for `tokens` or `others` of another length than x.

    >>> import saelab
    >>> from saelab.analysis.dark_matter.decomposition import decompose
    >>> sae = saelab.SAE(saelab.TopK(k=2, d_sae=16), d_in=4)
    >>> x = torch.randn(1000, 4, generator=torch.Generator().manual_seed(0))
    >>> list(norm_baselines(decompose(sae, x), x, tokens=torch.arange(1000) % 7).index)
    ['activation', 'norm', 'l0', 'token']
    """
    import pandas

    if tokens is None and isinstance(x, ActivationStore):
        tokens = x.tokens
    numbers = dict(others or {})
    for name, column in {**({} if tokens is None else {"tokens": tokens}), **numbers}.items():
        if len(column) != len(x):
            raise DataError(f"{name!r} has {len(column):,} entries for {len(x):,} rows of x")
    seen: dict[int, list[Tensor]] = {LEARN: [], SCORE: []}
    for chunk in parts.chunks(x):
        if chunk.held:
            with torch.no_grad():
                codes = parts.sae.encode_sparse(chunk.x)
                error = (chunk.x - parts.sae.decode(codes, chunk.x)).double().square().sum(1)
            mine = [error, torch.linalg.vector_norm(chunk.x.double(), dim=1), codes.offsets.diff().double()]
            mine += [column[chunk.row].to(error) for column in numbers.values()]
            mine += [] if tokens is None else [tokens[chunk.row].to(error)]
            seen[chunk.use].append(torch.stack(mine, 1).cpu())
    learn, score = (torch.cat(found) for found in seen.values())
    found = {"activation": parts.r2_norm["error"]}
    for i, name in enumerate(["norm", "l0", *numbers], start=1):
        found[name] = _r2(_line(learn[:, i : i + 1], learn[:, :1], score[:, i : i + 1]), score[:, 0])
    if tokens is not None:
        found["token"] = _r2(_mean_of_token(learn[:, -1].long(), learn[:, 0], score[:, -1].long()), score[:, 0])
    return pandas.Series(found, name="r2")


def _line(x_N1: Tensor, y_N1: Tensor, of_N1: Tensor) -> Tensor:
    moments = Moments(1, 1)
    moments.add(x_N1, y_N1)
    return moments.fit()(of_N1)[:, 0]


def _mean_of_token(token_N: Tensor, y_N: Tensor, of_N: Tensor) -> Tensor:
    size = int(max(token_N.max(), of_N.max())) + 1
    counts = torch.bincount(token_N, minlength=size)
    means = torch.bincount(token_N, weights=y_N, minlength=size) / counts.clamp(min=1)
    return torch.where(counts > 0, means, y_N.mean())[of_N]


def _r2(predicted_N: Tensor, y_N: Tensor) -> float:
    return 1 - float((y_N - predicted_N).square().sum() / (y_N - y_N.mean()).square().sum())
