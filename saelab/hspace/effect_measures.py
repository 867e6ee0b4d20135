"""What an edit changed in the images, by a classifier and by distances, and the random directions it is held against.

Shapes: N images, K classes, F features, S steps.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float, Shaped
from torch import Tensor

from saelab.base.errors import ConfigError
from saelab.hspace.directions import Direction, unit
from saelab.hspace.principal import h_of
from saelab.hspace.trajectory import Trajectory

CONTROLS = ("isotropic", "covariance")
BATCH = 512


@dataclasses.dataclass(frozen=True)
class Judged:
    """What a classifier says of images: `probabilities` [N, K] and `features` [N, F]."""

    probabilities: Tensor
    features: Tensor


@torch.no_grad()
def judge(
    classifier: Callable[[Shaped[Tensor, "..."]], Shaped[Tensor, "..."]], images: Float[Tensor, "N C H W"]
) -> Judged:
    """Probabilities (softmax of its logits) and features (`classifier.features`, else the pixels) of the images.

    >>> judge(lambda x: x.flatten(1), torch.zeros(3, 1, 2, 1)).probabilities
    tensor([[0.5000, 0.5000],
            [0.5000, 0.5000],
            [0.5000, 0.5000]])
    """
    features = getattr(classifier, "features", lambda x: x.flatten(1))
    parts = images.split(BATCH)
    probabilities = torch.cat([classifier(part).softmax(1) for part in parts])
    return Judged(probabilities, torch.cat([features(part) for part in parts]))


def changes(
    before: Float[Tensor, "N C H W"], after: Float[Tensor, "N C H W"], was: Judged, now: Judged,
    data: Float[Tensor, "M F"] | None = None,
) -> dict[str, Any]:  # fmt: skip
    """The figures of one edit, means over the samples.

    - `p_<k>`: probability of class k after it; `change_<k>`: after less before;
    - `flip_rate`: share of images whose most probable class is another;
    - `confidence`: the largest probability after it, a proxy of quality (as is the next);
    - `nearest`: distance in feature space to the nearest of `data` (features of real images), over that before the edit;
    - `rms`: root mean square change of the pixels;
    - `identity`: distance in feature space to the same sample unedited, over the mean distance between two unedited samples:
      0 is the same image, 1 as far as another sample.

    >>> x = torch.tensor([[[[1.0]]], [[[3.0]]]])
    >>> was, now = (Judged(torch.tensor(p), y.flatten(1)) for p, y in [([[1.0, 0], [0, 1]], x), ([[1.0, 0], [1, 0]], x - 1)])
    >>> found = changes(x, x - 1, was, now)
    >>> found["flip_rate"], found["change_0"], found["rms"], found["identity"]
    (0.5, 0.5, 1.0, 0.5)
    """
    found: dict[str, Any] = {
        "flip_rate": float((was.probabilities.argmax(1) != now.probabilities.argmax(1)).float().mean()),
        "confidence": float(now.probabilities.max(1).values.mean()),
        "rms": float((after - before).flatten(1).square().mean(1).sqrt().mean()),
    }
    n = len(before)
    if n > 1:
        apart = torch.cdist(was.features, was.features).sum() / (n * (n - 1))
        found["identity"] = float((now.features - was.features).norm(dim=1).mean() / apart)
    if data is not None:
        found["nearest"] = float(_nearest(now.features, data) / _nearest(was.features, data))
    means = now.probabilities.mean(0)
    for k, (p, p_before) in enumerate(zip(means.tolist(), was.probabilities.mean(0).tolist(), strict=True)):
        found |= {f"p_{k}": p, f"change_{k}": p - p_before}
    return found


def random_direction(
    like: Direction, trajectory: Trajectory | None = None, kind: str = "isotropic", seed: int = 0
) -> Direction:
    """A random direction as long as `like` at every step, to hold it against.

    "isotropic" has the same random unit vector at all steps, and is easily beaten, as h hardly varies along most;
    "covariance" the same random combination of the trajectory's samples about their mean, so that it varies where h varies (a
    direction off the data does little for that reason alone).

    Raises `ConfigError` for another kind, or "covariance" without a trajectory of the direction's denoiser and site.

    >>> like = Direction(torch.full((1, 4, 1, 1), 0.5), torch.tensor([3.0]), None, "mid_block", "abc")
    >>> random_direction(like, seed=1).delta(torch.tensor([5])).norm()
    tensor(3.)
    """
    generator = torch.Generator().manual_seed(seed)
    timesteps = like.timesteps
    if kind == "isotropic":
        drawn = torch.randn(like.vector.shape[1:], generator=generator, dtype=torch.float64)
        raw = drawn.expand(like.vector.shape)
    elif kind == "covariance":
        if trajectory is None or (trajectory.denoiser, trajectory.site) != (like.denoiser, like.site):
            raise ConfigError(
                "a covariance-matched direction needs the trajectory of the direction's denoiser and site"
            )
        h = h_of(trajectory)
        weights = torch.randn(len(h), generator=generator, dtype=torch.float64).to(h.device)
        raw = torch.tensordot(weights, h.double() - h.double().mean(0), dims=1)
        timesteps = trajectory.timesteps
    else:
        raise ConfigError(f"there is no control {kind!r}: choose one of {', '.join(CONTROLS)}")
    grid = torch.zeros(1, dtype=torch.long) if timesteps is None else timesteps
    size = like.delta(grid).flatten(1).norm(dim=1)
    return dataclasses.replace(
        like, vector=unit(raw)[0].to(like.vector), scale=size, timesteps=timesteps, name=f"{kind} {seed}", details={}
    )


def _nearest(features: Tensor, data: Tensor) -> Tensor:
    return torch.stack([torch.cdist(some, data.to(some)).min(1).values.sum() for some in features.split(BATCH)]).sum()
