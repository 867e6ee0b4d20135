"""Direct attribution of a latent of an attention layer to the features of the residual stream at its sources.

With pattern and norm frozen, and x_s = sum_j f_j d_j + b + e_s by a residual SAE at the attention's input, the
pre-activation is a sum over sources and features of A_ts f_j LN_s(d_j) W_V . w, and of what b, e_s, the norm's and the
values' biases give (Kissane et al., arXiv 2406.17759; their dashboards leave out A and the norm's scale, here nothing is
left out).

Shapes: B batch, S source positions, D width of the stream, K entries of the codes.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor

from saelab.analysis.circuits import frozen
from saelab.base.codes import SparseCodes
from saelab.base.errors import ConfigError, DataError
from saelab.base.protocols import Dictionary
from saelab.models.purpose import Purpose

if TYPE_CHECKING:
    from pandas import DataFrame

    from saelab.models.language import LanguageModel

_ENTRIES = 8192  # whose decoder rows are gathered at a time


@dataclass(frozen=True, repr=False)
class FeatureAttribution:
    """Which features of the stream a latent reads, for one destination a text; `feature_attribution` makes it.

    Attributes
    ----------
    destinations: [batch].
    codes: `SparseCodes` of the residual SAE over batch * source rows; `by_feature` [nnz] what each of them contributes.
    error, residual_bias, norm_bias, value_bias: [batch, source]: of what the residual SAE misses, of its b_dec, of the norm's
        constant and of the values' bias.
    bias: of the attention SAE, b_enc - b_dec W_enc.
    pre_activation: [batch]; the parts add up to it (`total`).
    ids: token ids [batch, position].
    """

    latent: int
    destinations: Tensor
    codes: SparseCodes
    by_feature: Tensor
    error: Tensor
    residual_bias: Tensor
    norm_bias: Tensor
    value_bias: Tensor
    bias: float
    pre_activation: Tensor
    ids: Tensor

    @property
    def total(self) -> Float[Tensor, " batch"]:
        """[batch]: the sum of all parts."""
        return self.by_source.sum(1) + self.bias

    @property
    def by_source(self) -> Float[Tensor, "batch source"]:
        """[batch, source]: all parts but the bias, summed by source."""
        features = torch.zeros_like(self.error).flatten().index_add_(0, self.codes.rows(), self.by_feature)
        return features.view_as(self.error) + self.error + self.residual_bias + self.norm_bias + self.value_bias

    def top(self, k: int = 10, context: int = 0) -> "DataFrame":
        """The `k` largest contributions (by size) of a feature at a source: source, token id, feature, activation,
        contribution, the share of the pre-activation."""
        import pandas as pd

        n_sources = self.error.shape[1]
        first, last = (int(self.codes.offsets[row * n_sources]) for row in (context, context + 1))
        best = first + self.by_feature[first:last].abs().topk(min(k, last - first)).indices
        source = self.codes.rows()[best] - context * n_sources
        contribution = self.by_feature[best].cpu().numpy()
        return pd.DataFrame(
            {"source": source.cpu().numpy(), "token": self.ids[context, source].cpu().numpy(),
             "feature": self.codes.indices[best].cpu().numpy(), "activation": self.codes.values[best].cpu().numpy(),
             "contribution": contribution, "share": contribution / float(self.pre_activation[context])}
        )  # fmt: skip

    def __repr__(self) -> str:
        n = len(self.by_feature)
        return f"FeatureAttribution(latent {self.latent}, {len(self.error)} texts, {n:,} features at sources)"


def feature_attribution(
    sae: Dictionary, lm: "LanguageModel", tokens: Any, latent: int, residual_sae: Dictionary, destinations: Any = None
) -> FeatureAttribution:
    """Which features of the residual stream, at which source positions, a latent gets its pre-activation from.

    Args:
        sae: an SAE of a `hook_z` site.
        lm: the model of both SAEs.
        tokens: whatever `lm.record` takes.
        latent: its number.
        residual_sae: an SAE of the stream before the same block (its `hook_resid_pre`, or `hook_resid_post` of the block
            before). Where it is not for a position (the first, high norms: as `lm.splice`), all but its b_dec is error.
        destinations: a position for each text; by default that of the largest pre-activation.

    Exact to rounding: every part that the frozen layer has is there. The attention pattern, the norm and the codes of the
    residual SAE are what they were: no claim is made of what another input would do.

    Raises `ConfigError` where the residual SAE is of another place, and as `direct_attribution` does; `DataError` for
    destinations that are no positions.
    """
    block, heads, d_head = frozen.attention_site(sae, lm)
    if residual_block(residual_sae, lm) != block:
        raise ConfigError(
            f"the residual autoencoder reads {Purpose.of(residual_sae).reads} and block {block}'s attention reads "
            f"blocks.{block}.hook_resid_pre: give one of that site"
        )
    reader = frozen.readers(sae, frozen.check_latent(sae, latent))
    batch = lm.tokens_for(sae, tokens)
    layer = frozen.read(lm, batch, [block]).layers[block]
    weights_HE = reader.weights.to(layer.z).view(heads, d_head)
    with torch.no_grad():
        bias = float(reader.bias)
        every = (layer.z * weights_HE).sum((2, 3)) + bias
        if destinations is None:
            destinations = every.masked_fill(~batch.mask, -torch.inf).argmax(1)
        chosen = torch.as_tensor(destinations, device=every.device).reshape(-1)
        if len(chosen) != len(every) or int(chosen.min()) < 0 or int(chosen.max()) >= every.shape[1]:
            raise DataError(
                f"destinations {chosen.tolist()} for {len(every)} texts of {every.shape[1]} tokens: one position each"
            )
        codes, error = frozen.coded(lm, residual_sae, layer.x, batch)
        reads = [frozen.pulled(layer, weights_HE, context, int(at)) for context, at in enumerate(chosen)]
        stream_RD = torch.cat([read.stream for read in reads])
        shape = every.shape
        return FeatureAttribution(
            int(latent),
            chosen,
            codes,
            of_codes(codes, residual_sae.W_dec.to(stream_RD), stream_RD),
            (error * stream_RD).sum(1).view(shape),
            (stream_RD @ residual_sae.b_dec.to(stream_RD)).view(shape),
            torch.stack([read.norm for read in reads]),
            torch.stack([read.value for read in reads]),
            bias,
            every.gather(1, chosen[:, None])[:, 0],
            batch.ids,
        )


def of_codes(
    codes: SparseCodes, W_dec_FD: Float[Tensor, "latents d"], readings_RD: Float[Tensor, "rows d"]
) -> Float[Tensor, " nnz"]:
    """f_rj d_j . reading_r of every entry [nnz] of codes over R rows; their decoder rows are gathered a few at a time."""
    rows = codes.rows()
    dots = [
        (W_dec_FD[codes.indices[some]] * readings_RD[rows[some]]).sum(1)
        for some in torch.arange(len(rows), device=rows.device).split(_ENTRIES)
    ]
    return codes.values * torch.cat(dots) if dots else codes.values


def residual_block(sae: Dictionary, lm: "LanguageModel") -> int:
    """The block before which an SAE reads the stream; `ConfigError` for another site, `SiteError` for another width."""
    site = Purpose.of(sae).source(lm)
    parts = site.name.split(".")
    if len(parts) != 3 or parts[2] not in ("hook_resid_pre", "hook_resid_post"):
        raise ConfigError(f"the autoencoder reads {site.name}, not the stream between two blocks: train one with "
                          "site='blocks.N.hook_resid_pre'")  # fmt: skip
    return int(parts[1]) + (parts[2] == "hook_resid_post")
