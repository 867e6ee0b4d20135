"""Small denoisers and planted trajectories for the tests of h-space."""

import torch
from torch import Tensor

from saelab.hspace.trajectory import Trajectory

SHAPE = (3, 2, 2)  # of planted h: 12 entries
TIMESTEPS = torch.tensor([800, 500, 200])


def unet(**changes):
    """An untrained U-Net of 8x8 images with h [16, 4, 4], the same at each call."""
    import diffusers

    config = dict(
        sample_size=8, in_channels=1, out_channels=1, block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"), up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=8,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return diffusers.UNet2DModel(**{**config, **changes}).eval()


def planted(h: Tensor, timesteps: Tensor = TIMESTEPS, **fields) -> Trajectory:
    """A trajectory with this h [n, S, C, h, w] and nothing else that means anything."""
    images = torch.zeros(len(h), 1, 4, 4)
    made = {"start": images, "samples": images, "denoiser": "planted", "site": "mid_block", "batch_size": 64, **fields}
    return Trajectory(timesteps=timesteps, eta=torch.ones(len(timesteps), dtype=torch.float64), h=h, **made)


def orthonormal(k: int, seed: int = 0) -> Tensor:
    """k orthonormal vectors of the shape of planted h."""
    drawn = torch.randn(12, k, generator=torch.Generator().manual_seed(seed))
    return torch.linalg.qr(drawn).Q.T.reshape(k, *SHAPE)
