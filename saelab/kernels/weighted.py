"""The k latents of each token with the largest weighted pre-activations, in row tiles.

Shapes: N tokens, D inputs, F latents, K kept.
"""

import torch
from torch import Tensor

from saelab.autoencoders.codes import SparseCodes
from saelab.kernels.selection import largest, tiles


def top_k_weighted(
    x_ND: Tensor, W_FD: Tensor, b_F: Tensor, gradient_ND: Tensor, W_dec_FD: Tensor, strength: float, k: int
) -> SparseCodes:
    """The codes z = x W^T + b > 0 of the k largest z (1 + strength |gradient W_dec^T|) of each token.

    The values are z, the weights only choose. Of equal weighted scores the lower index wins. Not differentiable.

    >>> import torch
    >>> x, g = torch.tensor([[3.0, 2.0]]), torch.tensor([[0.0, -1.0]])
    >>> top_k_weighted(x, torch.eye(2), torch.zeros(2), g, torch.eye(2), 1.0, k=1).to_dense()
    tensor([[0., 2.]])
    """
    values_NK = x_ND.new_empty(len(x_ND), k)
    indices_NK = torch.empty(len(x_ND), k, dtype=torch.int64, device=x_ND.device)
    with torch.no_grad():
        for rows in tiles(len(x_ND), len(W_FD)):
            scores_NF = torch.nn.functional.linear(x_ND[rows], W_FD, b_F)
            weights_NF = torch.nn.functional.linear(gradient_ND[rows], W_dec_FD).abs_().mul_(strength).add_(1)
            indices_NK[rows] = largest(weights_NF.mul_(scores_NF.relu()), k)[1]
            values_NK[rows] = scores_NF.gather(1, indices_NK[rows])
    return SparseCodes.from_rows(values_NK, indices_NK, len(W_FD))
