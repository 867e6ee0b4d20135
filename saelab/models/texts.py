"""What a user may hand in as text or token ids, said once: here it is made plain, or refused by name.

`LanguageModel.to_tokens` reads texts and ids through it, `load_corpus` a corpus.
"""

import io
import json
import reprlib
import warnings
from collections.abc import Iterable, Mapping, Sequence, Set
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor, nn

from saelab.base.errors import DataError
from saelab.models.tokens import Text, Tokens, checked_text, is_messages, padded

_NO_LISTS = (str, bytes, bytearray, memoryview, Set, io.IOBase, nn.Module)  # iterable, but no list of texts or ids
UNFILLED = -1  # stands for the id of padding, which the model's tokenizer has
COLUMNS = ("text", "messages", "input_ids")  # of a table or record: the first of them that is there is read
WANTED = (
    "give a string, a list of strings, a conversation (a list of {'role', 'content'}), token ids (a tensor, NumPy array or "
    "lists of whole numbers), a tokenizer's batch, or a table with a column text, messages or input_ids"
)


@dataclass(frozen=True)
class Given:
    """Texts, or token ids: int64 [batch, position] with the mask that came with them (None where nothing was said).

    `single` for one text or conversation rather than a list.
    """

    texts: list[Text] | None = None
    ids: Tensor | None = None
    mask: Tensor | None = None
    single: bool = False


def given(x: Any, *, column: str | None = None, limit: int | None = None, nulls: bool = False) -> Given:
    """What was handed in, made plain.

    Texts are strings, conversations and lists of them, columns of strings or conversations; ids are integers of any
    type, flat (one text) or nested (several, of different lengths too), `Tokens`, and a tokenizer's batch with its
    attention mask. Shorter texts are followed by `UNFILLED` where the mask is False. Of tables and records (DataFrame,
    `datasets.Dataset`, Arrow table, dict of columns, list of dicts) `column` is read, else the first of text, messages and
    input_ids that is there. `limit` keeps the first so many. With `nulls`, missing values are empty texts, said in a
    warning; else they are refused.

    Raises `DataError` for everything else, by name.

    >>> given({"input_ids": [[5, 6], [7]]}).mask
    tensor([[ True,  True],
            [ True, False]])
    >>> given(["peace", "war"], limit=1).texts
    ['peace']
    """
    if isinstance(x, Given):
        return x
    if isinstance(x, Tokens):
        return _limited(_masked(_as_column(given(x.ids), "input_ids"), x.mask), limit)
    if isinstance(x, str):
        return Given([_text(x, "the text")], single=True)
    if isinstance(x, Tensor) or (isinstance(x, np.ndarray) and x.dtype.kind not in "OUT"):
        return _limited(Given(ids=whole_numbers(x, "token ids")), limit)
    if isinstance(x, Mapping) and not _is_message(x):
        return _of_table(x, x, column, limit, nulls)
    if isinstance(names := getattr(x, "column_names", getattr(x, "columns", None)), Iterable):
        return _of_table(x, names, column, limit, nulls)
    if isinstance(x, _NO_LISTS) or not isinstance(x, Iterable):
        raise DataError(f"{described(x)} is no text: {_way_out(x)}")
    items = [x] if isinstance(x, Mapping) else _listed(x, limit)
    return _limited(_of_items(items, column, nulls), limit)


def whole_numbers(x: Any, what: str) -> Int[Tensor, "..."]:
    """A tensor or array of whole numbers as int64; `DataError`, naming type and shape, for another."""
    if isinstance(x, np.ndarray):
        if x.dtype.kind in "iu" and not (isinstance(x, np.ma.MaskedArray) and np.ma.is_masked(x)):
            return torch.from_numpy(np.array(x, dtype=np.int64))
    elif (
        isinstance(x, Tensor)
        and x.dtype in _INTEGERS
        and x.layout == torch.strided
        and not x.is_nested
        and x.device.type != "meta"
    ):
        return x.detach().to(torch.int64)
    masked = " with masked entries" if isinstance(x, np.ma.MaskedArray) else ""
    raise DataError(
        f"{what} are whole numbers, and this is {described(x)}{masked}: convert it (x.long()), or give the texts"
    )


_INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.uint16, torch.uint32, torch.uint64)


def described(x: Any) -> str:
    """A few words that name a value: its type, and its shape or keys.

    >>> described(torch.zeros(2, 3)), described({"a": 1}), described(None)
    ('a Tensor [2, 3] of float32', "a dict of ['a']", 'None')
    """
    if x is None:
        return "None"
    name = f"a {type(x).__name__}"
    if isinstance(x, Mapping):
        return f"{name} of {[str(key) for key in islice(x, 8)]}"
    if isinstance(x, Tensor | np.ndarray):
        shape = "(nested)" if getattr(x, "is_nested", False) else list(x.shape)
        return f"{name} {shape} of {str(x.dtype).removeprefix('torch.')}"
    if isinstance(x, list | tuple):
        return f"{name} of {len(x)} ({described(x[0])}, ...)" if x and not isinstance(x[0], list | tuple) else name
    return name


def _way_out(x: Any) -> str:
    if isinstance(x, Path):
        return "read the file, or saelab.load_corpus(path) for a corpus of it"
    if isinstance(x, bytes | bytearray | memoryview):
        return 'decode it, x.decode("utf-8")'
    if isinstance(x, Set):
        return "it has no order, give a list"
    if isinstance(x, io.IOBase):
        return "give what it holds, file.read(), or the path to saelab.load_corpus"
    return WANTED


def _limited(found: Given, limit: int | None) -> Given:
    if limit is None or found.single:
        return found
    if found.texts is not None:
        return Given(found.texts[:limit])
    assert found.ids is not None
    if found.ids.ndim < 2:
        return found
    return Given(ids=found.ids[:limit], mask=None if found.mask is None else found.mask[:limit])


def _listed(x: Any, limit: int | None) -> list[Any]:
    """The items; of an iterable that may be long, no more than are wanted (a list may be one text, and is read whole)."""
    if hasattr(x, "to_pylist"):
        x = x.to_pylist()
    if isinstance(x, np.ndarray):
        x = x.tolist() if x.ndim else [x.item()]
    return list(x) if isinstance(x, list | tuple) else list(islice(x, limit))


def _of_table(x: Any, names: Iterable[Any], column: str | None, limit: int | None, nulls: bool) -> Given:
    known = list(names)
    chosen = chosen_column(known, column, x)
    values = x[chosen]
    if isinstance(values, str):
        return Given([_text(values, repr(chosen))], single=True)
    if not _is_column(values):
        raise DataError(f"{chosen!r} of {described(x)} holds {described(values)}: {WANTED}")
    if not isinstance(values, Tensor | np.ndarray):
        values = _listed(values, limit)
    if chosen != "input_ids":
        found = given(values, limit=limit, nulls=nulls)
        return _limited(_as_column(found, chosen), limit)
    mask = x["attention_mask"] if "attention_mask" in known else None
    if mask is not None and not isinstance(mask, Tensor | np.ndarray):
        mask = _listed(mask, limit)
    found = _masked(_as_column(given(values), chosen), mask)
    if "position_ids" in known:
        positions = x["position_ids"]
        is_array = isinstance(positions, Tensor | np.ndarray)
        _check_positions(positions.tolist() if is_array else _listed(positions, limit), found)
    return _limited(found, limit)


def _is_column(values: Any) -> bool:
    """Whether these are the values of one column: not a table (names that a table has twice give one), set or file."""
    table = isinstance(values, Mapping) or isinstance(getattr(values, "columns", None), Iterable)
    return isinstance(values, Iterable) and not table and not isinstance(values, _NO_LISTS)


