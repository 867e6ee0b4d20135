"""Attention layers over a batch of texts, frozen: with the pattern A and the norms' scales held at what they were, the
output of an attention layer is linear in the residual stream at the source positions (Kissane et al., arXiv 2406.17759,
section 2; of the norms, ours):

    z^h_t = sum_s A^h_ts v^{g(h)}_s,   v_s = (gain * (x_s - mean) / sigma_s + beta) W_V + b_V,   g(h) = h // (H / G)

Rotary embeddings, norms of queries and keys, windows and soft caps act through A only.

Shapes: B batch, T destination and S source positions, D width of the stream, H query heads, G key-value heads, E width of
a head, n readings.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from saelab.base import checks
from saelab.base.codes import SparseCodes
from saelab.base.errors import ConfigError
from saelab.base.protocols import Dictionary
from saelab.models.attention import AttentionParts, Pattern, attention_parts, watching
from saelab.models.hooks import first_runs
from saelab.models.purpose import Purpose
from saelab.models.sites import flat
from saelab.models.tokens import Tokens

if TYPE_CHECKING:
    from saelab.models.language import LanguageModel


@dataclass(frozen=True)
class Layer:
    """One attention layer over a batch of texts; every tensor in at least fp32.

    `x` [B, S, D] is the stream that its norm read, divided by `sigma` [B, S]; `values` [B, S, G, E]; `z` [B, T, H, E];
    `post_sigma` [B, T] what a norm after attention divided by, None where there is none.
    """

    parts: AttentionParts
    pattern: Pattern
    x: Tensor
    sigma: Tensor
    values: Tensor
    z: Tensor
    post_sigma: Tensor | None

    @property
    def heads(self) -> int:
        return self.z.shape[2]


class Frozen(NamedTuple):
    """`layers` by number, and `sites`: activations [B, position, width] by the names asked for, in at least fp32."""

    layers: dict[int, Layer]
    sites: dict[str, Tensor]


def read(lm: "LanguageModel", tokens: Tokens, layers: Sequence[int], sites: Sequence[str] = ()) -> Frozen:
    """One forward pass, up to the last of these attention layers and sites; neither model nor its attention is changed.

    Raises `ConfigError` for a block that is not there, a model whose attention is not known, or whose pattern cannot be had
    (`saelab.models.attention.watching`).
    """
    parts = {layer: attention_parts(lm, layer) for layer in layers}
    targets = {(layer, name): place for layer, part in parts.items() for name, place in part.places.items()}
    named = {name: lm.place(lm.site(name)) for name in sites}
    every: Mapping[Any, Any] = {**targets, **named}
    with torch.no_grad(), watching(parts) as patterns:
        found: Mapping[Any, Tensor] = first_runs(every, lambda: lm.forward(tokens))
        exact = torch.promote_types(lm.dtype, torch.float32)
        return Frozen(
            {layer: _layer(part, patterns.get(layer), {name: found[layer, name].to(exact) for name in part.places})
             for layer, part in parts.items()},
            {name: flat(found[name]).to(exact) for name in named},
        )  # fmt: skip


def _layer(part: AttentionParts, pattern: Pattern | None, found: Mapping[str, Tensor]) -> Layer:
    heads, d_head, _ = part.W_O.shape
    normed = found["norm_out"]
    post = part.post_norm
    return Layer(
        part,
        pattern if pattern is not None else Pattern(weights=found["pattern"]),
        found["norm_in"],
        part.norm.sigma(found["norm_in"], normed),
        (normed @ part.W_V.flatten(1)).unflatten(-1, part.W_V.shape[1:]) + part.b_V,
        flat(found["z"]).unflatten(-1, (heads, d_head)),
        None if post is None else post.sigma(found["attention"], found["post_norm"]),
    )


class Readers(NamedTuple):
    """What latents read: their activation, where they fire, is x . weights + bias. `weights` [n, d_in], `bias` [n]."""

    weights: Tensor
    bias: Tensor


def readers(sae: Dictionary, latents: Int[Tensor, " n"]) -> Readers:
    """The affine function whose value a latent's code is where it fires, in raw units, in at least fp32.

    The pre-activation (x - b_dec) W_enc + b_enc; of a gated SAE the magnitude's, e^r (x - b_dec) W_enc + b_mag. Raises
    `ConfigError` where there is none, as each vector is normalised by itself first.
    """
    refuse_normalised(sae)
    with torch.no_grad():
        weights = sae.W_enc.T[latents]
        weights = weights.to(torch.promote_types(weights.dtype, torch.float32))
        bias = sae.b_enc[latents].to(weights)
        if "r_mag" in sae.extra:
            weights = weights * sae.extra["r_mag"][latents, None].to(weights).exp()
            bias = (sae.extra["b_mag"] / sae.state.target_scale)[latents].to(weights)
        if sae.cfg.centres_input:
            bias = bias - weights @ sae.b_dec.to(weights)
        return Readers(weights, bias)


def contributions(
    layer: Layer, weights_nHE: Float[Tensor, "_ heads width"], context: int, destinations: Int[Tensor, " n"]
) -> Float[Tensor, "n heads source"]:
    """What each head and source position of one text gives to readings of z at some destinations: [n, H, S].

    Args:
        weights_nHE: what is read, [n, H, E], or one for all, [1, H, E].
        context: the text.
        destinations: [n] positions.

    Sums over S to what is read of each head, over both to the reading without its bias. The largest tensor is the result:
    [n, S, H * E] is never made.
    """
    values_SGE = layer.values[context]
    n, (n_sources, groups, width) = len(weights_nHE), values_SGE.shape
    shared_GnE = weights_nHE.view(n, groups, -1, width).transpose(0, 1).reshape(groups, -1, width)
    read_nHS = (shared_GnE @ values_SGE.permute(1, 2, 0)).view(groups, n, -1, n_sources).transpose(0, 1).flatten(1, 2)
    return layer.pattern.rows(context, destinations).transpose(0, 1) * read_nHS


class Pulled(NamedTuple):
    """A reading of z at one destination as readings of the stream at the sources: sum over s of x_s . `stream`[s] +
    `norm`[s] + `value`[s]. `stream` [S, D]; `norm` [S] what the norm's constant beta gives, `value` [S] the values' bias;
    `by_head` [H, S] the total by head."""

    stream: Tensor
    norm: Tensor
    value: Tensor
    by_head: Tensor


def pulled(layer: Layer, weights_HE: Float[Tensor, "heads width"], context: int, destination: int) -> Pulled:
    """What reads weights_HE of z at a destination, pulled back through values and norm:
    sum_h A^h_ts pull(W_V^{g(h)} w^h) / sigma_s."""
    parts = layer.parts
    A_HS = layer.pattern.rows(context, torch.tensor([destination], device=layer.z.device))[:, 0]
    W_V, b_V = parts.W_V[:, parts.group], parts.b_V[parts.group]
    normed_HD = torch.einsum("dhe,he->hd", W_V, weights_HE)
    stream = A_HS.T @ parts.norm.pull(normed_HD) / layer.sigma[context, :, None]
    norm, value = A_HS.T @ (normed_HD @ parts.norm.beta), A_HS.T @ (b_V * weights_HE).sum(1)
    at = torch.tensor([destination], device=layer.z.device)
    return Pulled(stream, norm, value, contributions(layer, weights_HE[None], context, at)[0])


def refuse_normalised(sae: Dictionary) -> None:
    """Raise `ConfigError` for an SAE whose codes are no sums over the parts of the vector that it reads."""
    if sae.cfg.per_token:
        raise ConfigError(
            f"{sae!r} reads each vector normalised by itself: its codes are not linear in the vector and have no attribution "
            "to parts of it"
        )


class Coded(NamedTuple):
    """An SAE's view of activations [rows, width]: x = codes W_dec + b_dec + `error`."""

    codes: SparseCodes
    error: Tensor


