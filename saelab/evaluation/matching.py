"""One-to-one matching of rows of a table of similarities with its columns."""

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from saelab.base.errors import ConfigError

MOST = 16_384**2  # similarities


def matched(similarity_NM: Float[Tensor, "n m"]) -> Int64[Tensor, " n"]:
    """The column [n] of each row, no two rows with the same, so that the sum is largest; -1 for a row left over.

    By the Hungarian method (Jonker and Volgenant's, of SciPy). Raises `ConfigError` for more than 16,384 by 16,384.

    >>> matched(torch.tensor([[0.9, 0.8], [0.8, 0.1], [0.0, 0.2]]))
    tensor([ 1,  0, -1])
    """
    from scipy.optimize import linear_sum_assignment

    n, m = similarity_NM.shape
    if n * m > MOST:
        raise ConfigError(f"matching {n:,} rows with {m:,} takes {8 * n * m / 1e9:.0f} GB and hours: give smaller SAEs, "
                          "or leave out stability")  # fmt: skip
    rows, columns = linear_sum_assignment(similarity_NM.double().numpy(), maximize=True)
    found = torch.full((len(similarity_NM),), -1)
    found[torch.from_numpy(rows)] = torch.from_numpy(columns)
    return found
