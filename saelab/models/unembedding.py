"""From a vector in the residual stream to the logits: the last norm, the unembedding, and what is done to its result.

    logits = g(factor * norm(x) W_U + b_U),   g(z) = scale z,  or  cap tanh(scale z / cap)  with a soft cap

No configuration is read for it: the model itself is asked, on a few tokens. Whatever it does beside this formula (another
norm, a projection, an adapter) makes a `ConfigError` that says where, and never a figure without it.

Shapes: D width of the stream, V vocabulary, N directions.
"""

import contextlib
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from saelab.base.errors import ConfigError, SiteError
from saelab.models.attention import Norm, is_norm
from saelab.models.hooks import _hooked, first_runs, interventions_silent
from saelab.models.offloading import in_memory
from saelab.models.sites import Site, flat
from saelab.models.tokens import Tokens

if TYPE_CHECKING:
    from saelab.models.language import LanguageModel

_TOKENS = 4  # of the probes
_SMALL, _LARGE, _RAMP = 2.0**-10, 2.0**14, 64.0  # logits: no cap is felt, every cap is reached, and between
_FAR = 1e5  # times the stream's size: beside it nothing counts that goes through a norm


@dataclass(frozen=True)
class Unembedding:
    """The last norm (`module`, read as `norm`), `W_U` [D, V], `b_U` [V] or None, and the numbers of the formula above."""

    module: nn.Module
    norm: Norm
    W_U: Tensor
    b_U: Tensor | None = None
    factor: float = 1.0
    scale: float = 1.0
    cap: float | None = None

    @property
    def width(self) -> int:
        return len(self.W_U)

    def logits(self, directions_ND: Float[Tensor, "N D"], gain: bool = True) -> Float[Tensor, "N V"]:
        """(directions * gain) W_U, [N, V] in at least fp32: the logits' change for a small step where none is near a cap, the
        norm's scale left out; without `gain` as if the norm's were 1."""
        rows = directions_ND.detach().to(self.W_U)
        if gain:
            rows = self.norm.scaled(rows)
        return (rows * (self.factor * self.scale)) @ self.W_U

    def change(
        self, normed_ND: Float[Tensor, "N D"], sigma_N: Float[Tensor, "N"], written_ND: Float[Tensor, "N D"]
    ) -> Float[Tensor, "N V"]:
        """[N, V]: by how much the logits change when `written` is taken off the stream that the last norm reads.

        The norm's scale `sigma` stays what it was; `normed` is what the norm gave. Exact, also for logits near a cap.
        """
        exact = self.norm.apply(written_ND.to(self.W_U), sigma_N)
        lost_NV = (exact * self.factor) @ self.W_U
        if self.cap is None:
            return -self.scale * lost_NV
        z_NV = (normed_ND.to(self.W_U) * self.factor) @ self.W_U
        if self.b_U is not None:
            z_NV = z_NV + self.b_U
        return self._g(z_NV - lost_NV) - self._g(z_NV)

    def _g(self, z: Tensor) -> Tensor:
        return z * self.scale if self.cap is None else (z * (self.scale / self.cap)).tanh() * self.cap


def unembedding(lm: "LanguageModel") -> Unembedding:
    """The unembedding of a language model, as two short forward passes show it.

    Raises `ConfigError` where the model has no last norm or unembedding matrix, and where it does something else between
    the last norm and the logits than the formula of this module; the message says what.
    """
    head, W_U, b_U = _head(lm)
    exact = torch.promote_types(W_U.dtype, torch.float32)
    module = _last_norm(lm.inner, W_U.shape[0])
    if module is None:
        raise ConfigError(f"what a latent writes to the logits of {lm.name} is not known: no norm of width {len(W_U)} "
                          "stands before its unembedding")  # fmt: skip
    norm = Norm(module, W_U.shape[0], W_U)
    W_U, b_U = W_U.detach().to(exact), None if b_U is None else b_U.detach().to(exact)
    places = {"x": (module, "input"), "y": (module, "output"), "u": (head, "input"), "z": (head, "output")}
    try:
        seen = _run(lm, lambda tokens: first_runs(places, lambda: lm.forward(tokens)))  # type: ignore[arg-type]
    except SiteError as error:
        raise ConfigError(f"the last norm of {lm.name} is not where its logits come from: {error}") from error
    x, y, u, z = (flat(seen[name]).flatten(0, 1).to(exact) for name in places)
    x, y, u, z = (rows[x.norm(dim=1) > 0] for rows in (x, y, u, z))
    _check(lm, norm.apply(x, norm.sigma(x, y)) + norm.beta, y, f"its last norm ({type(module).__name__}) is another "
           "function than gain * (x - mean) / sigma + beta")  # fmt: skip
    factor = float((u * y).sum() / (y * y).sum()) if u.shape == y.shape else 0.0
    _check(lm, factor * y, u, "its unembedding does not read what the last norm gives (a projection stands between)")
    linear = u.to(W_U) @ W_U if u.shape[-1] == len(W_U) else z.new_zeros(z.shape)
    _check(
        lm, linear if b_U is None else linear + b_U, z, "its unembedding is more than its weight and bias (an adapter?)"
    )
    return Unembedding(
        module, norm, W_U, b_U, 1.0 if abs(factor - 1) < _tolerance(lm.dtype) else factor, *_bound(lm, head, z)
    )


