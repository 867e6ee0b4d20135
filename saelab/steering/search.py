"""Latents to try for a concept: those that fire on its texts more often than elsewhere."""

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from saelab.base.errors import ConfigError, DataError
from saelab.base.protocols import Dictionary
from saelab.models.purpose import Purpose
from saelab.steering.contrast import batches

if TYPE_CHECKING:
    from pandas import DataFrame

    from saelab.models.language import LanguageModel

COLUMNS = ["latent", "score", "share", "usual_share", "activation", "promotes", "label"]


def find(
    lm: "LanguageModel", sae: Dictionary, text: Any, k: int = 10, *, against: Any = None, progress: bool = True
) -> "DataFrame":
    """The `k` latents that speak most for a concept, given by example: a table, best first.

    `text` is one text, or several, about the concept. The score is how surprising a latent's share of their tokens is
    next to its usual share, in nats a token: the Kullback-Leibler divergence of the two Bernoulli distributions, for
    latents that fire more often than usual (our choice; both shares are smoothed by half a firing). The best of all latents
    are shown with their figures on the texts that chose them: on other texts about the concept expect less. The usual share is
    that on the SAE's corpus, or on the texts `against`. What a latent writes is another matter than when it fires:
    `promotes` shows the tokens whose logits its direction raises most, and latents steer where these fit (`sweep`).

    Columns: `latent`, `score`, `share` (of the texts' tokens on which it fires), `usual_share`, `activation` (mean where
    it fires), `promotes` (empty where the site does not write to the residual stream), `label`.
    Tokens that the SAE is not for (see `LanguageModel.splice`) do not count.

    Raises `ConfigError` without a site, or without statistics in the SAE when there is no `against`; `DataError` when
    no token is left.

    >>> steering.find(lm, sae, ["war and peace", "the army fought the war"])  # doctest: +SKIP
    """
    import pandas as pd

    if k < 1:
        raise ConfigError(f"k is {k}: ask for at least 1 latent")
    fires_F, sums_F, n = _count(lm, sae, text, progress)
    share_F = (fires_F + 0.5) / (n + 1)
    if against is None:
        usual_F = _usual(sae)
    else:
        other_F, _, m = _count(lm, sae, against, progress)
        usual_F = (other_F + 0.5) / (m + 1)
    score_F = torch.where((share_F > usual_F) & (fires_F > 0), _divergence(share_F, usual_F), 0.0)
    order = score_F.sort(descending=True, stable=True).indices[:k]
    best = order[score_F[order] > 0].tolist()
    labels = sae.metadata.get("labels") or {}
    promoted = _promoted(lm, sae, best)
    rows = [
        (latent, float(score_F[latent]), float(fires_F[latent]) / n, float(usual_F[latent]),
         float(sums_F[latent] / fires_F[latent]), promoted[i], str(labels.get(str(latent), "")))
        for i, latent in enumerate(best)
    ]  # fmt: skip
    return pd.DataFrame(rows, columns=COLUMNS)


def _count(lm: "LanguageModel", sae: Dictionary, text: Any, progress: bool) -> tuple[Tensor, Tensor, int]:
    """How often each latent fires [F], the sum of its activations [F], and on how many tokens."""
    purpose = Purpose.of(sae)
    site = purpose.source(lm)
    d_sae = sae.W_dec.shape[0]
    fires_F, sums_F = torch.zeros(d_sae, dtype=torch.float64), torch.zeros(d_sae, dtype=torch.float64)
    n = 0
    for tokens in batches(lm, lm.tokens_for(sae, text), progress):
        x = lm.record(tokens, site)
        chosen = purpose.positions(lm, x, tokens)
        n += int(chosen.sum())
        with torch.no_grad():
            codes = sae.encode_sparse(x[chosen].to(sae.W_dec))
        latents, values = codes.indices.cpu(), codes.values.double().cpu()
        fires_F += torch.bincount(latents, minlength=d_sae)
        sums_F.index_add_(0, latents, values)
    if not n:
        raise DataError("no token of the text is one that the autoencoder is for (the first of a text, special tokens "
                        "and very long activations are not): give a longer text")  # fmt: skip
    return fires_F, sums_F, n


def _usual(sae: Dictionary) -> Tensor:
    try:
        density_F = sae.latent_stats.density.double().cpu()
    except (AttributeError, ConfigError) as error:
        raise ConfigError("the usual share of each latent is not known (the autoencoder has no statistics): "
                          "give texts to compare with, against=[...]") from error  # fmt: skip
    seen = int(sae.state.stat_tokens)
    return (density_F * seen + 0.5) / (seen + 1)


def _divergence(p: Tensor, q: Tensor) -> Tensor:
    """KL(Bernoulli(p) || Bernoulli(q)) in nats."""
    return p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log()


def _promoted(lm: "LanguageModel", sae: Dictionary, latents: list[int]) -> list[str]:
    from saelab.steering.scores import top_tokens, why_no_logits

    site = Purpose.of(sae).target(lm)
    if not latents or why_no_logits(lm, site):
        return [""] * len(latents)
    tops = top_tokens(lm, sae.W_dec.detach()[latents], 5)
    return [" ".join(repr(lm.token_text(token)) for token in row) for row in tops.tolist()]
