"""From a name, a folder or an object of diffusers to a U-Net and a scheduler, with errors that say the way out."""

import json
import warnings
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Shaped
from torch import Tensor, nn

from saelab.base.errors import ConfigError, DataError
from saelab.base.files import user_path
from saelab.models.wrappers import looked_through

PARTS = ("unet", "transformer")  # of a pipeline
AUTOENCODERS = ("vae", "vqvae")
BUNDLED = Path(__file__).parent / "denoisers"
PREDICTIONS = ("epsilon", "sample", "v_prediction")
DIT = "DiTTransformer2DModel"
UNETS = ("UNet2DModel", "UNet2DConditionModel", DIT)


def bundled_names() -> list[str]:
    """Names of the denoisers that load with no network.

    >>> bundled_names()
    ['digits-unet', 'mnist-unet']
    """
    return sorted(folder.name for folder in BUNDLED.iterdir() if (folder / "model_index.json").is_file())


def diffusers() -> Any:
    """The package, or a `ConfigError` that says how to get it."""
    try:
        import diffusers as package
    except ImportError as error:
        raise ConfigError("denoisers need diffusers: pip install 'saelab[diffusion]'") from error
    return package


def pretrained(name: str, device: torch.device) -> tuple[nn.Module, Any, Any]:
    """A U-Net in evaluation mode and fp32, and its pipeline's scheduler and autoencoder, each or None."""
    package = diffusers()
    folder = BUNDLED / name if name in bundled_names() else user_path(name)
    source = str(folder) if folder.is_dir() else name
    if not folder.is_dir() and (name.startswith((".", "/", "~")) or name.count("/") != 1):
        raise ConfigError(f"there is no folder {name!r}: give one that save_pretrained wrote, a pipeline's name on the hub "
                          f"(owner/name), or {' or '.join(map(repr, bundled_names()))}")  # fmt: skip
    try:
        if folder.is_dir() and (folder / "config.json").is_file():
            return _unet(source, None, json.loads((folder / "config.json").read_text())).to(device).eval(), None, None
        index = package.DiffusionPipeline.load_config(source)
        part = next((part for part in PARTS if part in index), None)
        if part is None or "scheduler" not in index:
            raise ConfigError(
                f"{name!r} is a {index.get('_class_name')} without a U-Net or transformer, or a scheduler"
            )
        unet = _unet(source, part, {"_class_name": index[part][1]})
        scheduler = getattr(package, index["scheduler"][1]).from_pretrained(source, subfolder="scheduler")
        pixels = next((part for part in AUTOENCODERS if index.get(part, [None])[0]), None)
        autoencoder = None if pixels is None else _loaded(source, pixels, index[pixels][1]).to(device).eval()
    except (OSError, ValueError) as error:
        if isinstance(error, ConfigError):
            raise
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
        raise ConfigError(f"no denoiser {name!r} can be loaded ({reason}). Without a network only folders, pipelines in the "
                          f"hub's cache and {' and '.join(map(repr, bundled_names()))} load") from error  # fmt: skip
    return unet.to(device).eval(), scheduler, autoencoder


def _unet(source: str, subfolder: str | None, config: dict[str, Any]) -> Any:
    kind = config.get("_class_name")
    if kind not in UNETS:
        raise ConfigError(f"{source!r} holds a {kind}, and a denoiser is one of {' and '.join(UNETS)}")
    return _loaded(source, subfolder, str(kind))


def _loaded(source: str, subfolder: str | None, kind: str) -> Any:
    where = {} if subfolder is None else {"subfolder": subfolder}
    return getattr(diffusers(), kind).from_pretrained(source, torch_dtype=torch.float32, use_safetensors=True, **where)


def parts(thing: Any) -> tuple[nn.Module, Any, Any]:
    """The U-Net, scheduler and autoencoder of a pipeline, the last two each or None."""
    diffusers()
    whole = isinstance(thing, nn.Module)
    unet: Any = thing if whole else next((getattr(thing, part) for part in PARTS if hasattr(thing, part)), None)
    scheduler = None if whole else getattr(thing, "scheduler", None)
    held = [getattr(thing, part, None) for part in AUTOENCODERS if not whole]
    unet = looked_through(unet) if isinstance(unet, nn.Module) else unet
    if not isinstance(unet, nn.Module) or type(unet).__name__ not in UNETS:
        raise ConfigError(f"a {type(thing).__name__} is no denoiser: give a {' or '.join(UNETS)} of diffusers, a pipeline "
                          "that has one, or a name or folder")  # fmt: skip
    return unet, scheduler, next((part for part in held if part is not None), None)