def chosen_column(names: Sequence[Any], column: str | None, x: Any) -> str:
    """The column of a table or record that is read; `DataError`, with the columns there are, where there is none."""
    wanted = COLUMNS if column is None else (column,)
    for name in wanted:
        if name in names:
            return name
    inside = (
        next((value for value in x.values() if hasattr(value, "column_names")), None)
        if isinstance(x, Mapping)
        else None
    )
    if inside is not None:
        raise DataError(f"{described(x)} holds several tables: give one of them, x[{str(names[0])!r}]")
    raise DataError(
        f"a {type(x).__name__} has {[str(name) for name in names]}, not {' or '.join(map(repr, wanted))}: give "
        "text_column= to load_corpus, or the texts themselves"
    )


def _as_column(found: Given, name: str) -> Given:
    """What a column holds, which must be what its name says."""
    wrong = (
        name == "input_ids" and found.ids is None
        or name == "messages" and (found.texts is None or any(isinstance(text, str) and text for text in found.texts))
        or name == "text" and found.ids is not None
    )  # fmt: skip
    if wrong:
        what = "token ids" if found.ids is not None else "texts"
        raise DataError(f"the column {name!r} holds {what}: give text_column=, or what it holds itself")
    return found


def _masked(found: Given, mask: Any) -> Given:
    if mask is None:
        return found
    assert found.ids is not None
    if isinstance(mask, list) and mask and not _is_id(mask[0]):
        rows = [_row(row) for row in mask]
        lengths = found.mask.sum(1).tolist() if found.mask is not None else [found.ids.shape[-1]] * len(found.ids)
        if any(row is None for row in rows) or [len(row) for row in rows if row is not None] != lengths:
            raise DataError("attention_mask has other lengths than input_ids: give one 0 or 1 for each id")
        return Given(ids=found.ids, mask=_zero_or_one(padded([row.tolist() for row in rows if row is not None], 0).ids))
    if isinstance(mask, list):
        mask = np.array(mask)
    if isinstance(mask, Tensor) and mask.dtype == torch.bool:
        mask = mask.to(torch.int64)
    if isinstance(mask, np.ndarray) and mask.dtype == bool:
        mask = mask.astype(np.int64)
    numbers = whole_numbers(mask, "attention masks")
    if numbers.shape != found.ids.shape:
        raise DataError(
            f"attention_mask is {list(numbers.shape)} and input_ids {list(found.ids.shape)}: give one 0 or 1 for each id"
        )
    return Given(ids=found.ids, mask=_zero_or_one(numbers).to(found.ids.device))


def _check_positions(positions: list[Any], found: Given) -> None:
    """Raise `DataError` for positions that are not 0, 1, 2 ... from the first real token on: they are counted anew."""
    assert found.ids is not None
    rows = [positions] if positions and _is_id(positions[0]) else positions
    real = torch.atleast_2d(found.ids != UNFILLED if found.mask is None else found.mask).cpu()
    if len(rows) != len(real):
        raise DataError(
            f"position_ids are of {len(rows):,} rows, input_ids of {len(real):,}: give one of each for each text"
        )
    for number, (row, mask) in enumerate(zip(rows, real, strict=True)):
        numbers = _row(row)
        if numbers is not None and len(numbers) <= len(mask):
            numbers = numbers[mask[: len(numbers)]]
        if numbers is None or not torch.equal(numbers, torch.arange(int(mask.sum()))):
            raise DataError(
                f"position_ids of row {number} are {reprlib.repr(row)}, and here they count from the first real token on: "
                "give texts that are packed into one row as rows of their own, without position_ids"
            )


def _zero_or_one(numbers: Tensor) -> Tensor:
    """The mask as bool; `DataError` for the numbers of packed texts (1, 1, 2), and for what is added to scores (0, -1)."""
    wrong = numbers[(numbers != 0) & (numbers != 1)]
    if len(wrong):
        raise DataError(f"attention_mask holds {int(wrong[0])}, and is 1 at real tokens and 0 at padding: make it "
                        "that, with one row for each text")  # fmt: skip
    return numbers != 0


