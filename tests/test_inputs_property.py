"""Whatever a user may hand in as text, ids, rows, corpus or path is read as its plain equivalent, or refused by name.

Each generated object goes through every entry point that takes such a thing. Objects that have a plain equivalent must give
what that gives, to the bit; all others must raise one of saelab's own errors; nothing of the user's may change.
"""

import random
import tempfile
import warnings
from collections import OrderedDict, UserDict, deque
from pathlib import Path

import datasets
import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import saelab
from saelab import steering
from saelab.base.errors import SaelabError
from saelab.models.tokens import Tokens
from tests.tiny import byte_tokenizer, llama_model

SITE = "blocks.0.hook_resid_post"
SLOW = [HealthCheck.too_slow, HealthCheck.data_too_large]
GENERATED = settings(max_examples=300, deadline=None, suppress_health_check=SLOW)
FEWER = settings(max_examples=100, deadline=None, suppress_health_check=SLOW)


@pytest.fixture(scope="module")
def lm():
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    return saelab.load_model(llama_model(), tokenizer=tokenizer)


@pytest.fixture(scope="module")
def sae(lm):
    texts = [f"{i} of the people, by the people {i * i}" * 8 for i in range(40)]
    return saelab.train(lm, texts, site=SITE, sae=saelab.TopK(k=4, d_sae=32), tokens=512, batch_size=128, context_length=32,
                        progress=False).sae  # fmt: skip


# objects with a plain equivalent

plain_text = st.text(st.characters(codec="utf-8"), min_size=1, max_size=12)
several_texts = st.lists(plain_text, min_size=1, max_size=4)
one_row = st.lists(st.integers(0, 255), min_size=2, max_size=6)


@st.composite
def even_rows(draw):
    width = draw(st.integers(2, 6))
    return draw(st.lists(st.lists(st.integers(0, 127), min_size=width, max_size=width), min_size=1, max_size=4))


ragged_rows = st.lists(one_row, min_size=1, max_size=4)


def encoded(rows):
    """As a tokenizer's batch: padded on the right with zeros and a mask."""
    width = max(map(len, rows))
    ids = torch.tensor([row + [0] * (width - len(row)) for row in rows])
    return ids, torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows])


TEXT_FORMS = {
    "tuple": tuple,
    "deque": deque,
    "generator": lambda texts: (text for text in texts),
    "array": lambda texts: np.array(texts, object),
    "series": pd.Series,
    "index": pd.Index,
    "frame": lambda texts: pd.DataFrame({"n": range(len(texts)), "text": texts}),
    "dict": lambda texts: {"text": texts},
    "records": lambda texts: [{"text": text, "year": 1862} for text in texts],
    "data set": lambda texts: datasets.Dataset.from_dict({"text": texts}),
    "column": lambda texts: datasets.Dataset.from_dict({"text": texts})["text"],
    "stream": lambda texts: datasets.Dataset.from_dict({"text": texts}).to_iterable_dataset(),
    "Arrow": lambda texts: pa.table({"text": pa.array(texts, pa.string())}),
    "Arrow array": lambda texts: pa.array(texts, pa.string()),
    "NumPy strings": lambda texts: [np.str_(text) for text in texts],
    "loader": lambda texts: torch.utils.data.DataLoader(texts, batch_size=None),
}
ROW_FORMS = {
    "tuples": lambda rows: tuple(map(tuple, rows)),
    "generator": lambda rows: (row for row in rows),
    "tensors": lambda rows: [torch.tensor(row, dtype=torch.int32) for row in rows],
    "arrays": lambda rows: [np.array(row, np.uint16) for row in rows],
    "batch": lambda rows: dict(zip(("input_ids", "attention_mask"), encoded(rows), strict=True)),
    "user dict": lambda rows: UserDict(input_ids=rows),
    "Tokens": lambda rows: Tokens(encoded(rows)[0], encoded(rows)[1].bool()),
    "NumPy batch": lambda rows: {
        n: x.numpy() for n, x in zip(("attention_mask", "input_ids"), encoded(rows)[::-1], strict=True)
    },
    "records": lambda rows: [OrderedDict(input_ids=row, attention_mask=[1] * len(row)) for row in rows],
    "data set": lambda rows: datasets.Dataset.from_dict({"input_ids": rows}),
    "formatted": lambda rows: datasets.Dataset.from_dict({"input_ids": rows}).with_format("torch"),
    "Arrow": lambda rows: pa.table({"input_ids": pa.array(rows, pa.list_(pa.int32()))}),
}
EVEN_FORMS = {
    **{str(dtype): lambda rows, dtype=dtype: torch.tensor(rows, dtype=dtype)
       for dtype in (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.uint16, torch.uint64)},
    **{dtype: lambda rows, dtype=dtype: np.array(rows, dtype) for dtype in ("u1", "i1", ">i2", "i4", "u8", ">u4")},
    "strided": lambda rows: torch.tensor(rows).T.contiguous().T,
    "reversed": lambda rows: np.array(rows)[::-1][::-1],
    "frozen": lambda rows: np.array(rows)[:],
}  # fmt: skip


