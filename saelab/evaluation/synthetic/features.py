"""Features that are known: which fire together, how often, how strongly, and the activations that they add up to.

Shapes: N rows, F features, D inputs, M circles.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int64
from torch import Tensor
from torch.nn.functional import normalize

from saelab.autoencoders.architectures.relu import ReLU
from saelab.autoencoders.sae import SAE
from saelab.base import checks
from saelab.base.codes import SparseCodes
from saelab.base.errors import ConfigError
from saelab.base.seeds import named_generator

MOST = 0.5  # of the rows, that a feature fires on
CHILD = 0.3  # of its parent's rows, that a child fires on
CHILDREN = 2  # of a parent
GROUP = 4  # features that fire together where firing is correlated
_ROWS = 4096


@dataclass(frozen=True)
class Planted:
    """Features and the rows that they make; made by `make`. Iterating gives chunks [4096, d_in] without end, to train on.

    `directions` [f, d_in] are of unit length and belong to the first f features; the others are circles: a feature whose
    activation is a radius, with an angle, uniform and independent of all else, in the plane of `planes` [m, 2, d_in].
    `densities` [f + m] are the shares of the rows on which each fires, and `parents` [f + m] the feature without which it
    never does, -1 for none.
    """

    directions: Float[Tensor, "f d_in"]
    planes: Float[Tensor, "m 2 d_in"]
    densities: Float[Tensor, " features"]
    parents: Int64[Tensor, " features"]
    correlation: float
    magnitudes: tuple[float, float]
    noise: float
    seed: int

    @property
    def d_in(self) -> int:
        return self.directions.shape[1]

    def sample(self, n: int, seed: int = 0) -> tuple[Float[Tensor, "n d_in"], SparseCodes]:
        """Rows [n, d_in] and the features that made them, [n, f + m]; none of them is among those that iterating gives.

        The first rows of a longer sample are those of a shorter one.

        >>> x, codes = make(features=8, d_in=4, seed=1).sample(5)
        >>> torch.equal(x, make(features=8, d_in=4, seed=1).sample(7)[0][:5])
        True
        """
        n, seed = checks.count("n", n), checks.seed(seed)
        chunks = [self._chunk(f"sample {seed} {start}") for start in range(0, n, _ROWS)]
        x_ND, codes_NF = (torch.cat(parts)[:n] for parts in zip(*chunks, strict=True))
        return x_ND, SparseCodes.from_dense(codes_NF)

    def __iter__(self) -> Iterator[Float[Tensor, "_ d_in"]]:
        number = 0
        while True:
            yield self._chunk(f"stream {number}")[0]
            number += 1

    def dictionary(self) -> SAE:
        """The SAE whose latents are the features, its decoder their directions, for what has no circles.

        It finds the features exactly where their directions are orthogonal (features at most d_in, `orthogonal=True`),
        and nearly where they are nearly so. Raises `ConfigError` where there are circles, which no direction stands for.
        """
        if len(self.planes):
            raise ConfigError(
                f"{len(self.planes)} of the features are circles, which no dictionary of directions holds"
            )
        sae = SAE(ReLU(l1=1.0, d_sae=len(self.directions)), self.d_in).requires_grad_(False)
        inverse_DF = torch.linalg.pinv(self.directions) if len(self.directions) <= self.d_in else self.directions.T
        sae.encoder_weight.copy_(inverse_DF.T)
        sae.W_dec.copy_(self.directions)
        sae.encoder_bias.fill_(-1e-4)  # above rounding, below any activation
        return sae

    def _chunk(self, name: str) -> tuple[Tensor, Tensor]:
        """Rows [4096, d_in] and their dense codes; the same for the same name."""
        generator = named_generator(f"planted {self.seed} {name}")
        n_features, n_circles = len(self.densities), len(self.planes)
        fires_NF = self._fires(generator)
        low, high = self.magnitudes
        codes_NF = fires_NF * (low + (high - low) * torch.rand(_ROWS, n_features, generator=generator))
        flat_NF, radius_NM = codes_NF.split([n_features - n_circles, n_circles], 1)
        x_ND = flat_NF @ self.directions
        if n_circles:
            angle_NM = 2 * torch.pi * torch.rand(_ROWS, n_circles, generator=generator)
            around = torch.stack([angle_NM.cos(), angle_NM.sin()], -1) * radius_NM[..., None]
            x_ND = x_ND + around.flatten(1) @ self.planes.flatten(0, 1)
        if self.noise:
            x_ND = x_ND + self.noise * torch.randn(x_ND.shape, generator=generator)
        return x_ND, codes_NF

    def _fires(self, generator: torch.Generator) -> Tensor:
        """Which fire: each by its own threshold of a normal number that its group shares in part, and with its parent only."""
        is_root = self.parents < 0
        own_NF = torch.randn(_ROWS, len(self.parents), generator=generator)
        shared_NG = torch.randn(_ROWS, -(-len(self.parents) // GROUP), generator=generator)
        shared_NF = shared_NG.repeat_interleave(GROUP, 1)[:, : len(self.parents)]
        together = self.correlation**0.5 * shared_NF + (1 - self.correlation) ** 0.5 * own_NF
        shares_F = torch.where(is_root, self.densities, CHILD)
        fires_NF = torch.where(is_root, together, own_NF) < torch.special.ndtri(shares_F.double()).float()
        parents_F = torch.where(is_root, torch.arange(len(is_root)), self.parents)
        for _ in range(len(is_root)):  # once a level: nothing changes below the lowest
            below = fires_NF & fires_NF[:, parents_F]
            if torch.equal(below, fires_NF):
                break
            fires_NF = below
        return fires_NF


def make(
    features: int = 64,
    d_in: int = 32,
    *,
    l0: float = 3.0,
    skew: float = 0.0,
    children: int = 0,
    correlation: float = 0.0,
    circles: int = 0,
    magnitudes: tuple[float, float] = (0.5, 1.5),
    noise: float = 0.0,
    orthogonal: bool = False,
    seed: int = 0,
) -> Planted:
    """Known features, whose sums are activations [n, d_in] of any number of rows.

    Args:
        features: how many, circles not among them.
        d_in: width of the rows.
        l0: mean number of features that fire on a row.
        skew: exponent of how unevenly they fire: the share of rows of number i is proportional to (i + 1)^-skew, at most 1/2.
        children: so many of the features, the last ones, fire only where their parent does, and on 3 in 10 of its rows: two
            children a parent, level below level.
        correlation: of the normal numbers whose thresholds decide firing, among each four features that follow each other
            and have no parent (a Gaussian copula: shares stay what they are); from 0 to below 1.
        circles: features beside the others that lie on a circle of a plane of their own, one in place of a direction.
        magnitudes: bounds of the activations, uniform between them.
        noise: standard deviation of Gaussian noise on each entry.
        orthogonal: directions (and planes) at right angles, where they fit into `d_in`; random ones otherwise.
        seed: of the features and of their rows.

    Raises `ConfigError` for numbers that do not go together.

    >>> planted = make(features=16, d_in=8, l0=2.0, skew=1.0, children=6)
    >>> round(float(planted.densities.sum()), 3), planted.parents.tolist()[10:]
    (2.0, [0, 0, 1, 1, 2, 2])
    """
    features, d_in = checks.count("features", features), checks.count("d_in", d_in)
    children = checks.count("children", children, least=0, most=features - 1, of="features but one")
    circles = checks.count("circles", circles, least=0)
    low, high = (checks.number("one of magnitudes", value, least=0) for value in magnitudes)
    if not low <= high or not high:
        raise ConfigError(
            f"magnitudes is {magnitudes!r}; it must be (low, high), with 0 <= low <= high and high above 0"
        )
    roots, seed = features - children, checks.seed(seed)
    parents = torch.full((features + circles,), -1)
    parents[roots:features] = torch.arange(children) // CHILDREN
    levels_F = torch.zeros(features + circles)
    for number in range(roots, features):
        levels_F[number] = levels_F[parents[number]] + 1
    share_F = _shares(parents, levels_F, checks.number("l0", l0, above=0), checks.number("skew", skew, least=0))
    directions, planes = _directions(features, circles, d_in, orthogonal, seed)
    correlation = checks.number("correlation", correlation, least=0, below=1)
    noise = checks.number("noise", noise, least=0)
    return Planted(directions, planes, share_F, parents, correlation, (low, high), noise, seed)


def _shares(parents_F: Tensor, levels_F: Tensor, l0: float, skew: float) -> Tensor:
    """Of each feature the share of rows on which it fires: those of roots by their number, the sum `l0`."""
    root_F = parents_F < 0
    root_of_F = torch.arange(len(root_F))
    while not bool(root_F[root_of_F].all()):
        root_of_F = torch.where(root_F[root_of_F], root_of_F, parents_F[root_of_F])
    rank_F = root_F.cumsum(0)  # counted from 1
    weights_F = rank_F.double() ** -skew

    def shares(factor: float) -> Tensor:
        return (factor * weights_F).clamp(max=MOST)[root_of_F] * CHILD ** levels_F.double()

    most = float(shares(float("inf")).sum())
    if l0 >= most:
        raise ConfigError(f"l0={l0:g} is more than {len(root_F)} features, none of which fires on more than half of the rows, "
                          f"can have ({most:g}): give more features or a smaller l0")  # fmt: skip
    low, high = 0.0, MOST / float(weights_F.min())
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if float(shares(middle).sum()) < l0 else (low, middle)
    return shares(low).float()


def _directions(features: int, circles: int, d_in: int, orthogonal: bool, seed: int) -> tuple[Tensor, Tensor]:
    n, generator = features + 2 * circles, named_generator(f"planted {seed} directions")
    if orthogonal and n > d_in:
        raise ConfigError(
            f"{n} directions at right angles (two a circle) do not fit into d_in={d_in}: give a larger d_in"
        )
    rows = torch.randn(n, d_in, generator=generator, dtype=torch.float64)
    rows = torch.linalg.qr(rows.T).Q.T if orthogonal else normalize(rows, dim=1)
    planes = rows[features:].reshape(circles, 2, d_in)
    return rows[:features].float(), torch.linalg.qr(planes.transpose(1, 2)).Q.transpose(1, 2).float()
