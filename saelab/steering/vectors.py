"""Directions: a vector at a site, with the figures that give its strengths a unit."""

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from saelab.base import checks
from saelab.base.errors import ConfigError


@dataclass(frozen=True, eq=False)
class Direction:
    """A vector at a site; made by `steering.difference`, or by hand from any vector.

    Args:
        vector: [width], any length but zero. A copy is kept; but of one that requires a gradient the tensor itself, so
            that it can be learned.
        site: where it acts.
        name: for tables.
        residual_norm: median norm of the activations at the site, for the unit "residual_norm".
        std: standard deviation of the activations along the vector, in the activations' own units.
        mean: mean coordinate of the activations along the vector, for `ablate(to="mean")`.

    The *coordinate* of h along the vector d is <h, d> / <d, d>: what stands in front of d. Raises `ConfigError` for a
    vector that is not finite, is zero or has another shape.

    >>> Direction(torch.tensor([3.0, 4.0]), site="blocks.3.hook_resid_post", name="warm")
    Direction(warm, width 2, norm 5, blocks.3.hook_resid_post)
    """

    vector: Tensor
    site: str | None = None
    name: str = "direction"
    residual_norm: float | None = None
    std: float | None = None
    mean: float | None = None

    def __post_init__(self) -> None:
        try:
            vector = torch.as_tensor(self.vector)
        except (TypeError, ValueError, RuntimeError):
            checks.autoencoder("what steers", self.vector)  # neither that nor a vector
            raise
        if not vector.requires_grad:
            vector = vector.clone()
        if vector.ndim != 1 or not vector.is_floating_point():
            raise ConfigError(f"a direction is one vector of floating-point numbers, not {vector.dtype} "
                              f"{list(vector.shape)}: give one operation a direction")  # fmt: skip
        check_direction(vector, self.name)
        object.__setattr__(self, "vector", vector)

    def __repr__(self) -> str:
        at = f", {self.site}" if self.site else ""
        return f"Direction({self.name}, width {len(self.vector)}, norm {float(self.vector.detach().norm()):.4g}{at})"

    def to_dict(self) -> dict[str, Any]:
        """As plain values; `from_dict` gives the same bits back."""
        return {
            "name": self.name,
            "vector": self.vector.tolist(),
            "dtype": str(self.vector.dtype).removeprefix("torch."),
            "site": self.site,
            "residual_norm": self.residual_norm,
            "std": self.std,
            "mean": self.mean,
        }

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "Direction":
        """The direction that `to_dict` described.

        >>> Direction.from_dict(Direction(torch.ones(2, dtype=torch.float64)).to_dict())
        Direction(direction, width 2, norm 1.414)
        """
        values = dict(values)
        dtype = getattr(torch, values.pop("dtype"))
        return cls(**{**values, "vector": torch.tensor(values["vector"], dtype=dtype)})


def check_direction(vector: Float[Tensor, "..."], name: str) -> None:
    """Raise `ConfigError` for a direction that is not finite, or zero."""
    vector = vector.detach()
    bad = int((~torch.isfinite(vector)).sum())
    if bad:
        raise ConfigError(f"{name}: {bad} of {vector.numel()} entries are NaN or infinite: it is no direction")
    if not bool(vector.any()):
        raise ConfigError(f"{name}: all {vector.numel()} entries are zero: there is no direction to steer along")


def is_sae(source: Any) -> bool:
    """Whether a source of directions is an autoencoder (by what it has, so that foreign ones do too)."""
    return hasattr(source, "encode_sparse") and hasattr(source, "W_dec")