def same(lm, made, plain):
    """`made()` gives what `plain` gives, wherever text and ids are read."""
    expected = lm.to_tokens(plain)
    found = lm.to_tokens(made())
    assert torch.equal(found.mask, expected.mask) and found.rows() == expected.rows()
    values, wanted = lm.record(made(), SITE), lm.record(plain, SITE)
    torch.testing.assert_close(values[found.mask], wanted[expected.mask], atol=1e-5, rtol=1e-4)
    assert lm.generate(made(), 2, temperature=0) == lm.generate(plain, 2, temperature=0)
    corpus, from_plain = saelab.load_corpus(made()), saelab.load_corpus(plain)
    assert corpus.digest == from_plain.digest or corpus.rows is not None
    if corpus.rows is not None:
        pairs = [corpus.contexts(lm, split="all"), from_plain.contexts(lm, split="all")]
        assert torch.equal(pairs[0].real, pairs[1].real) and torch.equal(pairs[0].mask, pairs[1].mask)
        assert torch.equal(pairs[0].ids[pairs[0].real], pairs[1].ids[pairs[1].real])


@FEWER
@given(st.data())
def test_each_form_is_its_plain_equivalent(lm, data):
    kind = data.draw(st.sampled_from(["texts", "rows", "even"]))
    plain, forms = {
        "texts": (several_texts, TEXT_FORMS),
        "rows": (ragged_rows, ROW_FORMS),
        "even": (even_rows(), EVEN_FORMS),
    }[kind]
    value = data.draw(plain)
    form = forms[data.draw(st.sampled_from(sorted(forms)))]
    same(lm, lambda: form(value), value)


# anything at all

numbers = st.one_of(
    st.none(), st.booleans(), st.integers(-3, 300), st.integers(2**62, 2**70), st.floats(), st.complex_numbers()
)
strings = st.one_of(
    st.text(max_size=8), st.binary(max_size=8), st.just("\ud800"), st.just("a\0b"), st.just("~nobody-here/x")
)
DTYPES = [
    torch.float32,
    torch.bfloat16,
    torch.float64,
    torch.bool,
    torch.uint8,
    torch.int8,
    torch.int64,
    torch.complex64,
    torch.int32,
]
shapes = st.lists(st.integers(0, 3), max_size=4)


@st.composite
def tensors(draw):
    x = torch.full(draw(shapes), draw(st.sampled_from([-1, 0, 1, 300, 77])), dtype=torch.float64).to(
        draw(st.sampled_from(DTYPES))
    )
    kind = draw(st.sampled_from(["plain", "sparse", "meta", "gradient", "expanded"]))
    if kind == "sparse":
        return x.to_sparse()
    if kind == "gradient" and x.is_floating_point():
        return x.requires_grad_()
    return x.to("meta") if kind == "meta" else x[None].expand(2, *x.shape) if kind == "expanded" else x


@st.composite
def arrays(draw):
    dtype = draw(
        st.sampled_from(["f4", "f8", "?", "i1", "i8", "u8", "c8", "M8[s]", "O", "U3", "S3", "f2", [("a", "i4")]])
    )
    x = np.zeros(draw(shapes), dtype)
    return np.ma.masked_array(x, True) if draw(st.booleans()) and dtype == "i8" else x


class Odd:
    """Things that have a length, or items, and are no collection."""

    def __init__(self, n):
        self.n = n

    def __len__(self):
        return self.n

    def __getitem__(self, i):
        return self


leaves = st.one_of(
    numbers, strings, tensors(), arrays(), st.builds(Odd, st.integers(0, 2)), st.builds(Path, st.text("ab/.", max_size=5)),
    st.sampled_from([torch.nn.Linear(2, 2), torch.float32, Ellipsis, NotImplemented, range(0), range(3), object, len]),
    st.sampled_from([pd.NaT, pd.NA]),
    st.builds(lambda x: iter(x), st.lists(numbers, max_size=2)),
)  # fmt: skip
keys = st.sampled_from(["input_ids", "attention_mask", "text", "messages", "role", "content", "train", "", 3, None])
MADE = [
    list, tuple, deque, pd.Series, iter, lambda x: {"text": x}, lambda x: {"input_ids": x}, lambda x: UserDict(messages=x),
    lambda x: [{"role": "user", "content": item} for item in x], lambda x: {"input_ids": x, "attention_mask": x},
    lambda x: pd.DataFrame({"text": x}), lambda x: Tokens(x, x), lambda x: Tokens(*x[:1], *x[-1:]) if x else x,
    lambda x: {"role": "user", "content": x}, lambda x: {i: item for i, item in enumerate(x)},
    lambda x: frozenset(i for i, _ in enumerate(x)), lambda x: np.array([0, *map(str, x)], object),
]  # fmt: skip


