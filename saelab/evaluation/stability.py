"""Would another seed, or another size, find the same latents? Shapes: S latents of one, T of another, D outputs."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from jaxtyping import Float, Int64
from torch import Tensor
from torch.nn.functional import normalize

from saelab.base.errors import ConfigError
from saelab.base.protocols import Dictionary
from saelab.base.seeds import named_generator
from saelab.evaluation.matching import matched
from saelab.evaluation.scores import Score, Scores

if TYPE_CHECKING:
    from pandas import DataFrame

    from saelab.models.language import LanguageModel

NULL = "alike directions"


@dataclass(frozen=True)
class Stability:
    """Latents of each autoencoder found again among those of each other, by the cosine of their decoder rows.

    Figures of one autoencoder, `of` another; each a mean over its latents, with a bootstrap interval over them:

    - "mean maximum cosine": with the nearest latent of the other, which may be near to several.
    - "matched cosine": with its own latent of the other, one to one (Hungarian method); where the other has fewer, of those
      that are matched (`n`).
    - "universal": share of latents whose nearest is within `threshold`.

    The control, "alike directions", has in the other's place as many random directions with the same mean and
    covariance (Gaussian): what all latents have in common is no latent found again. The interval says how the figure varies
    with the latents, not with the seeds: give several of them for that. Latents whose `latent_stats` say that they never
    fired are left out, and so are rows of zeros. `details["stability"]` has a row a latent.

    Raises `ConfigError` for fewer than two autoencoders, and for such as write at different sites.

    >>> import saelab
    >>> saes = {str(seed): saelab.SAE(saelab.TopK(k=1, d_sae=8), 64, seed=seed) for seed in (0, 1)}
    >>> scores = Stability().run(saes)
    >>> scores.value("universal", sae="0")
    0.0
    """

    threshold: float = 0.7
    seed: int = 0
    name: ClassVar[str] = "stability"

    @torch.no_grad()
    def run(self, saes: Mapping[str, Dictionary], lm: "LanguageModel | None" = None) -> Scores:
        if len(saes) < 2:
            raise ConfigError("stability compares autoencoders, and this is one: give two, of other seeds or sizes")
        places = {(sae.d_out, sae.metadata.get("target_site") or sae.metadata.get("site")) for sae in saes.values()}
        if len(places) > 1:
            raise ConfigError(
                f"stability compares autoencoders of one site, and these write at {sorted(map(str, places))}"
            )
        rows = {name: directions(sae) for name, sae in saes.items()}
        scores = Scores([])
        for name, (latents, first_SD) in rows.items():
            for other, (found, second_TD) in rows.items():
                if other == name:
                    continue
                cosine_ST = first_SD @ second_TD.T
                match_S = matched(cosine_ST)
                table = _table(latents, found, cosine_ST, match_S).assign(of=other)
                null_ST = first_SD @ alike(second_TD, named_generator(f"stability {self.seed}")).T
                figures = self._figures(cosine_ST, match_S, other)
                null = self._figures(null_ST, matched(null_ST), other, NULL)
                scores += Scores.of(name, self.name, [*figures, *null], table)
        return scores

    def _figures(self, cosine_ST: Tensor, match_S: Tensor, of: str, source: str = "sae") -> list[Score]:
        nearest_S = cosine_ST.amax(1)
        has_S = match_S >= 0
        own = cosine_ST[has_S, match_S[has_S]]
        values = {
            "mean maximum cosine": nearest_S,
            "matched cosine": own,
            "universal": (nearest_S > self.threshold).double(),
        }  # sorted, so that the order of the latents changes no interval
        return [Score.mean(figure, sorted(value.tolist()), of, source=source) for figure, value in values.items()]


def directions(sae: Dictionary) -> tuple[Int64[Tensor, " s"], Float[Tensor, "s d"]]:
    """Numbers of the latents that fired and have a decoder row, and these rows, of unit length."""
    rows_SD = sae.W_dec.double().cpu()
    live_S = rows_SD.norm(dim=1) > 0
    if int(getattr(sae.state, "stat_tokens", 0)):
        live_S &= sae.latent_stats.max.cpu() > 0
    if not bool(live_S.any()):
        raise ConfigError(
            f"none of the {len(live_S)} latents of {sae.cfg!r} fired in its training: there is nothing to find again"
        )
    return live_S.nonzero()[:, 0], normalize(rows_SD[live_S], dim=1)


def alike(rows_TD: Float[Tensor, "t d"], generator: torch.Generator) -> Float[Tensor, "t d"]:
    """Random unit vectors, as many, drawn from the Gaussian with the same mean and covariance.

    >>> alike(torch.tensor([[1.0, 0.0], [1.0, 0.0]]).double(), named_generator("doc"))
    tensor([[1., 0.],
            [1., 0.]], dtype=torch.float64)
    """
    mean_D = rows_TD.mean(0)
    values, vectors = torch.linalg.eigh((rows_TD - mean_D).T @ (rows_TD - mean_D) / len(rows_TD))
    root_DD = vectors * values.clamp(min=0).sqrt() @ vectors.T
    return normalize(mean_D + torch.randn(rows_TD.shape, generator=generator, dtype=rows_TD.dtype) @ root_DD, dim=1)


def _table(latents: Tensor, found: Tensor, cosine_ST: Tensor, match_S: Tensor) -> "DataFrame":
    import pandas

    nearest = cosine_ST.max(1)
    has_S = match_S >= 0
    own_S = cosine_ST.gather(1, match_S.clamp(min=0)[:, None])[:, 0]
    return pandas.DataFrame(
        {
            "latent": latents.numpy(),
            "nearest": found[nearest.indices].numpy(),
            "maximum cosine": nearest.values.numpy(),
            "matched": torch.where(has_S, found[match_S.clamp(min=0)], -1).numpy(),
            "matched cosine": torch.where(has_S, own_S, float("nan")).numpy(),
        }
    )
