"""Do denoisers memorise or generalise? Two of them on disjoint halves, and subspaces found in samples of a mixture.

Kadkhodaie, Guth, Simoncelli, Mallat (ICLR 2024), section 2; Wang et al. (arXiv:2409.02426), theorems 1 to 4. Shapes: N images.
"""

import dataclasses
import os
from collections.abc import Sequence
from operator import itemgetter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor

from saelab.analysis.denoisers.bias_free import BiasFree, coarse_to_fine, train_bias_free
from saelab.analysis.denoisers.oracles import LowRankMixture, subspace_affinity
from saelab.base import checks, digests, seeds
from saelab.base.errors import CheckpointError, ConfigError
from saelab.base.files import user_path
from saelab.base.manifests import FLOATS, TEXT, read_tensors
from saelab.base.tensors import write_tensors

if TYPE_CHECKING:
    from pandas import DataFrame

FORMAT = "saelab-bias-free-1"
SIGMAS = (0.05, 0.1, 0.2, 0.3, 0.6, 1.0)
SIGMA_END = 0.05  # of samples


@dataclasses.dataclass(frozen=True, repr=False)
class TwoSplit:
    """What two denoisers that were trained on disjoint images have in common.

    `curves`: a row for each number of training images and noise level: `images`, `sigma`, `psnr_in`, `psnr_train` and
    `psnr_test` (10 log10(1 / MSE), images in [0, 1], mean over the two denoisers), `distance` (|f1(y) - f2(y)| / (sigma
    sqrt(D)) on test images). `samples`: a row for each number of images: `images`, `between` (mean cosine of the two
    denoisers' samples from the same noise, each without its mean) and `nearest` (mean cosine of a sample and the nearest image
    of its denoiser's training), of the share of the starts, `arrived`, from which both denoisers came to a sample.
    """

    curves: "DataFrame"
    samples: "DataFrame"

    def slopes(self) -> "DataFrame":
        """The slope of PSNR out over PSNR in by number of images, on training and test images: 1 where the images are
        memorised, for images of smoothness a about a / (a + 1) (ICLR 2024, section 3)."""
        import pandas

        rows = []
        for images, some in self.curves.groupby("images"):
            at = torch.tensor(some.psnr_in.to_numpy())
            slope = {
                part: float(((at - at.mean()) * torch.tensor(some[f"psnr_{part}"].to_numpy())).sum()
                            / (at - at.mean()).square().sum())
                for part in ("train", "test")
            }  # fmt: skip
            rows.append({"images": images, **slope})
        return pandas.DataFrame(rows)

    def to_pandas(self) -> "DataFrame":
        """Both tables, a row for each number of images and noise level."""
        return self.curves.merge(self.samples, on="images")

    def plot(self) -> Any:
        """A plotly figure: PSNR out over PSNR in, on training images (dashed) and test images."""
        import plotly.express

        long = self.curves.melt(["images", "psnr_in"], ["psnr_train", "psnr_test"], "part", "psnr_out")
        return plotly.express.line(
            long, x="psnr_in", y="psnr_out", color="images", line_dash="part", markers=True,
            title="Denoisers on training and test images, by the number of training images",
        )  # fmt: skip

    def __repr__(self) -> str:
        return f"TwoSplit\n{self.samples.round(3).to_string(index=False)}"


