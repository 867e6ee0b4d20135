"""A run of a denoiser: all that it takes to make it again, and what was read on the way.

n samples, S steps, images C x H x W, h of C x h x w, K directions of an edit.
"""

import dataclasses
import os
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from saelab.base.errors import DataError, FormatError
from saelab.base.manifests import ALL, DIGITS, FLOATS, TEXT, WHOLE, Layout, exactly, read_tensors
from saelab.base.tensors import write_tensors
from saelab.base.version import __version__

FORMAT = "saelab-trajectory-1"
_IMAGE, _STEPS, _BOTTLENECK = (FLOATS, "n C H W"), (FLOATS, "n S C H W"), (FLOATS, "n S Ch h w")
LAYOUT: Layout = {
    "start": _IMAGE, "samples": _IMAGE, "timesteps": (WHOLE, "S"), "eta": (FLOATS, "S"), "noise?": _STEPS, "residual?": _IMAGE,
    "images?": _IMAGE, "partner?": _IMAGE, "x?": (FLOATS, "n S+1 C H W"), "x0?": _STEPS, "epsilon?": _STEPS, "h?": _BOTTLENECK,
    "cond?": (ALL, "_ ..."), "edit.delta?": (FLOATS, "K S Ch h w"), "edit.strength?": (FLOATS, "K n"),
    "edit.mask?": (FLOATS, "_ h w"), "edit.active?": ((torch.bool,), "S"),
}  # fmt: skip
STRINGS = {
    "denoiser": TEXT, "site": TEXT, "method": TEXT, "batch_size": DIGITS, "seed?": DIGITS,
    "mode?": exactly("symmetric", "asymmetric"),
}  # fmt: skip
# What was read on the way, not needed to make it again: half precision on disk.
READINGS = ("x", "x0", "h", "epsilon")
# What has a row for each sample.
ROWS = ("start", "samples", "noise", "residual", "images", "partner", *READINGS)


@dataclasses.dataclass(frozen=True, eq=False)
class Injection:
    """What an edit adds to h: `strength` [K, n] times `delta` [K, S, C, h, w], summed over K, times `mask`.

    `delta` is zero outside the edit's window. With `mode` "asymmetric" only the predicted clean image sees it.
    """

    delta: Float[Tensor, "K S C h w"]
    strength: Float[Tensor, "K n"]
    mask: Float[Tensor, "rows h w"] | None  # one row for all samples, or one a sample
    mode: str
    active: Tensor  # [S]: which steps lie in the window

    def at(self, step: int, rows: slice) -> Float[Tensor, "n C h w"] | None:
        """What is added to h of these samples at a step, [rows, C, h, w]; None outside the window."""
        if not self.active[step]:
            return None
        added = torch.einsum("kn,kchw->nchw", self.strength[:, rows], self.delta[:, step])
        if self.mask is None:
            return added
        return added * (self.mask if len(self.mask) == 1 else self.mask[rows])[:, None]


