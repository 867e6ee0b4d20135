"""Where a forward pass is in its text: tokens, places, padding and phase of every call of a model.

Read off the call itself (ids, attention mask, position ids, length of the key-value cache), so that it is right for
any call of the wrapped model: whole prompts, one token at a time with a cache, padding on either side, generation of
other libraries.
"""

import contextlib
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

_prompt_width: ContextVar[int | Tensor | None] = ContextVar("prompt_width", default=None)


@dataclass(frozen=True)
class Where:
    """The positions that one forward pass computes; every tensor is [batch, position].

    `positions` are absolute places in the context: padding does not count, what is in the key-value cache does.
    `ids` are -1 where the call had embeddings instead. `mask` is True at real tokens, `generated` at those that were
    not in the prompt. `phase` is "generated" when the whole call is (each step with a cache); without a cache
    `LanguageModel.generate` runs prompt and continuation together, phase "prompt", and `generated` tells them apart.
    """

    ids: Tensor
    positions: Tensor
    mask: Tensor
    generated: Tensor
    phase: Literal["prompt", "generated"]


@contextlib.contextmanager
def prompt(width: int | Tensor) -> Iterator[None]:
    """Within it, columns of the context from `width` on are generated ones; a width for all, or one a row [batch]."""
    token = _prompt_width.set(width)
    try:
        yield
    finally:
        _prompt_width.reset(token)


def locator(parameters: list[str]) -> Callable[[tuple[Any, ...], dict[str, Any]], Where]:
    """What reads `Where` off a call's args and kwargs, given the names of the forward method's parameters.

    >>> where = locator(["input_ids", "attention_mask"])((torch.tensor([[7, 7, 5]]), torch.tensor([[0, 1, 1]])), {})
    >>> where.positions.tolist(), where.mask.tolist()
    ([[0, 0, 1]], [[False, True, True]])
    """

    def locate(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Where:
        named = {**dict(zip(parameters, args, strict=False)), **kwargs}
        ids = _ids(named)
        past = _cached(named)
        mask, positions = _mask_and_positions(named, ids, past)
        width = _prompt_width.get()
        first_generated = width if width is not None else past if past else past + ids.shape[1]
        first = torch.as_tensor(first_generated, device=ids.device).reshape(-1, 1)
        columns = torch.arange(past, past + ids.shape[1], device=ids.device)
        return Where(
            ids=ids,
            positions=positions,
            mask=mask,
            generated=(columns >= first).expand_as(ids),
            phase="generated" if past >= int(first.max()) else "prompt",
        )

    return locate


def _ids(named: dict[str, Any]) -> Tensor:
    for name in ("input_ids", "input"):
        if isinstance(named.get(name), Tensor) and not named[name].is_floating_point():
            return named[name]
    embedded = next(
        value for value in named.values() if isinstance(value, Tensor) and value.ndim == 3 and value.is_floating_point()
    )
    return torch.full(embedded.shape[:2], -1, dtype=torch.int64, device=embedded.device)


def _cached(named: dict[str, Any]) -> int:
    """Tokens that the key-value cache holds: transformers' `Cache`, or HookedTransformer's list of entries."""
    cache = named.get("past_key_values")
    if cache is not None:
        return int(cache.get_seq_length())
    entries = named.get("past_kv_cache")
    return int(entries[0].past_keys.shape[1]) if entries is not None else 0


def _mask_and_positions(named: dict[str, Any], ids: Tensor, past: int) -> tuple[Tensor, Tensor]:
    new = ids.shape[1]
    given = named.get("attention_mask")
    if isinstance(given, Tensor) and given.ndim == 2:
        known = given.to(ids.device) != 0
        unseen = past + new - known.shape[1]  # a mask of the new tokens only: all before were real
        positions = (known.cumsum(1) - 1).clamp(min=0)[:, -new:] + max(unseen, 0)
        return known[:, -new:], positions
    everything = torch.ones_like(ids, dtype=torch.bool)
    asked = named.get("position_ids")
    if isinstance(asked, Tensor):
        return everything, asked.to(ids.device).expand_as(ids)
    return everything, torch.arange(past, past + new, device=ids.device).expand_as(ids)
