"""What fires on a text: the strongest latents of an autoencoder, token by token."""

from typing import TYPE_CHECKING, Any

import torch

from saelab.base import checks
from saelab.base.errors import DataError
from saelab.base.protocols import Dictionary
from saelab.models.purpose import Purpose
from saelab.models.sites import flat

if TYPE_CHECKING:
    from pandas import DataFrame

    from saelab.models.language import LanguageModel


def top_latents(lm: "LanguageModel", text: Any, sae: Dictionary, k: int = 10) -> "DataFrame":
    """See `LanguageModel.top_latents`."""
    import pandas as pd

    k = checks.count("k", k)
    tokens = lm.tokens_for(checks.autoencoder("sae", sae), text)
    if len(tokens.ids) != 1:
        raise DataError(f"top_latents reads one text at a time, not {len(tokens.ids)}: call it for each")
    purpose = Purpose.of(sae)
    x = flat(lm.record(tokens, purpose.source(lm)))
    places = purpose.positions(lm, x, tokens)[0].nonzero().flatten()
    with torch.no_grad():
        codes = sae.encode_sparse(x[0, places].to(sae.W_dec))
    best = codes.values.float().sort(descending=True, stable=True).indices[:k].cpu()
    rows = codes.rows().cpu()[best]
    latents = codes.indices.cpu()[best].tolist()
    at = places.cpu()[rows].tolist()
    labels = sae.metadata.get("labels") or {}
    return pd.DataFrame(
        {
            "position": at,
            "token": [lm.token_text(int(tokens.ids[0, position])) for position in at],
            "latent": latents,
            "activation": codes.values.float().cpu()[best].tolist(),
            "label": [str(labels.get(str(latent), "")) for latent in latents],
        }
    )
