"""Directions in h-space: unit vectors per timestep with a scale, projection, files.

Shapes: K directions, S steps (1 where one vector serves at every timestep), C channels, h x w places of the bottleneck.
"""

import dataclasses
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, overload

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor

from saelab.base.errors import ConfigError, FormatError
from saelab.base.manifests import ALL, FLOATS, TEXT, WHOLE, Layout, parse_json, read_tensors
from saelab.base.tensors import write_tensors
from saelab.base.version import __version__

if TYPE_CHECKING:
    from pandas import DataFrame

    from saelab.models.denoiser import Denoiser

FORMAT = "saelab-directions-1"
_DETAIL = "detail."
LAYOUT: Layout = {
    "vectors": (FLOATS, "K S C h w"), "scales": (FLOATS, "K S"), "timesteps?": (WHOLE, "S"), "explained?": (FLOATS, "K _"),
    f"{_DETAIL}*": (ALL, "K ..."),
}  # fmt: skip
STRINGS = dict.fromkeys(("denoiser", "site", "method", "names"), TEXT)


@dataclasses.dataclass(frozen=True, eq=False)
class Direction:
    """One direction: `scale * vector` is what an edit of strength 1 adds to h.

    `vector` [S, C, h, w] is of unit length at each step, `scale` [S] its size there; `timesteps` [S], descending, says at
    which, None that the one vector serves everywhere. `site` and `denoiser` (a digest) say what it was made from; an edit
    of another denoiser is refused.

    >>> one = Direction(torch.full((1, 4, 1, 1), 0.5), torch.tensor([3.0]), None, "mid_block", "abc")
    >>> one.delta(torch.tensor([900, 100])).norm(dim=1).flatten()
    tensor([3., 3.])
    """

    vector: Float[Tensor, "S C h w"]
    scale: Float[Tensor, " S"]
    timesteps: Int[Tensor, " S"] | None
    site: str
    denoiser: str
    name: str = "direction"
    details: Mapping[str, Tensor] = dataclasses.field(default_factory=dict)

    def delta(self, timesteps: Int[Tensor, " T"]) -> Float[Tensor, "T C h w"]:
        """What strength 1 adds at each of these timesteps [T]: `scale * vector` of the nearest timestep it was made at.

        Of two equally near the noisier one.
        """
        rows = nearest(self.timesteps, timesteps)
        return (self.scale[:, None, None, None] * self.vector)[rows.to(self.vector.device)]

    def check(self, denoiser: str, shape: Sequence[int]) -> None:
        """Raise `ConfigError` unless this is a direction of that denoiser and of h of that shape (C, h, w)."""
        _check_shape(self.vector, shape, self.name)
        _check_denoiser(self.denoiser, denoiser)

    def __repr__(self) -> str:
        steps = "every timestep" if self.timesteps is None else f"{len(self.timesteps)} timesteps"
        return f"Direction({self.name!r}, {list(self.vector.shape[1:])} at {steps} of {self.site})"


