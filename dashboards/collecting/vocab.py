"""Token ids become the bytes that they stand for, and rows of the chunk `vocab`."""

import json
import re
from collections.abc import Iterable
from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np

from saelab.dashboards.writing.codec import Column, none_of

if TYPE_CHECKING:
    from saelab.models.language import LanguageModel

SPECIAL, PARTIAL, ABSENT = 1, 2, 4


class Ids:
    """Token ids in an array, -1 for none, still to become rows of `vocab`."""

    def __init__(self, ids: np.ndarray) -> None:
        self.ids = ids


class Vocab:
    """The tokens of one dashboard: `ids` ascending; `local` maps ids to their rows."""

    def __init__(self, ids: Iterable[int] | np.ndarray) -> None:
        self.ids = np.unique(np.asarray(ids if isinstance(ids, np.ndarray) else list(ids), np.int64))
        self.ids = self.ids[self.ids >= 0]
        self.dtype = np.dtype("<u2" if len(self.ids) < 65_535 else "<u4")

    def local(self, ids: np.ndarray) -> np.ndarray:
        """Rows of `vocab`, all bits set for -1; every other id must be one of them.

        >>> Vocab([7, 3]).local(np.array([3, 7, -1]))
        array([    0,     1, 65535], dtype=uint16)
        """
        rows = np.searchsorted(self.ids, ids)
        return np.where(ids < 0, none_of(self.dtype), rows).astype(self.dtype)

    def resolved(self, columns: dict[str, Any]) -> dict[str, Column]:
        """The columns with `Ids` made local."""
        return {name: self.local(column.ids) if isinstance(column, Ids) else column for name, column in columns.items()}

    def columns(self, lm: "LanguageModel", counts: np.ndarray) -> dict[str, Column]:
        """The chunk `vocab`; `counts` [d_vocab] says how often each id was read at a counted place."""
        known = token_bytes(lm.tokenizer)
        words = [known(int(i)) for i in self.ids]
        flags = np.zeros(len(words), "u1")
        flags[np.isin(self.ids, sorted(lm.special_ids))] |= SPECIAL
        flags[[i for i, word in enumerate(words) if word is not None and not is_text(word)]] |= PARTIAL
        flags[[i for i, word in enumerate(words) if word is None]] |= ABSENT
        found = [word if word is not None else b"" for word in words]
        return {
            "id": self.ids.astype("<u4"),
            "length": np.array([len(word) for word in found], "<u4"),
            "bytes": np.frombuffer(b"".join(found), "u1"),
            "flags": flags,
            "count": counts[self.ids].astype("<u4"),
        }


def is_text(word: bytes) -> bool:
    """Whether the bytes are UTF-8 by themselves."""
    try:
        word.decode()
    except UnicodeDecodeError:
        return False
    return True


def token_bytes(tokenizer: Any) -> Any:
    """A function from an id to the token's bytes; None where the tokenizer has no such id.

    Byte-level BPE (GPT-2's alphabet) and SentencePiece (with byte fallback) give the bytes themselves; others the text
    that the tokenizer decodes. Without a tokenizer the id stands for itself.
    """
    if tokenizer is None:
        return lambda i: str(i).encode()
    added = {int(i): str(token) for i, token in getattr(tokenizer, "added_tokens_decoder", {}).items()}
    decoder, size = _decoder(tokenizer), len(tokenizer)  # milliseconds each time it is asked

    def known(i: int) -> bytes | None:
        if i in added:
            return _utf8(added[i])
        token = tokenizer.convert_ids_to_tokens(i) if i < size else None
        if token is None:
            return None
        token = token if isinstance(token, str) else str(token)
        if "ByteLevel" in decoder:
            alphabet = byte_alphabet()
            if all(character in alphabet for character in token):
                return bytes(alphabet[character] for character in token)
            return _utf8(token)
        if "\u2581" in decoder or "Metaspace" in decoder:
            byte = re.fullmatch(r"<0x([0-9A-Fa-f]{2})>", token)
            return bytes([int(byte[1], 16)]) if byte else _utf8(token.replace("\u2581", " "))
        return _utf8(str(tokenizer.decode([i])))

    return known


def _decoder(tokenizer: Any) -> str:
    """The tokenizer's decoder as JSON; empty where it has none of the `tokenizers` library."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        return json.dumps(json.loads(backend.to_str()).get("decoder"), ensure_ascii=False)
    return "\u2581" if hasattr(tokenizer, "sp_model") else ""


def _utf8(text: str) -> bytes:
    return re.sub("[\ud800-\udfff]", "\ufffd", text).encode()


@cache
def byte_alphabet() -> dict[str, int]:
    """Character -> byte of GPT-2's byte-level BPE: printable Latin-1 stands for itself, the other bytes follow from
    U+0100 on.

    >>> byte_alphabet()["\\u0120"], byte_alphabet()["a"]
    (32, 97)
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(others)}
