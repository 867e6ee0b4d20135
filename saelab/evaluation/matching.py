"""One-to-one matching of rows of a table of similarities with its columns."""

import torch
from jaxtyping import Float, Int64
from torch import Tensor


def matched(similarity_NM: Float[Tensor, "n m"]) -> Int64[Tensor, " n"]:
    """The column [n] of each row, no two rows with the same, so that the sum is largest; -1 for a row left over.

    By the Hungarian method (Jonker and Volgenant's, of SciPy).

    >>> matched(torch.tensor([[0.9, 0.8], [0.8, 0.1], [0.0, 0.2]]))
    tensor([ 1,  0, -1])
    """
    from scipy.optimize import linear_sum_assignment

    rows, columns = linear_sum_assignment(similarity_NM.double().numpy(), maximize=True)
    found = torch.full((len(similarity_NM),), -1)
    found[torch.from_numpy(rows)] = torch.from_numpy(columns)
    return found
