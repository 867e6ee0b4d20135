"""Pictures as a page holds them: base64 of PNG."""

import base64
import io
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

# Blue-black through orange to pale yellow, at equal steps of lightness: read as heat by every kind of eye.
RAMP = torch.tensor([[16, 18, 40], [74, 28, 96], [150, 40, 98], [218, 72, 60], [248, 148, 44], [252, 236, 160]]).float()


def picture(image: Float[Tensor, "C H W"]) -> str:
    """The picture of values in [-1, 1]; three channels are colours, of others the mean is grey."""
    levels = ((image.float().clamp(-1, 1) + 1) * 127.5).round().byte().cpu()
    levels = levels.permute(1, 2, 0) if len(levels) == 3 else levels.float().mean(0).round().byte()
    return png(levels.numpy())


def heat(map_hw: Float[Tensor, "h w"], largest: float, alpha: bool = False) -> str:
    """The picture of a map, by the ramp; with alpha the weaker the more transparent."""
    level = (map_hw.float().cpu() / max(largest, 1e-12)).clamp(0, 1) * (len(RAMP) - 1)
    low = level.floor().long().clamp(max=len(RAMP) - 2)
    share = (level - low)[..., None]
    colour = (1 - share) * RAMP[low] + share * RAMP[low + 1]
    if alpha:
        colour = torch.cat([colour, 255 * (level[..., None] / (len(RAMP) - 1)).sqrt() * 0.85], dim=-1)
    return png(colour.round().byte().numpy())


def png(levels: Any) -> str:
    """Of an array of bytes [H, W] or [H, W, 3 or 4]."""
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(levels).save(buffer, "PNG", optimize=True)
    return base64.b64encode(buffer.getvalue()).decode()
