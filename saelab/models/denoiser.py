"""A diffusion denoiser whose activations can be read, replaced and traced to timesteps.

A U-Net or DiT of diffusers and a noise schedule: x_t = sqrt(a_t) x_0 + sqrt(1 - a_t) e, with a_t the schedule's
`alphas_cumprod`. Whatever the network predicts (e, x_0 or v), `epsilon` and `x0` give e and x_0 (Ho et al. 2020;
v = sqrt(a_t) e - sqrt(1 - a_t) x_0: Salimans and Ho 2022).
"""

import contextlib
import copy
import inspect
import json
import math
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor, nn

from saelab.base import checks, digests
from saelab.base.errors import ConfigError, DataError, SiteError
from saelab.models import identity, sites
from saelab.models.guidance import Guidance, guidance_of, in_unconditional_branch, without_condition
from saelab.models.hooks import first_runs, interventions_silent, open_interventions
from saelab.models.pixels import to_latents, to_pixels
from saelab.models.places import width_of
from saelab.models.solvers import timesteps
from saelab.models.unet_sites import AFTER, PLACES, is_block, kind_of, order_of
from saelab.models.wrappers import eager

if TYPE_CHECKING:
    from pandas import DataFrame

    from saelab.base.protocols import Dictionary
    from saelab.models.classifier import Classifier
    from saelab.models.splice import Edit, Splice


@dataclass(frozen=True)
class Moment:
    """What an intervention's function gets beside the activation: the timestep of each sample of the batch, and whether the
    pass is that of the branch without the condition (see `Denoiser.guided`)."""

    timesteps: Int[Tensor, "n"]
    unconditional: bool = False


def load_denoiser(name_or_unet: Any, scheduler: Any = None, device: str | torch.device = "auto") -> "Denoiser":
    """A denoiser by name, from a folder, or around a U-Net or pipeline of diffusers.

    "digits-unet" (8x8) and "mnist-unet" (28x28) come with saelab. Any other string is a folder or a name on the hub that
    holds a pipeline (or a `UNet2DModel`, `UNet2DConditionModel` or `DiTTransformer2DModel` alone).
    These load in evaluation mode and fp32. A U-Net object is wrapped as it is, on its device, in its dtype and mode, and
    never changed. `scheduler` defaults to the pipeline's, else to `DDIMScheduler()`. What is kept is a copy of it with
    `clip_sample=False` (and no thresholding):
    clipping would make x0 a non-linear function of epsilon and inversion impossible; a warning says so where it was on.
    In a latent diffusion pipeline images are the autoencoder's latents; `encode` and `decode` lead there and back.

    Args:
        device: as "cpu", "cuda:0" or "mps", or "auto": the GPU where there is one.

    Raises `ConfigError`, with the way out, when nothing can be loaded, the U-Net needs more than an image and `cond` (Stable
    Diffusion XL, inpainting), gradient checkpointing is on, or the scheduler has
    no fixed variance-preserving schedule of discrete timesteps.

    >>> denoiser = load_denoiser("digits-unet")
    >>> denoiser.epsilon(torch.zeros(2, 1, 8, 8), 500).shape
    torch.Size([2, 1, 8, 8])
    >>> denoiser.record(torch.zeros(2, 1, 8, 8), 500).shape
    torch.Size([2, 64, 4, 4])
    """
    if isinstance(name_or_unet, Denoiser):
        return name_or_unet
    from saelab.models import diffusion

    if isinstance(name_or_unet, str | os.PathLike):
        name = os.fspath(name_or_unet)
        unet, own, autoencoder = diffusion.pretrained(name, checks.device_of(device))
    else:
        unet, own, autoencoder = diffusion.parts(name_or_unet)
        name = type(unet).__name__
        place = next(unet.parameters()).device
        if device != "auto" and checks.device_of(device) not in (place, torch.device(place.type)):
            raise ConfigError(f"the U-Net is on {place}, and objects are wrapped as they are: move it yourself "
                              f"(unet.to({str(device)!r})) before load_denoiser")  # fmt: skip
        identity.warn_of_dropout(unet)
    return Denoiser(unet, diffusion.unclipped(scheduler if scheduler is not None else own), name, autoencoder)


