"""Token ids with their padding, and the way from text and chat messages to them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from saelab.errors import ConfigError, DataError

Messages = Sequence[Mapping[str, Any]]  # one conversation: [{"role": "user", "content": "..."}, ...]
Text = str | Messages


@dataclass(frozen=True)
class Tokens:
    """A batch of token ids, accepted wherever tokens are.

    `ids` is int64 [batch, position]; `mask` is bool [batch, position], False at padding.

    >>> Tokens(torch.tensor([[5, 6, 0]]), torch.tensor([[True, True, False]])).lengths
    [2]
    """

    ids: Tensor
    mask: Tensor

    @property
    def lengths(self) -> list[int]:
        """Real tokens of each row."""
        return self.mask.sum(1).tolist()

    def rows(self) -> list[list[int]]:
        """The real token ids of each row, without padding."""
        return [ids[mask].tolist() for ids, mask in zip(self.ids, self.mask, strict=True)]

    def to(self, device: torch.device | str) -> "Tokens":
        """The same tokens on another device."""
        return Tokens(self.ids.to(device), self.mask.to(device))


def padded(rows: Sequence[Sequence[int]], fill: int, *, left: bool = False) -> Tokens:
    """Rows of different lengths as one batch, padded on the right (or the left) with `fill`.

    >>> padded([[1, 2, 3], [4]], fill=0).ids.tolist()
    [[1, 2, 3], [4, 0, 0]]
    """
    width = max(len(row) for row in rows)
    ids = torch.full((len(rows), width), fill, dtype=torch.int64)
    mask = torch.zeros(len(rows), width, dtype=torch.bool)
    for i, row in enumerate(rows):
        place = slice(width - len(row), width) if left else slice(0, len(row))
        ids[i, place] = torch.tensor(row, dtype=torch.int64)
        mask[i, place] = True
    return Tokens(ids, mask)


def from_ids(ids: Tensor, d_vocab: int) -> Tokens:
    """Token ids, [position] or [batch, position], all of them real.

    Raises `DataError` for another shape or type, and for ids outside a vocabulary of `d_vocab`.
    """
    if ids.ndim not in (1, 2) or ids.is_floating_point() or not ids.numel():
        raise DataError("token ids are whole numbers, [position] or [batch, position], "
                        f"not {ids.dtype} {list(ids.shape)}")  # fmt: skip
    low, high = int(ids.min()), int(ids.max())
    if low < 0 or high >= d_vocab:
        raise DataError(f"token ids run from {low} to {high}, the vocabulary from 0 to {d_vocab - 1}: "
                        "were they made by another tokenizer?")  # fmt: skip
    batch = ids.reshape(-1, ids.shape[-1]).long()
    return Tokens(batch, torch.ones_like(batch, dtype=torch.bool))


def is_messages(text: Any) -> bool:
    """Whether this is one conversation: a list of messages, each with a role and a content."""
    return isinstance(text, Sequence) and not isinstance(text, str) and len(text) > 0 and isinstance(text[0], Mapping)


def is_single(texts: Any) -> bool:
    """Whether this is one text or one conversation rather than a list of them."""
    return isinstance(texts, str) or is_messages(texts)


def encode(tokenizer: Any, texts: Text | Sequence[Text], *, chat: bool = False) -> list[list[int]]:
    """Token ids of each text, nothing prepended; conversations go through the tokenizer's chat template.

    With `chat`, a plain string is what the user says. The template's opening of an answer is added where the last
    message is not the assistant's. Raises `ConfigError` where there is no tokenizer or no template, `DataError` for
    a text without tokens.
    """
    if tokenizer is None:
        raise ConfigError("this model came without a tokenizer, so it reads token ids only: "
                          "give one with load_model(model, tokenizer=...)")  # fmt: skip
    batch: list[Any] = [texts] if is_single(texts) else list(texts)
    if not batch:
        raise DataError("no text at all: give a string, or a list with at least one")
    rows = [_chat_ids(tokenizer, text) if chat or is_messages(text) else _text_ids(tokenizer, text) for text in batch]
    for i, row in enumerate(rows):
        if not row:
            raise DataError(f"text {i} of {len(rows)} has no tokens: {batch[i]!r}; leave it out or prepend something")
    return rows


def _text_ids(tokenizer: Any, text: str) -> list[int]:
    if not isinstance(text, str):
        raise DataError(f"a text is a string or a list of chat messages, not {type(text).__name__}")
    # verbose=False: a text longer than the context is no mistake here, corpora are cut afterwards
    return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


def _chat_ids(tokenizer: Any, text: Text) -> list[int]:
    if getattr(tokenizer, "chat_template", None) is None:
        raise ConfigError("this model's tokenizer has no chat template: set its chat_template, or give plain text")
    messages = [{"role": "user", "content": text}] if isinstance(text, str) else list(text)
    opening = messages[-1].get("role") != "assistant"
    return list(tokenizer.apply_chat_template(messages, add_generation_prompt=opening, return_dict=False))


def special_ids(tokenizer: Any) -> frozenset[int]:
    """Ids of every special token of the tokenizer: beginning, end, padding, turn markers and reserved ones."""
    if tokenizer is None:
        return frozenset()
    added = getattr(tokenizer, "added_tokens_decoder", {})
    return frozenset(tokenizer.all_special_ids) | {i for i, token in added.items() if getattr(token, "special", False)}


def separator_id(tokenizer: Any) -> int | None:
    """The id put between packed documents: `<|endoftext|>` where the vocabulary has it, else the end of sequence."""
    if tokenizer is None:
        return None
    found = tokenizer.get_vocab().get("<|endoftext|>")
    return tokenizer.eos_token_id if found is None else found
