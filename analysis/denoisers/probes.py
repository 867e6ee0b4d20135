"""Linear probes of a denoiser's features by timestep and site: what it knows of a noised image, and when.

One protocol: real images noised to t, features of the network there, logistic regression, accuracy over images that each probe
has not seen, by cross-validation. Beside it the same probe on x_t itself, without which a high accuracy says nothing of the
network, and on shuffled labels, which has to be at chance.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from saelab.base import checks
from saelab.base.errors import DataError
from saelab.base.surroundings import OwnRandomness

if TYPE_CHECKING:
    from pandas import DataFrame

    from saelab.models.denoiser import Denoiser

NOISED = "x_t"


def probe_timesteps(
    denoiser: "Denoiser",
    images: Float[Tensor, "N C H W"],
    labels: Int[Tensor, " N"],
    timesteps: Sequence[int] = (0, 100, 200, 300, 500, 700),
    sites: Sequence[str] = ("mid_block",),
    *,
    pooled: bool = False,
    folds: int = 5,
    seed: int = 0,
) -> "DataFrame":
    """Cross-validated accuracy of a linear probe for the labels on the grid (timestep, site), and of x_t itself.

    Args:
        images, labels: real ones, [N, C, H, W] and [N].
        timesteps: how far the images are noised: x_t = sqrt(alpha_bar) x + sqrt(1 - alpha_bar) n, one n an image.
        sites: of the denoiser.
        pooled: also the mean over places of each site's features.
        folds: parts of the images, each predicted by a probe of the others; the same at every timestep and site.
        seed: of the noise, the folds and the shuffled labels.

    Returns: a table of `t`, `site` ("x_t" the noised image), `accuracy` with its 95% interval `low` to `high` (Wilson's, over
    images), `shuffled` (the same with labels in random order), and `chance` (the share of the largest class).

    Raises `DataError` for labels of another length or a single class, `ConfigError` for fewer than 2 folds.

    >>> import saelab, torch
    >>> denoiser = saelab.load_denoiser("digits-unet")
    >>> probe_timesteps(denoiser, torch.randn(40, 1, 8, 8), torch.arange(40) % 2, [100])["site"].tolist()
    ['mid_block', 'x_t']
    """
    import pandas

    if len(labels) != len(images) or len(labels.unique()) < 2:
        raise DataError(f"{len(labels)} labels of {len(labels.unique())} classes for {len(images)} images: a probe needs one "
                        "each, and two classes")  # fmt: skip
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(images.shape, generator=generator).to(images)
    parts = torch.randperm(len(images), generator=generator).tensor_split(checks.count("folds", folds, 2, len(images)))
    shuffled = labels[torch.randperm(len(images), generator=generator)]
    chance = float(labels.unique(return_counts=True)[1].max() / len(labels))
    rows = []
    for t in timesteps:
        alpha = float(denoiser.alphas_cumprod[t])
        x_t = alpha**0.5 * images + (1 - alpha) ** 0.5 * noise
        with torch.no_grad():
            recorded = [denoiser.record(part, int(t), list(sites)) for part in x_t.split(256)]
        features: dict[str, Tensor] = {site: torch.cat([found[site] for found in recorded]) for site in sites}
        if pooled:
            features |= {f"{site}, pooled": some.flatten(2).mean(2) for site, some in features.items()}
        for name, some in {**features, NOISED: x_t}.items():
            accuracy = _accuracy(some, labels, parts)
            low, high = _wilson(accuracy, len(labels))
            rows.append({"t": int(t), "site": name, "accuracy": accuracy, "low": low, "high": high,
                         "shuffled": _accuracy(some, shuffled, parts), "chance": chance})  # fmt: skip
    return pandas.DataFrame(rows)


def _accuracy(features: Tensor, labels: Tensor, parts: Sequence[Tensor]) -> float:
    """The share of all samples that a probe of the other parts gets right."""
    with OwnRandomness(0):  # its first import draws from Python's generator
        from sklearn.linear_model import LogisticRegression
        from sklearn.pipeline import make_pipeline
        from sklearn.preprocessing import StandardScaler

    x: Any = features.flatten(1).double().cpu().numpy()
    y = labels.cpu().numpy()
    probe = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1_000, C=0.1))
    right = 0
    for test in parts:
        train = torch.cat([part for part in parts if part is not test])
        right += int((probe.fit(x[train], y[train]).predict(x[test]) == y[test]).sum())
    return right / len(y)


def _wilson(share: float, n: int, z: float = 1.96) -> tuple[float, float]:
    """The 95% interval of a share of n (Wilson 1927)."""
    middle, half = share + z**2 / (2 * n), z * (share * (1 - share) / n + z**2 / (4 * n**2)) ** 0.5
    return (middle - half) / (1 + z**2 / n), (middle + half) / (1 + z**2 / n)


@torch.no_grad()
def posterior_gap(
    denoiser: "Denoiser", images: Float[Tensor, "N C H W"], timesteps: Sequence[int], seed: int = 0
) -> "DataFrame":
    """How far predicted x0 is from the clean image at each timestep: the information that noise has taken away.

    Yue et al. (ICLR 2024) compare the means of q(x_{t-1} | x_t, x0) with the image and with the prediction for x0; their
    difference is a known multiple of this one. Columns `t`, `x0_mse` (mean square a pixel) and `posterior_mean_gap`
    (theirs, for steps of one timestep, summed over pixels).
    """
    import pandas

    noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(seed)).to(images)
    rows = []
    for t in timesteps:
        alpha = float(denoiser.alphas_cumprod[t])
        before = float(denoiser.alphas_cumprod[t - 1]) if t > 0 else 1.0
        x_t = alpha**0.5 * images + (1 - alpha) ** 0.5 * noise
        error = torch.cat([denoiser.x0(part, int(t)) for part in x_t.split(256)]) - images
        weight = before**0.5 * (1 - alpha / before) / (1 - alpha)  # of x0 in the posterior's mean
        rows.append({"t": int(t), "x0_mse": float(error.square().mean()),
                     "posterior_mean_gap": weight**2 * float(error.flatten(1).square().sum(1).mean())})  # fmt: skip
    return pandas.DataFrame(rows)
