"""What Python encodes, Chromium decodes; what is damaged is said, and the page lives."""

import base64
import gzip
import hashlib
import math
import random
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from saelab.dashboards.writing import codec
from saelab.pages import packing
from saelab.pages.shell import PAGE
from tests import synthetic_dashboard
from tests.browser import Watched, browser, bundle, single_file, synthetic_texts  # noqa: F401

ORIGIN = "http://localhost"  # modules need an origin, crypto.subtle a safe one
# The page's own functions, in an empty page. Numbers that JSON has not come back as strings.
PROBES = """async () => {
  const { ChunkError, cutTexts, fromBase64, halves, inflate, parseContainer } = await import("/chunks.js");
  const { characterGroups } = await import("/text.js");
  const plain = (v) => typeof v === "string" ? v : Array.from(v, (x) => Number.isFinite(x) ? x : String(x));
  const hex = (bytes) => Array.from(new Uint8Array(bytes), (b) => b.toString(16).padStart(2, "0")).join("");
  globalThis.decodeChunk = async (text, check) => {
    try {
      const member = fromBase64("x", text);
      if (check && hex(await crypto.subtle.digest("SHA-256", member)) !== check) throw new ChunkError("x", "SHA-256");
      const { header, columns } = parseContainer("x", await inflate("x", member));
      return { header, columns: Object.fromEntries(Object.entries(columns).map(([k, v]) => [k, plain(v)])) };
    } catch (error) { return { error: error.constructor.name, message: error.message }; }
  };
  globalThis.readTexts = async (text) => {
    const { columns } = parseContainer("x", await inflate("x", fromBase64("x", text)));
    return cutTexts(columns.text, columns.length);
  };
  globalThis.groupTokens = (tokens) =>
    characterGroups(tokens.map((t) => Uint8Array.from(t))).map(({ from, to, text }) => [from, to, text]);
  globalThis.everyHalf = () => plain(halves(Uint16Array.from({ length: 65536 }, (_, i) => i).buffer));
}"""


def serve(route: Any) -> None:
    name = route.request.url.removeprefix(f"{ORIGIN}/")
    if name:
        route.fulfill(path=PAGE / "scripts" / name, content_type="text/javascript")
    else:
        route.fulfill(body="<!doctype html>", content_type="text/html")


@pytest.fixture(scope="module")
def tab(browser) -> Any:  # noqa: F811
    with Watched(browser) as watched:
        watched.page.route(f"{ORIGIN}/**", serve)
        watched.page.goto(f"{ORIGIN}/")
        watched.page.evaluate(PROBES)
        yield watched.page


INTEGERS = ("u1", "i1", "<u2", "<i2", "<u4", "<i4")
FLOATS = ("<f2", "<f4", "<f8")


def arrays(dtype: str) -> st.SearchStrategy:
    if dtype in FLOATS:
        numbers = st.floats(width=8 * np.dtype(dtype).itemsize)  # type: ignore[call-overload]
    else:
        numbers = st.integers(int(np.iinfo(dtype).min), int(np.iinfo(dtype).max))
    return st.lists(numbers, max_size=40).map(lambda values: np.array(values, dtype))


ARRAYS = st.one_of(
    *map(arrays, INTEGERS + FLOATS),
    st.lists(st.floats(-1e30, 1e30), min_size=1, max_size=20).map(lambda values: codec.Half(np.array(values))),
    st.text(st.characters(exclude_categories=("Cs",)), max_size=40),
)
NAMES = st.text("abcdefghijklmnopqrstuvwxyz_0123456789", min_size=1, max_size=12) | st.sampled_from(
    ["__proto__", "constructor", "length"]
)


