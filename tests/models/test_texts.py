"""What may be handed in as text or ids: each form is read as its plain equivalent, or refused by name."""

import gzip
import io
import json
from pathlib import Path

import datasets
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

import saelab
from saelab.base.errors import ConfigError, DataError
from saelab.models.texts import given
from saelab.models.tokens import Tokens
from tests.tiny import TEXTS, byte_tokenizer, llama_model

SITE = "blocks.0.hook_resid_post"
PLAIN = list(TEXTS[:2])
CHAT = [{"role": "user", "content": "peace"}, {"role": "assistant", "content": "bread"}]
FRAME = pd.DataFrame({"year": [1862, 1865], "text": PLAIN})
TEMPLATE = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}"


def test_a_tokenizers_batch_is_its_tokens(tiny_llama):
    tokenizer, expected = tiny_llama.tokenizer, tiny_llama.record(PLAIN, SITE)
    for kind in ("pt", "np", None):
        batch = tokenizer(PLAIN, return_tensors=kind, padding=True)
        for given_batch in (batch, dict(batch)):
            assert torch.equal(tiny_llama.record(given_batch, SITE), expected)
    ragged = tokenizer(PLAIN)
    assert torch.equal(tiny_llama.to_tokens(ragged).mask, tiny_llama.tokenize(PLAIN).mask)
    assert torch.equal(tiny_llama.logits(ragged), tiny_llama.logits(PLAIN))
    left = tokenizer(PLAIN, padding=True, padding_side="left", return_tensors="pt")
    assert tiny_llama.loss(left) == pytest.approx(float(tiny_llama.loss(PLAIN)), rel=1e-6)
    assert tiny_llama.generate(left, 4) == tiny_llama.generate(PLAIN, 4)
    one = tokenizer("peace")
    assert tiny_llama.to_tokens(one).ids.tolist() == [one["input_ids"]]


def test_positions_that_count_from_the_first_real_token_are_those_of_the_model(tiny_llama):
    batch = {"input_ids": torch.tensor([[0, 5, 6], [7, 8, 9]]), "attention_mask": torch.tensor([[0, 1, 1], [1, 1, 1]])}
    for positions in (torch.tensor([[1, 0, 1], [0, 1, 2]]), [[1, 0, 1], [0, 1, 2]]):
        found, plain = tiny_llama.to_tokens(batch | {"position_ids": positions}), tiny_llama.to_tokens(batch)
        assert torch.equal(found.ids, plain.ids) and torch.equal(found.mask, plain.mask)
    assert tiny_llama.to_tokens({"input_ids": [[5, 6], [7]], "position_ids": [[0, 1], [0]]}).mask.sum() == 3
    assert tiny_llama.to_tokens({"input_ids": torch.tensor([5, 6]), "position_ids": torch.arange(2)}).mask.sum() == 2
    many = datasets.Dataset.from_dict({"input_ids": [[5, 6], [7, 8], [9, 8]], "position_ids": [[0, 1]] * 3})
    assert len(saelab.load_corpus(many, max_documents=2).rows) == 2


@pytest.mark.parametrize("dtype", [np.int8, np.uint8, np.int32, np.uint64, ">i4"])
def test_ids_of_any_integer_type(tiny_llama, dtype):
    rows = [[5, 6, 7], [8, 9, 10]]
    for x in (np.array(rows, dtype), rows, tuple(map(tuple, rows)), [np.array(row, dtype) for row in rows],
              [torch.tensor(row) for row in rows], np.array(rows).T.T, iter(rows)):  # fmt: skip
        assert tiny_llama.to_tokens(x).ids.tolist() == rows
    assert tiny_llama.to_tokens([5, 6, np.int64(7)]).ids.tolist() == [[5, 6, 7]]
    ragged = tiny_llama.to_tokens([[5, 6, 7], [8]])
    assert ragged.rows() == [[5, 6, 7], [8]]