def two_split(
    images: Float[Tensor, "N C H W"],
    counts: Sequence[int] = (10, 100, 700),
    *,
    sigmas: Sequence[float] = SIGMAS,
    samples: int = 32,
    out: str | os.PathLike[str] | None = None,
    seed: int = 0,
    progress: bool = True,
    **training: Any,
) -> TwoSplit:
    """Train two bias-free denoisers on disjoint halves of each size, and measure how far they agree.

    Of the images in an order of their own the first `count` and the last `count` are trained on; those in the middle, which no
    pair is trained on, are the test images. Both denoisers of a size start from the same weights and see the same noise, so
    that only the images differ. Few images are memorised: training images are denoised better than others, samples are training
    images and differ between the two. With many, both denoisers and their samples agree. Near duplicates, which the paper takes
    out first, are the caller's to find.

    Args:
        images: in [0, 1].
        counts: sizes of the halves; two of the largest have to leave some over.
        sigmas: noise levels at which they are compared.
        samples: how many are drawn of each denoiser, by `coarse_to_fine`.
        out: a folder for the trained denoisers; another call with the same images and settings goes on from those there.
        seed: of the order, the weights, the noise.
        progress: show bars.
        training: what `train_bias_free` takes.

    Raises `ConfigError` where images are too few, `CheckpointError` where `out` has denoisers of other images or settings.

    >>> found = two_split(torch.rand(12, 1, 8, 8), counts=[2, 4], steps=2, samples=2, sigmas=[0.1, 0.5], progress=False)
    >>> found.curves.shape, found.samples.columns.tolist()
    ((4, 6), ['images', 'between', 'nearest', 'arrived'])
    """
    import pandas

    counts = sorted(checks.counts("counts", counts))
    over = len(images) - 2 * counts[-1]
    if over < 1:
        raise ConfigError(
            f"two halves of {counts[-1]:,} leave none of {len(images):,} images for the test: give smaller counts"
        )
    generator = seeds.named_generator(f"two halves {checks.seed(seed)}")
    images = images[torch.randperm(len(images), generator=generator)]
    test = images[counts[-1] : counts[-1] + over]
    start = test.mean(0) + torch.randn(samples, *images.shape[1:], generator=generator)
    noise = torch.randn(test.shape, generator=generator)
    curves, agreement = [], []
    for count in counts:
        halves = images[:count], images[-count:]
        nets = [
            _trained(half, out, f"{count}-{name}", {"seed": seed, **training}, progress)
            for name, half in zip(("first", "last"), halves, strict=True)
        ]
        curves += [_compared(nets, halves, test, noise, sigma) | {"images": count} for sigma in sigmas]
        found = [coarse_to_fine(net, start, sigma_end=SIGMA_END, seed=seed) for net in nets]
        arrived = torch.stack([sigma <= SIGMA_END for _, sigma in found]).all(0)
        drawn = [y[arrived] for y, _ in found]
        nearest = [_cosines(some, half).amax(1).mean() for some, half in zip(drawn, halves, strict=True)]
        between = _cosines(*drawn).diagonal().mean()
        share = float(arrived.double().mean())
        agreement.append(
            {"images": count, "between": float(between), "nearest": float(sum(nearest)) / 2, "arrived": share}
        )
    columns = ["images", "sigma", "psnr_in", "psnr_train", "psnr_test", "distance"]
    return TwoSplit(pandas.DataFrame(curves)[columns], pandas.DataFrame(agreement))


def _trained(images: Tensor, out: Any, name: str, settings: dict[str, Any], progress: bool) -> BiasFree:
    """The denoiser that the folder has, or a new one."""
    if out is None:
        return train_bias_free(images, progress=progress, **settings)
    path, of = user_path(out) / f"{name}.safetensors", digests.of_tensors({"images": images})
    told = {"images": of, "settings": digests.of_json(settings)}
    if not path.exists():
        net = train_bias_free(images, progress=progress, **settings)
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        write_tensors(path, net.state_dict(), {"format": FORMAT, **told})
        return net
    shape = {name: settings[name] for name in ("layers", "width") if name in settings}
    tensors, strings = read_tensors(path, {"*": (FLOATS, "...")}, FORMAT, {"images": TEXT, "settings": TEXT})
    if other := [key for key, value in told.items() if strings[key] != value]:
        raise CheckpointError(f"{path} was trained with other {' and '.join(other)}: give another folder as out")
    net = BiasFree(images.shape[1], **shape)
    net.load_state_dict(tensors)
    return net.eval()


@torch.no_grad()
def _compared(
    nets: Sequence[BiasFree], halves: Sequence[Tensor], test: Tensor, noise: Tensor, sigma: float
) -> dict[str, float]:
    one, other = (net(test + sigma * noise) for net in nets)
    trained = [
        (net(half + sigma * noise[torch.arange(len(half)) % len(noise)]) - half).square().mean()
        for net, half in zip(nets, halves, strict=True)
    ]
    squares = {"train": trained, "test": [(seen - test).square().mean() for seen in (one, other)]}
    psnr = {f"psnr_{part}": float(-10 * torch.stack(some).mean().log10()) for part, some in squares.items()}
    distance = float(((one - other).flatten(1).norm(dim=1) / (sigma * one[0].numel() ** 0.5)).mean())
    return {"sigma": sigma, "psnr_in": float(-20 * torch.tensor(sigma).log10()), **psnr, "distance": distance}


