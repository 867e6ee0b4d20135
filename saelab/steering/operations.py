"""Operations: what is done to an activation along a direction.

With d the direction (a latent's decoder row, or any vector), a its activation (the latent's code, or the coordinate
<h, d> / <d, d>), s the strength and u the size of its unit (`steering.unit_size`):

    add          h + s·u·d
    clamp        h + (s·u - a)·d
    cap          h + min(0, s·u - a)·d
    scale        h + (s - 1)·a·d
    ablate       clamp to 0, or to the mean activation
    project_out  h without its component along d; several remove the space that they span

An autoencoder of vectors that are normalised one by one (`saelab.autoencoders.token_norm`) has codes of those: a·d, and s·u·d
but in the unit "residual_norm", are then times the size of the vector that is steered.

The activation is changed, not replaced: what the autoencoder does not explain stays. All operations of one `lm.steer`
at one site read the same unsteered vector, and their changes add up. Where the change is zero h keeps its very bits.

Derivatives are those of these formulas, with respect to h, the latents, the decoder and encoder of the source, a vector
or `Direction` that requires a gradient, and a strength that is a tensor.
"""

import math
from dataclasses import dataclass
from typing import Any

from jaxtyping import Float, Shaped
from torch import Tensor

from saelab.base import checks
from saelab.base.errors import ConfigError
from saelab.steering.scope import Scope
from saelab.steering.units import UNITS
from saelab.steering.vectors import Direction, check_direction, is_sae

KINDS = ("add", "clamp", "scale", "ablate", "project_out", "cap")
WITH_UNIT = ("add", "clamp", "cap")
WITH_STRENGTH = (*WITH_UNIT, "scale")
SETTERS = ("clamp", "ablate", "cap")  # say what a latent's activation is to be


@dataclass(frozen=True, eq=False)
class Operation:
    """One change along one direction; made by `steering.add` and its siblings, given to `lm.steer`.

    `unit` is never None for add, clamp and cap once made: "max_activation" for latents and "residual_norm" for plain
    vectors unless another was asked for. The strength of scale is a factor; ablate and project_out have none.
    Raises `ConfigError` for what cannot work: see `add`.
    """

    kind: str
    source: Any
    latent: int | None = None
    strength: float | Tensor | None = None
    unit: str | None = None
    site: str | None = None
    scope: Scope | None = None  # the default one once made
    to: str = "zero"

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ConfigError(f"unknown operation {self.kind!r}: choose one of {', '.join(KINDS)}")
        if not is_sae(self.source) and not isinstance(self.source, Direction):
            object.__setattr__(self, "source", Direction(self.source, self.site))
        object.__setattr__(self, "scope", self.scope or Scope())
        _check_source(self)
        _check_strength(self)
        if self.to not in ("zero", "mean"):
            raise ConfigError(f"ablate goes to 'zero' or to 'mean', not {self.to!r}")
        if self.unit is None and self.kind in WITH_UNIT:
            object.__setattr__(self, "unit", "residual_norm" if self.latent is None else "max_activation")

    @property
    def name(self) -> str:
        """Of the direction: "latent 123", or the name that it was given."""
        return self.source.name if self.latent is None else f"latent {self.latent}"

    @property
    def live_direction(self) -> Float[Tensor, "width"]:
        """The vector d [width] as it is now, with its gradient where the source asks for one."""
        row: Tensor = self.source.vector if self.latent is None else self.source.W_dec[self.latent]
        return row

    @property
    def direction(self) -> Float[Tensor, "width"]:
        """The vector d [width], a detached copy."""
        return self.live_direction.detach().clone()

    @property
    def normalised(self) -> str | None:
        """How the autoencoder's vectors are normalised one by one, where its codes are of those; None for all others."""
        cfg = None if self.latent is None else getattr(self.source, "cfg", None)
        return cfg.input_scale if cfg is not None and cfg.per_token else None

    @property
    def amount(self) -> float | None:
        """The strength as a plain number, also where it is a tensor that is learned."""
        return float(self.strength.detach()) if isinstance(self.strength, Tensor) else self.strength

    @property
    def place(self) -> str:
        """The site where it acts; `ConfigError` when nothing says which."""
        known = self.source.site if self.latent is None else self.source.metadata.get("site")
        if not (self.site or known):
            raise ConfigError(f"{self!r} does not say at which site it acts, nor does its source: give site=")
        return str(self.site or known)

    def to_dict(self) -> dict[str, Any]:
        """As plain values; an autoencoder is named by its folder, a plain vector is written out."""
        source = self.source.to_dict() if self.latent is None else {"sae": str(getattr(self.source, "path", None))}
        return {
            "kind": self.kind,
            "source": source,
            "latent": self.latent,
            "strength": self.amount,
            "unit": self.unit,
            "site": self.place,
            "scope": self.scope.to_dict() if self.scope else {},
            "to": self.to,
        }

    def __repr__(self) -> str:
        strength = "" if self.amount is None else f", {self.amount:g}" + (f" {self.unit}" if self.unit else "")
        to = ", to mean" if self.to == "mean" else ""
        scope = f", {self.scope!r}" if self.scope != Scope() else ""
        return f"{self.kind}({self.name}{strength}{to}{scope})"