def refuse_more_inputs(unet: Any) -> None:
    """`ConfigError` for a U-Net that needs more than an image, a timestep and `cond`: its passes would fail."""
    config = unet.config
    read = int(config.in_channels)
    given = read if config.out_channels is None else int(config.out_channels)
    kinds = [str(config.get(name)) for name in ("addition_embed_type", "encoder_hid_dim_type") if config.get(name)]
    if kinds:
        why = f"is also conditioned on {' and '.join(kinds)} (added_cond_kwargs, as Stable Diffusion XL)"
    elif config.get("class_embed_type") not in (None, "timestep", "identity") or config.get("time_cond_proj_dim"):
        why = "is also conditioned on class embeddings or a guidance scale"
    elif type(unet).__name__ == DIT and unet.training:
        why = "drops class labels at random in training mode (call its eval() first)"
    elif read not in (given, given // 2):  # twice as many come out where the variance is learned
        why = (
            f"reads {read} channels and gives {given}: those of an image to fill in or to go by stand beside the noise"
        )
    else:
        return
    raise ConfigError(
        f"this {type(unet).__name__} {why}, which load_denoiser does not pass on: wrap it in a module with the forward of your "
        "call and use saelab.models.sites.record and .intervene on that, or load the U-Net of another pipeline"
    )


def unclipped(scheduler: Any) -> Any:
    """A copy of the scheduler with `clip_sample=False`, saying so where it was on; `DDIMScheduler` for None."""
    if scheduler is None:
        scheduler = diffusers().DDIMScheduler(clip_sample=False)
    kind, config = type(scheduler).__name__, getattr(scheduler, "config", None)
    alphas = getattr(scheduler, "alphas_cumprod", None)
    if config is None or not isinstance(alphas, Tensor):
        raise ConfigError(
            f"the step of a {kind} does not fit: it has no alphas_cumprod, and x_t = sqrt(a) x_0 + sqrt(1 - a) e with fixed "
            "a at whole timesteps is assumed (flow matching has x_t = (1 - s) x_0 + s e at any s, other networks' timesteps): "
            "give DDIMScheduler, DDPMScheduler or another such one"
        )
    prediction_of(scheduler)
    off = {name: False for name in ("clip_sample", "thresholding") if config.get(name)}
    if off:
        warnings.warn(
            f"works on a copy of the {kind} with {' and '.join(f'{name}=False' for name in off)}: clipping would make x0 a "
            "non-linear function of epsilon (yours is unchanged)",
            stacklevel=3,
        )
    return type(scheduler).from_config(config, **off)


def prediction_of(scheduler: Any) -> str:
    """What the network predicts: "epsilon", "sample" (x_0) or "v_prediction"."""
    prediction = scheduler.config.get("prediction_type", "epsilon")
    if prediction not in PREDICTIONS:
        raise ConfigError(f"the step of a {type(scheduler).__name__} with prediction_type={prediction!r} does not fit: "
                          f"known are {', '.join(PREDICTIONS)}")  # fmt: skip
    return prediction


def image_size(config: Any) -> tuple[int, int]:
    """(H, W) of what the U-Net was made for."""
    size = config.sample_size
    if size is None:
        raise ConfigError("the U-Net's configuration has no sample_size: build it with sample_size=, an int or (H, W)")
    return (int(size), int(size)) if isinstance(size, int) else (int(size[0]), int(size[1]))


def conditioning(unet: Any, cond: Shaped[Tensor, "..."] | None, n: int) -> dict[str, Shaped[Tensor, "..."]]:
    """Keyword arguments for what the U-Net is conditioned on.

    Raises `ConfigError` when a conditional U-Net gets nothing, or an unconditional one something.
    """
    kind = type(unet).__name__
    conditional, labelled = kind == "UNet2DConditionModel", embeds_classes(unet)
    if cond is None:
        if conditional:
            raise ConfigError(f"a {kind} needs cond=, its encoder_hidden_states [n or 1, length, width]")
        if labelled:
            raise ConfigError(f"this {kind} embeds classes: give cond=, their labels [n]")
        return {}
    if len(cond) not in (1, n):
        raise DataError(f"cond has {len(cond)} rows for {n} samples: give one, or one a sample")
    cond = cond.expand(n, *cond.shape[1:])
    if conditional:
        return {"encoder_hidden_states": cond}
    if not labelled:
        raise ConfigError(f"this {kind} is not conditioned on anything: leave cond out")
    return {"class_labels": cond}


def embeds_classes(unet: Any) -> bool:
    """Whether it is conditioned on class labels: a DiT always, a `UNet2DModel` that was built so."""
    return type(unet).__name__ == DIT or getattr(unet, "class_embedding", None) is not None


def blank(unet: Any) -> Shaped[Tensor, "..."] | None:
    """A conditioning of the right shape, for a pass that only asks for shapes."""
    parameter = next(unet.parameters())
    if type(unet).__name__ == "UNet2DConditionModel":
        width = unet.config.cross_attention_dim
        return parameter.new_zeros(1, 1, width if isinstance(width, int) else width[0])
    if embeds_classes(unet):
        return torch.zeros(1, dtype=torch.long, device=parameter.device)
    return None
