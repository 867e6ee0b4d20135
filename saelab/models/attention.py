"""The parts of one attention layer, by family: norms, value and output weights, and the pattern that the model used.

Shapes: B batch, T destination and S source positions, D width of the stream, H query heads, G key-value heads, E width of
a head.
"""

import contextlib
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from torch.overrides import TorchFunctionMode

from saelab.base import checks
from saelab.base.errors import ConfigError
from saelab.models.backends import Bridge, Hooked
from saelab.models.families import KNOWN, Side, block_list, family_of

if TYPE_CHECKING:
    from saelab.models.language import LanguageModel


class Norm:
    """A norm y = gain * (x - mean of x) / sigma + beta, the mean only where it is `centred` (LayerNorm).

    Read off the module by what it makes of a vector and its negative, so that a gain of 1 + gamma (Gemma) or a norm
    without one needs no table.
    """

    def __init__(self, module: nn.Module, width: int, like: Tensor) -> None:
        module = _bare(module)
        probe = torch.full(
            (width,), 1024.0, dtype=like.dtype, device=like.device
        )  # so that epsilon is nothing beside it
        ones = probe.clone()
        probe[1::2] *= -1
        if width % 2:
            probe[1] *= 2  # of mean 0, without zeros
        exact = torch.promote_types(like.dtype, torch.float32)

        # the class's own forward: hooks that others set on the module have no business here
        def run(x: Tensor) -> Tensor:
            return type(module).forward(module, x).to(exact)

        with torch.no_grad():
            odd, even = (run(x) - run(-x) for x in (probe, ones))
            wide = probe.to(exact)
            self.gain = odd / 2 * wide.norm() / width**0.5 / wide
            self.beta = run(torch.zeros_like(probe))
        self.centred = bool(even.abs().max() < 1e-3 * odd.abs().max())

    def apply(self, x: Tensor, sigma: Tensor) -> Tensor:
        """gain * (x - mean) / sigma: the linear part with sigma [...] frozen; beta is apart."""
        return self.scaled(x) / sigma[..., None]

    def sigma(self, x: Tensor, y: Tensor) -> Tensor:
        """By what the norm divided each vector of x [..., D] when it gave y, in the precision of the gain."""
        before, after = self.scaled(x), y.to(self.gain) - self.beta
        return (before * before).sum(-1) / (before * after).sum(-1)

    def pull(self, directions_KD: Tensor) -> Tensor:
        """What reads from x as these directions [..., D] read from y * sigma, beta left out."""
        rows = directions_KD * self.gain
        return rows - rows.mean(-1, keepdim=True) if self.centred else rows

    def scaled(self, x: Tensor) -> Tensor:
        """gain * (x - mean): the linear part, undivided."""
        x = x.to(self.gain)
        return (x - x.mean(-1, keepdim=True) if self.centred else x) * self.gain


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

    Raises `ConfigError` for a layer that is not there or a model whose family has no table.
    """
    why = f"there is no block {layer}: {lm.name} has {lm.n_layers}, from 0 on"
    layer = checks.count("block", layer, least=0, most=lm.n_layers - 1, of=why)
    backend: Any = lm.backend
    if isinstance(backend, Hooked) and not isinstance(backend, Bridge):
        return _hooked_parts(backend, layer)
    family = family_of(backend.config)
    found = family and block_list(lm.inner, family)
    if not family or not found:
        raise ConfigError(
            f"where {lm.name} keeps its attention is not known: attribution is there for {', '.join(KNOWN)}"
        )
    block = found[1][layer]
    value = _projection(block.get_submodule(family.value))
    output = _projection(block.get_submodule(family.z_reader))
    heads, d_model = int(backend.config.num_attention_heads), value.W.shape[0]
    d_head = output.W.shape[0] // heads
    W_V, b_V = _value_part(value, family.value_part, d_head)
    module = block.get_submodule(family.attention)
    norm, after = block.get_submodule(family.norm), family.attention_norm
    places: dict[str, tuple[nn.Module, Side]] = {
        "norm_in": (norm, "input"), "norm_out": (norm, "output"), "z": lm.place(lm.site(f"blocks.{layer}.attn.hook_z")),
        "attention": (module, "output"),
    }  # fmt: skip
    if after:
        places["post_norm"] = (block.get_submodule(after), "output")
    like = next(norm.parameters())
    return AttentionParts(
        layer, module, Norm(norm, d_model, like),
        Norm(block.get_submodule(after), d_model, like) if after else None,
        W_V, b_V, output.W.view(heads, d_head, d_model), _bias(output, d_model),
        torch.arange(heads, device=W_V.device) // (heads // W_V.shape[1]), places,
    )  # fmt: skip


def _hooked_parts(backend: Hooked, layer: int) -> AttentionParts:
    """Of a `HookedTransformer`, whose attention holds its weights by head and gives its pattern to a hook point."""
    block: Any = backend.runner.blocks[layer]  # type: ignore[index]
    attn, exact = block.attn, torch.promote_types(block.attn.W_V.dtype, torch.float32)
    W_V, b_V, W_O, b_O = (x.detach().to(exact) for x in (attn.W_V, attn.b_V, attn.W_O, attn.b_O))
    after = getattr(block, "ln1_post", None)
    d_model = int(backend.cfg.d_model)
    places: dict[str, tuple[nn.Module, Side]] = {
        "norm_in": (block.ln1, "input"), "norm_out": (block.ln1, "output"), "z": (attn.hook_z, "output"),
        "pattern": (attn.hook_pattern, "output"), "attention": (attn, "output"),
    }  # fmt: skip
    if after is not None:
        places["post_norm"] = (after, "output")
    return AttentionParts(
        layer, attn, Norm(block.ln1, d_model, attn.W_V), Norm(after, d_model, attn.W_V) if after is not None else None,
        W_V.transpose(0, 1), b_V, W_O, b_O, torch.arange(len(W_O), device=W_O.device) // (len(W_O) // len(W_V)), places,
    )  # fmt: skip


def _bare(module: nn.Module) -> nn.Module:
    """The transformers module inside a bridge's."""
    while (inner := getattr(module, "_original_component", None)) is not None:
        module = inner
    return module


