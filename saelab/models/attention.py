"""The parts of one attention layer: norms, value and output weights, and the pattern that the model used.

Shapes: B batch, T destination and S source positions, D width of the stream, H query heads, G key-value heads, E width of
a head.
"""

import contextlib
import itertools
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from einops import rearrange
from jaxtyping import Float, Int, Shaped
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from torch.overrides import TorchFunctionMode

from saelab.base import checks
from saelab.base.errors import ConfigError
from saelab.models.backends import Bridge, Hooked, Transformers
from saelab.models.blocks import USUAL
from saelab.models.offloading import in_memory
from saelab.models.site_names import Side
from saelab.models.wrappers import looked_through

if TYPE_CHECKING:
    from saelab.models.language import LanguageModel


class Norm:
    """A norm y = gain * (x - mean of x) / sigma + beta, the mean only where it is `centred` (LayerNorm).

    Read off the module by what it makes of a vector and its negative, so that a gain of 1 + gamma (Gemma) or a norm
    without one needs no table.
    """

    def __init__(self, module: nn.Module, width: int, otherwise: Shaped[Tensor, "..."]) -> None:
        module = _bare(module)

        # the class's own forward: hooks that others set on the module have no business here
        def run(x: Tensor) -> Tensor:
            return type(module).forward(module, x).to(torch.promote_types(x.dtype, torch.float32))

        with torch.no_grad(), in_memory(module):
            like = next(module.parameters(), otherwise)  # device and precision
            ones = like.new_full((width,), 1024.0)  # so that epsilon is nothing beside it
            probe = ones.clone()
            probe[1::2] *= -1
            if width % 2:
                probe[1] *= 2  # of mean 0, without zeros
            odd, even = (run(x) - run(-x) for x in (probe, ones))
            wide = probe.to(odd)
            self.gain = odd / 2 * wide.norm() / width**0.5 / wide
            self.beta = run(torch.zeros_like(probe))
        self.centred = bool(even.abs().max() < 1e-3 * odd.abs().max())

    def apply(self, x: Float[Tensor, "*rows D"], sigma: Float[Tensor, "*rows"]) -> Float[Tensor, "*rows D"]:
        """gain * (x - mean) / sigma: the linear part with sigma [...] frozen; beta is apart."""
        return self.scaled(x) / sigma[..., None]

    def sigma(self, x: Float[Tensor, "*rows D"], y: Float[Tensor, "*rows D"]) -> Float[Tensor, "*rows"]:
        """By what the norm divided each vector of x [..., D] when it gave y, in the precision of the gain."""
        before, after = self.scaled(x), y.to(self.gain) - self.beta
        return (before * before).sum(-1) / (before * after).sum(-1)

    def pull(self, directions_KD: Float[Tensor, "*n D"]) -> Float[Tensor, "*n D"]:
        """What reads from x as these directions [..., D] read from y * sigma, beta left out."""
        rows = directions_KD * self.gain
        return rows - rows.mean(-1, keepdim=True) if self.centred else rows

    def scaled(self, x: Float[Tensor, "*rows D"]) -> Float[Tensor, "*rows D"]:
        """gain * (x - mean): the linear part, undivided."""
        x = x.to(self.gain)
        return (x - x.mean(-1, keepdim=True) if self.centred else x) * self.gain


def is_norm(module: nn.Module, width: int) -> bool:
    """Whether a module may be a norm of vectors so long: its only parameters are as long, or it has none and is called so."""
    shapes = {tuple(parameter.shape) for parameter in module.parameters()}
    return shapes == {(width,)} or not shapes and "norm" in type(module).__name__.lower()


@dataclass(frozen=True)
class Projection:
    """x -> x W + b with W [in, out]; b None where there is none."""

    W: Tensor
    b: Tensor | None


@dataclass(frozen=True)
class AttentionParts:
    """Modules and weights of the attention of block `layer`; nothing here is a copy of the model's state but weights.

    `W_V` [D, G, E] and `b_V` [G, E]; query head h reads key-value head `group[h]`. `W_O` [H, E, D], `b_O` [D]. `places`
    are (module, side) by name: `norm_in`, `norm_out`, `z`, `attention`, with TransformerLens 3 `pattern`, and `post_norm` where
    there is such a norm between attention and the stream (Gemma 2 and 3).
    """

    layer: int
    module: nn.Module
    norm: Norm
    post_norm: Norm | None
    W_V: Tensor
    b_V: Tensor
    W_O: Tensor
    b_O: Tensor
    group: Tensor
    places: Mapping[str, tuple[nn.Module, Side]]


