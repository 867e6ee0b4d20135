"""Measures of steering that need no judge. Each is a plain function of logits, activations, codes or token ids.

Shapes: T positions, V vocabulary, D width of the activation, F latents, K top tokens.
"""

import math
from collections.abc import Sequence

from jaxtyping import Float, Int
from torch import Tensor

TOP_TOKENS = 10  # whose mass is the effect
SCORE_TOKENS = 20  # of the output and the input score (Arad et al. 2025)
LOOPING = 0.2  # 4-gram repetition above which a perplexity is not ranked: loops are cheap to predict


def mass(logits_TV: Float[Tensor, "T V"], tokens_K: Int[Tensor, " K"]) -> Float[Tensor, " T"]:
    """Probability of the next token being one of `tokens_K`, fp64 [T].

    >>> import torch
    >>> mass(torch.zeros(1, 4), torch.tensor([0, 3])).item()
    0.5
    """
    return logits_TV.double().softmax(-1)[:, tokens_K].sum(-1)


def perplexity(logits_TV: Float[Tensor, "T V"], targets_T: Int[Tensor, " T"]) -> float:
    """exp of the mean negative log-probability of the targets; NaN where there are none.

    >>> import torch
    >>> round(perplexity(torch.zeros(3, 8), torch.tensor([1, 2, 3])), 6)
    8.0
    """
    if not len(targets_T):
        return math.nan
    losses = -logits_TV.double().log_softmax(-1).gather(1, targets_T[:, None])
    return float(losses.mean().exp())


def ngrams(ids: Sequence[int], n: int) -> list[tuple[int, ...]]:
    """Every run of n tokens."""
    return [tuple(ids[i : i + n]) for i in range(len(ids) - n + 1)]


def repetition(ids: Sequence[int], n: int = 4) -> float:
    """1 - distinct n-grams / n-grams: 0 where none comes twice; NaN for fewer than n tokens.

    >>> repetition([1, 2, 1, 2, 1, 2])  # (1 2 1 2) twice, (2 1 2 1) once
    0.33333333333333337
    """
    found = ngrams(ids, n)
    return 1 - len(set(found)) / len(found) if found else math.nan


def distinct(ids: Sequence[int], n: int = 2) -> float:
    """Distinct n-grams / n-grams (Li et al. 2016); NaN for fewer than n tokens.

    >>> distinct([1, 2, 1, 2])
    0.6666666666666666
    """
    found = ngrams(ids, n)
    return len(set(found)) / len(found) if found else math.nan


def changed_share(ids: Sequence[int], reference: Sequence[int]) -> float:
    """Share of places at which two continuations differ; what only one of them has differs. 0 for two empty ones.

    >>> changed_share([1, 2, 3, 4], [1, 9, 3])
    0.5
    """
    length = max(len(ids), len(reference))
    same = sum(a == b for a, b in zip(ids, reference, strict=False))
    return 1 - same / length if length else 0.0


def first_divergence(ids: Sequence[int], reference: Sequence[int]) -> float:
    """The first place (from 0) at which two continuations differ; NaN for equal ones.

    >>> first_divergence([1, 2, 3], [1, 2]), first_divergence([1], [1])
    (2.0, nan)
    """
    if list(ids) == list(reference):
        return math.nan
    pairs = enumerate(zip(ids, reference, strict=False))
    return float(next((i for i, (a, b) in pairs if a != b), min(len(ids), len(reference))))


def relative_change(h_TD: Float[Tensor, "T D"], steered_TD: Float[Tensor, "T D"]) -> tuple[float, float]:
    """Means over positions of ||steered - h|| / ||h|| and of ||steered|| / ||h||.

    >>> import torch
    >>> relative_change(torch.tensor([[3.0, 4.0]]), torch.tensor([[3.0, 0.0]]))
    (0.8, 0.6)
    """
    h, steered = h_TD.double(), steered_TD.double()
    norms = h.norm(dim=-1)
    return float(((steered - h).norm(dim=-1) / norms).mean()), float((steered.norm(dim=-1) / norms).mean())


def latent_changes(
    clean_TF: Float[Tensor, "T F"], steered_TF: Float[Tensor, "T F"], latent: int
) -> tuple[float, float, float, float]:
    """Codes before and after, as means over positions: target before, target after, sum |change| of all other
    latents, and how many of these went on or off.

    >>> import torch
    >>> latent_changes(torch.tensor([[1.0, 0.0, 2.0]]), torch.tensor([[5.0, 3.0, 2.5]]), latent=0)
    (1.0, 5.0, 3.5, 1.0)
    """
    change = (steered_TF.double() - clean_TF.double()).abs()
    flipped = (steered_TF > 0) != (clean_TF > 0)
    change[:, latent], flipped[:, latent] = 0, False
    before, after = clean_TF[:, latent].double().mean(), steered_TF[:, latent].double().mean()
    return float(before), float(after), float(change.sum(1).mean()), float(flipped.double().sum(1).mean())


def output_score(logits_V: Float[Tensor, " V"], tokens_K: Int[Tensor, " K"]) -> float:
    """(1 - least rank / V) * largest probability over the latent's own top tokens, ranks from 0.

    Arad et al. 2025 ("SAEs Are Good for Steering", EMNLP), on the next-token logits of a neutral prompt with the
    latent amplified (`saelab.steering.scores.output_scores`).

    >>> import torch
    >>> output_score(torch.zeros(4).index_fill(0, torch.tensor(2), 100.0), torch.tensor([1, 2]))
    1.0
    """
    probabilities = logits_V.double().softmax(-1)
    best = probabilities[tokens_K].max()
    rank = int((probabilities > best).sum())
    return (1 - rank / len(logits_V)) * float(best)


def input_score(peaks: Sequence[int], tokens_K: Int[Tensor, " K"]) -> float:
    """Share of the latent's top contexts whose strongest token is among its own top logit tokens (Arad et al. 2025);
    NaN without contexts.

    >>> import torch
    >>> input_score([5, 6, 7, 5], torch.tensor([5, 9]))
    0.5
    """
    own = set(tokens_K.tolist())
    return sum(token in own for token in peaks) / len(peaks) if peaks else math.nan
