"""Denoisers around random U-Nets of a few thousand parameters, and a scheduler's own steps along a trajectory."""

from typing import Any
from unittest import mock

import torch
from diffusers import DDIMScheduler, DiTTransformer2DModel, UNet2DConditionModel
from torch import Tensor

import saelab
from tests.toy_hspace import unet


def conditional_unet() -> UNet2DConditionModel:
    torch.manual_seed(0)
    return UNet2DConditionModel(
        sample_size=8, in_channels=1, out_channels=1, layers_per_block=1, block_out_channels=(8, 16), norm_num_groups=4,
        attention_head_dim=4, cross_attention_dim=12, down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
    ).eval()  # fmt: skip


def denoiser(scheduler: Any = None, **config: Any) -> saelab.Denoiser:
    return saelab.load_denoiser(unet(**config), scheduler or DDIMScheduler(clip_sample=False))


def scheduler_steps(den: saelab.Denoiser, trajectory: Any) -> Tensor:
    """What the scheduler's `step` makes of each x of a trajectory, with the trajectory's noise: [n, S, C, H, W]."""
    scheduler, ends = den.scheduler, []
    scheduler.set_timesteps(trajectory.steps)
    for i, t in enumerate(scheduler.timesteps):
        x = trajectory.x[:, i]
        with torch.no_grad():
            out = den.unet(x, t).sample
        noise = None if trajectory.noise is None else trajectory.noise[:, i]
        if isinstance(scheduler, DDIMScheduler):
            end = scheduler.step(out, t, x, eta=float(trajectory.eta[i]), variance_noise=noise).prev_sample
        else:  # DDPM draws its own noise: give it ours
            with mock.patch("diffusers.schedulers.scheduling_ddpm.randn_tensor", return_value=noise):
                end = scheduler.step(out, t, x).prev_sample
        ends.append(end)
    return torch.stack(ends, dim=1)


def dit(**changes: Any) -> DiTTransformer2DModel:
    """Two blocks of width 16 on the 4x4 patches of 8x8 images, five classes, nothing zero that the usual start has so."""
    config = dict(
        num_attention_heads=2, attention_head_dim=8, in_channels=1, num_layers=2, sample_size=8, norm_num_groups=4,
        num_embeds_ada_norm=5,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return DiTTransformer2DModel(**{**config, **changes}).eval()