def attention_parts(lm: "LanguageModel", layer: int) -> AttentionParts:
    """The parts of one layer's attention, weights in at least fp32.

    Found by what has to hold: at the first token, which sees nothing else, z is the values that the norm and a projection
    give. Raises `ConfigError` for a layer that is not there, or where no part of the attention does (gates, norms of the
    values, latent attention).
    """
    why = f"there is no block {layer}: {lm.name} has {lm.n_layers}, from 0 on"
    layer = checks.count("block", layer, least=0, most=lm.n_layers - 1, of=why)
    backend = lm.backend
    ways = _by_names(lm, backend, layer) if isinstance(backend, Hooked) else _by_modules(backend, layer)
    if layer in backend.attention_ways:
        return next(itertools.islice(ways, backend.attention_ways[layer], None))
    every = list(ways)
    places = {place for parts in every for place in (parts.places["norm_out"], parts.places["z"])}
    seen = backend.few_tokens({place: place for place in places})
    for number, parts in enumerate(every):
        if _values_are_z(parts, seen):
            backend.attention_ways[layer] = number
            return parts
    raise ConfigError(f"what block {layer} of {lm.name} attends to is not known: no projection of it gives values "
                      "that hook_z holds at the first token, or it adds something else to the stream")  # fmt: skip


def _values_are_z(parts: AttentionParts, seen: Mapping[Any, Tensor]) -> bool:
    normed, z = (seen.get(parts.places[name]) for name in ("norm_out", "z"))
    if normed is None or z is None:
        return False
    values_BGE = torch.einsum("bd,dge->bge", normed[:, 0].to(parts.W_V), parts.W_V) + parts.b_V
    gap = values_BGE[:, parts.group].flatten(1) - z[:, 0].flatten(1)
    tolerance = max(1e-4, 8 * torch.finfo(z.dtype).eps)
    return bool(gap.abs().max() <= tolerance * z[:, 0].abs().max())