class Denoiser:
    """A U-Net and its noise schedule, with named sites; made by `load_denoiser`.

    `unet` is the wrapped module, untouched; `scheduler` a copy with `clip_sample=False`; `alphas_cumprod` [T] in float64;
    `autoencoder` a latent diffusion pipeline's, else None; `guidance` that of `guided`.

    >>> denoiser = load_denoiser("digits-unet")
    >>> x = torch.zeros(2, 1, 8, 8)
    >>> with denoiser.intervene("after", lambda h, where: h + (where.timesteps > 400).view(-1, 1, 1, 1)):
    ...     changed = denoiser.epsilon(x, torch.tensor([300, 500]))
    >>> (changed - denoiser.epsilon(x, torch.tensor([300, 500]))).flatten(1).abs().amax(1) > 0
    tensor([False,  True])
    """

    def __init__(self, unet: nn.Module, scheduler: Any, name: str, autoencoder: nn.Module | None = None) -> None:
        from saelab.models import diffusion

        diffusion.refuse_more_inputs(unet)
        self.unet, self.scheduler, self.name, self.autoencoder = unet, scheduler, name, autoencoder
        self.guidance: Guidance | None = None
        self.inner = self.runner = unet  # what a language model calls its own
        self.compared: WeakKeyDictionary[Any, str] = WeakKeyDictionary()  # see `identity.warn_of_other_weights`
        self.prediction: str = diffusion.prediction_of(scheduler)
        self.alphas_cumprod: Tensor = scheduler.alphas_cumprod.detach().cpu().double()
        config: Any = unet.config
        to_zero = scheduler.config.get("final_sigmas_type", "zero") == "zero"
        self.final_alpha = float(getattr(scheduler, "final_alpha_cumprod", 1.0 if to_zero else self.alphas_cumprod[0]))
        self.sample_shape = (int(config.in_channels), *diffusion.image_size(config))
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._refuse_checkpointing()

    @property
    def device(self) -> torch.device:
        """Where the first parameter is."""
        return next(self.unet.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """The first parameter's."""
        return next(self.unet.parameters()).dtype

    @property
    def conditional(self) -> bool:
        """Whether every pass needs a `cond`."""
        from saelab.models import diffusion

        return diffusion.blank(self.unet) is not None

    @property
    def digest(self) -> str:
        """SHA-256 (hex) of what decides what the network makes of an image, as it is now: weights (as fp32, so that a copy in
        float64 has the same), what no weight tells of the U-Net (groups of a norm, an activation: where its configuration
        is not the default), noise schedule, prediction, adapters, dropout, the number of open interventions.

        Taken anew each time, which costs a pass over the weights.
        """
        usual = inspect.signature(type(self.unet).__init__).parameters
        unusual = {name: value for name, value in self._config().items()
                   if name not in usual or _json(value) != _json(usual[name].default)}  # fmt: skip
        return self._digest(unusual)

    def made(self, digest: str) -> bool:
        """Whether a digest that was saved with a trajectory or a direction is this denoiser's.

        Those of older versions of saelab, which hashed the defaults of the configuration too, are known.
        """
        return digest in (self.digest, self._digest(self._config()))

    def _config(self) -> dict[str, Any]:
        config: Any = self.unet.config
        return {name: value for name, value in config.items() if not name.startswith("_")}

    def _digest(self, config: dict[str, Any]) -> str:
        words = [f"predicts {self.prediction}", f"made {_json(config)}", *identity.circumstances(self.unet)]
        guided = {}
        if self.guidance is not None:
            words.append(f"guided by {self.guidance.scale:g}")
            guided = {"unconditional": self.guidance.unconditional}
        if interventions := open_interventions(self.unet):
            words.append(f"{interventions} interventions")
        weights = {name: p.float() if p.is_floating_point() else p for name, p in self.unet.state_dict().items()}
        return digests.of_tensors(
            weights
            | guided
            | {"alphas": self.alphas_cumprod}
            | {word: torch.zeros(0, dtype=torch.float32) for word in words}
        )

    def to(self, dtype: torch.dtype) -> "Denoiser":
        """A copy in another dtype (its weights are its own); float64 brings inversion to rounding."""
        made = Denoiser(
            nn.Module.to(copy.deepcopy(self.unet), dtype), self.scheduler, self.name, self.autoencoder
        )  # diffusers' own `to` warns
        made.guidance = self.guidance
        return made

    def guided(self, scale: float, unconditional: Shaped[Tensor, "..."] | None = None) -> "Denoiser":
        """This denoiser with classifier-free guidance: its epsilon is e_u + scale (e_c - e_u), of two passes of the network.

        e_c is the prediction with `cond`, e_u that with `unconditional` in its place (default: a DiT's label for none): Ho and
        Salimans (2022), as the pipelines of diffusers count the scale (1: e_c alone). `record` reads the branch with the
        condition; the other is `record(x, t, site, unconditional)`. What acts at a site (`intervene`, edits, splices) acts in
        both, and `where.unconditional` tells an intervention which it sees.

        Raises `ConfigError` for a denoiser without conditions, or where nothing is known to stand for none.

        >>> from diffusers import DiTTransformer2DModel
        >>> dit = DiTTransformer2DModel(2, 8, in_channels=1, num_layers=1, sample_size=8, num_embeds_ada_norm=3)
        >>> denoiser = load_denoiser(dit.eval()).guided(4.0)
        >>> denoiser.epsilon(torch.zeros(2, 1, 8, 8), 500, torch.tensor([0, 2])).shape
        torch.Size([2, 1, 8, 8])
        """
        made = copy.copy(self)
        made.guidance = guidance_of(self, scale, unconditional)
        return made

    def encode(self, images: Float[Tensor, "n C H W"]) -> Float[Tensor, "n c h w"]:
        """The latents of images, which are what this denoiser denoises. `ConfigError` for one of pixels."""
        return to_latents(self.autoencoder, images)

    def decode(self, latents: Float[Tensor, "n c h w"]) -> Float[Tensor, "n C H W"]:
        """The images of latents, in the caller's gradient mode. `ConfigError` for a denoiser of pixels."""
        return to_pixels(self.autoencoder, latents)

    # what the network predicts

    def both(
        self, x: Float[Tensor, "n C H W"], t: int | Shaped[Tensor, "..."], cond: Shaped[Tensor, "..."] | None = None
    ) -> tuple[Float[Tensor, "n C H W"], Float[Tensor, "n C H W"]]:
        """(epsilon, x0) of one pass, each from what the network predicts and not from the other; see those."""
        t = self._timesteps(x, t)
        out = self._output(x, t, cond)
        if self.guidance is not None:
            with without_condition():
                plain = self._output(x, t, self.guidance.unconditional)
            out = plain + self.guidance.scale * (out - plain)
        exact = torch.promote_types(x.dtype, torch.float32)
        a = self.alphas_cumprod.to(x.device, exact)[t].view(-1, 1, 1, 1)
        signal, noise = a**0.5, (1 - a) ** 0.5
        if self.prediction == "epsilon":
            epsilon, x0 = out, (x - noise * out) / signal
        elif self.prediction == "sample":
            epsilon, x0 = (x - signal * out) / noise, out
        else:
            epsilon, x0 = signal * out + noise * x, signal * x - noise * out
        return epsilon.to(x.dtype), x0.to(x.dtype)

    def epsilon(
        self, x: Float[Tensor, "n C H W"], t: int | Shaped[Tensor, "..."], cond: Shaped[Tensor, "..."] | None = None
    ) -> Float[Tensor, "n C H W"]:
        """The noise that the network sees in `x` at timestep `t` (one for all, or [n]), in the caller's gradient mode.

        `cond` is what the network is conditioned on: `encoder_hidden_states` [n or 1, length, width] of a
        `UNet2DConditionModel`, or class labels [n]. A variance predicted beside the noise is left out.
        """
        return self.both(x, t, cond)[0]

    def x0(
        self, x: Float[Tensor, "n C H W"], t: int | Shaped[Tensor, "..."], cond: Shaped[Tensor, "..."] | None = None
    ) -> Float[Tensor, "n C H W"]:
        """The clean image that the network sees in `x` at timestep `t`: (x - sqrt(1 - a) e) / sqrt(a)."""
        return self.both(x, t, cond)[1]

    def _output(self, x: Tensor, t: Tensor, cond: Tensor | None) -> Tensor:
        from saelab.models import diffusion

        with eager(self.unet):
            out = self.unet(x, t, **diffusion.conditioning(self.unet, cond, len(x))).sample
        return out[:, : x.shape[1]]  # the rest is a learned variance

    def _timesteps(self, x: Tensor, t: int | Tensor) -> Tensor:
        steps = torch.as_tensor(t, device=x.device)
        if steps.is_floating_point() or steps.numel() not in (1, len(x)):
            raise DataError(f"timesteps are whole numbers, one or one a sample ({len(x)}); these are {steps.dtype} "
                            f"{list(steps.shape)}")  # fmt: skip
        last = len(self.alphas_cumprod) - 1
        if steps.numel() and not 0 <= int(steps.min()) <= int(steps.max()) <= last:
            raise DataError(f"timesteps go from 0 to {last}; these go from {int(steps.min())} to {int(steps.max())}")
        return steps.reshape(-1).expand(len(x))

    def timesteps(self, steps: int) -> Int[Tensor, "steps"]:
        """The timesteps of a run of so many steps, highest noise first, spaced as the scheduler does it.

        A step is a pass of the network, of which PNDM takes one more than diffusers counts (nine with Runge-Kutta steps).

        Raises `ConfigError` when the scheduler's are not whole numbers that fall (Euler's "linspace"), or its step is unknown.
        """
        return timesteps(self.scheduler, steps)

    # sites

    def site(self, name: str) -> str:
        """The module path of a site: "after", "before" and "middle" mean the middle block, anything else is a path.

        `path` is a module's output, `path.input` its input. Raises `SiteError` with near names, or when the U-Net has no
        middle block.
        """
        path = PLACES.get(name, name)
        if path.startswith("mid_block") and getattr(self.unet, "mid_block", None) is None:
            stages = ("down_blocks.", "transformer_blocks.")
            others = [p for p, _ in self.unet.named_modules() if p.startswith(stages) and p.count(".") == 1]
            raise SiteError(f"this {type(self.unet).__name__} has no middle block (mid_block_type=None), so there is no site "
                            f"{name!r}: give another, for instance site={others[-1] if others else 'conv_in'!r}")  # fmt: skip
        try:
            sites.resolve(self.unet, path)
        except SiteError as error:
            names = [*PLACES, *(p for p, _ in self.unet.named_modules() if p)]
            raise sites.unknown_site(name, names) from error
        return path

    def site_shape(self, name: str = AFTER) -> tuple[int, ...]:
        """Shape of one sample's activation at a site, [C, h, w] for feature maps; found by running the network once."""
        path = self.site(name)
        if path not in self._shapes:
            with interventions_silent(), torch.no_grad():
                self._shapes[path] = tuple(self._read([path], *self._probe())[path].shape[1:])
        return self._shapes[path]

    def sites(self) -> "DataFrame":
        """Table of the sites, in the order of the forward pass: name, module, width (channels), kind, height.

        The three places of the middle block by name, then every block, ResNet, attention and resampling module. Of a DiT every
        block, its attention and feed-forward part; `height` is the side of the square of its tokens.
        """
        import pandas as pd

        named = {path: name for name, path in PLACES.items()}
        paths = [path for path, _ in self.unet.named_modules() if is_block(path)]
        if getattr(self.unet, "mid_block", None) is not None:
            paths += [PLACES["before"], PLACES["middle"]]
        paths.sort(key=order_of)
        with interventions_silent(), torch.no_grad():
            shapes = {path: x.shape[1:] for path, x in self._read(paths, *self._probe()).items()}
        heights = {path: shape[1] if len(shape) == 3 else math.isqrt(shape[0]) for path, shape in shapes.items()}
        rows = [(named.get(p, p), p, width_of(tuple(shape)), kind_of(p), heights[p]) for p, shape in shapes.items()]
        return pd.DataFrame(rows, columns=["name", "module", "width", "kind", "height"])

    def record(
        self,
        x: Float[Tensor, "n C H W"],
        t: int | Shaped[Tensor, "..."],
        site_or_sites: str | Sequence[str] = AFTER,
        cond: Shaped[Tensor, "..."] | None = None,
    ) -> Any:
        """The activation [n, C, h, w] at a site when the network sees `x` at timestep `t`; for several a dict by name.

        The pass stops after the last site. No gradients. Raises `SiteError` for an unknown site.
        """
        names = [site_or_sites] if isinstance(site_or_sites, str) else list(site_or_sites)
        paths = {name: self.site(name) for name in names}
        with torch.no_grad():
            found = self._read(list(paths.values()), x, self._timesteps(x, t), cond)
        return found[paths[names[0]]] if isinstance(site_or_sites, str) else {n: found[p] for n, p in paths.items()}

    @contextlib.contextmanager
    def intervene(
        self, site: str, fn: Callable[[Float[Tensor, "n C h w"], Moment], Float[Tensor, "n C h w"]]
    ) -> Iterator[None]:
        """Within it, every pass of the network uses `fn(activation, where)` at the site; `where.timesteps` is [n], and
        `where.unconditional` says which branch of a guided denoiser passes.

        Contexts nest, the outer acts first; hooks are gone afterwards, whatever happens. In the last down block the output
        and the last skip are one tensor: "before" changes what the middle block reads and leaves the skip alone. Raises
        `SiteError`; `InterventionError` when `fn` gives no tensor of the same shape; `ConfigError` under gradient
        checkpointing, where hooks would run twice.
        """
        self._refuse_checkpointing()
        with sites.intervene(self.unet, self.site(site), fn, _moment):
            yield

    def splice(
        self, sae: "Dictionary", error_term: bool = False, edit: "Edit | None" = None, site: str | None = None
    ) -> contextlib.AbstractContextManager["Splice"]:
        """Within it, every pass of the network uses an autoencoder's reconstruction at its site.

        Replaced is each place (of a feature map, or token) whose vector is within the SAE's norm limit. As
        `LanguageModel.splice`: with `error_term` it is h + (decode(edited) - decode(codes)), to the bit h where
        `edit(SparseCodes) -> SparseCodes` changes nothing or there is none. `site` is that of `sae.metadata` unless given.

        Raises `ConfigError` where no site is known or it is a transcoder, `SiteError` for another width,
        `InterventionError` when nothing ran.

        >>> denoiser, x = load_denoiser("digits-unet"), torch.zeros(2, 1, 8, 8)
        >>> from saelab import SAE, TopK
        >>> with denoiser.splice(SAE(TopK(k=4, d_sae=128), 64), site="mid_block") as receipt:
        ...     changed = denoiser.epsilon(x, 500)
        >>> receipt
        Splice(replaced=32 of positions=32)
        """
        from saelab.models.places import splice_places

        return splice_places(self, sae, error_term, edit, site)

    def _read(self, paths: list[str], x: Tensor, t: Tensor, cond: Tensor | None) -> dict[str, Tensor]:
        self._refuse_checkpointing()
        return first_runs({p: sites.resolve(self.unet, p) for p in paths}, lambda: self._output(x, t, cond))

    def _probe(self) -> tuple[Tensor, Tensor, Tensor | None]:
        from saelab.models import diffusion

        x = torch.zeros(1, *self.sample_shape, device=self.device, dtype=self.dtype)
        return x, torch.zeros(1, dtype=torch.long, device=self.device), diffusion.blank(self.unet)

    def _refuse_checkpointing(self) -> None:
        if getattr(self.unet, "is_gradient_checkpointing", False):
            raise ConfigError("gradient checkpointing is on, which runs blocks (and hooks) a second time in the backward "
                              "pass: call unet.disable_gradient_checkpointing() first")  # fmt: skip

    # what comes with a bundled denoiser

    def classifier(self) -> "Classifier":
        """The bundled classifier of this denoiser's images ([n, 1, H, W] to logits [n, 10]).

        Raises `ConfigError` for a denoiser that saelab does not bundle.
        """
        from saelab.models.classifier import load_classifier

        return load_classifier(self._beside("classifier.safetensors"), self.device)

    def examples(self) -> tuple[Float[Tensor, "n C H W"], Int[Tensor, "n"]]:
        """Real images that the bundled denoiser was not trained on, in [-1, 1], and their classes.

        >>> images, labels = load_denoiser("digits-unet").examples()
        >>> images.shape, labels.shape
        (torch.Size([200, 1, 8, 8]), torch.Size([200]))
        """
        from safetensors.torch import load_file

        found = load_file(self._beside("examples.safetensors"), device=str(self.device))
        return found["images"].to(self.dtype) / 127.5 - 1, found["labels"].long()

    def _beside(self, name: str) -> Path:
        from saelab.models import diffusion

        path = diffusion.BUNDLED / self.name / name
        if not path.is_file():
            known = ", ".join(diffusion.bundled_names())
            raise ConfigError(f"{self.name!r} does not come with saelab, and only such denoisers ({known}) have "
                              f"{path.stem.removesuffix('s')}s: give your own")  # fmt: skip
        return path

    def __repr__(self) -> str:
        shape = "x".join(map(str, self.sample_shape))
        steps = f"{len(self.alphas_cumprod):,} timesteps of {type(self.scheduler).__name__}"
        where = f"{str(self.dtype).removeprefix('torch.')} on {self.device}"
        return f"Denoiser({self.name}: {type(self.unet).__name__} of {shape}, {self.prediction}, {steps}, {where})"


def _json(value: Any) -> str:
    return json.dumps(value, sort_keys=True, default=str)


def _moment(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Moment:
    x: Tensor = args[0] if args else kwargs["sample" if "sample" in kwargs else "hidden_states"]
    t = args[1] if len(args) > 1 else kwargs["timestep"]
    return Moment(torch.as_tensor(t, device=x.device).reshape(-1).expand(len(x)), in_unconditional_branch())
