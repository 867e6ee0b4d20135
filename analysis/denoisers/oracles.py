"""Distributions whose best denoiser is known exactly, to check scores, Jacobians and probes of denoisers against.

Everything is in y = x + sigma n, n standard normal (x_t = sqrt(alpha_bar) y of a diffusion, sigma^2 = (1 - alpha_bar) /
alpha_bar). Shapes: N points, D dimensions, K components of rank R.
"""

import dataclasses

import torch
from jaxtyping import Float, Int
from torch import Tensor


@dataclasses.dataclass(frozen=True)
class Gaussian:
    """N(0, covariance): the denoiser is linear, with shrinkage s / (s + sigma^2) along each eigenvector.

    >>> one = Gaussian(torch.diag(torch.tensor([4.0, 1.0])))
    >>> one.denoise(torch.ones(1, 2), sigma=1.0), one.score(torch.ones(1, 2), sigma=1.0)
    (tensor([[0.8000, 0.5000]]), tensor([[-0.2000, -0.5000]]))
    """

    covariance: Float[Tensor, "D D"]

    def sample(self, n: int, seed: int = 0) -> Float[Tensor, "N D"]:
        """n points."""
        values, vectors = torch.linalg.eigh(self.covariance)
        drawn = torch.randn(n, len(values), generator=torch.Generator().manual_seed(seed), dtype=values.dtype)
        return (drawn * values.clamp(min=0).sqrt()) @ vectors.T

    def denoise(self, y: Float[Tensor, "N D"], sigma: float) -> Float[Tensor, "N D"]:
        """E[x | y] = S (S + sigma^2)^-1 y."""
        return y @ torch.linalg.solve(self._noisy(sigma), self.covariance).to(y)

    def score(self, y: Float[Tensor, "N D"], sigma: float) -> Float[Tensor, "N D"]:
        """The gradient of log p_sigma at y, -(S + sigma^2)^-1 y."""
        return -torch.linalg.solve(self._noisy(sigma).to(y), y.T).T

    def _noisy(self, sigma: float) -> Tensor:
        return self.covariance + sigma**2 * torch.eye(len(self.covariance)).to(self.covariance)


@dataclasses.dataclass(frozen=True)
class LowRankMixture:
    """A mixture of low-rank Gaussians (MoLRG): x ~ sum_k weights_k N(0, U_k U_k^T) (Wang et al., arXiv:2409.02426).

    `bases` [K, D, R] have orthonormal columns.

    >>> mixture = LowRankMixture.random(dimensions=12, components=2, rank=3)
    >>> x, labels = mixture.sample(5)
    >>> x.shape, mixture.denoise(x, sigma=0.1).shape
    (torch.Size([5, 12]), torch.Size([5, 12]))
    """

    bases: Float[Tensor, "K D R"]
    weights: Float[Tensor, " K"]

    @classmethod
    def random(cls, dimensions: int, components: int, rank: int, seed: int = 0) -> "LowRankMixture":
        """Equal weights; the bases are blocks of one random orthogonal matrix, so that they are orthogonal to each other."""
        generator = torch.Generator().manual_seed(seed)
        drawn = torch.randn(dimensions, components * rank, generator=generator, dtype=torch.float64)
        columns = torch.linalg.qr(drawn).Q
        bases = columns.view(dimensions, components, rank).transpose(0, 1).contiguous()
        return cls(bases, torch.full((components,), 1 / components, dtype=torch.float64))

    def sample(self, n: int, seed: int = 0) -> tuple[Float[Tensor, "N D"], Int[Tensor, " N"]]:
        """n points and the component of each."""
        generator = torch.Generator().manual_seed(seed)
        labels = torch.multinomial(self.weights, n, replacement=True, generator=generator)
        drawn = torch.randn(n, self.bases.shape[2], generator=generator, dtype=self.bases.dtype)
        return torch.einsum("ndr,nr->nd", self.bases[labels], drawn), labels

    def assignment(self, y: Float[Tensor, "N D"], sigma: float) -> Float[Tensor, "N K"]:
        """The posterior of the component: softmax of log weight + |U_k^T y|^2 / (2 sigma^2 (1 + sigma^2)) - R/2 log(1 +
        1/sigma^2).

        The log weights and the last term count only where components differ in them.
        """
        along = torch.einsum("kdr,nd->nkr", self.bases.to(y), y).square().sum(2)
        rank = self.bases.shape[2]
        constant = self.weights.log().to(y) - rank / 2 * torch.log1p(torch.tensor(1 / sigma**2)).to(y)
        return (constant + along / (2 * sigma**2 * (1 + sigma**2))).softmax(1)

    def denoise(self, y: Float[Tensor, "N D"], sigma: float) -> Float[Tensor, "N D"]:
        """E[x | y] = sum_k assignment_k U_k U_k^T y / (1 + sigma^2)."""
        projected = torch.einsum("kdr,ker,ne->nkd", self.bases.to(y), self.bases.to(y), y)
        return (self.assignment(y, sigma)[:, :, None] * projected).sum(1) / (1 + sigma**2)

    def score(self, y: Float[Tensor, "N D"], sigma: float) -> Float[Tensor, "N D"]:
        """The gradient of log p_sigma at y, by Tweedie's formula: (E[x | y] - y) / sigma^2."""
        return (self.denoise(y, sigma) - y) / sigma**2


def subspace_affinity(one: Float[Tensor, "D R"], other: Float[Tensor, "D R"]) -> float:
    """|U^T V|_F^2 / R of two orthonormal bases: 1 is the same subspace, about R / D unrelated ones.

    >>> subspace_affinity(torch.eye(3)[:, :2], torch.eye(3)[:, 1:])
    0.5
    """
    return float((one.T @ other).square().sum() / one.shape[1])
