"""Token ids with their padding, and the way from text and chat messages to them."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from saelab.base.errors import ConfigError, DataError

Messages = Sequence[Mapping[str, Any]]  # one conversation: [{"role": "user", "content": "..."}, ...]
Text = str | Messages


@dataclass(frozen=True, repr=False)
class Tokens:
    """A batch of token ids, accepted wherever tokens are.

    `ids` is int64 [batch, position]; `mask` is bool [batch, position], False at padding.

    >>> Tokens(torch.tensor([[5, 6, 0]]), torch.tensor([[True, True, False]])).lengths
    [2]
    """

    ids: Tensor
    mask: Tensor

    def __repr__(self) -> str:
        rows, positions = self.ids.shape
        return f"Tokens({rows:,} rows of {positions:,} positions, {int(self.mask.sum()):,} tokens)"

    @property
    def lengths(self) -> list[int]:
        """Real tokens of each row."""
        return self.mask.sum(1).tolist()

    @property
    def positions(self) -> Int[Tensor, "batch position"]:
        """The place of each token among the real ones of its row: int64 [batch, position], 0 before the first."""
        return (self.mask.cumsum(1) - 1).clamp(min=0)

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


def checked(tokens: Tokens, d_vocab: int) -> Tokens:
    """The same tokens; `DataError` unless they are a batch of ids within a vocabulary of `d_vocab`, none all padding."""
    ids, mask = tokens.ids, tokens.mask
    if ids.ndim != 2 or ids.is_floating_point() or ids.dtype == torch.bool or not ids.numel():
        raise DataError("token ids are whole numbers, [position] or [batch, position], "
                        f"not {ids.dtype} {list(ids.shape)}")  # fmt: skip
    low, high = int(ids.min()), int(ids.max())
    if low < 0 or high >= d_vocab:
        raise DataError(f"token ids run from {low:,} to {high:,}, the vocabulary from 0 to {d_vocab - 1:,}: "
                        "were they made by another tokenizer?")  # fmt: skip
    if not bool(mask.any(1).all()):
        raise DataError(f"row {int((~mask.any(1)).nonzero()[0])} of {len(ids):,} is nothing but padding: leave it out")
    return Tokens(ids.long(), mask)


def real_places(ids: Int[Tensor, "..."], tokenizer: Any, eos_ids: Iterable[int] = ()) -> Bool[Tensor, "..."]:
    """Where ids [batch, position] without a mask are no padding: bool, as the tokenizer's pad id and padding side say.

    A pad id that is nothing else is padding at either end of a row, and a token like others inside it. One that is
    also the beginning, the end or the unknown token is padding on the tokenizer's side where rows have several of it, or a
    different number; one at the beginning of every row is a beginning. A row of nothing else is read as it is.

    Raises `DataError` where it cannot be told whether rows are padded: several end tokens at an end of a row, and a
    tokenizer that does not pad with them, or not on that side.

    >>> from types import SimpleNamespace
    >>> real_places(torch.tensor([[1, 1, 5], [7, 1, 6]]), SimpleNamespace(pad_token_id=1, eos_token_id=0))
    tensor([[False, False,  True],
            [ True,  True,  True]])
    """
    pad, end = (getattr(tokenizer, f"{name}_token_id", None) for name in ("pad", "eos"))
    others = {getattr(tokenizer, f"{name}_token_id", None) for name in ("bos", "eos", "unk")} | {*eos_ids}
    sought = next((i for i in (pad, end, *eos_ids) if i is not None), None)
    alike = torch.eq(ids, -1 if sought is None else sought)
    if sought is None or ids.ndim != 2 or not bool((alike[:, :1] | alike[:, -1:]).any()):
        return torch.ones_like(ids, dtype=torch.bool)
    part = ~alike.all(1, keepdim=True)
    runs = {"left": alike.cumprod(1).bool() & part, "right": alike.flip(1).cumprod(1).flip(1).bool() & part}
    if pad is not None and pad not in others:
        return ~(runs["left"] | runs["right"])
    side = None if pad is None else getattr(tokenizer, "padding_side", "right")
    real = torch.ones_like(ids, dtype=torch.bool)
    for name, run in runs.items():
        lengths = run.sum(1)
        several, unequal = int(lengths.max()) > 1, int(lengths.max()) > int(lengths.min())
        if side == name and (several or (unequal and name == "right")):
            real &= ~run
        elif several or (unequal and side == name):
            how = f"pads on the {side}" if side else "has no padding token"
            raise DataError(
                f"row {int(lengths.argmax())} of {len(ids):,} has {int(lengths.max())} of token {sought} on its {name}: it is "
                f"also an end or a beginning, and the tokenizer {how}, so that it cannot be told from padding. Give "
                '{"input_ids": ids, "attention_mask": mask} or saelab.models.tokens.Tokens(ids, mask)'
            )
    return real


def is_messages(text: Any) -> bool:
    """Whether this is one conversation: a list of messages, each with a role and a content."""
    return isinstance(text, Sequence) and not isinstance(text, str) and len(text) > 0 and isinstance(text[0], Mapping)


def checked_text(text: str, where: str) -> str:
    """The same text; `DataError` for one that cannot be written as UTF-8."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise DataError(
            f"{where} has a lone surrogate at character {error.start:,}, which no text file can hold: "
            'clean it with text.encode(errors="replace").decode()'
        ) from error
    return text


