"""A page of SAE latents of h: when along the trajectory each fires, where in the image, and on which samples.

Shapes: K latents, N samples, S steps, h x w places of the bottleneck.
"""

import os
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from saelab.base.errors import ConfigError, DataError
from saelab.base.files import try_file, whole_file
from saelab.hspace.dictionaries import activation_maps, latent_codes
from saelab.hspace.effect_measures import judge
from saelab.hspace.image_pages import Markup, document, number, picture, png, table
from saelab.hspace.principal import h_of
from saelab.hspace.trajectory import Trajectory

if TYPE_CHECKING:
    from saelab.autoencoders.sae import SAE

# Blue-black through orange to pale yellow, at equal steps of lightness: read as heat by every kind of eye.
RAMP = torch.tensor([[16, 18, 40], [74, 28, 96], [150, 40, 98], [218, 72, 60], [248, 148, 44], [252, 236, 160]]).float()


def show_latents(
    sae: "SAE",
    trajectory: Trajectory,
    path: str | os.PathLike,
    latents: int | Sequence[int] = 48,
    *,
    classifier: Callable[[Tensor], Tensor] | None = None,
    classes: Sequence[str] | None = None,
    examples: int = 10,
    title: str = "SAE latents of h-space",
) -> None:
    """Write one self-contained page of the latents of an SAE of h, by timestep and by place in the image.

    For each latent: how often it fires and how strongly at each timestep, its mean activation at each place, and its strongest
    samples: predicted x0 at the step of its peak, the same under the map of its activations there, and the finished sample. It
    opens offline, fetches nothing and runs no script.

    Args:
        sae: trained by `train_latents`.
        trajectory: of the same denoiser, site and steps, with `h` and `x0`.
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
    rows, sections = [], []
    for latent in chosen:
        map_NShw = activation_maps(codes, [latent], shape)[0]
        profile_S = map_NShw.mean(dim=(0, 2, 3))
        when = trajectory.timesteps[int(profile_S.argmax())]
        most = words.most(map_NShw) if words else None
        density = float(fired[latent]) / len(codes)
        link = Markup(f'<a href="#latent-{latent}">{latent}</a>')
        rows.append([link, density, float(map_NShw.max()), int(when), most])
        sections.append(_latent(trajectory, latent, map_NShw, examples, f"fires at {density:.2%} of places"))
    body = [
        f'<p class="lead">{sae.d_sae:,} latents read the bottleneck at each place and step; {int((fired > 0).sum()):,} fire on '
        f"these {shape[0]:,} samples. Bars: mean activation at each timestep, noise to image from left to right. Map: mean "
        f"activation at each place. Examples: predicted x0 at the step of the latent's peak, where it is active there, and the "
        f"finished sample.</p><h2>{len(chosen)} latents</h2>",
        table(["latent", "density", "largest", "peaks at t", "most active for"], rows),
        *sections,
    ]
    with whole_file(path) as temporary:
        temporary.write_text(document(title, body), encoding="utf-8")


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


def _latent(trajectory: Trajectory, latent: int, map_NShw: Tensor, examples: int, words: str) -> str:
    peaks_NS = map_NShw.amax(dim=(2, 3))
    largest = float(peaks_NS.max())
    best = [
        n for n in peaks_NS.amax(1).argsort(descending=True, stable=True)[:examples].tolist() if peaks_NS[n].max() > 0
    ]
    figures = "".join(_example(trajectory, map_NShw, n, int(peaks_NS[n].argmax()), largest) for n in best)
    return (
        f'<section class="latent" id="latent-{latent}"><h2>Latent {latent}<small>{words}, largest activation {number(largest)}'
        f"</small></h2><div><h3>By timestep</h3>{_bars(map_NShw.mean(dim=(0, 2, 3)), trajectory.timesteps)}"
        f"<h3>By place</h3>{_map(map_NShw.mean(dim=(0, 1)))}</div>"
        f'<div><h3>Strongest samples</h3><div class="examples">{figures}</div></div></section>'
    )


def _example(trajectory: Trajectory, map_NShw: Tensor, n: int, step: int, largest: float) -> str:
    assert trajectory.x0 is not None
    t = int(trajectory.timesteps[step])
    seen = picture(trajectory.x0[n, step], f"predicted x0 of sample {n} at t = {t}")
    heat = f'<img alt="where the latent is active" src="{png(_heat(map_NShw[n, step], largest, alpha=True))}">'
    under = picture(trajectory.x0[n, step], "")
    done = picture(trajectory.samples[n], f"sample {n}")
    peak = number(float(map_NShw[n, step].max()))
    return (
        f'<figure><div class="pair">{seen}<span class="over">{under}{heat}</span>{done}</div>'
        f"<figcaption>{peak}<br>t = {t}</figcaption></figure>"
    )


def _heat(map_hw: Tensor, largest: float, alpha: bool = False) -> Any:
    """Bytes [h, w, 3 or 4]: the ramp; with alpha the weaker the more transparent."""
    level = (map_hw.float().cpu() / max(largest, 1e-12)).clamp(0, 1) * (len(RAMP) - 1)
    low = level.floor().long().clamp(max=len(RAMP) - 2)
    share = (level - low)[..., None]
    colour = (1 - share) * RAMP[low] + share * RAMP[low + 1]
    if alpha:
        colour = torch.cat([colour, 255 * (level[..., None] / (len(RAMP) - 1)).sqrt() * 0.85], dim=-1)
    return colour.round().byte().numpy()


def _map(map_hw: Tensor) -> str:
    largest = float(map_hw.max())
    return f'<img class="map" alt="mean activation at each place, at most {largest:.3g}" src="{png(_heat(map_hw, largest))}">'


def _bars(profile_S: Tensor, timesteps: Tensor) -> str:
    largest = max(float(profile_S.max()), 1e-12)
    step = 256 / len(profile_S)
    bars = "".join(
        f'<rect x="{4 + i * step:.1f}" y="{84 - 76 * value / largest:.1f}" width="{max(step - 1, 0.6):.1f}" '
        f'height="{76 * value / largest:.1f}"><title>t = {int(t)}: {value:.3g}</title></rect>'
        for i, (value, t) in enumerate(zip(profile_S.tolist(), timesteps.tolist(), strict=True))
    )
    return (
        f'<svg class="bars" viewBox="0 0 264 104" role="img" aria-label="mean activation by timestep">{bars}'
        f'<text x="4" y="99">t = {int(timesteps[0])}</text>'
        f'<text x="260" y="99" text-anchor="end">{int(timesteps[-1])}</text></svg>'
    )
