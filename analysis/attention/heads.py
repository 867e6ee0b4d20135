"""Which heads a latent of an attention layer belongs to, and how many things a head does.

Shapes: N rows, F latents, H heads, E width of a head.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from saelab.analysis.circuits import frozen
from saelab.base.errors import DataError
from saelab.base.protocols import Dictionary

if TYPE_CHECKING:
    from pandas import DataFrame


def head_attribution(sae: Dictionary) -> Float[Tensor, "d_sae heads"]:
    """Attribution to heads by the weights: the share of each head's slice in the norms of a decoder row.

    h_{i,k} = |W_dec[i, k]| / sum_l |W_dec[i, l]| (Kissane et al., arXiv 2406.17759; in their code, by our notes). Rows sum to
    1, in at least fp32; a row of zeros is spread evenly (our choice).

    Raises `ConfigError` when the SAE is not of an attention layer's `hook_z`, or its metadata do not say the heads.

    >>> import saelab
    >>> sae = saelab.SAE(saelab.TopK(k=2, d_sae=6), d_in=8, metadata={"site": "blocks.0.attn.hook_z", "heads": [2, 4]})
    >>> head_attribution(sae).shape
    torch.Size([6, 2])
    """
    _, heads, _ = frozen.attention_site(sae)
    with torch.no_grad():
        return head_shares(sae.W_dec.to(torch.promote_types(sae.dtype, torch.float32)), heads)


def head_shares(W_dec_FD: Float[Tensor, "latents _"], heads: int) -> Float[Tensor, "latents heads"]:
    """The same of decoder rows given by themselves, [latents, heads x width of one].

    >>> head_shares(torch.tensor([[3.0, 4.0, 0.0, 5.0]]), heads=2)
    tensor([[0.5000, 0.5000]])
    """
    norms_FH = torch.linalg.vector_norm(W_dec_FD.unflatten(1, (heads, -1)), dim=2)
    total_F1 = norms_FH.sum(1, keepdim=True)
    return torch.where(total_F1 > 0, norms_FH / total_F1.clamp_min(1e-30), 1 / heads)


def top_latents(sae: Dictionary, k: int = 10) -> "DataFrame":
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


def firing_head_attribution(sae: Dictionary, x: Any, rows: int = 2048) -> Float[Tensor, "d_sae heads"]:
    """Attribution to heads where a latent fires: the mean over its firings of w^h . z^h (direct attribution by head).

    Args:
        sae: an SAE of a `hook_z` site.
        x: activations of that site, a tensor [n, d_in] or an `ActivationStore`. Rows above the SAE's norm limit are left out.
        rows: how many are encoded at a time.

    Rows of latents that never fire are NaN. With the bias, a row sums to the mean activation (`frozen.readers`). As it is
    linear, the mean of z over a latent's firings is enough: [d_sae, d_in] is the largest tensor.
    """
    _, heads, d_head = frozen.attention_site(sae)
    exact = torch.promote_types(sae.dtype, torch.float32)
    sums_FD = torch.zeros(sae.d_sae, sae.d_in, dtype=exact, device=sae.device)
    fires_F = torch.zeros(sae.d_sae, dtype=exact, device=sae.device)
    with torch.no_grad():
        for start in range(0, len(x), rows):
            part = x[start : start + rows].to(sae.device, sae.dtype)
            part = part[sae.replaceable(part)]
            codes = sae.encode_sparse(part)
            sums_FD.index_add_(0, codes.indices, part.to(exact)[codes.rows()])
            fires_F.index_add_(0, codes.indices, torch.ones_like(codes.values, dtype=exact))
        weights = frozen.readers(sae, torch.arange(sae.d_sae, device=sae.device)).weights
        return (sums_FD / fires_F[:, None] * weights).view(-1, heads, d_head).sum(2)  # 0 / 0 is NaN


@dataclass(frozen=True)
class HeadAgreement:
    """How often two ways name the same top head; `head_agreement` makes it.

    `agreement` is the share of the `latents` compared; `null` and `null_99` are the mean and the 99th percentile of that
    share when the latents of one side are shuffled; `p_value` the share of shuffles at or above it (with the usual one
    added); `chance` = 1 / heads.
    """

    agreement: float
    null: float
    null_99: float
    p_value: float
    chance: float
    latents: int
    permutations: int

    @property
    def clear(self) -> bool:
        """Above the null's 99th percentile, and twice it."""
        return self.agreement >= 2 * self.null_99 and self.agreement > 0


