"""Where an operation acts: phases, positions, tokens, windows, and what is left out."""

import operator
import reprlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Bool
from torch import Tensor

from saelab.base import checks
from saelab.base.errors import ConfigError, InterventionError
from saelab.models.purpose import among, counted
from saelab.models.where import Where

if TYPE_CHECKING:
    from saelab.models.language import LanguageModel

Window = tuple[int, int | None]


_SHORT = reprlib.Repr()
_SHORT.maxtuple = 12


@dataclass(frozen=True)
class Scope:
    """The positions that an operation touches. By default every ordinary token but the first of the context.

    A position is touched when its phase is on, *and* it is chosen (by any of `positions`, `tokens`, `windows`; all are
    when none of the three is given), *and* nothing leaves it out. What is left out always wins. Padding is never
    touched. The same positions are touched with and without a cache, whatever the padding and the batch.

    What is the prompt is known in `lm.generate`, in the `generate` of transformers and within
    `saelab.models.where.prompt(width)`. In a loop of your own a call without a cache is all prompt and one token after a
    cache is generated; a scope that needs to know raises `InterventionError` at what may be either (`Where.known`).

    Args:
        prompt: the tokens of the prompt (of a call without generation: all of them).
        generated: the tokens of the continuation.
        positions: places in the context, from 0; negative ones count from the end of the prompt (-1 its last token).
        tokens: token ids.
        windows: (start, stop) of places, stop excluded, counted as `positions`; a stop of None is open, so that
            (-2, None) is the last two tokens of the prompt and all that follows.
        exclude_positions, exclude_tokens, exclude_windows: the same, left out.
        skip_positions: the first places of the context, left out; 0 steers the first token too. The activation there
            is many times the others' (an attention sink) and no unit of strength was made for it.
        special: whether special tokens (beginning, end, turns of a chat) are touched.
        high_norm: whether activations above the norm limit of the autoencoder (`sae.replaceable`) are touched.

    Raises `ConfigError` for a scope in which nothing can be.

    >>> Scope(generated=False, positions=[-1])
    Scope(generated=False, positions=(-1,))
    """

    prompt: bool = True
    generated: bool = True
    positions: Sequence[int] | None = None
    tokens: Sequence[int] | None = None
    windows: Sequence[Window] | None = None
    exclude_positions: Sequence[int] = ()
    exclude_tokens: Sequence[int] = ()
    exclude_windows: Sequence[Window] = ()
    skip_positions: int = 1
    special: bool = False
    high_norm: bool = False

    def __post_init__(self) -> None:
        for name in ("prompt", "generated", "special", "high_norm"):
            checks.choice(name, getattr(self, name), (True, False))
        object.__setattr__(self, "skip_positions", checks.count("skip_positions", self.skip_positions, least=0))
        for name in ("positions", "tokens", "exclude_positions", "exclude_tokens"):
            self._set(name, _whole_numbers)
        for name in ("windows", "exclude_windows"):
            self._set(name, _intervals)
        reason = self._why_empty()
        if reason:
            raise ConfigError(f"the scope is empty: {reason}")

    def mask(self, where: Where, lm: "LanguageModel") -> Bool[Tensor, "batch position"]:
        """Which positions of a forward pass are touched: bool [batch, position] (but for `high_norm`).

        Raises `InterventionError` where the scope needs to know the prompt and the call does not show it.
        """
        if self._needs_prompt and not where.known:
            raise InterventionError(
                f"{self!r} needs to know which tokens are the prompt's, and this call may be a step of a generation as well as "
                "a text of its own: generate with lm.generate or the model's own generate, or say how many columns the "
                "prompt has, with saelab.models.where.prompt(width): ..."
            )
        chosen = counted(where, self.skip_positions, () if self.special else lm.special_ids)
        if not self.prompt:
            chosen = chosen & where.generated
        if not self.generated:
            chosen = chosen & ~where.generated
        if self._selects:
            chosen = chosen & _covered(where, self.positions or (), self.tokens or (), self.windows or ())
        if self.exclude_positions or self.exclude_tokens or self.exclude_windows:
            chosen = chosen & ~_covered(where, self.exclude_positions, self.exclude_tokens, self.exclude_windows)
        return chosen

    def to_dict(self) -> dict[str, Any]:
        """What differs from the defaults, as plain values; `Scope(**d)` is the same scope."""
        return {field.name: getattr(self, field.name) for field in fields(self) if not self._is_default(field)}

    def __repr__(self) -> str:
        return f"Scope({', '.join(f'{name}={_SHORT.repr(value)}' for name, value in self.to_dict().items())})"

    def _is_default(self, field: Any) -> bool:
        return bool(getattr(self, field.name) == field.default)

    def _set(self, name: str, convert: Any) -> None:
        value = getattr(self, name)
        if value is not None:
            object.__setattr__(self, name, convert(name, value))

    @property
    def _needs_prompt(self) -> bool:
        """Whether it parts the prompt from the continuation, or counts from the prompt's end."""
        windows = [*(self.windows or ()), *self.exclude_windows]
        places = [*(self.positions or ()), *self.exclude_positions, *(bound or 0 for pair in windows for bound in pair)]
        return not (self.prompt and self.generated) or any(place < 0 for place in places)

    @property
    def _selects(self) -> bool:
        return any(given is not None for given in (self.positions, self.tokens, self.windows))

    def _why_empty(self) -> str | None:
        """What leaves nothing, whatever the text."""
        if not (self.prompt or self.generated):
            return "neither prompt nor generated tokens: turn one of them on"
        for name in ("positions", "tokens", "windows"):
            if getattr(self, name) == ():
                return f"{name} holds nothing: leave it out (None) to mean all of them"
        if self.windows is not None:
            for start, stop in self.windows:
                if stop is not None and (start < 0) == (stop < 0) and start >= stop:
                    return f"the window ({start}, {stop}) holds no position: it goes from start to before stop"
        if not self._selects:
            return None
        tokens = set(self.tokens or ()) - set(self.exclude_tokens)
        places = [p for p in self.positions or () if p < 0 or p >= self.skip_positions]
        places = [p for p in places if p not in self.exclude_positions and (p >= 0 or self.prompt)]
        windows = [w for w in self.windows or () if w[1] is None or w[1] < 0 or w[1] > self.skip_positions]
        windows = [w for w in windows if self.prompt or w[1] is None or w[1] >= 0]
        if tokens or places or windows:
            return None
        return (
            f"all that {self!r} chooses is left out by its exclusions, by skip_positions={self.skip_positions} "
            "(0 steers the first token too), or lies in a phase that is off"
        )