def _cosines(some: Tensor, others: Tensor) -> Float[Tensor, "N M"]:
    """Of each image with each other, the mean of its pixels taken away."""
    a, b = (
        torch.nn.functional.normalize(x.flatten(1) - x.flatten(1).mean(1, keepdim=True), dim=1) for x in (some, others)
    )
    return a @ b.T


def phase_curve(
    rank: int, counts: Sequence[int], *, dimensions: int = 48, components: int = 1, draws: int = 10, seed: int = 0
) -> "DataFrame":
    """How well the subspaces of a mixture of low-rank Gaussians are found in so many samples of each component.

    Training a denoiser of the mixture's form is PCA for one component and K-subspaces for more (Wang et al., theorems 1 and
    3); done here are these, K-subspaces from 10 random starts. For one component the share of the subspace that is found is
    min(N, rank) / rank exactly: as many samples as dimensions are the phase transition.

    Returns: a row a count: `samples` (of each component), `ratio` to the rank, `affinity` (`subspace_affinity` with the true
    bases, matched one to one; mean over draws), `low`, `high` (over the draws) and `found`, the share of the draws above .95.

    >>> phase_curve(rank=4, counts=[2, 4, 8], dimensions=12, draws=3).affinity.round(3).tolist()
    [0.5, 1.0, 1.0]
    """
    import pandas

    rows = []
    for count in checks.counts("counts", counts):
        found = torch.tensor(
            [_recovered(rank, count, dimensions, components, f"{seed} {draw}") for draw in range(draws)]
        )
        rows.append({"samples": count, "ratio": count / rank, "affinity": float(found.mean()), "low": float(found.min()),
                     "high": float(found.max()), "found": float((found > 0.95).double().mean())})  # fmt: skip
    return pandas.DataFrame(rows)


def _recovered(rank: int, count: int, dimensions: int, components: int, name: str) -> float:
    from scipy.optimize import linear_sum_assignment

    generator = seeds.named_generator(f"phase curve {name}")
    drawn = int(torch.randint(2**31, (1,), generator=generator))
    mixture = LowRankMixture.random(dimensions, components, rank, drawn)
    weights = torch.randn(components, count, rank, generator=generator, dtype=torch.float64)
    x_ND = torch.einsum("kdr,knr->knd", mixture.bases, weights).flatten(0, 1)
    best = min(
        (_k_subspaces(x_ND, components, rank, generator) for _ in range(10 if components > 1 else 1)), key=itemgetter(1)
    )
    affinity = [[subspace_affinity(U, V) for V in best[0]] for U in mixture.bases]
    pairs = linear_sum_assignment(affinity, maximize=True)
    return sum(affinity[i][j] for i, j in zip(*pairs, strict=True)) / components


def _k_subspaces(x_ND: Tensor, K: int, rank: int, generator: torch.Generator, rounds: int = 50) -> tuple[Tensor, float]:
    """Bases [K, D, R] and the squared error left: each sample to the nearest subspace, each subspace by PCA of its samples."""
    D = x_ND.shape[1]
    bases = torch.linalg.qr(torch.randn(K, D, rank, generator=generator, dtype=x_ND.dtype)).Q
    labels = torch.full((len(x_ND),), -1)
    for _ in range(rounds):
        nearest = torch.einsum("kdr,nd->nkr", bases, x_ND).square().sum(2).argmax(1)
        if torch.equal(nearest, labels):
            break
        labels = nearest
        bases = torch.stack([_basis(x_ND[labels == k], rank, bases[k]) for k in range(K)])
    inside = torch.einsum("kdr,nd->nkr", bases, x_ND).square().sum(2).amax(1)
    return bases, float((x_ND.square().sum(1) - inside).sum())


def _basis(x_ND: Tensor, rank: int, before: Tensor) -> Float[Tensor, "D R"]:
    """The leading principal axes; of fewer samples than the rank only theirs, and zeros."""
    if not len(x_ND):
        return before
    values, axes_RD = torch.linalg.svd(x_ND, full_matrices=False)[1:]
    kept = axes_RD[:rank] * (values[:rank, None] > 1e-9 * values[0])
    return torch.nn.functional.pad(kept, (0, 0, 0, rank - len(kept))).T