TABLES = {
    "a frame": FRAME,
    "a column": FRAME["text"],
    "a data set": datasets.Dataset.from_pandas(FRAME),
    "its column": datasets.Dataset.from_pandas(FRAME)["text"],
    "a slice of it": datasets.Dataset.from_pandas(FRAME)[:2],
    "its rows": list(datasets.Dataset.from_pandas(FRAME)),
    "a stream": datasets.Dataset.from_pandas(FRAME).to_iterable_dataset(),
    "an Arrow table": pa.Table.from_pandas(FRAME),
    "an Arrow column": pa.Table.from_pandas(FRAME)["text"],
    "a dict of columns": {"text": PLAIN},
    "a generator": (text for text in PLAIN),
    "an array": np.array(PLAIN),
    "an array of objects": np.array(PLAIN, object),
    "a tuple": tuple(PLAIN),
    "dict values": dict(enumerate(PLAIN)).values(),
}


@pytest.mark.parametrize("table", TABLES.values(), ids=TABLES)
def test_tables_are_their_texts(tiny_llama, table):
    again = list(table) if not hasattr(table, "__len__") and not hasattr(table, "column_names") else table
    assert given(again).texts == PLAIN
    assert torch.equal(tiny_llama.record(again, SITE), tiny_llama.record(PLAIN, SITE))
    assert saelab.load_corpus(again).digest == saelab.load_corpus(PLAIN).digest


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (None, "None is no text"),
        (b"peace", "decode it"),
        ({"peace", "war"}, "no order"),
        ({1: "a"}.keys(), "no order"),
        (Path("a.txt"), "load_corpus|no file"),
        (io.StringIO("peace"), "file.read"),
        (3, "a int is no text"),
        (torch.nn.ModuleList(), "a ModuleList is no text"),
        ({"body": ["a"]}, r"a dict has \['body'\], not 'text' or 'messages' or 'input_ids'"),
        (pd.DataFrame({"body": ["a"]}), r"a DataFrame has \['body'\]"),
        (datasets.DatasetDict(train=datasets.Dataset.from_pandas(FRAME)), r"x\['train'\]"),
        ({"input_ids": ["peace"]}, "holds texts"),
        ({"text": [[5, 6]]}, "holds token ids"),
        ({"input_ids": [[5, 6]], "attention_mask": [[1]]}, "other lengths"),
        (
            pd.DataFrame([["peace", "a"], ["war", "b"]], columns=["text", "text"]),
            "'text' of a DataFrame holds a DataFrame",
        ),
        ({"text": pd.DataFrame({"a": ["x"], "b": ["y"]})}, "holds a DataFrame"),
        ({"text": {"peace", "war"}}, "holds a set"),
        ({"text": {1: "a"}.keys()}, "holds a dict_keys"),
        ({"text": io.StringIO("peace")}, "holds a StringIO"),
        ({"input_ids": b"ab"}, "holds a bytes"),
        ({"input_ids": [[5, 6, 7]], "attention_mask": [[1, 1, 2]]}, "attention_mask holds 2"),
        ({"input_ids": torch.ones(1, 2).long(), "attention_mask": torch.tensor([[0, -1]])}, "attention_mask holds -1"),
        ({"input_ids": torch.ones(1, 2).long(), "attention_mask": torch.ones(1, 3)}, "whole numbers"),
        ({"input_ids": torch.ones(1, 2).long(), "attention_mask": torch.ones(1, 3).long()}, r"\[1, 3\]"),
        ({"input_ids": [[5, 6, 7, 8]], "position_ids": [[0, 1, 0, 1]]}, "position_ids of row 0"),
        ({"input_ids": torch.ones(2, 3).long(), "position_ids": torch.tensor([[0, 1, 2], [1, 2, 3]])}, "of row 1"),
        ({"input_ids": [[5, 6], [7]], "position_ids": [[0, 1]]}, "position_ids are of 1 rows, input_ids of 2"),
        ({"input_ids": [[5, 6]], "position_ids": [[0]]}, "position_ids of row 0"),
        ({"input_ids": [[5, 6]], "position_ids": [[0, 1, 2]]}, "position_ids of row 0"),
        ({"input_ids": [[5, 6]], "position_ids": [None]}, "position_ids of row 0"),
        ({"input_ids": [[5, 6]], "position_ids": [["0", "1"]]}, "position_ids of row 0"),
        (["peace", b"war"], "text 1 of 2 is a bytes"),
        ([["peace"], ["war"]], "text 0 of 2 is a list"),
        ([[5, 6], "war"], "row 1 of 2 is a str"),
        ([{"text": "peace"}, {"body": "war"}], "record 1 of 2"),
        ([[2**70]], "do not reach"),
        (torch.ones(2, 3), "whole numbers, and this is a Tensor"),
        (torch.ones(2, 3, dtype=torch.bool), "whole numbers"),
        (torch.ones(2, 3, dtype=torch.complex64), "whole numbers"),
        (torch.ones(2, 3, dtype=torch.int64).to_sparse(), "whole numbers"),
        (torch.ones(2, 3, dtype=torch.int64, device="meta"), "whole numbers"),
        (np.ma.masked_array([[1, 2]], [[False, True]]), "masked entries"),
        (np.zeros(3, "M8[s]"), "whole numbers"),
    ],
)
def test_what_is_no_text_is_refused_by_name(tiny_llama, x, message):
    for read in (tiny_llama.to_tokens, saelab.load_corpus):
        with pytest.raises(DataError, match=message):
            read(x)