def coded(lm: "LanguageModel", sae: Dictionary, x: Float[Tensor, "batch pos width"], tokens: Tokens) -> Coded:
    """The codes of x [batch, position, width] over batch * position rows, and what they miss.

    At positions that the SAE is not for (skipped, special, padding, above its norm limit: as `lm.splice` leaves them alone)
    no latent fires and all but b_dec is error.
    """
    refuse_normalised(sae)
    rows = x.flatten(0, 1).to(sae.device)
    with torch.no_grad():
        chosen = Purpose.of(sae).positions(lm, x, tokens).flatten().to(sae.device)
        own = sae.encode_sparse(rows[chosen].to(sae.dtype))
        offsets = torch.cat([own.offsets[:1], own.offsets[1:][(chosen.cumsum(0) - 1).clamp(min=0)]])
        # before the first chosen row nothing fires
        offsets[1:][chosen.cumsum(0) == 0] = 0
        error = rows - sae.decode(SparseCodes(own.values, own.indices, offsets, sae.d_sae)).to(rows.dtype)
        values, indices, offsets = (part.to(x.device) for part in (own.values.to(rows.dtype), own.indices, offsets))
        return Coded(SparseCodes(values, indices, offsets, sae.d_sae), error.to(x.device))


def attention_site(sae: Dictionary, lm: "LanguageModel | None" = None) -> tuple[int, int, int]:
    """(block, heads, d_head) of an SAE of an attention layer's `hook_z`.

    Raises `ConfigError` for another site, or metadata without (or with impossible) heads; with a model also `SiteError` for
    another width and `ConfigError` for other heads.
    """
    purpose = Purpose.of(sae)
    name = purpose.reads
    block = name.split(".")[1] if name.count(".") > 1 and name.startswith("blocks.") else ""
    if not block.isdigit() or not name.endswith(("attn.hook_z", "attn.o.hook_in")):
        raise ConfigError(f"the autoencoder reads {name!r}, and heads are there at an attention layer's hook_z only: "
                          "train one with site='blocks.N.attn.hook_z'")  # fmt: skip
    heads = sae.metadata.get("heads")
    if not isinstance(heads, list | tuple) or len(heads) != 2 or heads[0] * heads[1] != sae.d_in:
        raise ConfigError(f"the autoencoder is {sae.d_in} wide and its metadata say {heads!r} of heads: set "
                          "sae.metadata['heads'] = [heads, width of one], as lm.sites() lists them")  # fmt: skip
    if lm is not None:
        site = purpose.source(checks.language_model("lm", lm))
        if site.heads != heads[0]:
            raise ConfigError(f"the autoencoder has {heads[0]} heads and {name} of {lm.name} has {site.heads}: "
                              "give the model that it was trained on")  # fmt: skip
    return int(block), int(heads[0]), int(heads[1])


def check_latent(sae: Dictionary, latent: Any) -> Int[Tensor, "1"]:
    """The number of a latent as a tensor [1] on the SAE's device; `ConfigError` for one that is not there."""
    why = f"there is no latent {latent}: the autoencoder has {sae.d_sae:,}, from 0 on"
    number = checks.count("latent", latent, least=0, most=sae.d_sae - 1, of=why)
    return torch.tensor([number], device=sae.device)