class Directions(Sequence[Direction]):
    """Directions made together, a sequence of `Direction`.

    `vectors` [K, S, C, h, w] (unit per step), `scales` [K, S], `timesteps` [S] or None (one vector for every timestep),
    `explained` [K, S] or [K, 1] (of a PCA: the share of the variance), `details` (tensors [K, ...] that the method reports),
    `method`, `names`, `site`, `denoiser`.

    >>> import torch
    >>> made = Directions(torch.eye(3)[:2].view(2, 1, 3, 1, 1), torch.ones(2, 1), None, "mid_block", "abc", "by hand")
    >>> len(made), made[1].name, made.project_out(made[:0])[0].scale
    (2, 'by hand 1', tensor([1.]))
    """

    def __init__(
        self,
        vectors: Float[Tensor, "K S C h w"],
        scales: Float[Tensor, "K S"],
        timesteps: Int[Tensor, " S"] | None,
        site: str,
        denoiser: str,
        method: str,
        *,
        explained: Float[Tensor, "..."] | None = None,
        details: Mapping[str, Shaped[Tensor, "..."]] | None = None,
        names: Sequence[str] | None = None,
    ) -> None:
        self.vectors, self.scales, self.timesteps = vectors, scales, timesteps
        self.site, self.denoiser, self.method = site, denoiser, method
        self.explained, self.details = explained, dict(details or {})
        self.names = tuple(names if names is not None else (f"{method} {i}" for i in range(len(vectors))))

    def __len__(self) -> int:
        return len(self.vectors)

    @overload
    def __getitem__(self, index: int) -> Direction: ...
    @overload
    def __getitem__(self, index: slice) -> "Directions": ...
    def __getitem__(self, index: int | slice) -> "Direction | Directions":
        details = {name: value[index] for name, value in self.details.items()}
        if isinstance(index, slice):
            explained = None if self.explained is None else self.explained[index]
            return self._like(self.vectors[index], self.scales[index], explained, details, self.names[index])
        if not -len(self) <= index < len(self):
            raise IndexError(f"there is no direction {index}: there are {len(self)}")
        return Direction(
            self.vectors[index],
            self.scales[index],
            self.timesteps,
            self.site,
            self.denoiser,
            self.names[index],
            details,
        )

    def __iter__(self) -> Iterator[Direction]:
        return (self[i] for i in range(len(self)))

    def project_out(self, others: "Direction | Sequence[Direction]") -> "Directions":
        """These directions with the span of `others` taken out: [I - V (V^T V)^-1 V^T] v (Haas et al. 2024, eq. 12).

        One projector over all steps together: v and the columns of V are scale * vector, flattened over steps and places. What
        is left is not brought back to the old length (nor in our notes of the paper): `scales` shrink.

        Raises `ConfigError` when the others are of another denoiser or shape, or nothing is left of a direction.
        """
        others = [others] if isinstance(others, Direction) else list(others)
        for other in others:
            other.check(self.denoiser, self.vectors.shape[2:])
        grids = [some for some in (self.timesteps, *(other.timesteps for other in others)) if some is not None]
        grid = max(grids, key=len) if grids else None
        places = torch.zeros(1, dtype=torch.long) if grid is None else grid
        own_KD = torch.stack([direction.delta(places) for direction in self]).double().flatten(1)
        if others:
            span_DV = torch.stack([other.delta(places) for other in others]).double().flatten(1).T
            U, S, _ = torch.linalg.svd(span_DV, full_matrices=False)
            U = U[:, 1e-10 * S[0] < S]  # what does not count: others that depend on each other
            left_KD = own_KD - (own_KD @ U) @ U.T
        else:
            left_KD = own_KD
        for name, before, after in zip(self.names, own_KD.norm(dim=1), left_KD.norm(dim=1), strict=True):
            if after <= 1e-6 * before:
                raise ConfigError(f"{name!r} lies in the span of the {len(others)} directions to project out: none of it "
                                  "would be left; leave out the one that it depends on")  # fmt: skip
        left = left_KD.view(len(self), len(places), *self.vectors.shape[2:])
        names = [
            f"{name} without {', '.join(other.name for other in others)}" if others else name for name in self.names
        ]
        vectors, scales = unit(left)
        made = self._like(vectors.to(self.vectors), scales.to(self.scales), None, {}, names)
        made.timesteps = grid
        return made

    def check(self, denoiser: str, shape: Sequence[int]) -> None:
        """Raise `ConfigError` unless these are directions of that denoiser and of h of that shape (C, h, w)."""
        _check_shape(self.vectors, shape, self.method)
        _check_denoiser(self.denoiser, denoiser)

    def to_pandas(self) -> "DataFrame":
        """A row a direction: name, mean scale, explained (mean over steps) and the means of what the method reports."""
        import pandas

        rows = []
        for i, name in enumerate(self.names):
            row: dict[str, Any] = {"name": name, "scale": float(self.scales[i].mean())}
            if self.explained is not None:
                row["explained"] = float(self.explained[i].mean())
            row |= {name: float(value[i].double().mean()) for name, value in self.details.items()}
            rows.append(row)
        return pandas.DataFrame(rows)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write one safetensors file, with the denoiser's digest, site and method in its header."""
        tensors = {
            "vectors": self.vectors,
            "scales": self.scales,
            "timesteps": self.timesteps,
            "explained": self.explained,
        }
        header = {
            "format": FORMAT,
            "saelab": __version__,
            "denoiser": self.denoiser,
            "site": self.site,
            "method": self.method,
            "names": json.dumps(self.names),
        }
        tensors |= {_DETAIL + name: value for name, value in self.details.items()}
        write_tensors(path, {name: value for name, value in tensors.items() if value is not None}, header)

    @classmethod
    def load(cls, path: str | os.PathLike[str], denoiser: "Denoiser | None" = None) -> "Directions":
        """The directions that `save` wrote. Raises `FormatError` for another file; with a `saelab.Denoiser`, `ConfigError` when
        they are not of it, or h has another shape."""
        tensors, header = read_tensors(path, LAYOUT, FORMAT, STRINGS)
        names = parse_json(header["names"], [TEXT], f"the names in the header of {path}")
        if len(names) != len(tensors["vectors"]):
            raise FormatError(f"{path} has {len(names)} names for {len(tensors['vectors'])} directions")
        made = cls(
            tensors["vectors"],
            tensors["scales"],
            tensors.get("timesteps"),
            header["site"],
            header["denoiser"],
            header["method"],
            explained=tensors.get("explained"),
            details={name[len(_DETAIL) :]: value for name, value in tensors.items() if name.startswith(_DETAIL)},
            names=names,
        )
        if denoiser is not None:
            own = made.denoiser if denoiser.made(made.denoiser) else denoiser.digest
            made.check(own, denoiser.site_shape(made.site))
        return made

    def _like(
        self,
        vectors: Tensor,
        scales: Tensor,
        explained: Tensor | None,
        details: dict[str, Tensor],
        names: Sequence[str],
    ) -> "Directions":
        return Directions(vectors, scales, self.timesteps, self.site, self.denoiser, self.method,
                          explained=explained, details=details, names=names)  # fmt: skip

    def __repr__(self) -> str:
        steps = "every timestep" if self.timesteps is None else f"{len(self.timesteps)} timesteps"
        return f"Directions({len(self)} by {self.method}, {list(self.vectors.shape[2:])} at {steps} of {self.site})"


