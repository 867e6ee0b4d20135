"""Which heads a latent of an attention layer belongs to. Shapes: F latents, H heads, E width of a head."""

from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor

from saelab.analysis import frozen

if TYPE_CHECKING:
    from pandas import DataFrame


def head_attribution(sae: Any) -> Float[Tensor, "d_sae heads"]:
    """Attribution to heads by the weights: the share of each head's slice in the norms of a decoder row.

    h_{i,k} = |W_dec[i, k]| / sum_l |W_dec[i, l]| (Kissane et al., arXiv 2406.17759; in their code). Rows sum to 1, in at
    least fp32; a row of zeros is spread evenly (our choice).

    Raises `ConfigError` when the SAE is not of an attention layer's `hook_z`, or its metadata do not say the heads.

    >>> import saelab
    >>> sae = saelab.SAE(saelab.TopK(k=2, d_sae=6), d_in=8, metadata={"site": "blocks.0.attn.hook_z", "heads": [2, 4]})
    >>> head_attribution(sae).shape
    torch.Size([6, 2])
    """
    _, heads, _ = frozen.attention_site(sae)
    with torch.no_grad():
        return head_shares(sae.W_dec.to(torch.promote_types(sae.dtype, torch.float32)), heads)


def head_shares(W_dec_FD: Tensor, heads: int) -> Float[Tensor, "latents heads"]:
    """The same of decoder rows given by themselves, [latents, heads x width of one].

    >>> head_shares(torch.tensor([[3.0, 4.0, 0.0, 5.0]]), heads=2)
    tensor([[0.5000, 0.5000]])
    """
    norms_FH = torch.linalg.vector_norm(W_dec_FD.unflatten(1, (heads, -1)), dim=2)
    total_F1 = norms_FH.sum(1, keepdim=True)
    return torch.where(total_F1 > 0, norms_FH / total_F1.clamp_min(1e-30), 1 / heads)


def top_latents(sae: Any, k: int = 10) -> "DataFrame":
    """The `k` latents of each head with the largest share of it (`head_attribution`): head, rank, latent, share, and
    `top_head`, whether it is that latent's largest share too."""
    import pandas as pd

    shares_FH = head_attribution(sae)
    best = shares_FH.sort(dim=0, descending=True, stable=True).indices[:k]
    rows = [
        (head, rank, latent, float(shares_FH[latent, head]), int(shares_FH[latent].argmax()) == head)
        for head, column in enumerate(best.T.tolist())
        for rank, latent in enumerate(column)
    ]
    return pd.DataFrame(rows, columns=["head", "rank", "latent", "share", "top_head"])