def number(x: Any) -> float:
    """Back from the strings that stand for what JSON has not."""
    return {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}.get(x, x) if isinstance(x, str) else x


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(columns=st.dictionaries(NAMES, ARRAYS, max_size=6), kind=st.text(max_size=10))
def test_what_python_encodes_chromium_decodes(tab, columns, kind):
    container = codec.encode(kind, columns)
    read = tab.evaluate("(text) => decodeChunk(text)", packing.to_text(packing.compress(container)))
    header, wanted = codec.decode(container)
    assert "error" not in read, read
    assert [c["name"] for c in read["header"]["columns"]] == list(columns)
    for name, value in wanted.items():
        if name == "__proto__":  # lost on the way through JSON to this test, not in the page
            continue
        if isinstance(value, str):
            assert read["columns"][name] == value
        else:
            np.testing.assert_array_equal(
                np.array([number(x) for x in read["columns"][name]], float), value.astype(float)
            )


@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(strings=st.lists(st.text(max_size=12), max_size=12))
def test_texts_are_cut_where_python_cut_them(tab, strings):
    container = codec.encode("toy", codec.texts(strings))
    read = tab.evaluate("(text) => readTexts(text)", packing.to_text(packing.compress(container)))
    assert read == ["".join("\ufffd" if "\ud800" <= c <= "\udfff" else c for c in s) for s in strings]


def test_every_half_with_and_without_the_browsers_own(tab):
    wanted = np.arange(65_536, dtype="<u2").view("<f2").astype(float)
    for _ in range(2):
        read = np.array([number(x) for x in tab.evaluate("everyHalf()")], float)
        np.testing.assert_array_equal(read, wanted)
        tab.evaluate("delete globalThis.Float16Array")


@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    text=st.text(st.characters(exclude_categories=("Cs",)), max_size=8), cuts=st.lists(st.integers(0, 32), max_size=6)
)
def test_characters_split_over_tokens_come_together(tab, text, cuts):
    """However UTF-8 text is cut into tokens, joined groups give the text, and no group holds part of a character."""
    data = text.encode()
    at = sorted({0, len(data), *(c for c in cuts if c < len(data))})
    tokens = [list(data[a:b]) for a, b in zip(at, at[1:], strict=False)]
    groups = tab.evaluate("(tokens) => groupTokens(tokens)", tokens)
    assert "".join(string for _, _, string in groups) == text
    assert [g[0] for g in groups] + [len(tokens)] == [0] * (not groups) + (
        [0] + [g[1] for g in groups] if groups else []
    )


def test_damage_never_passes_and_never_breaks(tab):
    """Flipped bits, cut ends, foreign bytes: a ChunkError with the checksum; without it a reading or a ChunkError."""
    rng = random.Random(0)
    container = codec.encode(
        "toy", {"a": np.arange(50, dtype="<u2"), "text": "naïve" * 9, "h": codec.Half(np.linspace(0, 9, 30))}
    )
    member = packing.compress(container)
    digest = hashlib.sha256(member).hexdigest()
    assert "columns" in tab.evaluate("([text, check]) => decodeChunk(text, check)", [packing.to_text(member), digest])
    for _ in range(120):
        broken = bytearray(member)
        for _ in range(rng.randint(1, 3)):
            broken[rng.randrange(len(broken))] ^= 1 << rng.randrange(8)
        broken = broken[: rng.choice([len(broken), rng.randrange(len(broken))])]
        if bytes(broken) == member:
            continue
        read = tab.evaluate("([text, check]) => decodeChunk(text, check)", [packing.to_text(bytes(broken)), digest])
        assert read.get("error") == "ChunkError"
        inner = bytearray(container)
        inner[rng.randrange(len(inner))] ^= 1 << rng.randrange(8)
        read = tab.evaluate(
            "(text) => decodeChunk(text)",
            packing.to_text(gzip.compress(bytes(inner[: rng.choice([len(inner), rng.randrange(len(inner))])]))),
        )
        assert "columns" in read or read["error"] == "ChunkError", read
    for text in ("", "A", "====", "AAAA", "not base64!", base64.b64encode(b"SLD1").decode()):
        assert tab.evaluate("(text) => decodeChunk(text)", text)["error"] == "ChunkError"


@pytest.fixture(scope="module")
def chunks() -> dict[str, str]:
    return synthetic_texts(d_sae=128, vocab=300, per_chunk=64)