def _covered(where: Where, positions: Iterable[int], tokens: Iterable[int], windows: Iterable[Window]) -> Tensor:
    """Positions that any of the clauses names: bool [batch, position].

    Places from the end need the prompt's length. Where one token after a cache is all that is known, it is 0, and no
    generated token has a place before the end of the prompt.
    """
    places = where.positions
    length = where.prompt_lengths
    if length is None:
        length = torch.where(where.mask & ~where.generated, places + 1, 0).amax(1)
    length = length[:, None]
    covered = torch.zeros_like(where.mask)
    for place in positions:
        covered |= places == (place if place >= 0 else length + place)
    for start, stop in windows:
        inside = places >= (start if start >= 0 else length + start)
        if stop is not None:
            inside &= places < (stop if stop >= 0 else length + stop)
        covered |= inside
    tokens = tuple(tokens)
    return covered | among(where.ids, tokens) if tokens else covered


def _whole_numbers(name: str, values: Any) -> tuple[int, ...]:
    several = isinstance(values, Iterable) and not isinstance(values, str | bytes) and getattr(values, "ndim", 1) != 0
    return tuple(_whole_number(name, number) for number in (values if several else [values]))


def _whole_number(name: str, value: Any) -> int:
    """As an int, which a receipt can be written with, also from those of NumPy and torch."""
    try:
        if isinstance(value, bool) or getattr(value, "dtype", None) == torch.bool:
            raise TypeError
        return operator.index(value)
    except TypeError as error:
        raise ConfigError(f"{name} of a scope are whole numbers, not {value!r}") from error


def _intervals(name: str, windows: Any) -> tuple[Window, ...]:
    pairs = tuple(tuple(window) if isinstance(window, Sequence) else (window,) for window in windows)
    for pair in pairs:
        if len(pair) != 2 or not isinstance(pair[0], int) or not isinstance(pair[1], int | None):
            raise ConfigError(f"{name} of a scope are pairs (start, stop), such as [(1, 8), (-2, None)], not {pair!r}")
    return pairs
