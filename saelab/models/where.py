"""Where a forward pass is in its text: tokens, places, padding and phase of every call of a model.

Read off the call itself (ids, attention mask, position ids, length of the cache) and off the generation that it is part
of (`LanguageModel.generate`, `prompt`, the `generate` of transformers), so that it is right for whole prompts, prompts
in chunks, one token at a time with any cache or none, and padding on either side.
"""

import contextlib
import threading
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Int
from torch import Tensor

from saelab.base.errors import InterventionError
from saelab.models.callers import Running, running_generation

_prompt_width: ContextVar[int | Tensor | None] = ContextVar("prompt_width", default=None)


@dataclass(frozen=True)
class Where:
    """The positions that one forward pass computes; every tensor is [batch, position].

    `positions` are absolute places in the context: padding does not count, what is in the cache does. `ids` are -1 where
    the call had embeddings instead. `mask` is True at real tokens, `generated` at those that were not in the prompt.
    `phase` is "generated" when the whole call is (each step with a cache); without a cache prompt and continuation run
    together, phase "prompt", and `generated` tells them apart.

    The prompt is that of `LanguageModel.generate`, of `prompt(width)` or of transformers' `generate`. Outside of these a
    call without a cache is all prompt, and one token after a cache is generated. `known` is False, and `generated` a
    guess, where neither can be said: several tokens after a cache, or a text that is the last call's and one token more.
    `prompt_lengths` [batch] are the real tokens of the prompt, None where only those of this call are known.
    """

    ids: Tensor
    positions: Tensor
    mask: Tensor
    generated: Tensor
    phase: Literal["prompt", "generated"]
    known: bool = True
    prompt_lengths: Tensor | None = None


@contextlib.contextmanager
def prompt(width: int | Int[Tensor, "batch"]) -> Iterator[None]:
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

    before = threading.local()  # the last text that this thread ran without a cache

    def locate(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Where:
        named = {**dict(zip(parameters, args, strict=False)), **kwargs}
        ids = _ids(named)
        told = _prompt_width.get()
        running = running_generation(len(ids)) if told is None else None
        past = _past(named, ids, running)
        real = _real(named, ids, past, running)
        width = running.width if running is not None else told
        if width is not None:
            known, lengths = True, _lengths(width, real, ids, running)
        else:
            earlier, before.ids = getattr(before, "ids", None), None if past else ids
            apart = ids.shape[1] == 1 if past else not _longer_by_one(earlier, ids)
            known = apart and (real is not None or _in_one_row(named.get("position_ids"), past))
            width, lengths = past or ids.shape[1], None
        first = torch.as_tensor(width, device=ids.device).reshape(-1, 1)
        columns = torch.arange(past, past + ids.shape[1], device=ids.device)
        mask, positions = _mask_and_positions(named, ids, past, real)
        return Where(
            ids=ids,
            positions=positions,
            mask=mask,
            generated=(columns >= first).expand_as(ids),
            phase="generated" if past >= int(first.max()) else "prompt",
            known=known,
            prompt_lengths=lengths,
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


def _past(named: dict[str, Any], ids: Tensor, running: Running | None) -> int:
    """Columns of the context before this call's, which a cache or a state stands for."""
    new, mask, positions = ids.shape[1], named.get("attention_mask"), named.get("position_ids")
    if isinstance(mask, Tensor) and mask.ndim == 2 and mask.shape[1] > new:
        return mask.shape[1] - new
    if isinstance(named.get("cache_position"), Tensor):
        return int(named["cache_position"][0])
    length = _length(next((named[name] for name in _CACHES if named.get(name) is not None), None))
    if length is not None:
        return length
    if isinstance(positions, Tensor) and positions.ndim == 2:
        return max(int(positions[:, -1].max()) + 1 - new, 0)
    if running is not None:
        return running.total - new
    raise InterventionError("the model's state does not say how many tokens it has read, so that the places of these are "
                            "unknown: pass attention_mask or cache_position, or call lm.generate")  # fmt: skip


_CACHES = ("past_key_values", "past_kv_cache", "cache_params", "state")


def _length(cache: Any) -> int | None:
    """Tokens that a cache holds: transformers' `Cache`, HookedTransformer's list of entries; None for a state."""
    if cache is None:
        return 0
    if hasattr(cache, "get_seq_length"):
        try:
            return int(cache.get_seq_length())
        except ValueError:  # one of linear attention alone
            return None
    entries = getattr(cache, "entries", cache)
    if isinstance(entries, list) and entries and hasattr(entries[0], "past_keys"):
        return int(entries[0].past_keys.shape[1])
    return None


def _longer_by_one(earlier: Tensor | None, ids: Tensor) -> bool:
    """Whether these are the earlier texts and a token more: a generation without a cache, or so it seems."""
    if earlier is None or ids.shape[0] != earlier.shape[0] or ids.shape[1] != earlier.shape[1] + 1:
        return False
    return torch.equal(ids[:, :-1], earlier.to(ids.device))


def _in_one_row(positions: Any, past: int) -> bool:
    """Whether the places asked for are those of one text a row, not of several that are packed or decoded together."""
    if not isinstance(positions, Tensor):
        return True
    return bool((positions == torch.arange(past, past + positions.shape[-1], device=positions.device)).all())


def _real(named: dict[str, Any], ids: Tensor, past: int, running: Running | None) -> Tensor | None:
    """Which columns of the context are real, bool [batch, column] up to this call's last; None where nothing says."""
    given = named.get("attention_mask")
    if isinstance(given, Tensor) and given.ndim == 2:
        real = given.to(ids.device) != 0
    elif running is not None and running.mask is not None:
        real = running.mask.to(ids.device)[:, : past + ids.shape[1]]
        real = torch.cat([real, real.new_ones(len(ids), past + ids.shape[1] - real.shape[1])], 1)
    else:
        return None
    unseen = past + ids.shape[1] - real.shape[1]  # a mask of the new tokens only: all before were real
    return torch.cat([real.new_ones(len(ids), max(unseen, 0)), real], 1)


def _lengths(width: int | Tensor, real: Tensor | None, ids: Tensor, running: Running | None) -> Tensor:
    """Real tokens [batch] of a prompt of so many columns."""
    if running is not None and running.mask is not None:
        return running.mask.to(ids.device).sum(1)
    columns = torch.as_tensor(width, device=ids.device).expand(len(ids))
    if real is None:
        return columns
    inside = torch.arange(real.shape[1], device=ids.device) < columns[:, None]
    return (real & inside).sum(1) + (columns - real.shape[1]).clamp(min=0)


def _mask_and_positions(named: dict[str, Any], ids: Tensor, past: int, real: Tensor | None) -> tuple[Tensor, Tensor]:
    new = ids.shape[1]
    if real is not None:
        return real[:, -new:], (real.cumsum(1) - 1).clamp(min=0)[:, -new:]
    everything = torch.ones_like(ids, dtype=torch.bool)
    asked = named.get("position_ids")
    if isinstance(asked, Tensor) and asked.ndim <= 2:
        return everything, asked.to(ids.device).expand_as(ids)
    return everything, torch.arange(past, past + new, device=ids.device).expand_as(ids)
