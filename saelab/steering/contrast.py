"""Directions from texts: a difference of means, and the figures that give a direction its units."""

from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from saelab.base.errors import ConfigError, DataError
from saelab.base.progress import progress_bar
from saelab.models.purpose import counted
from saelab.models.tokens import Tokens, padded
from saelab.steering.program import coordinate
from saelab.steering.vectors import Direction

if TYPE_CHECKING:
    from saelab.models.language import LanguageModel

BATCH = 8


def difference(
    lm: "LanguageModel",
    positive: Any,
    negative: Any,
    site: str,
    *,
    at: Literal["last", "mean"] = "last",
    name: str = "difference",
    progress: bool = True,
) -> Direction:
    """The mean activation of the positive texts minus that of the negative ones: contrastive activation addition.

    Rimsky et al. 2024 ("Steering Llama 2 via Contrastive Activation Addition"), section 3: with `at="last"` each text
    counts by its last token, which is where the texts of a contrastive pair differ; `at="mean"` takes the mean over
    its tokens. Special tokens, padding and the first token of a text are left out; the two lists need not be
    of one length. The direction carries the figures of `measured` on all texts together, so that "residual_norm" (the
    default unit), "std" and "activation" (1 is the whole difference) work.

    Args:
        positive, negative: texts, conversations or `Tokens`; each a list.
        site: where the activations are read, and where the direction acts.

    Raises `DataError` for a text without such a token, `ConfigError` when the two means are the same.

    >>> warm = steering.difference(lm, ["I love it"], ["I hate it"], "blocks.12.hook_resid_post")  # doctest: +SKIP
    >>> with lm.steer(steering.add(warm, strength=0.3)):  # doctest: +SKIP
    ...     lm.generate("The weather today", max_new_tokens=20)
    """
    if at not in ("last", "mean"):
        raise ConfigError(f"at is {at!r}: 'last' takes the last token of each text, 'mean' the mean over its tokens")
    means = []
    for which, texts in (("positive", positive), ("negative", negative)):
        vectors = [rows[-1] if at == "last" else rows.mean(0) for rows in _ordinary(lm, texts, site, which, progress)]
        means.append(torch.stack(vectors).mean(0))
    vector = (means[0] - means[1]).to(torch.promote_types(lm.dtype, torch.float32))
    direction = Direction(vector, lm.site(site).name, name)
    return measured(direction, lm, [*_listed(lm, positive), *_listed(lm, negative)], progress=progress)


def measured(direction: Direction, lm: "LanguageModel", texts: Any, *, progress: bool = True) -> Direction:
    """The direction with its figures: median norm, standard deviation and mean coordinate of the activations of texts.

    Over every token but special ones, padding and the first of each text. Raises `ConfigError` for a direction without
    a site, `DataError` for a text without such a token.

    >>> probe = steering.measured(steering.Direction(vector, "blocks.12.hook_resid_post"), lm, texts)  # doctest: +SKIP
    """
    if direction.site is None:
        raise ConfigError(f"{direction!r} does not say at which site it is: Direction(vector, site)")
    norms, coordinates = [], []
    for rows in _ordinary(lm, texts, direction.site, "measured", progress):
        norms.append(torch.linalg.vector_norm(rows, dim=1))
        coordinates.append(coordinate(rows, direction.vector.detach()))
    along = torch.cat(coordinates)
    length = float(direction.vector.detach().double().norm())
    return replace(
        direction,
        residual_norm=float(torch.cat(norms).median()),
        std=float(along.std(correction=0)) * length,
        mean=float(along.mean()),
    )


def batches(lm: "LanguageModel", texts: Any, progress: bool) -> Iterator[Tokens]:
    """The texts in batches of a few, under a progress bar where it takes long."""
    rows = _listed(lm, texts)
    starts = range(0, len(rows), BATCH)
    for start in progress_bar(len(starts), "reading", "batch", progress, iterable=starts):
        yield padded(rows[start : start + BATCH], 0).to(lm.device)


def _listed(lm: "LanguageModel", texts: Any) -> list[list[int]]:
    """The token ids of each text."""
    return lm.to_tokens(texts).rows()


def _ordinary(lm: "LanguageModel", texts: Any, site: str, which: str, progress: bool) -> Iterator[Tensor]:
    """The activations [position, width] of each text's ordinary tokens, in fp64."""
    number = 0
    for tokens in batches(lm, texts, progress):
        x = lm.record(tokens, site)
        for rows, mask in zip(x, counted(tokens, 1, lm.special_ids).to(x.device), strict=True):
            if not bool(mask.any()):
                raise DataError(f"{which} text {number} has no token past its first that is not special: "
                                "lengthen it or leave it out")  # fmt: skip
            yield rows[mask].double()
            number += 1
