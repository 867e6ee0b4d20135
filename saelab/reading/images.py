"""Images that a denoiser sees noised: what a corpus is for a denoiser, and its activations at every place as rows.

x_t = sqrt(a_t) x_0 + sqrt(1 - a_t) e, one timestep and one e for each image in an epoch. n images, R rows.
"""

import copy
import dataclasses
import hashlib
import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor

from saelab.base import checks, digests, seeds
from saelab.base.errors import ConfigError, DataError
from saelab.models.denoising import ddim, draws
from saelab.models.places import rows_of_places, width_of

if TYPE_CHECKING:
    from saelab.models.denoiser import Denoiser

HELDOUT = 0.05
DRAWN, DRAWN_STEPS = 512, 25
BATCH = 64
MOST_ROWS = 32_768  # of a forward pass


@dataclasses.dataclass(frozen=True)
class Images:
    """Clean images [n, C, H, W] and what each is conditioned on (`cond`, [n, ...]); made by `load_images`.

    About 5% are held out, which depends on the images alone and not on their order.
    """

    images: Float[Tensor, "n C H W"]
    cond: Shaped[Tensor, "n ..."] | None
    name: str

    def __len__(self) -> int:
        return len(self.images)

    @property
    def digest(self) -> str:
        """Of the images and what they are conditioned on."""
        return digests.of_tensors({"images": self.images} | ({} if self.cond is None else {"cond": self.cond}))

    def split(self, name: str) -> "Images":
        """Those of "train", "heldout" or "all", in their order. Raises `DataError` where one image is all there is."""
        checks.choice("split", name, ("train", "heldout", "all"))
        if name == "all":
            return self
        if len(self) < 2:
            raise DataError('one image cannot be split: give two or more, or split="all"')
        ranks = sorted(range(len(self)), key=lambda i: hashlib.sha256(digests.content(self.images[i])).digest())
        heldout = torch.zeros(len(self), dtype=torch.bool)
        heldout[ranks[: max(1, round(HELDOUT * len(self)))]] = True
        chosen = heldout if name == "heldout" else ~heldout
        cond = None if self.cond is None else self.cond[chosen.to(self.cond.device)]
        return Images(self.images[chosen.to(self.images.device)], cond, self.name)


def load_images(given: Any, denoiser: "Denoiser") -> Images:
    """What stands for a corpus where the model is a denoiser.

    `given` is a tensor or array [n, C, H, W] as the denoiser sees clean images (in [-1, 1]; of latent diffusion the
    autoencoder's latents), a pair of it and its `cond` (see `Denoiser.epsilon`), `Images`, or None: 512 samples of the
    denoiser's own, by 25 steps of DDIM and always the same.

    Raises `DataError` for other shapes, entries that are not finite, or a cond of another length; `ConfigError` where a
    conditional denoiser has no cond.

    >>> import saelab
    >>> denoiser = saelab.load_denoiser("digits-unet")
    >>> load_images(denoiser.examples()[0], denoiser).split("heldout").images.shape
    torch.Size([10, 1, 8, 8])
    """
    if isinstance(given, Images):
        return given
    if given is None:
        if denoiser.conditional:
            raise ConfigError("this denoiser is conditional and draws no images on its own: give a pair (images, cond)")
        starts = draws(denoiser, DRAWN, 0, "images", 1)[:, 0]
        drawn = torch.cat([ddim(denoiser, part, DRAWN_STEPS) for part in starts.split(BATCH)])
        return Images(drawn.cpu(), None, f"{DRAWN} samples of {denoiser.name}")
    images, cond = given if isinstance(given, tuple | list) and len(given) == 2 else (given, None)
    images = torch.from_numpy(images) if isinstance(images, np.ndarray) else images
    if not isinstance(images, Tensor) or not images.is_floating_point() or images.shape[1:] != denoiser.sample_shape:
        found = (
            f"{list(images.shape)} of {images.dtype}" if isinstance(images, Tensor) else f"a {type(images).__name__}"
        )
        wanted = ", ".join(map(str, denoiser.sample_shape))
        raise DataError(f"images are a floating-point tensor [n, {wanted}] as the denoiser sees them, or a pair (images, "
                        f"cond), and these are {found}")  # fmt: skip
    if not len(images) or not bool(images.isfinite().all()):
        raise DataError(f"{len(images):,} images were given, and there must be one or more with finite entries")
    if cond is not None and len(cond) != len(images):
        raise DataError(f"cond has {len(cond):,} rows for {len(images):,} images: give one an image")
    if denoiser.conditional and cond is None:
        raise ConfigError("this denoiser is conditional: give a pair (images, cond), with a row of cond an image")
    return Images(images.detach().cpu(), None if cond is None else torch.as_tensor(cond).cpu(), f"{len(images)} images")