def _bound(lm: "LanguageModel", head: nn.Module, z: Tensor) -> tuple[float, float | None]:
    """(scale, cap) of g, by what the model makes of chosen results of its unembedding."""
    ramp = torch.linspace(-_RAMP, _RAMP, z.shape[-1], device=z.device)
    chosen = torch.stack([torch.full_like(ramp, _SMALL), torch.full_like(ramp, _LARGE), ramp, -ramp]).to(torch.float32)
    me = threading.get_ident()

    def replace() -> Iterator[Any]:  # in fp32 whatever the model's precision, so that its scale is seen exactly
        yield head.register_forward_hook(lambda *_: chosen[None] if threading.get_ident() == me else None)

    with _hooked(replace):
        made = _run(lm, lm.forward)[0].to(chosen)
    scale, high = float(made[0, 0]) / _SMALL, float(made[1, 0])
    bounded = not abs(high - scale * _LARGE) < 0.01 * abs(scale) * _LARGE
    scale = scale if bounded or not scale else high / _LARGE  # the larger number says it more exactly
    found = Unembedding(head, None, z, None, 1.0, scale, high if bounded else None)  # type: ignore[arg-type]
    _check(lm, found._g(chosen), made, "what it does to the logits after the unembedding is no scale and no soft cap")
    return scale, found.cap


def written_share(
    lm: "LanguageModel",
    site: Site,
    norm: nn.Module,
    written: Callable[[Float[Tensor, "n width"]], Float[Tensor, "n width"]] = lambda v: v,
) -> float | None:
    """The multiple of `written(v)` that a vector v at the site adds to the stream before the last `norm`; None for no one.

    A vector so long is added that whatever passes a norm is nothing beside it, so that blocks of any build are measured
    alike: 1 in most models, the residual multiplier of others, None where a norm stands between site and stream.
    """
    place = {"x": (norm, "input")}

    def last(tokens: Tokens) -> Tensor:
        return flat(first_runs(place, lambda: lm.forward(tokens))["x"])[0, -1].double()  # type: ignore[arg-type]

    before = _run(lm, last)
    v = torch.randn(site.width, generator=torch.Generator().manual_seed(0)).to(before.device)
    step = _FAR * float(before.abs().max())
    if lm.dtype == torch.float16:
        step = min(step, 2.0**14 / float(v.abs().max()))

    def add(x: Tensor, where: Any) -> Tensor:
        x = x.clone()
        x[:, -1] += (step * v).to(x)
        return x

    with lm.intervene(site, add):
        moved = (_run(lm, last, silent=False) - before) / step
    wanted = written(v[None].float())[0].double()
    if moved.shape != wanted.shape or not moved.isfinite().all():
        return None
    share = float(moved @ wanted / (wanted @ wanted))
    if float((moved - share * wanted).abs().max()) > 0.05 * abs(share) * float(wanted.abs().max()):
        return None
    return 1.0 if abs(share - 1) < 0.01 else share or None


def _run(lm: "LanguageModel", forward: Callable[[Tokens], Any], silent: bool = True) -> Any:
    """`forward` of a few ordinary tokens; `silent`: no intervention of the user's acts on them."""
    length = min(_TOKENS, lm.max_context or _TOKENS)
    ordinary = [token for token in range(lm.d_vocab) if token not in lm.special_ids][:length]
    ids = torch.tensor([ordinary], device=lm.device)
    with torch.no_grad(), interventions_silent() if silent else contextlib.nullcontext():
        return forward(Tokens(ids, torch.ones_like(ids, dtype=torch.bool)))


def _tolerance(dtype: torch.dtype) -> float:
    return max(1e-4, 8 * torch.finfo(dtype).eps)


def _check(lm: "LanguageModel", by_formula: Tensor, seen: Tensor, what: str) -> None:
    """`ConfigError` that says `what` where the formula does not give what the model does."""
    size = float(seen.abs().max())
    gap = float((by_formula - seen).abs().max()) if by_formula.shape == seen.shape else float("inf")
    if not gap <= _tolerance(lm.dtype) * size:
        raise ConfigError(f"what a latent writes to the logits of {lm.name} is not known: {what}")


def _head(lm: "LanguageModel") -> tuple[nn.Module, Tensor, Tensor | None]:
    """The module that makes logits, its weight as [D, V], and its bias."""
    found: Any = getattr(lm.inner, "get_output_embeddings", lambda: None)()
    if isinstance(getattr(found, "weight", None), Tensor):
        with in_memory(found):
            return found, found.weight.detach().T, getattr(found, "bias", None)
    found = getattr(lm.model, "unembed", None)  # of TransformerLens
    if not isinstance(getattr(found, "W_U", None), Tensor):
        raise ConfigError(f"{lm.name} has no unembedding matrix: what a latent writes to the logits is unknown here")
    return found, found.W_U, getattr(found, "b_U", None)


def _last_norm(runner: nn.Module, width: int) -> nn.Module | None:
    """The last norm of the stream's width outside the blocks; TransformerLens says which."""
    if isinstance(getattr(runner, "ln_final", None), nn.Module):
        return runner.ln_final  # type: ignore[return-value]
    blocks = {id(module) for parent in runner.modules() if isinstance(parent, nn.ModuleList)
              for module in parent.modules()}  # fmt: skip
    norms = [module for module in runner.modules() if id(module) not in blocks and is_norm(module, width)]
    return norms[-1] if norms else None
