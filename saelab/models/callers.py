"""The `generate` of transformers that a forward pass runs in.

A forward pass does not show which of its tokens are a prompt's: without a cache every step is a longer text, with one a
part of a long prompt (`prefill_chunk_size`) looks like an answer, and a state-space model's cache has no length. Its
caller knows, and is on the stack; nothing of it is changed. What is not found there is None: then it is not known.
"""

import sys
from dataclasses import dataclass
from types import FrameType
from typing import Any

from torch import Tensor

_HOME = "transformers.generation.utils"


@dataclass(frozen=True)
class Running:
    """A generation: columns of its prompt, which of them are real ([batch, width]; None: all), columns so far."""

    width: int
    mask: Tensor | None
    total: int


def running_generation(batch: int) -> Running | None:
    """The innermost `generate` of transformers above the caller, if its batch has so many rows."""
    inside: Tensor | None = None  # the text so far, of what `generate` has called (`_sample`, `_beam_search`, ...)
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if frame.f_globals.get("__name__") == _HOME:
            if frame.f_code.co_name == "generate":
                return _read(frame.f_locals, inside, batch)
            ids = frame.f_locals.get("input_ids")
            inside = ids if isinstance(ids, Tensor) and ids.ndim == 2 else inside
        frame = frame.f_back
    return None


def _read(found: dict[str, Any], inside: Tensor | None, batch: int) -> Running | None:
    length = found.get("input_ids_length")
    if not isinstance(length, int) or inside is None or len(inside) != batch:
        return None
    mask = found.get("model_kwargs", {}).get("attention_mask")
    if isinstance(mask, Tensor) and mask.ndim == 2 and len(mask) == batch:
        width, real = mask.shape[1], mask != 0
    else:  # a mask of ones is dropped, and its length kept
        width, real = max(length, getattr(found.get("generation_config"), "_mask_length", 0)), None
    # a prompt of embeddings, or one whose beginning is in the cache already, is longer than its ids
    return Running(width, real, inside.shape[1] + max(width - length, 0))
