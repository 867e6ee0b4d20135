"""Sparse autoencoders of h: rows for the trainers that there are, latents as directions.

A row is h at one place of the bottleneck of one sample at one step, divided by one number a step. Shapes: N samples, S steps,
C channels, h x w places, F latents.
"""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor

from saelab.base.errors import ConfigError
from saelab.hspace.directions import Directions, unit
from saelab.hspace.principal import h_of
from saelab.hspace.trajectory import Trajectory

if TYPE_CHECKING:
    from saelab.autoencoders.architecture import Architecture
    from saelab.autoencoders.sae import SAE
    from saelab.base.codes import SparseCodes
    from saelab.training.run import Run


def latent_rows(
    trajectory: Trajectory, scales: Float[Tensor, " S"] | None = None
) -> tuple[Float[Tensor, "rows C"], Float[Tensor, " S"]]:
    """h as rows for `saelab.train` (samples, then steps, then places row by row), and what each step was divided by [S].

    By default the root mean square of h at each step, so that every timestep weighs the same in training (h of the bundled
    digits shrinks by a third from the first step to the last).

    >>> import saelab
    >>> trajectory = saelab.hspace.sample(saelab.load_denoiser("digits-unet"), n=2, steps=3, seed=0)
    >>> rows, scales = latent_rows(trajectory)
    >>> rows.shape, scales.shape
    (torch.Size([96, 64]), torch.Size([3]))
    """
    h_NSChw = h_of(trajectory).float()
    if scales is None:
        scales = h_NSChw.square().mean(dim=(0, 2, 3, 4)).sqrt().clamp(min=1e-12)
    rows = h_NSChw / scales.to(h_NSChw)[:, None, None, None]
    return rows.permute(0, 1, 3, 4, 2).reshape(-1, h_NSChw.shape[2]).contiguous(), scales


def train_latents(trajectory: Trajectory, sae: "Architecture", tokens: int, **how: Any) -> "Run":
    """Train an SAE on the h of a trajectory; it remembers the denoiser, the site, the timesteps and their scales.

    `tokens` counts rows; `how` goes to `saelab.train`. Raises what that raises, and `DataError` where h was not recorded.

    >>> import saelab
    >>> trajectory = saelab.hspace.sample(saelab.load_denoiser("digits-unet"), n=4, steps=3, seed=0)
    >>> run = train_latents(trajectory, saelab.TopK(k=4, d_sae=128), tokens=1024, batch_size=64, progress=False)
    >>> latent_directions(run.sae, [3])[0]
    Direction('latent 3', [64, 4, 4] at 3 timesteps of mid_block)
    """
    from saelab.training.loop import train

    rows, scales = latent_rows(trajectory)
    run = train(rows, sae=sae, tokens=tokens, **how)
    run.sae.metadata["hspace"] = {
        "denoiser": trajectory.denoiser, "site": trajectory.site, "timesteps": trajectory.timesteps.tolist(),
        "scales": scales.tolist(), "shape": list(h_of(trajectory).shape[2:]),
    }  # fmt: skip
    run.write()  # where it has a folder: with what the SAE now says of itself
    return run


def latent_codes(sae: "SAE", trajectory: Trajectory) -> "SparseCodes":
    """The codes of each row of the trajectory, in the order of `latent_rows`, with the scales of the SAE's training.

    Of an SAE that `saelab.train(denoiser, ...)` gave, which knows every timestep, there are no scales.

    Raises `ConfigError` for an SAE that was not trained on a denoiser, or on another one or site, or for steps that it was not
    trained on.
    """
    made = _made_from(sae)
    if (made["denoiser"], made["site"]) != (trajectory.denoiser, trajectory.site):
        raise ConfigError("this SAE was trained on the h of another denoiser or site: train one on this trajectory's")
    scales = torch.ones(trajectory.steps)
    if made["timesteps"] is not None:
        known = dict(zip(made["timesteps"], made["scales"], strict=True))
        missing = [t for t in trajectory.timesteps.tolist() if t not in known]
        if missing:
            raise ConfigError(
                f"this SAE was not trained on timesteps {missing[:5]}: sample with its {len(known)} steps"
            )
        scales = torch.tensor([known[t] for t in trajectory.timesteps.tolist()])
    with torch.no_grad():
        return sae.encode_sparse(latent_rows(trajectory, scales)[0])


def latent_directions(sae: "SAE", latents: Sequence[int]) -> Directions:
    """Latents of an SAE of h as directions: the decoder row at every place of the bottleneck, at every step.

    Strength 1 is the latent at the largest activation it had in training, everywhere; a `mask` in `hspace.edit` keeps it to a
    place. At each step it has the size that h has there.

    Raises `ConfigError` for an SAE that was not trained on a denoiser's feature maps, or a latent that it does not have.
    """
    made = _made_from(sae)
    for latent in latents:
        if not 0 <= latent < sae.d_sae:
            raise ConfigError(f"there is no latent {latent}: the SAE has {sae.d_sae:,}")
    _, height, width = made["shape"]
    rows_KC = sae.W_dec.detach().float()[list(latents)] * sae.latent_stats.max.float()[list(latents), None]
    scales_S = torch.tensor(made["scales"])
    raw = torch.einsum("kc,s->ksc", rows_KC, scales_S.to(rows_KC))[..., None, None].expand(-1, -1, -1, height, width)
    vectors, scales = unit(raw)
    timesteps = None if made["timesteps"] is None else torch.tensor(made["timesteps"])
    return Directions(
        vectors, scales, timesteps, made["site"], made["denoiser"], "latents",
        details={"latent": torch.tensor([[float(latent)] for latent in latents])},
        names=[f"latent {latent}" for latent in latents],
    )  # fmt: skip


def activation_maps(codes: "SparseCodes", latents: Sequence[int], shape: Sequence[int]) -> Float[Tensor, "K N S h w"]:
    """The activations of some latents by sample, step and place: `codes` of N S h w rows, `shape` (N, S, h, w)."""
    if len(codes) != math.prod(shape):
        raise ConfigError(f"{len(codes):,} rows of codes for {list(shape)} places: they are of another trajectory")
    order, offsets = codes.by_latent()
    maps = torch.zeros(len(latents), len(codes))
    for k, latent in enumerate(latents):
        fires = order[offsets[latent] : offsets[latent + 1]]
        maps[k, codes.rows()[fires]] = codes.values[fires].float()
    return maps.view(len(latents), *shape)


def _made_from(sae: "SAE") -> dict[str, Any]:
    said = sae.metadata
    if said.get("trained_on") == "denoiser" and len(said["places"]) == 3:
        own = {"denoiser": said["model_digest"], "site": said["site"], "shape": said["places"]}
        return own | {"timesteps": None, "scales": [1.0]}  # one for all timesteps
    if "hspace" not in said:
        raise ConfigError(
            "this SAE does not say which denoiser's h it is of: train it with saelab.train(denoiser, site=...) or "
            "saelab.hspace.train_latents"
        )
    return dict(said["hspace"])
