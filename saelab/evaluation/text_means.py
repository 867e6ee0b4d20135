"""Means over the tokens of each text: of the activation, and of the codes of an autoencoder and of its two controls.

Shapes: N texts, D inputs, S latents.
"""

import contextlib
import copy
from collections.abc import Iterator
from contextvars import ContextVar
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn.functional import normalize

from saelab.autoencoders.sae import SAE
from saelab.base.errors import DataError
from saelab.base.progress import progress_bar
from saelab.base.protocols import Dictionary
from saelab.base.seeds import named_generator
from saelab.evaluation.labelled import LabelledTexts
from saelab.evaluation.stability import alike
from saelab.models.purpose import Purpose
from saelab.models.tokens import Tokens

if TYPE_CHECKING:
    from saelab.models.language import LanguageModel

RANDOM, UNTRAINED = "random directions", "untrained SAE"
LONGEST = 128  # tokens of a text that are read
BATCH = 16

_READ: ContextVar[dict[tuple[int, int, str], "TextMeans"] | None] = ContextVar("read", default=None)


@dataclass(frozen=True)
class TextMeans:
    """Of each text the means over the tokens that the autoencoder is for.

    `x` [n, d_in] of the activation; `codes` by source ("sae", "random directions", "untrained SAE") [n, d_sae], each latent
    times the length of its decoder row, so that how an SAE shares its scale between them changes nothing; `kept` [n], texts
    that have such tokens (the rows of others are zeros).
    """

    x: Float[Tensor, "n d_in"]
    codes: dict[str, Float[Tensor, "n d_sae"]]
    kept: Bool[Tensor, " n"]


@contextlib.contextmanager
def reading_once() -> Iterator[None]:
    """Within, the same texts pass through a model for an autoencoder only once."""
    token = _READ.set({})
    try:
        yield
    finally:
        _READ.reset(token)


def text_means(lm: "LanguageModel", sae: Dictionary, data: LabelledTexts) -> TextMeans:
    """The means of some texts, of which the first 128 tokens are read."""
    kept = _READ.get()
    key = (id(lm), id(sae), repr(data))
    if kept is None:
        return _means(lm, sae, data)
    if key not in kept:
        kept[key] = _means(lm, sae, data)
    return kept[key]


def controls(sae: Dictionary, seed: int = 0) -> dict[str, Dictionary]:
    """Two autoencoders like it: of random rows with the same mean, covariance and lengths, and as it was before training.

    Both keep its biases of the input, scales and thresholds; the untrained one has no other biases.

    >>> import saelab
    >>> twins = controls(saelab.SAE(saelab.TopK(k=1, d_sae=8), 4))
    >>> [bool((twin.W_dec.norm(dim=1) - 1).abs().max() < 1e-6) for twin in twins.values()]
    [True, True]
    """
    random, untrained = copy.deepcopy(sae), copy.deepcopy(sae)
    fresh = SAE(sae.cfg, sae.d_in, seed=seed, d_out=sae.d_out)
    with torch.no_grad():
        for name in ("encoder_weight", "W_dec"):
            rows = getattr(random, name)
            units = normalize(rows.double().cpu(), dim=1)
            drawn = alike(units, named_generator(f"random directions {seed}"))
            rows.copy_(drawn * rows.double().cpu().norm(dim=1, keepdim=True))
            getattr(untrained, name).copy_(getattr(fresh, name))
        untrained.encoder_bias.zero_()  # type: ignore[attr-defined]
    return {RANDOM: random, UNTRAINED: untrained}


@torch.no_grad()
def _means(lm: "LanguageModel", sae: Dictionary, data: LabelledTexts) -> TextMeans:
    purpose = Purpose.of(sae)
    site = purpose.source(lm)
    saes = {"sae": sae, **controls(sae)}
    lengths = {name: one.W_dec.norm(dim=1).float().cpu() for name, one in saes.items()}
    x_ND, kept_N = torch.zeros(len(data.texts), sae.d_in), torch.zeros(len(data.texts), dtype=torch.bool)
    codes = {name: torch.zeros(len(data.texts), sae.d_sae) for name in saes}
    order = sorted(range(len(data.texts)), key=lambda number: len(data.texts[number]))
    with progress_bar(len(order), f"reading {data.name}", "text", True) as bar:
        for start in range(0, len(order), BATCH):
            numbers = order[start : start + BATCH]
            whole = lm.tokens_for(sae, [data.texts[number] for number in numbers])
            tokens = Tokens(whole.ids[:, :LONGEST], whole.mask[:, :LONGEST])
            x_BPD = lm.record(tokens, site)
            counts_BP = purpose.positions(lm, x_BPD, tokens)
            rows, text_of = x_BPD[counts_BP], counts_BP.nonzero()[:, 0].cpu()
            counts_B = counts_BP.sum(1).cpu()
            kept_N[numbers] = counts_B > 0
            share_R = 1 / counts_B[text_of].float()[:, None]
            where_R = torch.tensor(numbers)[text_of]
            x_ND.index_add_(0, where_R, rows.float().cpu() * share_R)
            for name, one in saes.items():
                dense = one.encode_sparse(rows.to(one.W_dec)).to_dense().float().cpu()
                codes[name].index_add_(0, where_R, dense * lengths[name] * share_R)
            bar.update(len(numbers))
    if not bool(kept_N.any()):
        raise DataError(f"none of the {len(kept_N)} texts of {data.name} has a token that the autoencoder is for: "
                        "they are too short, or of another model")  # fmt: skip
    return TextMeans(x_ND, codes, kept_N)
