"""Bias-free denoisers that train in minutes: f(a y) = a f(y), so that a denoiser shrinks in a basis of its own at each y.

Mohan, Kadkhodaie, Simoncelli, Fernandez-Granda (ICLR 2020), as used by Kadkhodaie, Guth, Simoncelli, Mallat (ICLR 2024).
Shapes: N images.
"""

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor, nn

from saelab.base import checks, seeds
from saelab.base.progress import progress_bar
from saelab.base.surroundings import OwnRandomness

EPSILON = 1e-5


class Rescale(nn.Module):
    """Batch normalisation without its mean: x / sd * gain, sd of each channel over the batch, or the running one."""

    running: Float[Tensor, "1 width 1 1"]

    def __init__(self, width: int) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(1, width, 1, 1))
        self.register_buffer("running", torch.ones(1, width, 1, 1))

    def forward(self, x: Float[Tensor, "N width H W"]) -> Float[Tensor, "N width H W"]:
        if not self.training:
            return x * self.gain / (self.running + EPSILON).sqrt()
        variance = x.var((0, 2, 3), keepdim=True, correction=0)
        with torch.no_grad():
            self.running.lerp_(variance, 0.1)
        return x * self.gain / (variance + EPSILON).sqrt()


class BiasFree(nn.Module):
    """BF-CNN: 3x3 convolutions without biases, rescaled, ReLU; from y of any noise level to the denoised y (blind).

    The network proper predicts the noise: f(y) = y - net(y). In evaluation mode f is homogeneous. The papers' has 21 layers of
    64 channels; the default is one for 8x8 digits.

    >>> net = BiasFree(channels=1).eval()
    >>> y = torch.rand(2, 1, 8, 8)
    >>> torch.allclose(net(3 * y), 3 * net(y), atol=1e-5)
    True
    """

    def __init__(self, channels: int = 1, layers: int = 5, width: int = 32, seed: int = 0) -> None:
        super().__init__()
        layers = checks.count("layers", layers, least=2)
        with OwnRandomness(checks.seed(seed)):
            parts: list[nn.Module] = [nn.Conv2d(channels, width, 3, padding=1, bias=False), nn.ReLU()]
            for _ in range(layers - 2):
                parts += [nn.Conv2d(width, width, 3, padding=1, bias=False), Rescale(width), nn.ReLU()]
            self.net = nn.Sequential(*parts, nn.Conv2d(width, channels, 3, padding=1, bias=False))

    def forward(self, y: Float[Tensor, "N C H W"]) -> Float[Tensor, "N C H W"]:
        return y - self.net(y)


def train_bias_free(
    images: Float[Tensor, "N C H W"],
    *,
    steps: int = 1_500,
    batch_size: int = 128,
    lr: float = 1e-3,
    layers: int = 5,
    width: int = 32,
    seed: int = 0,
    progress: bool = True,
) -> BiasFree:
    """A `BiasFree` trained on images in [0, 1], in evaluation mode.

    y = x + u^2 n with u uniform on [0, 1] (Kadkhodaie et al. 2024: all noise levels up to that of the image), the loss the
    squared error summed over pixels. Adam; the rate falls as a half cosine (our choice, theirs is halved every 100 epochs).
    Initial weights, images and noise are drawn from the seed.

    >>> net = train_bias_free(torch.rand(4, 1, 8, 8), steps=2, progress=False)
    >>> net(torch.rand(3, 1, 8, 8)).shape
    torch.Size([3, 1, 8, 8])
    """
    steps, batch_size = checks.count("steps", steps), checks.count("batch_size", batch_size)
    generator = seeds.named_generator(f"bias-free {checks.seed(seed)}")
    net = BiasFree(images.shape[1], layers, width, seed).train()
    optimiser = torch.optim.Adam(net.parameters(), lr)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, steps)
    with progress_bar(steps, f"denoising {len(images):,} images", "step", progress) as bar:
        for _ in range(steps):
            x = images[torch.randint(len(images), (batch_size,), generator=generator)]
            sigma = torch.rand(batch_size, 1, 1, 1, generator=generator).square()
            y = x + sigma * torch.randn(x.shape, generator=generator)
            loss = (net(y) - x).square().sum() / batch_size
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            schedule.step()
            bar.update()
    return net.eval()


@torch.no_grad()
def coarse_to_fine(
    denoise: Callable[[Float[Tensor, "N *shape"]], Float[Tensor, "N *shape"]],
    start: Float[Tensor, "N *shape"],
    *,
    h0: float = 0.01,
    beta: float = 0.1,
    sigma_end: float = 0.05,
    most: int = 5_000,
    seed: int = 0,
) -> tuple[Float[Tensor, "N *shape"], Float[Tensor, " N"]]:
    """Samples of a blind denoiser, and the noise that it still sees in each (Kadkhodaie and Simoncelli, NeurIPS 2021).

    With d = f(y) - y, sigma = |d| / sqrt(D) and h = h0 t / (1 + h0 (t - 1)): y <- y + h d + gamma n, gamma^2 =
    ((1 - beta h)^2 - (1 - h)^2) sigma^2, until sigma is at most `sigma_end`, each sample for itself, or for `most` steps.
    `beta` 1 adds no noise; h0, beta and sigma_end are those of the ICLR 2024 paper. Start from noise of standard deviation 1
    about the mean of the images. A network with an eigenvalue above 1 may drive a sample away for good (small ones do, for a
    few samples in a hundred): one that looks twice as noisy as at first is given up where it is (our choice).

    >>> y, sigma = coarse_to_fine(lambda y: 0.5 * y, torch.ones(1, 4), beta=1.0, sigma_end=0.1)
    >>> bool(sigma <= 0.1), bool((2 * sigma - y.abs().mean()).abs() < 1e-6)
    (True, True)
    """
    h0, beta = checks.number("h0", h0, above=0, most=1), checks.number("beta", beta, least=0, most=1)
    generator = seeds.named_generator(f"coarse to fine {checks.seed(seed)}")
    y, first = start.clone(), None
    for t in range(1, checks.count("most", most) + 1):
        d = denoise(y) - y
        sigma = d.flatten(1).square().mean(1).sqrt()
        first = sigma if first is None else first
        going = (sigma > sigma_end) & (sigma <= 2 * first)
        if not bool(going.any()):
            break
        h = h0 * t / (1 + h0 * (t - 1))
        gamma = ((1 - beta * h) ** 2 - (1 - h) ** 2) ** 0.5 * sigma
        one_each = (-1, *[1] * (y.ndim - 1))
        noise = torch.randn(y.shape, generator=generator).to(y)
        y = torch.where(going.view(one_each), y + h * d + gamma.view(one_each) * noise, y)
    return y, (denoise(y) - y).flatten(1).square().mean(1).sqrt()
