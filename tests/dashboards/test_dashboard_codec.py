"""The container of a chunk: what goes in comes out, and anything else is refused."""

import contextlib
import gzip

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from saelab.base.errors import FormatError
from saelab.dashboards.writing import codec
from saelab.pages import packing
from tests import synthetic_dashboard

DTYPES = st.sampled_from(["u1", "i1", "<u2", "<i2", "<u4", "<i4", "<f2", "<f4", "<f8"])
NAMES = st.text("abcdefghijklmnopqrstuvwxyz_0123456789", min_size=1, max_size=12)
ARRAYS = DTYPES.flatmap(lambda dtype: hnp.arrays(dtype, st.integers(0, 40)))


@settings(max_examples=60, deadline=None)
@given(st.dictionaries(NAMES, ARRAYS | st.text(), max_size=6))
def test_columns_come_back(columns):
    columns = {name: c if not isinstance(c, str) else c.replace("\x00", "") for name, c in columns.items()}
    header, found = codec.decode(
        codec.from_text(packing.to_text(packing.compress(codec.encode("toy", columns, note="n"))))
    )
    assert (header["kind"], header["note"]) == ("toy", "n")
    assert list(found) == list(columns)
    for name, column in columns.items():
        if isinstance(column, str):
            assert found[name] == column
        else:
            assert found[name].dtype == column.dtype
            np.testing.assert_array_equal(found[name], column)


@given(st.lists(st.text(st.characters(codec=None), max_size=8), max_size=8))
def test_strings_come_back_with_lone_surrogates_replaced(strings):
    columns = codec.texts(strings)
    found = codec.decode(codec.encode("toy", columns))[1]
    expected = ["".join("\ufffd" if 0xD800 <= ord(c) < 0xE000 else c for c in s) for s in strings]
    assert codec.cut(found["text"], found["length"]) == expected


@given(hnp.arrays("<f8", st.integers(1, 30), elements=st.floats(-1e30, 1e30, allow_subnormal=False)))
def test_scaled_halves_are_within_half_a_step(values):
    found = codec.decode(codec.encode("toy", {"x": codec.Half(values)}))[1]["x"]
    largest = np.abs(values).max()
    assert np.isfinite(found).all()
    # eleven bits of precision, down to 2^-29 of the largest
    np.testing.assert_allclose(found, values, rtol=2**-10, atol=largest * 2**-38 + 1e-300)


def test_bytes_depend_on_the_columns_alone():
    columns = {"a": np.arange(9, dtype="<u2"), "b": "x"}
    assert packing.compress(codec.encode("toy", columns)) == packing.compress(codec.encode("toy", dict(columns)))
    assert packing.compress(b"x")[4:8] == bytes(4)  # no time in the gzip header
    assert gzip.decompress(packing.compress(b"x")) == b"x"


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_damage_is_a_format_error(data):
    whole = codec.encode("toy", {"a": np.arange(9, dtype="<u2"), "b": "text", "c": np.ones(3, "<f4")})
    if data.draw(st.booleans()):
        damaged = whole[: data.draw(st.integers(0, len(whole) - 1))]
        with pytest.raises(FormatError):
            codec.decode(damaged)
    else:
        changed = bytearray(whole)
        changed[data.draw(st.integers(0, len(whole) - 1))] ^= 1 << data.draw(st.integers(0, 7))
        with contextlib.suppress(FormatError):
            codec.decode(bytes(changed))


@pytest.mark.parametrize("text", ["</script>", "AAAA", "H4sIAAAAAAAC", "é"])
def test_what_is_no_chunk_is_refused(text):
    with pytest.raises((FormatError, ValueError)):
        codec.from_text(text)


@pytest.mark.parametrize("name", ["a b", "../x", "A", "", 'x"', "x\n"])
def test_chunk_names_are_plain(name):
    with pytest.raises(FormatError, match="only a-z"):
        codec.script(name, "AAAA")


def test_only_base64_crosses_into_script():
    text = packing.to_text(packing.compress(codec.encode("toy", {"b": "</script><script>alert(1)</script>"})))
    assert codec.script("x", text) == f'__sl("x","{text}")\n'
    assert set(text) <= set("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/=")


def test_the_synthetic_data_set_is_whole_and_repeatable():
    arguments = {"d_sae": 130, "heads": 9, "compare": True, "long_token": True}
    first = dict(synthetic_dashboard.chunks(**arguments))
    assert first == dict(synthetic_dashboard.chunks(**arguments))
    for i in range(3):
        columns = codec.decode(first[f"f-{i:05d}"])[1]
        windows, miss = columns["windows"].sum(), codec.decode(first[f"m-{i:05d}"])[1]["miss"]
        assert len(columns["group"]) == len(columns["offset"]) == windows
        assert len(columns["acts"]) == len(columns["effects"]) == columns["length"].sum()
        assert len(miss) == len(columns["pool"]) >= (columns["offset"] + columns["length"]).max()
    manifest = synthetic_dashboard.manifest(**arguments)
    assert [sae["prefix"] for sae in manifest["saes"]] == ["", "b-"]
    codec.manifest_bytes({**manifest, "chunks": {}})
