"""What the weights alone say of latents: logits, neighbours, norms, heads. F latents, D width, V vocabulary, P
pages."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from saelab.base.protocols import Dictionary
from saelab.models.attention import Norm
from saelab.models.site_names import ATTENTION, MLP, Side
from saelab.models.sites import Site
from saelab.models.unembedding import Unembedding, unembedding, written_share

if TYPE_CHECKING:
    from saelab.models.language import LanguageModel

NEIGHBOURS = 10
LOGITS = 10
LOGIT_BINS = 40
_BLOCK, _CELLS = 1024, 2**26  # rows compared at once, and cosines


@dataclass(frozen=True)
class ToLogits:
    """The direct path from a site to the logits: by a projection and a norm after it, where there are such, `share` of it into
    the residual stream, through the last norm and the unembedding."""

    unembedding: Unembedding
    share: float = 1.0
    projection: nn.Module | None = None
    post: tuple[nn.Module, Norm] | None = None

    @classmethod
    def of(cls, lm: "LanguageModel", site: Site) -> "ToLogits | None":
        """None where a site does not write into the stream by linear maps and norms; `ConfigError` as `unembedding`."""
        found = unembedding(lm)
        if site.kind not in (ATTENTION, MLP) or site.name.rpartition(".")[2] not in ("hook_z", "hook_post"):
            share = written_share(lm, site, found.module)
            return None if share is None else cls(found, share)
        module, side = lm.place(site)
        # a TransformerLens hook point is no projection
        if side != "input" or not _is_linear(module):
            return None
        path = cls(found, projection=module)
        share = written_share(lm, site, found.module, path.written)
        return replace(path, share=share) if share else path._through_a_norm(lm, site)

    def _through_a_norm(self, lm: "LanguageModel", site: Site) -> "ToLogits | None":
        """The path with the norm that stands between the projection and the stream (Gemma 2 and 3)."""
        hook = "hook_attn_out" if site.kind == ATTENTION else "hook_mlp_out"
        out = lm.site(".".join([*site.name.split(".")[:2], hook]))
        (module, side), width = lm.place(out), self.unembedding.width
        share = written_share(lm, out, self.unembedding.module)
        if not share or side != "output" or any(p.ndim > 1 for p in module.parameters()):
            return None
        return replace(self, share=share, post=(module, Norm(module, width, next(module.parameters()))))

    @property
    def places(self) -> dict[str, tuple[nn.Module, Side]]:
        """What `change` has to see of a forward pass: what the norms read and give."""
        norms = {"last": self.unembedding.module} | ({"post": self.post[0]} if self.post else {})
        sides: tuple[Side, ...] = ("input", "output")
        return {f"{name} {side}": (module, side) for name, module in norms.items() for side in sides}

    def change(self, rows_ND: Float[Tensor, "n d"], seen: Mapping[str, Float[Tensor, "n _"]]) -> Float[Tensor, "n v"]:
        """[N, V]: by how much the logits change when rows are taken off the site, norms frozen; `seen` [N, D] by `places`."""
        sigma = self.post[1].sigma(seen["post input"], seen["post output"]) if self.post else None
        last = self.unembedding
        sigma_N = last.norm.sigma(seen["last input"], seen["last output"])
        return last.change(seen["last output"], sigma_N, self.written(rows_ND, sigma))

    def written(
        self, directions_ND: Float[Tensor, "n d"], sigma_N: Float[Tensor, " n"] | None = None
    ) -> Float[Tensor, "n d_stream"]:
        """What directions at the site add to the residual stream; the scale `sigma` of a norm on the way left out, where it is
        not given."""
        rows = directions_ND
        if self.projection is not None:
            with torch.no_grad():
                like = next(self.projection.parameters())
                zero = self.projection(torch.zeros_like(rows[:1]).to(like))
                rows = (self.projection(rows.to(like)) - zero).float()
        if self.post is not None:
            rows = self.post[1].scaled(rows) if sigma_N is None else self.post[1].apply(rows, sigma_N)
        return rows * self.share

    def logits(self, directions_ND: Float[Tensor, "n d"], gain: bool = True) -> Float[Tensor, "n v"]:
        """[N, V], each row's mean over the vocabulary taken away (W_U centred, which no probability notices)."""
        logits = self.unembedding.logits(self.written(directions_ND.detach()), gain)
        return logits - logits.mean(1, keepdim=True)


def _is_linear(module: nn.Module) -> bool:
    weight = getattr(module, "weight", None)
    return isinstance(weight, Tensor) and weight.ndim == 2


def logit_columns(path: ToLogits, directions_PD: Float[Tensor, "p d"]) -> dict[str, np.ndarray]:
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


def unit_rows(W_FD: Float[Tensor, "f d"]) -> Float[Tensor, "f d"]:
    """Rows of length one; rows of zeros stay."""
    W_FD = W_FD.detach().float()
    return W_FD / torch.linalg.vector_norm(W_FD, dim=1, keepdim=True).clamp(min=1e-30)


def neighbours(
    W_FD: Float[Tensor, "f d"], queries: np.ndarray, n: int = NEIGHBOURS, other: Float[Tensor, "g d"] | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """(latents, cosines) [queries, n]: of each queried row the nearest rows by cosine, best first, itself left out; -1 and
    NaN where there are fewer. With `other`, nearest among its rows, none left out."""
    unit = unit_rows(W_FD)
    table = unit if other is None else unit_rows(other)
    ids, cosines = np.full((len(queries), n), -1, np.int64), np.full((len(queries), n), np.nan)
    available = min(n, len(table) - (other is None))
    if available < 1:
        return ids, cosines
    block = max(1, min(_BLOCK, _CELLS // len(table)))
    for start in range(0, len(queries), block):
        mine = torch.from_numpy(queries[start : start + block]).to(unit.device)
        cosine = unit[mine] @ table.T
        if other is None:
            cosine[torch.arange(len(mine)), mine] = -torch.inf
        best = cosine.topk(available, dim=1)
        ids[start : start + block, :available] = best.indices.cpu().numpy()
        cosines[start : start + block, :available] = best.values.cpu().numpy()
    return ids, cosines


@dataclass(frozen=True)
class Norms:
    """Norms of decoder rows and encoder columns, their cosine, and the encoder's bias: [d_sae] each."""

    dec: np.ndarray
    enc: np.ndarray
    cosine: np.ndarray
    bias: np.ndarray

    @classmethod
    def of(cls, sae: Dictionary) -> "Norms":
        dec, enc = sae.W_dec.detach().float(), sae.W_enc.detach().float().T
        same = dec.shape[1] == enc.shape[1]
        cosine = (unit_rows(dec) * unit_rows(enc)).sum(1) if same else torch.full((len(dec),), torch.nan)
        norms = [torch.linalg.vector_norm(rows, dim=1).cpu().numpy() for rows in (dec, enc)]
        return cls(norms[0], norms[1], cosine.cpu().numpy(), sae.b_enc.detach().float().cpu().numpy())