def encode(tokenizer: Any, texts: Sequence[Text], *, chat: bool = False, bos: int | None = None) -> list[list[int]]:
    """Token ids of each text; conversations go through the tokenizer's chat template.

    With `bos` each begins with that id: it is prepended unless the text or the template has it there already. With
    `chat`, a plain string is what the user says. The template's opening of an answer is added where the last message is
    not the assistant's. Raises `ConfigError` where there is no tokenizer or no template, `DataError` for a text without
    tokens and for messages that the template refuses.
    """
    if tokenizer is None:
        raise ConfigError("this model came without a tokenizer, so it reads token ids only: "
                          "give one with load_model(model, tokenizer=...)")  # fmt: skip
    if not texts:
        raise DataError("no text at all: give a string, or a list with at least one")
    rows = [_chat_ids(tokenizer, text) if chat or is_messages(text) else _text_ids(tokenizer, text) for text in texts]
    if bos is not None:
        rows = [row if row[:1] == [bos] else [bos, *row] for row in rows]
    for i, row in enumerate(rows):
        if not row:
            raise DataError(f"text {i} of {len(rows)} has no tokens: {texts[i]!r}; leave it out or prepend something")
    return rows


def _text_ids(tokenizer: Any, text: Any) -> list[int]:
    # verbose=False: a text longer than the context is no mistake here, corpora are cut afterwards
    return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


def _chat_ids(tokenizer: Any, text: Text) -> list[int]:
    messages = [{"role": "user", "content": text}] if isinstance(text, str) else list(text)
    return _text_ids(tokenizer, chat_text(tokenizer, messages))


def chat_text(tokenizer: Any, messages: Messages) -> str:
    """A conversation as the tokenizer's chat template writes it.

    Raises `ConfigError` where there is no template, `DataError` for messages that it refuses.
    """
    if getattr(tokenizer, "chat_template", None) is None:
        raise ConfigError("this model's tokenizer has no chat template: set its chat_template, or give plain text")
    from jinja2 import TemplateError

    opening = messages[-1].get("role") != "assistant"
    try:
        text = str(tokenizer.apply_chat_template(list(messages), add_generation_prompt=opening, tokenize=False))
    except (TemplateError, TypeError, ValueError, KeyError, AttributeError) as error:
        raise DataError(f"the chat template cannot write these messages ({error}): {messages!r:.200}") from error
    return checked_text(text, "a conversation")


def adds_bos(tokenizer: Any) -> bool:
    """Whether the tokenizer by itself puts its BOS before a text (Gemma's and Llama's do, GPT-2's does not)."""
    bos = getattr(tokenizer, "bos_token_id", None)
    if bos is None:
        return False
    plain, whole = (_as_called(tokenizer, special) for special in (False, True))
    return whole[: len(plain) + 1] == [bos, *plain]


def _as_called(tokenizer: Any, special: bool) -> list[int]:
    if not getattr(tokenizer, "is_fast", False):
        return list(tokenizer("a", add_special_tokens=special)["input_ids"])
    # the core's own call: the tokenizer's would undo the padding and truncation that the user's last call set
    found = tokenizer.backend_tokenizer.encode("a", add_special_tokens=special)
    return [i for i, real in zip(found.ids, found.attention_mask, strict=True) if real]


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
