"""A page of SAE latents of h: when along the trajectory each fires, where in the image, and on which samples.

Shapes: K latents, N samples, S steps, h x w places of the bottleneck.
"""

import os
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Shaped
from torch import Tensor

from saelab.base.errors import ConfigError, DataError
from saelab.base.files import try_file, whole_file
from saelab.hspace.dictionaries import activation_maps, latent_codes
from saelab.hspace.effect_measures import judge
from saelab.hspace.pictures import heat, picture
from saelab.hspace.principal import h_of
from saelab.hspace.trajectory import Trajectory
from saelab.pages.shell import report

if TYPE_CHECKING:
    from saelab.autoencoders.sae import SAE


def show_latents(
    sae: "SAE",
    trajectory: Trajectory,
    path: str | os.PathLike[str],
    latents: int | Sequence[int] = 48,
    *,
    classifier: Callable[[Shaped[Tensor, "..."]], Shaped[Tensor, "..."]] | None = None,
    classes: Sequence[str] | None = None,
    examples: int = 10,
    title: str = "SAE latents of h-space",
) -> None:
    """Write one self-contained page of the latents of an SAE of h, by timestep and by place in the image.

    For each latent: how often it fires and how strongly at each timestep, its mean activation at each place, and its strongest
    samples: predicted x0 at the step of its peak, the same under the map of its activations there, and the finished sample. It
    opens offline and fetches nothing.

    Args:
        sae: trained by `saelab.train(denoiser, ...)` or by `train_latents`.
        trajectory: of the same denoiser and site (of `train_latents` also the same steps), with `h` and `x0`.
        latents: which; or how many of those that fire on this trajectory, evenly over the ranks of how often.
        classifier: images -> logits: adds the classes of the finished samples on which a latent is most active.
        classes: their names.
        examples: samples shown for each.

    Raises `ConfigError` for an SAE of something else or a latent that it does not have, `DataError` where x0 was not recorded.
    """
    path = try_file(path)
    if trajectory.x0 is None:
        raise DataError('the page shows predicted x0: sample with record=("h", "x0", ...)')
    codes = latent_codes(sae, trajectory)
    shape = [*h_of(trajectory).shape[:2], *h_of(trajectory).shape[3:]]
    fired = torch.bincount(codes.indices.cpu(), minlength=sae.d_sae)
    chosen = _chosen(fired, latents)
    words = None
    if classifier is not None:
        words = _ClassMeans(judge(classifier, trajectory.samples).probabilities.argmax(1), classes)
    found = []
    for latent in chosen:
        map_NShw = activation_maps(codes, [latent], shape)[0]
        more = {"density": float(fired[latent]) / len(codes), "most": words.most(map_NShw) if words else None}
        found.append(_latent(trajectory, latent, map_NShw, examples) | more)
    data = {
        "title": title, "d_sae": sae.d_sae, "live": int((fired > 0).sum()), "samples": shape[0],
        "timesteps": trajectory.timesteps.tolist(), "latents": found,
    }  # fmt: skip
    with whole_file(path) as temporary:
        temporary.write_text(report("hspace-latents", data), encoding="utf-8")


def _chosen(fired: Tensor, latents: int | Sequence[int]) -> list[int]:
    if not isinstance(latents, int):
        for latent in latents:
            if not 0 <= latent < len(fired):
                raise ConfigError(f"there is no latent {latent}: the SAE has {len(fired):,}")
        return list(latents)
    live = [latent for latent in fired.argsort(descending=True, stable=True).tolist() if fired[latent]]
    picks = torch.linspace(0, len(live) - 1, min(latents, len(live))).round().long().tolist()
    return [live[i] for i in picks]


class _ClassMeans:
    """Which classes a latent is most active for."""

    def __init__(self, labels_N: Tensor, classes: Sequence[str] | None) -> None:
        self.labels_N = labels_N.cpu()
        self.present = self.labels_N.unique().tolist()
        self.names = list(classes) if classes is not None else [str(i) for i in range(int(self.labels_N.max()) + 1)]

    def most(self, map_NShw: Tensor) -> str:
        activity_N = map_NShw.mean(dim=(1, 2, 3))
        means = [float(activity_N[self.labels_N == label].mean()) for label in self.present]
        best = max(range(len(means)), key=means.__getitem__)
        return f"{self.names[self.present[best]]} ({means[best] / max(float(activity_N.mean()), 1e-12):.1f}x the mean)"


def _latent(trajectory: Trajectory, latent: int, map_NShw: Tensor, examples: int) -> dict[str, Any]:
    peaks_NS, profile_S, map_hw = map_NShw.amax(dim=(2, 3)), map_NShw.mean(dim=(0, 2, 3)), map_NShw.mean(dim=(0, 1))
    largest = float(peaks_NS.max())
    best = [
        n for n in peaks_NS.amax(1).argsort(descending=True, stable=True)[:examples].tolist() if peaks_NS[n].max() > 0
    ]
    return {
        "latent": latent, "largest": largest, "peaks_at": int(trajectory.timesteps[int(profile_S.argmax())]),
        "profile": profile_S.tolist(), "map": heat(map_hw, float(map_hw.max())), "map_largest": float(map_hw.max()),
        "examples": [_example(trajectory, map_NShw, n, int(peaks_NS[n].argmax()), largest) for n in best],
    }  # fmt: skip


def _example(trajectory: Trajectory, map_NShw: Tensor, n: int, step: int, largest: float) -> dict[str, Any]:
    assert trajectory.x0 is not None
    return {
        "sample": n, "t": int(trajectory.timesteps[step]), "peak": float(map_NShw[n, step].max()),
        "x0": picture(trajectory.x0[n, step]), "heat": heat(map_NShw[n, step], largest, alpha=True),
        "done": picture(trajectory.samples[n]),
    }  # fmt: skip