def head_agreement(weights: Any, attribution: Any, permutations: int = 10_000, seed: int = 0) -> HeadAgreement:
    """Is the top head by the weights the top head by attribution, more often than by chance?

    Args:
        weights: [n, heads], of `head_attribution`.
        attribution: [n, heads] of the same latents, of `firing_head_attribution` or `direct_attribution(...).by_head`; the
            largest value is the top one. Rows with NaN (latents that never fire) are left out.
        permutations: shuffles of the latents of one side, which keep how often each head is named by either.
        seed: of the shuffles.

    Raises `DataError` for other shapes or fewer than two latents.

    >>> import torch
    >>> shares = torch.eye(4).repeat(25, 1)
    >>> found = head_agreement(shares, shares)
    >>> found.agreement, found.chance, found.clear
    (1.0, 0.25, True)
    """
    first, second = (torch.as_tensor(x).detach().double().cpu() for x in (weights, attribution))
    if first.shape != second.shape or first.ndim != 2:
        raise DataError(
            f"{list(first.shape)} and {list(second.shape)}: give [latents, heads] of the same latents twice"
        )
    both = ~(first.isnan().any(1) | second.isnan().any(1))
    if int(both.sum()) < 2:
        raise DataError(f"{int(both.sum())} latents have both attributions: nothing to compare, give more activations")
    ours, theirs = first[both].argmax(1).numpy(), second[both].argmax(1).numpy()
    agreement = float((ours == theirs).mean())
    rng = np.random.default_rng(seed)
    null = np.array([(ours == rng.permutation(theirs)).mean() for _ in range(permutations)])
    return HeadAgreement(
        agreement, float(null.mean()), float(np.quantile(null, 0.99)),
        float((1 + (null >= agreement).sum()) / (1 + permutations)), 1 / first.shape[1], len(ours), permutations,
    )  # fmt: skip


def polysemanticity(
    sae: Dictionary,
    labels: Mapping[int, str | None] | Sequence[str | None],
    top: int = 10,
    majority: float = 0.9,
    permutations: int = 1000,
    seed: int = 0,
) -> "DataFrame":
    """How many things each head does, by the labels of its top latents; one row a head.

    By our notes the authors grouped each head's ten top latents by hand and found 14 of GPT-2's 144 heads possibly
    monosemantic; here labels (families, or a person's words) take the place of the hand. A head `looks_monosemantic` where at
    least `majority` of its `top` latents (by `head_attribution`) have one label: our rule. Two latents without label share
    none. With families as labels the count of such heads tells nothing of an SAE: on SmolLM2 untrained dictionaries had as
    many.

    Args:
        sae: an SAE of a `hook_z` site.
        labels: by latent number, or one for each latent; None (or absent) where there is none.
        top: latents of a head that are looked at.
        majority: the share of them that must agree.
        permutations: of the labels over all latents, for `chance`.
        seed: of the permutations.

    Columns: head; `latents`, their numbers; `labels`, theirs; `common`, the most frequent label, and its `share`; `distinct`,
    how many labels there are (each unlabelled latent counts as one); `mean_share`, mean weight share of the latents in the
    head; `own`, how many latents of the SAE have their largest share here; `dimensions`, the participation ratio of the
    unit decoder slices, from 1 (all write one direction) to `top`; `looks_monosemantic`; `chance`, how often shuffled
    labels look so.

    Raises `ConfigError` as `head_attribution` does.
    """
    import pandas as pd

    shares_FH = head_attribution(sae)
    get = labels.get if isinstance(labels, Mapping) else labels.__getitem__
    every = np.array([get(latent) for latent in range(sae.d_sae)], dtype=object)
    # unlabelled latents get a label each
    number = np.array([f"\0{i}" if label is None else str(label) for i, label in enumerate(every)], dtype=object)
    slices = sae.W_dec.detach().double().cpu().view(sae.d_sae, shares_FH.shape[1], -1)
    owner, rng, rows = shares_FH.argmax(1), np.random.default_rng(seed), []
    for head in range(shares_FH.shape[1]):
        latents = shares_FH[:, head].sort(descending=True, stable=True).indices[:top].cpu().numpy()
        names, counts = np.unique(number[latents].astype(str), return_counts=True)
        common, share = str(names[counts.argmax()]), counts.max() / len(latents)
        unlabelled = common.startswith("\0")
        rows.append(
            {
                "head": head, "latents": latents.tolist(), "labels": every[latents].tolist(),
                "common": None if unlabelled else common, "share": float(share), "distinct": len(names),
                "mean_share": float(shares_FH[latents, head].mean()), "own": int((owner == head).sum()),
                "dimensions": _participation(slices[latents, head]),
                "looks_monosemantic": bool(share >= majority and not unlabelled),
            }
        )  # fmt: skip
    shuffled = [
        _agrees(rng.choice(number, min(top, len(number)), replace=False), majority) for _ in range(permutations)
    ]
    return pd.DataFrame(rows).assign(chance=float(np.mean(shuffled)))


def _agrees(labels: np.ndarray, majority: float) -> bool:
    names, counts = np.unique(labels.astype(str), return_counts=True)
    return bool(counts.max() >= majority * len(labels) and not names[counts.argmax()].startswith("\0"))


def _participation(rows: Tensor) -> float:
    """(sum of eigenvalues)^2 / sum of squares, of unit rows' Gram matrix."""
    unit = rows / torch.linalg.vector_norm(rows, dim=1, keepdim=True).clamp_min(1e-30)
    gram = unit @ unit.T
    return float(gram.trace().square() / gram.square().sum())