@dataclasses.dataclass(frozen=True, eq=False)
class Trajectory:
    """A run of `n` samples over S steps, from x_T (`start`) to `samples`.

    `noise` [n, S, C, H, W] is what the steps added, None where eta is 0 throughout; `timesteps` [S] fall, `eta` [S] is each
    step's. Readings are None unless recorded: `x` [n, S + 1, C, H, W] with both ends, `x0` and `epsilon` [n, S, C, H, W] as
    the step used them, `h` [n, S, C, h, w] at `site` before any edit. `denoiser` is the digest of the one that ran.
    Of an inversion `images` are the real ones, `residual` what is added to the last step (edit-friendly) and `partner` the
    second x_T of EDICT. `trajectory[a:b]` are those samples; `len` is n.

    >>> import saelab
    >>> from saelab import hspace
    >>> trajectory = hspace.sample(saelab.load_denoiser("digits-unet"), n=3, steps=4, eta=1.0)
    >>> trajectory.h.shape, trajectory[1:].samples.shape
    (torch.Size([3, 4, 64, 4, 4]), torch.Size([2, 1, 8, 8]))
    """

    start: Float[Tensor, "n C H W"]
    samples: Float[Tensor, "n C H W"]
    timesteps: Int[Tensor, " S"]
    eta: Float[Tensor, " S"]
    denoiser: str
    site: str
    batch_size: int
    seed: int | None = None
    method: str = "sample"
    noise: Float[Tensor, "n S C H W"] | None = None
    x: Float[Tensor, "n S_1 C H W"] | None = None
    x0: Float[Tensor, "n S C H W"] | None = None
    h: Float[Tensor, "n S Ch h w"] | None = None
    epsilon: Float[Tensor, "n S C H W"] | None = None
    residual: Float[Tensor, "n C H W"] | None = None
    partner: Float[Tensor, "n C H W"] | None = None
    images: Float[Tensor, "n C H W"] | None = None
    cond: Tensor | None = None
    injection: Injection | None = None

    def __len__(self) -> int:
        return len(self.start)

    @property
    def steps(self) -> int:
        """How many steps the run has."""
        return len(self.timesteps)

    @property
    def recorded(self) -> tuple[str, ...]:
        """Names of the readings that are there."""
        return tuple(name for name in READINGS if getattr(self, name) is not None)

    @property
    def errors(self) -> Float[Tensor, " n"]:
        """Of an inversion: the largest difference of each reconstruction from its image. `DataError` for other runs."""
        if self.images is None:
            raise DataError(
                "these samples were drawn, not found from images: only hspace.invert has reconstruction errors"
            )
        return (self.samples.double() - self.images.double()).flatten(1).abs().amax(1)

    def __getitem__(self, rows: slice) -> "Trajectory":
        """Those samples. Made again they agree to rounding, not bitwise, where the batches they ran in were others."""
        parts = {name: value[rows] for name in ROWS if (value := getattr(self, name)) is not None}
        if self.cond is not None and len(self.cond) > 1:
            parts["cond"] = self.cond[rows]
        edit = self.injection
        if edit is not None:
            mask = edit.mask if edit.mask is None or len(edit.mask) == 1 else edit.mask[rows]
            parts["injection"] = dataclasses.replace(edit, strength=edit.strength[:, rows], mask=mask)
        return dataclasses.replace(self, **parts)

    def to(self, device: str | torch.device) -> "Trajectory":
        """A copy whose samples and readings are on another device."""
        moved = {name: value.to(device) for name in (*ROWS, "cond") if (value := getattr(self, name)) is not None}
        return dataclasses.replace(self, **moved)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write one safetensors file: what makes the run again in full, the readings in half precision where they fit.

        Raises `CheckpointError` when the disk is full or the folder cannot be written.
        """
        tensors: dict[str, Tensor | None] = {}
        for name in (*ROWS, "timesteps", "eta", "cond"):
            value = getattr(self, name)
            tensors[name] = _halved(value) if value is not None and name in READINGS else value
        strings = {"saelab": __version__, "denoiser": self.denoiser, "site": self.site,
                   "batch_size": str(self.batch_size), "method": self.method}  # fmt: skip
        if self.seed is not None:
            strings["seed"] = str(self.seed)
        if self.injection is not None:
            strings["mode"] = self.injection.mode
            for field in ("delta", "strength", "mask", "active"):
                tensors[f"edit.{field}"] = getattr(self.injection, field)
        kept = {name: value for name, value in tensors.items() if value is not None}
        write_tensors(path, kept, {"format": FORMAT, **strings})

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "Trajectory":
        """The run in a file that `save` wrote; readings come back in the precision of `start`.

        Raises `FormatError` for a file that is something else or was cut short.
        """
        tensors, strings = read_tensors(path, LAYOUT, FORMAT, STRINGS)
        whole = [name for name in ("edit.delta", "edit.strength", "edit.active") if name in tensors]
        if len(whole) not in (0, 3) or bool(whole) != ("mode" in strings) or "edit.mask" in tensors and not whole:
            raise FormatError(f"{path}: of its edit there is only {', '.join([*whole, *strings.keys() & {'mode'}])}")
        for name in ("cond", "edit.mask"):  # one row for all samples, or one a sample
            if name in tensors and len(tensors[name]) not in (1, len(tensors["start"])):
                raise FormatError(f"{path}: {name} has {len(tensors[name])} rows for {len(tensors['start'])} samples")
        edit = {name.removeprefix("edit."): tensors.pop(name) for name in list(tensors) if name.startswith("edit.")}
        readings = {name: tensors[name].to(tensors["start"].dtype) for name in READINGS if name in tensors}
        fields: dict[str, Any] = {**tensors, **readings}
        if edit:
            fields["injection"] = Injection(mask=edit.pop("mask", None), mode=strings["mode"], **edit)
        seed = int(strings["seed"]) if "seed" in strings else None
        return cls(denoiser=strings["denoiser"], site=strings["site"], batch_size=int(strings["batch_size"]),
                   method=strings["method"], seed=seed, **fields)  # fmt: skip

    def __repr__(self) -> str:
        edited = "" if self.injection is None else f", edited ({self.injection.mode})"
        recorded = ", ".join(self.recorded) or "nothing"
        return (
            f"Trajectory({len(self)} samples of {'x'.join(map(str, self.start.shape[1:]))}, {self.steps} steps by "
            f"{self.method}, eta {float(self.eta.min()):g} to {float(self.eta.max()):g}, recorded {recorded}{edited})"
        )


def _halved(x: Tensor) -> Tensor:
    half = x.half()
    return half if bool(torch.isfinite(half).all()) else x
