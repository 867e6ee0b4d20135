"""Direct attribution of a latent of an attention layer to source positions and heads (Kissane et al., arXiv 2406.17759,
section 2; the sums of their `dfa`), exact for grouped queries and every position embedding.

Shapes: B batch, T destination and S source positions, H query heads, E width of a head.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from saelab.analysis.circuits import frozen
from saelab.base.protocols import Dictionary

if TYPE_CHECKING:
    from pandas import DataFrame

    from saelab.models.language import LanguageModel

_DESTINATIONS = 256  # whose [H, S] parts are made at a time


@dataclass(frozen=True, repr=False)
class DirectAttribution:
    """Where the pre-activation of one latent comes from, at each destination; `direct_attribution` makes it.

    Attributes
    ----------
    by_source: [batch, destination, source], summed over heads.
    by_head: [batch, destination, head], summed over sources.
    bias: what reads nothing, b_enc - b_dec W_enc.
    pre_activation: [batch, destination] = by_source.sum(-1) + bias = by_head.sum(-1) + bias.
    ids: token ids [batch, position]; `mask` where they are real.
    """

    latent: int
    by_source: Tensor
    by_head: Tensor
    bias: float
    pre_activation: Tensor
    ids: Tensor
    mask: Tensor

    @property
    def error(self) -> float:
        """How far the parts are from the pre-activation at worst: rounding, in fp32 below 1e-4."""
        gaps = [self.pre_activation - self.bias - parts.sum(-1) for parts in (self.by_source, self.by_head)]
        return max(float(gap[self.mask].abs().max()) for gap in gaps)

    def top(self, k: int = 10, context: int | None = None) -> "DataFrame":
        """The `k` largest contributions of a source position (by size): context, destination, source, lag, the share of
        the pre-activation, strongest first."""
        import pandas as pd

        parts = self.by_source if context is None else self.by_source[context : context + 1]
        best = parts.abs().flatten().topk(min(k, parts.numel())).indices
        where = torch.unravel_index(best, parts.shape)
        at = [index.cpu().numpy() for index in where]
        value = parts.flatten()[best].cpu().numpy()
        total = (self.pre_activation if context is None else self.pre_activation[context : context + 1])[where[:2]]
        return pd.DataFrame(
            {"context": at[0] + (context or 0), "destination": at[1], "source": at[2], "lag": at[1] - at[2],
             "contribution": value, "share": value / total.cpu().numpy()}
        )  # fmt: skip

    def __repr__(self) -> str:
        batch, positions, heads = self.by_head.shape
        return f"DirectAttribution(latent {self.latent}, {batch} texts of {positions} tokens, {heads} heads)"


def direct_attribution(sae: Dictionary, lm: "LanguageModel", tokens: Any, latent: int) -> DirectAttribution:
    """Which source positions and heads a latent of an attention layer's `hook_z` gets its pre-activation from.

    With the encoder column w split by head, DFA(t, s) = sum_h A^h_ts v^h_s . w^h, and the sum over s plus the bias is the
    pre-activation at t (of a gated SAE the magnitude's). A and the values are what the model computed, whatever its attention
    implementation; the model is not changed. In fp32 or the model's precision, whichever is finer; parts add up to
    1e-4 in fp32, and to the rounding of the recorded z in bf16. Largest tensor: [batch, destination, source] or, for
    256 destinations of one text at a time, [heads, destination, source].

    Args:
        sae: an SAE of a `hook_z` site, its heads in `sae.metadata`.
        lm: the model that it was trained on; transformers models and TransformerLens ones.
        tokens: whatever `lm.record` takes.
        latent: its number.

    Raises `ConfigError` for another site, missing heads, another model or a latent that is not there; `DataError` for tokens
    that cannot be used.

    >>> import torch, transformers, saelab
    >>> config = transformers.GPT2Config(vocab_size=9, n_embd=8, n_layer=1, n_head=2, n_positions=8)
    >>> lm = saelab.load_model(transformers.GPT2LMHeadModel(config).eval())
    >>> sae = saelab.SAE(saelab.TopK(k=2, d_sae=16), d_in=8, metadata={"site": "blocks.0.attn.hook_z", "heads": [2, 4]})
    >>> parts = direct_attribution(sae, lm, torch.tensor([[1, 2, 3, 4]]), latent=5)
    >>> parts.by_source.shape, parts.by_head.shape, parts.error < 1e-4
    (torch.Size([1, 4, 4]), torch.Size([1, 4, 2]), True)
    """
    block, heads, d_head = frozen.attention_site(sae, lm)
    reader = frozen.readers(sae, frozen.check_latent(sae, latent))
    batch = lm.tokens_for(sae, tokens)
    layer = frozen.read(lm, batch, [block]).layers[block]
    weights_1HE = reader.weights.to(layer.z).view(1, heads, d_head)
    with torch.no_grad():
        by_source = torch.stack([_by_source(layer, weights_1HE, context) for context in range(len(batch.ids))])
        by_head = (layer.z * weights_1HE).sum(-1)
        bias = float(reader.bias)
        return DirectAttribution(int(latent), by_source, by_head, bias, by_head.sum(-1) + bias, batch.ids, batch.mask)


def _by_source(layer: frozen.Layer, weights_1HE: Tensor, context: int) -> Tensor:
    """[T, S]"""
    positions = torch.arange(layer.z.shape[1], device=layer.z.device)
    parts = [frozen.contributions(layer, weights_1HE, context, some).sum(1) for some in positions.split(_DESTINATIONS)]
    return torch.cat(parts)


def patterns(lm: "LanguageModel", tokens: Any, block: int) -> Float[Tensor, "batch heads destination source"]:
    """The attention pattern of one block, as the model computed it, in at least fp32; rows of real tokens sum to 1.

    >>> patterns(lm, "The state of the union", 3).shape  # doctest: +SKIP
    torch.Size([1, 9, 5, 5])
    """
    with torch.no_grad():
        return frozen.read(lm, lm.to_tokens(tokens), [block]).layers[block].pattern.full()


def at_positions(
    sae: Dictionary,
    layer: frozen.Layer,
    context: int,
    destinations: Int[Tensor, "n"],
    latents: Int[Tensor, "n"],
) -> Float[Tensor, "n heads source"]:
    """Attribution of many (destination, latent) pairs of one text, by head and source: what dashboards ask for.

    `layer` is `frozen.read(lm, tokens, [block]).layers[block]`, one forward pass for any number of pairs. Parts and
    `frozen.readers(sae, latents).bias` sum to the pre-activations; sum over heads for sources, over sources for heads.
    """
    weights = frozen.readers(sae, latents).weights.to(layer.z)
    return frozen.contributions(layer, weights.unflatten(1, layer.z.shape[2:]), context, destinations)