def nearest(made: Int[Tensor, " S"] | None, asked: Int[Tensor, " T"]) -> Int[Tensor, " T"]:
    """For each timestep asked for [T] the index of the nearest one that there is; 0 where one vector serves everywhere.

    >>> nearest(torch.tensor([900, 500, 100]), torch.tensor([980, 700, 0]))
    tensor([0, 0, 2])
    """
    if made is None:
        return torch.zeros(len(asked), dtype=torch.long)
    return (asked[:, None].cpu() - made[None].cpu()).abs().min(dim=1).indices


def unit(raw: Float[Tensor, "*some C h w"]) -> tuple[Float[Tensor, "*some C h w"], Float[Tensor, "*some"]]:
    """Vectors [..., C, h, w] as (unit vectors, lengths [...]); what has no length stays zero."""
    lengths = torch.linalg.vector_norm(raw, dim=(-3, -2, -1), keepdim=True)
    return raw / lengths.clamp(min=torch.finfo(raw.dtype).tiny), lengths[..., 0, 0, 0]


def _check_shape(vectors: Tensor, shape: Sequence[int], name: str) -> None:
    if tuple(vectors.shape[-3:]) != tuple(shape):
        raise ConfigError(f"{name!r} has vectors of shape {list(vectors.shape[-3:])} and h is {list(shape)} here: "
                          "make directions from a trajectory of this denoiser, at this site")  # fmt: skip


def _check_denoiser(mine: str, digest: str) -> None:
    if mine != digest:
        raise ConfigError(f"this direction was made from another denoiser (digest {mine[:12]}, here {digest[:12]}): a "
                          "direction means nothing in another network; make one from a trajectory of this one")  # fmt: skip