def _by_modules(backend: Transformers, layer: int) -> Iterator[AttentionParts]:
    """What the parts of a transformers model may be, the likeliest first."""
    pre, z, out = (
        backend.named.get(f"blocks.{layer}.{hook}") for hook in ("hook_resid_pre", "attn.hook_z", "hook_attn_out")
    )
    if pre is None or z is None or z.heads is None or out is None:
        return
    block, last = (backend.inner.get_submodule(site.path) for site in (pre, z))
    module = backend.inner.get_submodule(z.path.rpartition(".")[0])
    inside = dict(module.named_modules())
    linear = [
        path for path, m in inside.items() if getattr(getattr(m, "weight", None), "ndim", 0) == 2 and m is not last
    ]
    if not isinstance(getattr(last, "weight", None), Tensor):
        return
    output = _projection(last)
    norms = [m for m in block.modules() if is_norm(m, pre.width) and m not in inside.values()]
    after = backend.inner.get_submodule(out.path) if USUAL.norms.search(out.path) else None
    for path in sorted(linear, key=lambda path: not USUAL.projects[2].search(path)):
        value = _projection(inside[path])
        for norm, values in itertools.product(norms, _value_parts(value, z.heads, z.width // z.heads)):
            if len(values[0]) == pre.width:
                yield _assembled(backend, layer, module, norm, after, values, output, z.heads)


def _by_names(lm: "LanguageModel", backend: Hooked, layer: int) -> Iterator[AttentionParts]:
    """Of a TransformerLens model, whose blocks name them; a bridge takes a joint projection apart."""
    block: Any = looked_through(lm.model).blocks[layer]  # type: ignore[index]
    attention, norm = getattr(block, "attn", None), getattr(block, "ln1", None)
    if attention is None or norm is None:
        return
    heads = int(backend.cfg.n_heads)
    if isinstance(backend, Bridge):
        value, output = _projection(attention.v), _projection(attention.o)
        ways = list(_value_parts(value, heads, int(backend.cfg.d_head)))
    else:
        exact = torch.promote_types(attention.W_V.dtype, torch.float32)
        W_V, b_V, W_O, b_O = (getattr(attention, name).detach().to(exact) for name in ("W_V", "b_V", "W_O", "b_O"))
        output = Projection(rearrange(W_O, "h e d -> (h e) d"), b_O)
        ways = [(rearrange(W_V, "g d e -> d g e"), b_V)]
    for values in ways:
        yield _assembled(backend, layer, attention, norm, getattr(block, "ln1_post", None), values, output, heads)


def _assembled(
    backend: Transformers, layer: int, module: nn.Module, norm: nn.Module, after: nn.Module | None,
    values: tuple[Tensor, Tensor], output: Projection, heads: int,
) -> AttentionParts:  # fmt: skip
    (W_V, b_V), d_model = values, output.W.shape[1]
    places: dict[str, tuple[nn.Module, Side]] = {
        "norm_in": (norm, "input"), "norm_out": (norm, "output"),
        "z": backend.place(backend.site(f"blocks.{layer}.attn.hook_z")), "attention": (module, "output"),
    }  # fmt: skip
    if hasattr(module, "hook_pattern") and not isinstance(backend, Bridge):
        places["pattern"] = (module.hook_pattern, "output")  # type: ignore[assignment]
    if after is not None:
        places["post_norm"] = (after, "output")
    return AttentionParts(
        layer, module, Norm(norm, d_model, W_V), Norm(after, d_model, W_V) if after is not None else None,
        W_V, b_V, rearrange(output.W, "(h e) d -> h e d", h=heads), _bias(output, d_model),
        torch.arange(heads, device=W_V.device) // (heads // W_V.shape[1]), places,
    )  # fmt: skip


def _bare(module: nn.Module) -> nn.Module:
    """The transformers module inside a bridge's."""
    while (inner := getattr(module, "_original_component", None)) is not None:
        module = inner
    return module


def _projection(module: nn.Module) -> Projection:
    """Weights of a linear layer as [in, out], in at least fp32: `nn.Linear` keeps [out, in], GPT-2's `Conv1D` [in, out]."""
    module = _bare(module)
    with in_memory(module):
        weight, bias = module.weight.detach(), getattr(module, "bias", None)  # type: ignore[operator]
        exact = torch.promote_types(weight.dtype, torch.float32)
        W = (weight.T if isinstance(module, nn.Linear) else weight).to(exact)
        return Projection(W, None if bias is None else bias.detach().to(exact))


def _bias(projection: Projection, width: int) -> Tensor:
    return projection.W.new_zeros(width) if projection.b is None else projection.b


def _value_parts(value: Projection, heads: int, d_head: int) -> Iterator[tuple[Tensor, Tensor]]:
    """W_V [D, G, E] and b_V [G, E], as a projection may make them: its whole output; what stands after all queries and keys;
    of each group what stands after its queries and its key."""
    both, e = (value.W, _bias(value, value.W.shape[1])), {"e": d_head}
    wide = value.W.shape[1] // d_head
    if value.W.shape[1] % d_head == 0 and heads % wide == 0:
        W_V, b_V = (rearrange(x, "... (g e) -> ... g e", **e) for x in both)
        yield W_V, b_V
    groups = (wide - heads) // 2
    if value.W.shape[1] == (heads + 2 * groups) * d_head and groups > 0 and heads % groups == 0:
        W_V, b_V = (rearrange(x[..., -groups * d_head :], "... (g e) -> ... g e", **e) for x in both)
        yield W_V, b_V
        W_V, b_V = (rearrange(x, "... (g n e) -> ... g n e", g=groups, **e)[..., -1, :] for x in both)
        yield W_V, b_V


class Pattern:
    """Who attended to whom: A [B, H, T, S], its rows made when asked for, in at least fp32.

    Either the weights themselves, or queries [B, H, T, E], keys [B, H or G, S, E] (after rotary embeddings and the like), mask
    and scale as the model handed them to PyTorch's attention.
    """

    def __init__(self, weights: Float[Tensor, "B H T S"] | None = None, call: Mapping[str, Any] | None = None) -> None:
        self._weights, self._call = weights, call

    def rows(self, context: int, destinations: Int[Tensor, "n"] | None = None) -> Float[Tensor, "H n S"]:
        """A [H, n, S] of one text: at the destinations [n], or at all of them."""
        at = slice(None) if destinations is None else destinations
        if self._weights is not None:
            rows = self._weights[context, :, at]
            return rows.to(torch.promote_types(rows.dtype, torch.float32))
        assert self._call is not None
        query, key, mask, scale = (self._call[name] for name in ("query", "key", "attn_mask", "scale"))
        exact = torch.promote_types(query.dtype, torch.float32)
        query_HnE, key_GSE = query[context, :, at].to(exact), key[context].to(exact)
        heads, (groups, n_sources, width) = len(query_HnE), key_GSE.shape
        shared_GnE = query_HnE.reshape(groups, -1, width)  # the heads of a group one after the other
        scores = (shared_GnE @ key_GSE.mT).view(heads, -1, n_sources) * (width**-0.5 if scale is None else scale)
        if self._call["is_causal"]:
            positions = torch.arange(query.shape[2], device=scores.device)[at]
            later = torch.arange(n_sources, device=scores.device) > positions[:, None]
            scores = scores.masked_fill(later, -math.inf)
        if mask is not None:
            own = mask.expand(query.shape[0], -1, -1, -1)[context]
            own = own[:, at] if own.shape[1] > 1 else own
            scores = scores.masked_fill(~own, -math.inf) if own.dtype == torch.bool else scores + own
        # a text padded on the left has rows that see nothing
        return scores.softmax(-1).nan_to_num_(0.0)

    def full(self) -> Float[Tensor, "B H T S"]:
        """A [B, H, T, S]."""
        held = self._weights if self._weights is not None else self._call["query"]  # type: ignore[index]
        return torch.stack([self.rows(context) for context in range(len(held))])


@contextlib.contextmanager
def watching(parts: Mapping[int, AttentionParts]) -> Iterator[dict[int, Pattern]]:
    """Within it, a forward pass leaves the pattern of each of these layers in the dict that this gives.

    Weights that the attention returns are kept as they are; a model on PyTorch's fused attention returns none, and the
    arguments of that call are kept instead. Neither model nor attention implementation is changed.

    Raises `ConfigError` in the pass where there is neither (other fused kernels), or attention drops weights at random.
    """
    found: dict[int, Pattern] = {}
    with contextlib.ExitStack() as stack:
        calls = stack.enter_context(_FusedCalls())
        for layer, part in parts.items():

            def enter(*_: Any, layer: int = layer, heads: int = len(part.group)) -> None:
                calls.layer, calls.heads = layer, heads

            def leave(
                module: nn.Module, args: Any, output: Any, layer: int = layer, part: AttentionParts = part
            ) -> None:
                calls.layer = None
                weights = output[1] if isinstance(output, tuple) and len(output) > 1 else None
                if isinstance(weights, Tensor):
                    found[layer] = Pattern(weights=weights)
                elif layer in calls.found:
                    found[layer] = Pattern(call=calls.found[layer])
                elif "pattern" not in part.places:
                    raise ConfigError(
                        f"the attention of block {layer} gives no weights and does not use PyTorch's fused attention: load "
                        "the model with attn_implementation='sdpa' or 'eager'"
                    )

            stack.callback(part.module.register_forward_pre_hook(enter).remove)
            stack.callback(part.module.register_forward_hook(leave).remove)
        yield found


class _FusedCalls(TorchFunctionMode):
    """Keeps the arguments of PyTorch's fused attention, by the layer that runs."""

    _names = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal", "scale", "enable_gqa")

    def __init__(self) -> None:
        super().__init__()
        self.layer: int | None = None
        self.heads = 0
        self.found: dict[int, dict[str, Any]] = {}

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is scaled_dot_product_attention and self.layer is not None:
            given = {**dict(zip(self._names, args, strict=False)), **(kwargs or {})}
            if given.get("dropout_p"):
                raise ConfigError(
                    "attention drops weights at random: call model.eval() before attributing anything to it"
                )
            self.found[self.layer] = {
                "query": self._by_head(given["query"].detach()), "key": given["key"].detach(),
                "attn_mask": given.get("attn_mask"), "is_causal": bool(given.get("is_causal", False)),
                "scale": given.get("scale"),
            }  # fmt: skip
        return func(*args, **(kwargs or {}))

    def _by_head(self, query: Tensor) -> Tensor:
        """[B, H, T, E], also of a text of one token, whose heads transformers hands over as the queries of a group."""
        return query.reshape(len(query), self.heads, -1, query.shape[-1])