def test_tokens_are_checked(tiny_llama):
    with pytest.raises(DataError, match="from 0 to 258, the vocabulary from 0 to 257"):
        tiny_llama.record(Tokens(torch.tensor([[0, 258]]), torch.ones(1, 2, dtype=torch.bool)), SITE)
    with pytest.raises(DataError, match="attention masks are whole numbers"):
        tiny_llama.logits(Tokens(torch.tensor([[0, 5]]), torch.ones(1, 2)))
    with pytest.raises(DataError, match="row 1 of 2 is nothing but padding"):
        tiny_llama.logits({"input_ids": [[1, 2], [3, 4]], "attention_mask": [[1, 1], [0, 0]]})


# columns and nulls


def test_a_missing_row_is_an_empty_document_and_is_said():
    rows = datasets.Dataset.from_dict({"text": ["peace", None, "war"]})
    for source in (
        rows,
        rows.to_pandas(),
        ["peace", float("nan"), "war"],
        [{"text": "peace"}, {"text": None}, {"text": "war"}],
    ):
        with pytest.warns(UserWarning, match="1 of 3 texts are missing"):
            assert saelab.load_corpus(source).documents == ["peace", "", "war"]


def test_a_stream_is_read_no_further_than_asked():
    read = []

    def rows():
        for i in range(50_000):
            read.append(i)
            yield {"text": f"speech {i}"}

    stream = datasets.IterableDataset.from_generator(rows)
    assert saelab.load_corpus(stream, max_documents=10).documents == [f"speech {i}" for i in range(10)]
    assert len(read) <= 11
    assert len(saelab.load_corpus(torch.arange(40).view(10, 4), max_documents=3).rows) == 3


def test_conversations_are_written_by_the_chat_template(tiny_tokenizer):
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = TEMPLATE
    lm = saelab.load_model(llama_model(), tokenizer=tokenizer)
    corpus = saelab.load_corpus({"messages": [CHAT] * 30})
    assert corpus.digest == saelab.load_corpus([CHAT] * 30).digest
    text = "<user>peace<assistant>bread"
    as_text = saelab.load_corpus([text] * 30).contexts(lm, 16, "all")
    assert torch.equal(corpus.contexts(lm, 16, "all").ids, as_text.ids)
    assert lm.to_tokens({"messages": CHAT}).rows() == lm.to_tokens(CHAT).rows() == lm.to_tokens(text).rows()
    bare = saelab.load_model(llama_model(), tokenizer=tiny_tokenizer)
    with pytest.raises(ConfigError, match="chat template"):
        corpus.contexts(bare, 16, "all")
    with pytest.raises(DataError, match="template cannot write"):
        tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
        lm.to_tokens(CHAT)


# files

ROWS = [{"year": 1862 + i, "text": text} for i, text in enumerate(PLAIN)]


def lines(rows):
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def parquet(rows):
    buffer = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows), buffer)
    return buffer.getvalue()