def wrap(children):
    items = st.lists(children, max_size=3)
    made = st.builds(lambda make, x: attempt(make, x), st.sampled_from(MADE), items)
    return st.one_of(items, made, st.dictionaries(keys, children, max_size=3))


def attempt(make, x):
    try:
        return make(x)
    except Exception:  # NumPy and pandas have limits of their own
        return x


anything = st.recursive(leaves, wrap, max_leaves=6)


@pytest.fixture(scope="module")
def folder():
    with tempfile.TemporaryDirectory() as name:
        yield Path(name)


def entry_points(lm, sae, folder):
    short = dict(progress=False)
    return {
        "to_tokens": lm.to_tokens,
        "tokenize": lm.tokenize,
        "record": lambda x: lm.record(x, SITE),
        "logits": lm.logits,
        "loss": lm.loss,
        "generate": lambda x: lm.generate(x, 1),
        "top_latents": lambda x: lm.top_latents(x, sae),
        "load_corpus": saelab.load_corpus,
        "harvest": lambda x: saelab.harvest(lm, x, site=SITE, tokens=4, context_length=4, split="all", **short),
        "evaluate": lambda x: saelab.evaluate(sae, lm, x, tokens=8, sparsity_tokens=8, context_length=4, split="all", **short),
        "train on a corpus": lambda x: saelab.train(
            lm, x, site=SITE, sae=saelab.TopK(k=2, d_sae=8), tokens=8, batch_size=4, context_length=4, **short
        ),
        "dashboard": lambda x: saelab.dashboards.build(
            sae, lm, x, folder / "page.html", latents=[0], tokens=8, context_length=4, effects=None, evaluation=None,
            parquet=False, split="all", **short
        ),
        "prompts": lambda x: steering.sweep(
            lm, sae, [0], ["ablate"], [], x, max_new_tokens=1, baselines=(), **short
        ),
        "find": lambda x: steering.find(lm, sae, x, **short),
        "difference": lambda x: steering.difference(lm, x, ["a different text"], SITE, **short),
    }  # fmt: skip


@GENERATED
@given(st.data())
def test_anything_is_read_or_refused(lm, sae, folder, data):
    """One object, one entry point; raw errors and changes of what is the user's fail."""
    calls = entry_points(lm, sae, folder)
    call = calls[data.draw(st.sampled_from(sorted(calls)))]
    x = data.draw(anything)
    kept = [x.clone() if isinstance(x, torch.Tensor) and x.layout == torch.strided and x.device.type == "cpu" else None]
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()
    weights = lm.digest
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            call(x)
        except SaelabError as error:
            assert str(error)
    if kept[0] is not None and not kept[0].isnan().any():
        assert torch.equal(x, kept[0]) and getattr(x, "grad", None) is None
    assert torch.equal(torch.get_rng_state(), states[0]) and random.getstate() == states[1]
    assert (np.random.get_state()[1] == states[2]).all()
    assert lm.digest == weights and torch.is_grad_enabled() and torch.get_default_dtype() == torch.float32


@FEWER
@given(x=st.one_of(tensors(), arrays(), anything, st.lists(tensors(), max_size=3), st.tuples(tensors(), tensors())))
def test_rows_are_trained_on_or_refused(x):
    kept = (
        x.detach().clone()
        if isinstance(x, torch.Tensor) and x.layout == torch.strided and x.device.type == "cpu"
        else None
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            saelab.train(x, sae=saelab.TopK(k=1, d_sae=4), tokens=4, batch_size=2, buffer_tokens=40_000, progress=False)
        except SaelabError as error:
            assert str(error)
    if kept is not None and not kept.isnan().any():
        assert torch.equal(x.detach(), kept) and x.grad is None


@FEWER
@given(name=st.one_of(st.text(max_size=300), st.binary(max_size=9), anything))
def test_paths_are_used_or_refused(folder, name):
    for call in (saelab.load_run, saelab.SAE.load, steering.load_sweep):
        with pytest.raises(SaelabError):
            call(name)
    assert not any(folder.glob("~*"))