@dataclasses.dataclass(frozen=True)
class Noised:
    """Some images noised: `x` = sqrt(a) `images` + sqrt(1 - a) `noise` at `timesteps`, on the denoiser's device."""

    x: Float[Tensor, "n C H W"]
    timesteps: Int[Tensor, " n"]
    images: Float[Tensor, "n C H W"]
    noise: Float[Tensor, "n C H W"]
    cond: Shaped[Tensor, "n ..."] | None


def noised(
    denoiser: "Denoiser", images: Images, numbers: Int[Tensor, " n"], timesteps: Int[Tensor, " n"], name: str
) -> Noised:
    """Those images at those timesteps; the noise is drawn from a generator of that name."""
    generator = seeds.named_generator(name)
    clean = images.images[numbers].to(denoiser.device, denoiser.dtype)
    noise = torch.randn(clean.shape, generator=generator).to(clean)
    a = denoiser.alphas_cumprod[timesteps].to(clean).view(-1, 1, 1, 1)
    cond = None if images.cond is None else images.cond[numbers].to(denoiser.device)
    return Noised(a.sqrt() * clean + (1 - a).sqrt() * noise, timesteps.to(clean.device), clean, noise, cond)


class NoisedPlaces:
    """A denoiser's activations at a site while it sees noised images: rows (image, timestep, place) for `saelab.train`.

    Each image comes once an epoch, in an order, with noise and at a timestep (any one, all alike) that are drawn anew from the
    seed and the epoch. The cursor counts images. `widths`, `most` and `epochs`: see `saelab.training.pieces.Pieces`.

    >>> import saelab
    >>> denoiser = saelab.load_denoiser("digits-unet")
    >>> pieces = NoisedPlaces(denoiser, load_images(denoiser.examples()[0], denoiser), "mid_block", seed=0)
    >>> rows, cursor = next(pieces.read(epoch=0, cursor=0))
    >>> rows["x"].shape, cursor
    (torch.Size([1024, 64]), 64)
    """

    epochs = math.inf

    def __init__(self, denoiser: "Denoiser", images: Images, site: str, seed: int) -> None:
        self.denoiser, self.images, self.site, self.seed = denoiser, images, site, seed
        shape = denoiser.site_shape(site)
        self.widths = {"x": width_of(shape)}
        places = math.prod(shape) // self.widths["x"]
        self.batch_size = max(1, min(BATCH, len(images), MOST_ROWS // places))
        self.most = self.batch_size * places
        self.own = (0, 1)

    def read(self, epoch: int, cursor: int) -> Iterator[tuple[dict[str, Float[Tensor, "rows C"]], int]]:
        n, total = len(self.images), len(self.denoiser.alphas_cumprod)
        name = f"noised images {self.seed} {epoch}"
        generator = seeds.named_generator(name)
        order, timesteps = torch.randperm(n, generator=generator), torch.randint(total, (n,), generator=generator)
        lane, lanes = self.own
        for first in range(cursor, n, self.batch_size):
            if first // self.batch_size % lanes != lane:
                continue
            chosen = slice(first, min(first + self.batch_size, n))
            seen = noised(self.denoiser, self.images, order[chosen], timesteps[chosen], f"{name} {first}")
            h = self.denoiser.record(seen.x, seen.timesteps, self.site, seen.cond)
            rows = rows_of_places(h).float()
            if not bool(rows.isfinite().all()):
                raise DataError(f"{int((~rows.isfinite()).any(1).sum()):,} of {len(rows):,} rows at {self.site} are NaN or "
                                f"infinite in {h.dtype}: use float32 for the denoiser")  # fmt: skip
            yield {"x": rows}, chosen.stop

    def lane(self, number: int, lanes: int) -> "NoisedPlaces":
        if len(self.images) < lanes * self.batch_size:
            raise ConfigError(
                f"{len(self.images):,} images, {self.batch_size} at a time, do not fill {lanes:,} lanes: give fewer"
            )
        mine = copy.copy(self)
        mine.own = (number, lanes)
        return mine