def _of_items(items: list[Any], column: str | None, nulls: bool) -> Given:
    if items and all(_is_message(item) for item in items):
        return Given([_conversation(items)], single=True)
    if items and all(map(_is_id, items)):
        return Given(ids=_row(items))
    records = [item for item in items if isinstance(item, Mapping)]
    if records and all(isinstance(item, Mapping) or (nulls and _is_null(item)) for item in items):
        return _of_records(records, column, nulls)
    rows = [_row(item) for item in items] if items and _row(items[0]) is not None else []
    if rows:
        for number, (row, item) in enumerate(zip(rows, items, strict=True)):
            if row is None:
                raise DataError(f"row {number:,} of {len(rows):,} is {described(item)}, not token ids like the first")
        lengths = {len(row) for row in rows if row is not None}
        if len(lengths) == 1:
            return Given(ids=torch.stack([row.cpu() for row in rows if row is not None]))
        return _ragged([row.tolist() for row in rows if row is not None])
    texts: list[Text] = []
    missing = 0
    for number, item in enumerate(items):
        if nulls and _is_null(item):
            missing += 1
            item = ""
        texts.append(_text(item, f"text {number:,} of {len(items):,}"))
    if missing:
        warnings.warn(
            f"{missing:,} of {len(items):,} texts are missing (None or NaN): they are read as empty ones", stacklevel=5
        )
    return Given(texts)


def _ragged(rows: list[list[int]]) -> Given:
    tokens = padded(rows, UNFILLED)
    return Given(ids=tokens.ids, mask=tokens.mask)


def _of_records(records: list[Mapping[Any, Any]], column: str | None, nulls: bool) -> Given:
    chosen = chosen_column(list(records[0]), column, records[0])
    for number, record in enumerate(records):
        if chosen not in record:
            raise DataError(f"record {number:,} of {len(records):,} is {described(record)}, without {chosen!r}")
    found = _as_column(_of_items([record[chosen] for record in records], None, nulls), chosen)
    if found.single or (found.ids is not None and found.ids.ndim < 2):
        raise DataError(
            f"{chosen!r} of {described(records[0])} holds {described(records[0][chosen])}, no text: {WANTED}"
        )
    if chosen != "input_ids" or not all("attention_mask" in record for record in records):
        return found
    return _masked(found, [record["attention_mask"] for record in records])


def _text(item: Any, where: str) -> Text:
    if isinstance(item, str):
        return checked_text(str(item), where)
    if isinstance(item, np.ndarray) and item.dtype == object:
        item = item.tolist()
    if is_messages(item) and all(map(_is_message, item)):
        return _conversation(item)
    raise DataError(f"{where} is {described(item)}, and a text is a string or a list of chat messages: {WANTED}")


def digested(text: Text) -> bytes:
    """The bytes of a text that its digest is taken of."""
    return (text if isinstance(text, str) else json.dumps(text, default=str, skipkeys=True)).encode()


def _is_message(item: Any) -> bool:
    """Whether it says who speaks and what: a string, parts (texts, images), or None beside a call of a tool."""
    if not isinstance(item, Mapping) or not isinstance(item.get("role"), str) or "content" not in item:
        return False
    content = item["content"]
    parts = isinstance(content, list | tuple) and all(isinstance(part, Mapping) for part in content)
    return content is None or isinstance(content, str) or parts


def _conversation(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    return [{"role": message["role"], "content": message["content"], **message} for message in messages]


def _is_id(item: Any) -> bool:
    return isinstance(item, int | np.integer) and not isinstance(item, bool)


def _is_null(item: Any) -> bool:
    return item is None or (isinstance(item, float) and item != item) or type(item).__name__ in ("NAType", "NaTType")


def _row(item: Any) -> Tensor | None:
    """The ids of one text [position], None where it is no such thing."""
    if isinstance(item, list | tuple) and item and all(map(_is_id, item)):
        try:
            return torch.tensor([int(number) for number in item], dtype=torch.int64)
        except (RuntimeError, OverflowError, ValueError) as error:
            raise DataError(f"token ids do not reach {max(map(abs, map(int, item))):,}") from error
    if isinstance(item, Tensor | np.ndarray) and item.ndim == 1 and len(item):
        return whole_numbers(item, "token ids")
    return None