FILES = {
    "a.jsonl": lines(ROWS), "A.JSONL": lines(ROWS), "a.ndjson": lines(ROWS), "strings.jsonl": lines(PLAIN),
    "a.json": json.dumps(ROWS).encode(), "columns.json": json.dumps({"text": PLAIN}).encode(),
    "strings.json": json.dumps(PLAIN).encode(), "a.csv": FRAME.to_csv(index=False).encode(),
    "a.tsv": FRAME.to_csv(index=False, sep="\t").encode(), "a.parquet": parquet(ROWS),
}  # fmt: skip


@pytest.mark.parametrize("name", FILES)
def test_known_formats(tmp_path, name):
    plain = saelab.load_corpus(PLAIN).digest
    (tmp_path / name).write_bytes(FILES[name])
    assert saelab.load_corpus(tmp_path / name).digest == plain
    assert saelab.load_corpus(tmp_path / name, max_documents=1).documents == PLAIN[:1]
    zipped = tmp_path / "zipped" / f"{name}.gz"
    zipped.parent.mkdir()
    zipped.write_bytes(gzip.compress(FILES[name]))
    assert saelab.load_corpus(zipped).digest == saelab.load_corpus(zipped.parent).digest == plain


def test_columns_of_ids_and_of_conversations(tmp_path, tiny_llama):
    ids = [[5, 6, 7], [8, 9]]
    expected = saelab.load_corpus(ids).digest
    for name, content in (("a.parquet", parquet([{"input_ids": row} for row in ids])),
                          ("a.jsonl", lines([{"input_ids": row} for row in ids]))):  # fmt: skip
        (tmp_path / name).write_bytes(content)
        assert saelab.load_corpus(tmp_path / name).digest == expected
        both = lines([{"text": text, "input_ids": row} for text, row in zip(PLAIN, ids, strict=True)])
    (tmp_path / "both.jsonl").write_bytes(both)
    assert saelab.load_corpus(tmp_path / "both.jsonl").documents == PLAIN
    assert saelab.load_corpus(tmp_path / "both.jsonl", text_column="input_ids").digest == expected
    (tmp_path / "chat.jsonl").write_bytes(lines([{"messages": CHAT}, {"messages": CHAT}]))
    assert saelab.load_corpus(tmp_path / "chat.jsonl").documents == [CHAT, CHAT]
    with pytest.raises(DataError, match="some files .* texts and others token ids"):
        saelab.load_corpus(tmp_path)


@pytest.mark.parametrize("name", ["a.html", "a.pdf", "a.zip", "README", "a.html.gz", "a.jsonl.bak"])
def test_other_files_are_refused_with_the_list(tmp_path, name):
    (tmp_path / name).write_bytes(b"<p>peace</p>")
    with pytest.raises(DataError, match=r"no format .*\.txt, .*\.jsonl, .*\.parquet"):
        saelab.load_corpus(tmp_path / name)
    (tmp_path / "b.txt").write_text("war")
    with pytest.warns(UserWarning, match="1 of 2 files"):
        assert saelab.load_corpus(tmp_path).documents == ["war"]


@pytest.mark.parametrize(
    ("name", "content"),
    [("a.parquet", b"PAR1"), ("a.txt.gz", b"not gzip"), ("a.json", b"{"), ("a.json", b'{"name": "saelab"}'),
     ("a.csv.gz", gzip.compress(b"text\n" + bytes(range(256)) * 9)[:-9]), ("a.json", b"[" * 100_000), ("a.json", b"3")],
)  # fmt: skip
def test_damaged_files(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=r"a\.[a-z]+"):
        saelab.load_corpus(tmp_path / name)


def test_a_folder_of_texts_with_settings_in_it(tmp_path):
    (tmp_path / "a.txt").write_text("peace")
    (tmp_path / "about.json").write_text('{"author": "Lincoln"}')
    with pytest.warns(UserWarning, match=r"1 of 2 files .*\.json"):
        assert saelab.load_corpus(tmp_path).documents == ["peace"]
    datasets.Dataset.from_pandas(FRAME).save_to_disk(tmp_path / "saved")
    with pytest.raises(DataError, match="load_from_disk"):
        saelab.load_corpus(tmp_path / "saved")


def test_a_text_is_no_name():
    with pytest.raises(DataError, match="goes into a list"):
        saelab.load_corpus("The state of the union is strong.")
    with pytest.raises(DataError, match="goes into a list"):
        saelab.load_corpus("peace, " * 1_000)
