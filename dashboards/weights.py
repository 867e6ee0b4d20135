"""What the weights alone say of latents: logits, neighbours, norms, heads. F latents, D width, V vocabulary, P
pages."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from saelab.errors import ConfigError
from saelab.models.families import ATTENTION, MLP
from saelab.models.sites import Site
from saelab.models.unembedding import Unembedding, unembedding

if TYPE_CHECKING:
    from saelab.models.language import LanguageModel

NEIGHBOURS = 10
LOGITS = 10
LOGIT_BINS = 40
_BLOCK = 1024


@dataclass(frozen=True)
class ToLogits:
    """The direct path from a site to the logits: into the residual stream, through the last norm's gain, to W_U."""

    projection: nn.Module | None
    unembedding: Unembedding

    @classmethod
    def of(cls, lm: "LanguageModel", site: Site) -> "ToLogits | None":
        """None where a site does not write into the stream by a linear map, or the model has no known unembedding."""
        try:
            found = unembedding(lm)
        except ConfigError:
            return None
        width = len(found.gain)
        hook = site.name.rpartition(".")[2]
        if site.kind in (ATTENTION, MLP) and hook in ("hook_z", "hook_post"):
            module, side = lm.place(site)
            # a TransformerLens hook point is no projection
            return cls(module, found) if side == "input" and _is_linear(module) else None
        if hook == "hook_pre" or site.width != width:
            return None
        return cls(None, found)

    def written(self, directions_ND: Tensor) -> Tensor:
        """What directions at the site add to the residual stream."""
        if self.projection is None:
            return directions_ND
        with torch.no_grad():
            like = next(self.projection.parameters())
            zero = self.projection(torch.zeros_like(directions_ND[:1]).to(like))
            return (self.projection(directions_ND.to(like)) - zero).float()

    def logits(self, directions_ND: Tensor, gain: bool = True) -> Tensor:
        """[N, V], each row's mean over the vocabulary taken away (W_U centred, which no probability notices)."""
        written = self.written(directions_ND.detach())
        found = self.unembedding
        logits = found.logits(written) if gain else written.to(found.W_U) @ found.W_U
        return logits - logits.mean(1, keepdim=True)


def _is_linear(module: nn.Module) -> bool:
    weight = getattr(module, "weight", None)
    return isinstance(weight, Tensor) and weight.ndim == 2


def logit_columns(path: ToLogits, directions_PD: Tensor) -> dict[str, np.ndarray]:
    """Top and bottom logits with and without the final norm's gain, and the histogram of those with it. Token ids are
    global."""
    columns: dict[str, np.ndarray] = {}
    for prefix, gain in (("", True), ("raw_", False)):
        logits = path.logits(directions_PD, gain)
        n = min(LOGITS, logits.shape[1])
        for name, sign in (("top", 1), ("bottom", -1)):
            best = (sign * logits).topk(n, dim=1)
            columns[prefix + name] = best.indices.cpu().numpy()
            columns[prefix + name + "_value"] = (sign * best.values).cpu().numpy()
        if gain:
            low, high = logits.amin(1), logits.amax(1)
            columns["logit_lo"], columns["logit_hi"] = low.cpu().numpy(), high.cpu().numpy()
            columns["logit_hist"] = np.stack([equal_bins(row, LOGIT_BINS) for row in logits.cpu().numpy()])
    return columns


def equal_bins(values: np.ndarray, n: int) -> np.ndarray:
    """Counts in `n` equal bins from the smallest to the largest value, both included; all in the first where they are
    one."""
    low, high = float(values.min()), float(values.max())
    if not high > low:
        return np.bincount(np.zeros(len(values), np.int64), minlength=n)
    place = ((values.astype(np.float64) - low) * (n / (high - low))).astype(np.int64)
    return np.bincount(np.minimum(place, n - 1), minlength=n)


def unit_rows(W_FD: Tensor) -> Tensor:
    """Rows of length one; rows of zeros stay."""
    W_FD = W_FD.detach().float()
    return W_FD / torch.linalg.vector_norm(W_FD, dim=1, keepdim=True).clamp(min=1e-30)


def neighbours(
    W_FD: Tensor, queries: np.ndarray | None = None, n: int = NEIGHBOURS, other: Tensor | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """(latents, cosines) [queries, n]: the nearest rows by cosine, best first, a row itself left out; -1 and NaN where
    there are fewer. With `other`, nearest among its rows, none left out."""
    unit = unit_rows(W_FD)
    table = unit if other is None else unit_rows(other)
    asked = np.arange(len(unit)) if queries is None else queries
    ids, cosines = np.full((len(asked), n), -1, np.int64), np.full((len(asked), n), np.nan)
    available = min(n, len(table) - (other is None))
    if available < 1:
        return ids, cosines
    for start in range(0, len(asked), _BLOCK):
        mine = torch.from_numpy(np.asarray(asked[start : start + _BLOCK])).to(unit.device)
        cosine = unit[mine] @ table.T
        if other is None:
            cosine[torch.arange(len(mine)), mine] = -torch.inf
        best = cosine.topk(available, dim=1)
        ids[start : start + _BLOCK, :available] = best.indices.cpu().numpy()
        cosines[start : start + _BLOCK, :available] = best.values.cpu().numpy()
    return ids, cosines


@dataclass(frozen=True)
class Norms:
    """Norms of decoder rows and encoder columns, their cosine, and the encoder's bias: [d_sae] each."""

    dec: np.ndarray
    enc: np.ndarray
    cosine: np.ndarray
    bias: np.ndarray

    @classmethod
    def of(cls, sae: Any) -> "Norms":
        dec, enc = sae.W_dec.detach().float(), sae.W_enc.detach().float().T
        same = dec.shape[1] == enc.shape[1]
        cosine = (unit_rows(dec) * unit_rows(enc)).sum(1) if same else torch.full((len(dec),), torch.nan)
        norms = [torch.linalg.vector_norm(rows, dim=1).cpu().numpy() for rows in (dec, enc)]
        return cls(norms[0], norms[1], cosine.cpu().numpy(), sae.b_enc.detach().float().cpu().numpy())