def add(
    source: Any,
    latent: int | None = None,
    *,
    strength: float | Shaped[Tensor, "..."] | None = None,
    unit: str | None = None,
    site: str | None = None,
    scope: Scope | None = None,
) -> Operation:
    """h + strength·unit·d: push along a direction.

    Args:
        source: an autoencoder (with `latent`), a `Direction` or any vector [width].
        latent: the number of the latent whose decoder row is d.
        strength: how far, in units; 0 changes nothing, negative pushes the other way. A tensor [] may be learned.
        unit: "max_activation" (the latent's largest activation on its corpus; the default for latents), "activation"
            (1), "residual_norm" (the median norm of the activations at the site, along d at length 1; the default for
            plain vectors) or "std" (the standard deviation of the activations along d).
        site: where; by default the site that the source was made at.
        scope: which positions; by default every ordinary token but the first of the context.

    Raises `ConfigError` for an unknown latent, one that never fired, a direction that is zero or not finite, and a
    figure of the unit that is missing.

    >>> import torch
    >>> add(torch.ones(8), strength=0.2, site="blocks.3.hook_resid_post")
    add(direction, 0.2 residual_norm)
    """
    return Operation("add", source, latent, strength, unit, site, scope)


def clamp(
    source: Any,
    latent: int | None = None,
    *,
    strength: float | Shaped[Tensor, "..."] | None = None,
    unit: str | None = None,
    site: str | None = None,
    scope: Scope | None = None,
) -> Operation:
    """h + (strength·unit - a)·d: hold a latent's activation (a plain vector's coordinate) at a value. See `add`.

    Operations of one `lm.steer` that set one latent to different values at one position are a `ConfigError`.
    """
    return Operation("clamp", source, latent, strength, unit, site, scope)


def cap(
    source: Any,
    latent: int | None = None,
    *,
    strength: float | Shaped[Tensor, "..."] | None = None,
    unit: str | None = None,
    site: str | None = None,
    scope: Scope | None = None,
) -> Operation:
    """h + min(0, strength·unit - a)·d: let an activation not rise above a value; infinity changes nothing. See `add`."""
    return Operation("cap", source, latent, strength, unit, site, scope)


def scale(
    source: Any,
    latent: int | None = None,
    *,
    strength: float | Shaped[Tensor, "..."] | None = None,
    unit: str | None = None,
    site: str | None = None,
    scope: Scope | None = None,
) -> Operation:
    """h + (strength - 1)·a·d: multiply an activation; 1 changes nothing, 0 ablates. It has no unit. See `add`."""
    return Operation("scale", source, latent, strength, unit, site, scope)


def ablate(
    source: Any,
    latent: int | None = None,
    *,
    to: str = "zero",
    strength: float | Shaped[Tensor, "..."] | None = None,
    unit: str | None = None,
    site: str | None = None,
    scope: Scope | None = None,
) -> Operation:
    """Clamp an activation to 0, or with `to="mean"` to its mean over all tokens of its corpus (silent ones count 0).

    It has neither strength nor unit. See `add`.
    """
    return Operation("ablate", source, latent, strength, unit, site, scope, to)


def project_out(
    source: Any,
    latent: int | None = None,
    *,
    strength: float | Shaped[Tensor, "..."] | None = None,
    unit: str | None = None,
    site: str | None = None,
    scope: Scope | None = None,
) -> Operation:
    """h - (<h, d> / <d, d>)·d: remove the component along d; several in one `lm.steer` remove the space they span.

    It has neither strength nor unit. See `add`.
    """
    return Operation("project_out", source, latent, strength, unit, site, scope)


def _check_source(operation: Operation) -> None:
    source, latent = operation.source, operation.latent
    if isinstance(source, Direction):
        if latent is not None:
            raise ConfigError(f"latent={latent} goes with an autoencoder, not with {source!r}")
        return
    d_sae = source.W_dec.shape[0]
    if latent is None:
        raise ConfigError(f"which of the {d_sae:,} latents of the autoencoder? Give latent=")
    latent = checks.count("latent", latent, least=0, most=d_sae - 1, of="the autoencoder's latents")
    object.__setattr__(operation, "latent", latent)
    target = source.metadata.get("target_site")
    if target not in (None, source.metadata.get("site")):
        raise ConfigError(f"this autoencoder reads at {source.metadata.get('site')!r} and writes at {target!r}: steer along "
                          f"its decoder row as a plain vector, Direction(sae.W_dec[{latent}], site={target!r})")  # fmt: skip
    check_direction(source.W_dec[latent], f"the decoder row of latent {latent}")
    state: Any = getattr(source, "state", None)
    seen = int(state.stat_tokens) if state is not None else 0
    if seen and not int(state.fires[latent]):
        raise ConfigError(f"latent {latent} fired on none of the {seen:,} tokens of its statistics: it is dead, or too "
                          "rare to have a size; choose another (lm.top_latents, steering.find)")  # fmt: skip


def _check_strength(operation: Operation) -> None:
    kind, unit = operation.kind, operation.unit
    if isinstance(operation.strength, Tensor) and operation.strength.numel() != 1:
        raise ConfigError(f"a strength is one number, not {list(operation.strength.shape)}: give one operation each")
    strength = operation.amount
    if kind in WITH_STRENGTH:
        if strength is None:
            raise ConfigError(f"{kind} needs a strength: give strength=")
        if not hasattr(strength, "__float__"):
            raise ConfigError(f"the strength of {kind} is {strength!r}: give a number")
        if math.isnan(strength) or (math.isinf(strength) and not (kind == "cap" and strength > 0)):
            raise ConfigError(f"the strength of {kind} is {strength}: give a finite number")
    elif strength is not None:
        raise ConfigError(f"{kind} has no strength (strength={strength}): leave it out, or take scale or clamp")
    if unit is not None and kind not in WITH_UNIT:
        raise ConfigError(f"{kind} has no unit (unit={unit!r}): leave it out")
    if unit is not None and unit not in UNITS:
        raise ConfigError(f"unknown unit {unit!r}: choose one of {', '.join(UNITS)}")
