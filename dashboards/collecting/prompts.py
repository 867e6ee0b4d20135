"""Prompt pages: which latents fire on prompts given when the dashboard is made. T tokens of a prompt."""

from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch

from saelab.base.protocols import Dictionary
from saelab.dashboards.collecting.collect import Collection
from saelab.dashboards.collecting.one_pass import UNKNOWN_MISS
from saelab.dashboards.collecting.vocab import Ids
from saelab.dashboards.writing.codec import Half
from saelab.models.purpose import Purpose
from saelab.models.sites import Site, run_recording
from saelab.models.texts import given
from saelab.models.tokens import Tokens, padded

if TYPE_CHECKING:
    from saelab.models.language import LanguageModel

PER_TOKEN = 32


class Prompt(NamedTuple):
    """A prompt as it is shown, and its tokens, one row without padding."""

    text: str
    tokens: Tokens


def prompts_of(lm: "LanguageModel", prompts: Any, prepend_bos: bool) -> list[Prompt]:
    """The prompts given: texts, conversations or token ids, one or a list of them."""
    found = given(prompts)
    rows = lm.to_tokens(found, prepend_bos if found.texts is not None else None).rows()
    texts = found.texts or [""] * len(rows)
    return [
        Prompt(text if isinstance(text, str) and text else f"prompt {i}", padded([row], 0).to(lm.device))
        for i, (text, row) in enumerate(zip(texts, rows, strict=True))
    ]


def prompt_columns(
    lm: "LanguageModel",
    sae: Dictionary,
    site: Site,
    target: Site,
    collection: Collection,
    tokens: Tokens,
    effects: bool,
) -> dict[str, Any]:
    """The columns of a prompt's chunk, with token ids still global."""
    x = lm.record(tokens, list(dict.fromkeys([site, target])))
    x_TD = x[site.name][0].to(sae.W_dec)
    mine_T = Purpose.of(sae).positions(lm, x[site.name], tokens)[0].cpu()
    with torch.no_grad():
        codes = sae.encode_sparse(x_TD)
        size_T = (y := x[target.name][0].to(sae.W_dec).double()).square().sum(1)
        error_T = (y - sae.decode(codes, x_TD)).square().sum(1)
        log_p = lm.logits(tokens)[0].float().log_softmax(-1)
    miss_T = (15 * (error_T / size_T.clamp(min=1e-300)).clamp(max=1)).round().to(torch.uint8).cpu()
    miss_T[~mine_T] = UNKNOWN_MISS
    following = tokens.ids[0, 1:, None]
    logprob = torch.cat([torch.full((1,), torch.nan), log_p[:-1].gather(1, following)[:, 0].cpu()])

    number, latents, values, places = [], [], [], []
    for t in range(len(x_TD)):
        if not mine_T[t]:
            number.append(0)
            continue
        act, latent = (part.cpu().numpy() for part in codes.row(t))
        order = np.lexsort((latent, -act))[:PER_TOKEN]
        number.append(len(order))
        latents.append(latent[order])
        values.append(act[order].astype(np.float32))
        places.append(np.full(len(order), t))
    latent = np.concatenate([np.zeros(0, np.int64), *latents])
    act = np.concatenate([np.zeros(0, np.float32), *values])
    columns: dict[str, Any] = {
        "token": Ids(tokens.ids[0].cpu().numpy()), "logprob": logprob.numpy().astype("<f2"), "miss": miss_T.numpy(),
        "n": np.array(number, "<u2"), "latent": latent.astype("<u4"), "act": act,
        "quantile": quantiles(collection, latent, act).astype("<f2"),
    }  # fmt: skip
    if effects:
        columns["effect"] = Half(_effects(lm, sae, target, tokens, latent, act, places))
    return columns


def quantiles(collection: Collection, latents: np.ndarray, values: np.ndarray) -> np.ndarray:
    """The share of a latent's firings that are smaller than each value; NaN for latents that never fired."""
    out = np.full(len(latents), np.nan)
    for some, f in collection.of(np.unique(latents)):
        for i, latent in enumerate(some):
            mine = np.sort(f.values[f.offsets[i] : f.offsets[i + 1]])
            asked = latents == latent
            if len(mine):
                out[asked] = np.searchsorted(mine, values[asked]) / len(mine)
    return out


def _effects(
    lm: "LanguageModel",
    sae: Dictionary,
    target: Site,
    tokens: Any,
    latent: np.ndarray,
    act: np.ndarray,
    places: list[np.ndarray],
) -> np.ndarray:
    if tokens.ids.shape[1] < 2 or not len(latent):
        return np.zeros(len(latent))
    _, gradient = run_recording(lm, tokens, [target], gradients=True)
    g = gradient[target.name][0].to(sae.W_dec)[torch.from_numpy(np.concatenate(places)).to(sae.W_dec.device)]
    d = sae.W_dec.detach()[torch.from_numpy(latent).to(sae.W_dec.device)]
    return -act * (d * g).sum(1).double().cpu().numpy()