def damaged(text: str, how: str) -> str:
    return {
        "flip": text[:500] + ("A" if text[500] != "A" else "B") + text[501:],
        "cut": text[: len(text) // 2],
        "empty": "",
        "foreign": "<b>",
    }[how]


@pytest.mark.parametrize("form", ["single", "bundle"])
@pytest.mark.parametrize("how", ["flip", "cut", "empty"])
def test_a_damaged_chunk_is_said_and_the_rest_works(browser, chunks, tmp_path, form, how):  # noqa: F811
    broken = chunks | {name: damaged(chunks[name], how) for name in ("f-00001", "p-000", "m-00000", "steer")}
    path = single_file(tmp_path / "x.html", broken) if form == "single" else bundle(tmp_path / "x", broken)
    with Watched(browser) as watched:
        watched.open(path, "#f=100")
        card = watched.page.locator("main [role=alert]")
        assert card.is_visible() and "f-00001" in card.text_content()
        watched.go("#p=0")
        assert "p-000" in watched.text("main [role=alert]")
        watched.go("#p=1")
        assert watched.page.locator(".strip .t").count() > 5
        watched.go("#show=all")
        assert watched.page.locator(".grid .row").count() > 5
        watched.go("#f=4")  # steering is broken, the rest of this page is not
        assert watched.page.locator(".example").count() > 0
        watched.page.locator("main [role=alert]", has_text="steer").wait_for()
        watched.page.keyboard.press("r")
        watched.page.locator("main [role=alert]", has_text="m-00000").wait_for()
        assert watched.verdict() == []


def test_a_missing_file_and_a_missing_start(browser, chunks, tmp_path):  # noqa: F811
    path = bundle(tmp_path / "x", chunks)
    (path.parent / "data" / "f-00001.js").unlink()
    with Watched(browser) as watched:
        watched.open(path, "#f=100")
        assert "f-00001.js" in watched.text("main [role=alert]")
        watched.go("#f=3")
        assert watched.page.locator(".example").count() > 0
    (path.parent / "data" / "manifest.js").unlink()
    with Watched(browser) as watched:
        watched.open(path)
        assert "manifest.js" in watched.text("main [role=alert]")
    for name in ("vocab", "idx-0", "manifest"):
        with Watched(browser) as watched:
            watched.open(single_file(tmp_path / f"{name}.html", {k: v for k, v in chunks.items() if k != name}))
            assert name in watched.text("main [role=alert]")
            assert watched.verdict() == []


def test_another_version_is_refused(browser, tmp_path):  # noqa: F811
    future = packing.to_text(codec.manifest_bytes({"format": "saelab-dashboard", "version": 99, "chunks": {}}))
    with Watched(browser) as watched:
        watched.open(single_file(tmp_path / "x.html", {"manifest": future}))
        assert "version 99" in watched.text("main [role=alert]") and "build the dashboard again" in watched.text()


def test_the_loader_asks_for_chunks_only(browser, chunks, tmp_path):  # noqa: F811
    """A manifest that names a chunk like a path: the Trusted Types policy refuses the URL, nothing is loaded."""
    (tmp_path / "evil.js").write_text("window.__pwned = 1")
    manifest = synthetic_dashboard.manifest(d_sae=128, vocab=300)
    manifest["prompts"] = [{"chunk": "../evil", "text": "x", "tokens": 1, "prefix": ""}]
    manifest["chunks"] = {"../evil": ["0" * 64, 1, 1]}
    for name in chunks:
        if name != "manifest":
            member = base64.b64decode(chunks[name])
            manifest["chunks"][name] = [hashlib.sha256(member).hexdigest(), len(member), 0]
    path = bundle(tmp_path / "x", chunks | {"manifest": packing.to_text(codec.manifest_bytes(manifest))})
    with Watched(browser) as watched:
        watched.open(path, "#p=0")
        assert "evil" in watched.text("main [role=alert]")
        assert watched.verdict() == []
