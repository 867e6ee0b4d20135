"""What the operations of some rows do at one site: codes in, changed vectors out.

Shapes: N touched positions, D width, K operations.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from saelab.autoencoders.token_norm import sizes
from saelab.base.codes import SparseCodes
from saelab.base.errors import ConfigError
from saelab.models.hooks import plus
from saelab.steering.operations import SETTERS, Operation
from saelab.steering.scope import Scope
from saelab.steering.units import mean_activation, unit_figure


class Part:
    """One operation made ready: its direction, and its value in activations of the latent."""

    def __init__(self, operation: Operation, row: int) -> None:
        self.operation = operation
        self.row = row  # of the receipt
        self.scope = operation.scope or Scope()
        self.key = (id(operation.source), operation.latent)
        self.strength = 0.0 if operation.strength is None else operation.strength
        self.figure, self.is_length = unit_figure(operation)
        self.mean = mean_activation(operation) if operation.to == "mean" else 0.0
        self.value = float(self.live_value(operation.direction).detach())  # as it is when the context opens

    @property
    def sae(self) -> Any:
        """The autoencoder whose codes it reads; None where it needs none."""
        needs = self.operation.latent is not None and self.operation.kind not in ("add", "project_out")
        return self.operation.source if needs else None

    def live_value(self, direction_D: Float[Tensor, "D"]) -> Float[Tensor, ""]:
        """The value in activations of the latent, a number in float64 with the gradient of strength and direction."""
        if self.operation.kind == "ablate":
            return torch.tensor(self.mean, dtype=torch.float64)
        size = self.figure / direction_D.double().norm() if self.is_length else self.figure
        return torch.as_tensor(self.strength, dtype=torch.float64) * size

    def coefficient(
        self, h_ND: Float[Tensor, "N D"], direction_D: Float[Tensor, "D"], codes_N: Float[Tensor, "N"] | None
    ) -> Float[Tensor, "N"]:
        """How much of the direction is added to each vector, in the precision that the activation is read in."""
        kind = self.operation.kind
        value = self.live_value(direction_D).to(h_ND.device)
        how = self.operation.normalised
        size_N = None if how is None else sizes(h_ND, how)[:, 0]  # what a code is worth in each vector, 1 elsewhere
        if size_N is not None and self.operation.unit != "residual_norm" and kind != "scale":
            value = value * size_N
        if kind == "add":
            return value.to(h_ND).expand(len(h_ND))
        present = coordinate(h_ND, direction_D) if codes_N is None else codes_N
        if kind == "project_out":
            return -present
        if size_N is not None:
            present = present * size_N
        if kind == "scale":
            return (value - 1) * present
        change = value - present
        return change.clamp(max=0) if kind == "cap" else change


@dataclass
class Touched:
    """What a program did to N vectors: `before` and `after` [N, D], and per part its mask and its own change's share.

    `relative` holds |change| / |h| where the part acts, `changed` where its change is not zero; one [N] tensor a part.
    """

    before: Tensor
    after: Tensor
    masks: list[Tensor]
    changed: list[Tensor]
    relative: list[Tensor]


class Program:
    """The operations of one or more rows at one site; `rows` are their numbers in the batch, None for all."""

    def __init__(self, parts: Sequence[Part], rows: Int[Tensor, "..."] | None = None) -> None:
        self.parts = list(parts)
        self.rows = rows
        _refuse_open_disagreement(self.parts)

    def run(
        self, h_ND: Float[Tensor, "N D"], masks: list[Bool[Tensor, "N"]], codes: list[Float[Tensor, "N"] | None]
    ) -> Touched:
        """Change the vectors h; part k acts where `masks[k]` [N] and reads `codes[k]` [N]."""
        exact = h_ND.to(torch.promote_types(h_ND.dtype, torch.float32))
        directions = [part.operation.live_direction.to(exact) for part in self.parts]
        coefficients = self._coefficients(exact, directions, masks, codes)
        counted = self._once(masks, coefficients)
        norm = torch.linalg.vector_norm(exact.detach(), dim=1)
        total = torch.zeros_like(exact)
        changed, relative = [], []
        for direction, mask, once, coefficient in zip(directions, masks, counted, coefficients, strict=True):
            total = total + torch.where(once, coefficient, 0.0)[:, None] * direction
            size = coefficient.detach().abs()
            changed.append(mask & (size != 0))
            share = size * torch.linalg.vector_norm(direction.detach()) / norm
            relative.append(torch.where(mask & (size != 0), share, 0.0))
        return Touched(h_ND, plus(h_ND, total), masks, changed, relative)

    def _coefficients(
        self, h_ND: Tensor, directions: list[Tensor], masks: list[Tensor], codes: list[Tensor | None]
    ) -> list[Tensor]:
        each = zip(self.parts, directions, codes, strict=True)
        found = [part.coefficient(h_ND, direction, code).to(h_ND.dtype) for part, direction, code in each]
        projections = [k for k, part in enumerate(self.parts) if part.operation.kind == "project_out"]
        if len(projections) > 1:
            directions_KD = torch.stack([directions[k] for k in projections])
            masks_NK = torch.stack([masks[k] for k in projections], 1)
            joint = _span_coefficients(h_ND, directions_KD, masks_NK)
            for i, k in enumerate(projections):
                found[k] = -joint[:, i].to(h_ND.dtype)
        return found

    def _once(self, masks: list[Tensor], coefficients: list[Tensor]) -> list[Tensor]:
        """The masks, without what another part has already set: two clamps that agree act once.

        Raises `ConfigError` where two parts set one latent to different values.
        """
        counted = list(masks)
        for k, part in enumerate(self.parts):
            for earlier in range(k):
                if not _both_set(part, self.parts[earlier]):
                    continue
                shared = masks[k] & masks[earlier]
                if not torch.equal(coefficients[k][shared], coefficients[earlier][shared]):
                    raise _disagreement(self.parts[earlier], part)
                counted[k] = counted[k] & ~masks[earlier]
        return counted


def coordinate(h_ND: Float[Tensor, "N D"], direction_D: Float[Tensor, "D"]) -> Float[Tensor, "N"]:
    """<h, d> / <d, d> [N]."""
    d = direction_D.to(h_ND)
    return (h_ND @ d) / (d @ d)


def latent_codes(codes: SparseCodes, latent: int) -> Float[Tensor, "N"]:
    """The codes [N] of one latent out of `SparseCodes` of N rows."""
    chosen = codes.indices == latent
    found = codes.values.new_zeros(len(codes))
    return found.index_put((codes.rows()[chosen],), codes.values[chosen])


def _span_coefficients(h_ND: Tensor, directions_KD: Tensor, masks_NK: Tensor) -> Tensor:
    """Coefficients [N, K] of the projection of each h onto the span of the directions that act on it (least squares)."""
    d_KD, h_ND = directions_KD.double(), h_ND.double()
    gram_NKK = (d_KD @ d_KD.T) * (masks_NK[:, :, None] & masks_NK[:, None, :])
    inner_NK = (h_ND @ d_KD.T) * masks_NK
    return (torch.linalg.pinv(gram_NKK, hermitian=True) @ inner_NK[:, :, None]).squeeze(2)


def _both_set(one: Part, other: Part) -> bool:
    return one.key == other.key and one.operation.kind in SETTERS and other.operation.kind in SETTERS


def _refuse_open_disagreement(parts: Sequence[Part]) -> None:
    """What can be seen before anything runs: one latent, one scope, two values."""
    for k, part in enumerate(parts):
        for other in parts[:k]:
            fixed = "cap" not in (part.operation.kind, other.operation.kind)
            if _both_set(part, other) and fixed and part.scope == other.scope and part.value != other.value:
                raise _disagreement(other, part)


def _disagreement(one: Part, other: Part) -> ConfigError:
    return ConfigError(
        f"{one.operation!r} and {other.operation!r} set {one.operation.name} to different values ({one.value:g} and "
        f"{other.value:g}) at the same positions: keep one, or part their scopes"
    )
