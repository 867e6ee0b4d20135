"""Which latents are worth steering with: top logit tokens, output score and input score of each."""

import math
import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from saelab.base.errors import ConfigError
from saelab.base.protocols import Dictionary
from saelab.models.purpose import Purpose, counted
from saelab.models.sites import Site
from saelab.models.tokens import Tokens
from saelab.models.unembedding import unembedding, written_share
from saelab.reading.corpus import contexts_for
from saelab.reading.reader import ContextReader
from saelab.steering import text_measures as measures

if TYPE_CHECKING:
    from saelab.models.language import LanguageModel

NEUTRAL_PROMPT = "From my experience,"  # Arad et al. 2025
NEUTRAL_TOKENS = 4
AMPLIFIED = 10.0


def why_no_logits(lm: "LanguageModel", site: Site) -> str:
    """Why a vector at the site has no logits of its own; "" where it has: it is added to the stream before the last norm."""
    try:
        norm = unembedding(lm).module
    except ConfigError as error:
        return str(error)
    return "" if written_share(lm, site, norm) else f"{site.name} does not write to the residual stream"


def top_tokens(
    lm: "LanguageModel", directions_ND: Float[Tensor, "N D"], k: int = measures.TOP_TOKENS
) -> Int[Tensor, "N k"]:
    """The `k` tokens [N, k] whose logits each direction [N, D] of the residual stream raises most, the strongest first.

    They are the largest entries of (direction * gain) W_U with the last norm's gain (the "logit lens" of a latent).
    Of equals the lower id comes first. Raises `ConfigError` where the model has no unembedding.

    >>> top_tokens(lm, sae.W_dec[[123]])  # doctest: +SKIP
    """
    heads = unembedding(lm)
    k = min(k, heads.W_U.shape[1])
    rows = [
        heads.logits(part).sort(dim=-1, descending=True, stable=True).indices[:, :k] for part in directions_ND.split(64)
    ]
    return torch.cat(rows).cpu()


def neutral_tokens(lm: "LanguageModel", sae: Dictionary) -> Tokens:
    """The text before which a latent is amplified for its output score: `NEUTRAL_PROMPT`.

    For a model without a tokenizer, or whose tokenizer reads nothing in it (chess, DNA: all unknown tokens), the first
    four ordinary tokens of the vocabulary: what matters is that the latent is amplified at ordinary tokens, past the first
    position, which say nothing of its topic.
    """
    if lm.tokenizer is not None:
        tokens = lm.tokens_for(sae, NEUTRAL_PROMPT)
        if bool(counted(tokens, 1, lm.special_ids).any()):
            return tokens
    ordinary = [token for token in range(lm.d_vocab) if token not in lm.special_ids]
    return lm.to_tokens([ordinary[:NEUTRAL_TOKENS]])


def output_scores(
    lm: "LanguageModel",
    sae: Dictionary,
    latents: Sequence[int],
    *,
    strength: float = AMPLIFIED,
    unit: str | None = None,
    site: str | None = None,
    prompt: Any = None,
    batch_size: int = 32,
) -> list[float]:
    """The output score of each latent: does amplifying it bring its own top tokens up? Between 0 and 1.

    Arad et al. 2025, section 4: one forward pass of a neutral prompt (`neutral_tokens`) with the latent amplified, then
    (1 - least rank / vocabulary) * largest probability over its 20 top logit tokens (`measures.output_score`). Amplified
    here means `add` with `strength` times `unit` (the latent's largest activation by default): our reading. The prompt's first
    position is not steered. Raises `ConfigError` as `steering.add` does.

    >>> output_scores(lm, sae, [123, 9])  # doctest: +SKIP
    [0.93, 0.08]
    """
    from saelab.steering.apply import steer_rows
    from saelab.steering.operations import add

    tokens = neutral_tokens(lm, sae) if prompt is None else lm.tokens_for(sae, prompt)
    tops = top_tokens(lm, sae.W_dec.detach()[list(latents)], measures.SCORE_TOKENS)
    scores: list[float] = []
    for start in range(0, len(latents), batch_size):
        part = latents[start : start + batch_size]
        rows = [[add(sae, latent, strength=strength, unit=unit, site=site)] for latent in part]
        batch = Tokens(tokens.ids.expand(len(part), -1), tokens.mask.expand(len(part), -1))
        with steer_rows(lm, rows):
            logits_BV = lm.logits(batch)[:, -1].cpu()
        scores += [
            measures.output_score(row, top) for row, top in zip(logits_BV, tops[start : start + len(part)], strict=True)
        ]
    return scores


def input_scores(
    lm: "LanguageModel",
    sae: Dictionary,
    latents: Sequence[int],
    corpus: Any,
    *,
    tokens: int = 50_000,
    contexts: int = 20,
    site: str | None = None,
    split: str = "heldout",
    batch_size: int = 8,
) -> list[float]:
    """The input score of each latent: does it fire on the tokens that it writes? Between 0 and 1, NaN where it never fires.

    Arad et al. 2025, section 4: share of the `contexts` in which the latent is strongest whose strongest token is
    among its 20 top logit tokens. `tokens` tokens of the split are read.

    >>> input_scores(lm, sae, [123, 9], saelab.load_corpus("sotu"))  # doctest: +SKIP
    """
    purpose = Purpose.of(sae, site)
    reader = ContextReader.of(purpose, lm, contexts_for(sae, lm, corpus, split), tokens, batch_size)
    peaks: list[dict[int, tuple[float, int]]] = [{} for _ in latents]  # context -> (activation, token) of each latent
    for rows, codes in reader.coded(purpose):
        ids, inside = rows.tokens.tolist(), rows.contexts.tolist()
        at, values = codes.rows().cpu(), codes.values.float().cpu()
        for best, latent in zip(peaks, latents, strict=True):
            mine = (codes.indices.cpu() == latent).nonzero().flatten()
            for row, value in zip(at[mine].tolist(), values[mine].tolist(), strict=True):
                if value > best.get(inside[row], (0.0, -1))[0]:
                    best[inside[row]] = (value, ids[row])
    tops = top_tokens(lm, sae.W_dec.detach()[list(latents)], measures.SCORE_TOKENS)
    return [
        measures.input_score([token for _, token in sorted(best.values(), reverse=True)[:contexts]], top)
        for best, top in zip(peaks, tops, strict=True)
    ]


def known_scores(
    lm: "LanguageModel", sae: Dictionary, latents: Sequence[int], site: Site, corpus: Any
) -> dict[str, Any]:
    """Top tokens and scores of each latent for the tables of a sweep; NaN (and a warning) where they mean nothing."""
    missing = [math.nan] * len(latents)
    if reason := why_no_logits(lm, site):
        warnings.warn(
            f"{reason}: a latent there has no logit tokens of its own, so the mass on them, the output score and the input "
            "score are NaN",
            stacklevel=3,
        )
        return {"top_tokens": [[] for _ in latents], "output_score": missing, "input_score": missing}
    tops = top_tokens(lm, sae.W_dec.detach()[list(latents)])
    try:
        outputs = output_scores(lm, sae, latents, site=site.name)
    except ConfigError as error:  # no largest activation is known
        warnings.warn(f"no output score: {error}", stacklevel=3)
        outputs = missing
    return {
        "top_tokens": [[lm.token_text(token) for token in row] for row in tops.tolist()],
        "output_score": outputs,
        "input_score": missing if corpus is None else input_scores(lm, sae, latents, corpus, site=site.name),
    }