def _projection(module: nn.Module) -> Projection:
    """Weights of a linear layer as [in, out], in at least fp32: `nn.Linear` keeps [out, in], GPT-2's `Conv1D` [in, out]."""
    module = _bare(module)
    weight, bias = module.weight.detach(), getattr(module, "bias", None)  # type: ignore[operator]
    exact = torch.promote_types(weight.dtype, torch.float32)
    W = (weight.T if isinstance(module, nn.Linear) else weight).to(exact)
    return Projection(W, None if bias is None else bias.detach().to(exact))


def _bias(projection: Projection, width: int) -> Tensor:
    return projection.W.new_zeros(width) if projection.b is None else projection.b


def _value_part(value: Projection, part: str, d_head: int) -> tuple[Tensor, Tensor]:
    """W_V [D, G, E] and b_V [G, E] from the projection that makes the values, and perhaps queries and keys too."""
    W, b = value.W, _bias(value, value.W.shape[1])
    if part == "third":
        W, b = W.chunk(3, dim=1)[2], b.chunk(3)[2]
    W, b = W.reshape(len(W), -1, d_head), b.reshape(-1, d_head)
    # query, key and value of one head stand together
    return (W[:, 2::3], b[2::3]) if part == "third of each head" else (W, b)


class Pattern:
    """Who attended to whom: A [B, H, T, S], its rows made when asked for, in at least fp32.

    Either the weights themselves, or queries [B, H, T, E], keys [B, H or G, S, E] (after rotary embeddings and the like), mask
    and scale as the model handed them to PyTorch's attention.
    """

    def __init__(self, weights: Tensor | None = None, call: Mapping[str, Any] | None = None) -> None:
        self._weights, self._call = weights, call

    def rows(self, context: int, destinations: Tensor | None = None) -> Tensor:
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

    def full(self) -> Tensor:
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

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
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
