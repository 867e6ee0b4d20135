"""The page executes nothing of its data, reaches nothing, and shows every hostile string as it is."""

import csv
import io
import json
import re
from pathlib import Path

import numpy as np
import pytest

from saelab.dashboards.writing.codec import texts as text_columns
from tests.browser import Watched, browser, bundle, single_file, synthetic_texts  # noqa: F401
from tests.synthetic_dashboard import HOSTILE

H = len(HOSTILE)  # the vocabulary's first rows
PAGES = ["#show=all", "#f=5", "#f=7&tab=near", "#f=7,9@B", "#view=compare", "#p=0", "#sae=B", "#show=dead", "#f=5@B"]
MAXIMUM_NODES = 3_000


def all_hostile(name: str, header: dict, columns: dict) -> None:
    """Latent i is called HOSTILE[i], fires on it, writes it; windows and prompts go through them all, every token firing."""
    part = name.removeprefix("b-").split("-")[0]
    token = columns.get("tok0", columns.get("pool", columns.get("token", np.zeros(0, "<u2")))).dtype
    if part == "lab":
        columns["latent"] = np.arange(H, dtype="<u4")
        columns.update(text_columns(HOSTILE), source=np.zeros(H, "u1"), score=np.zeros(H, "<f2"))
        header["sources"] = [HOSTILE[0]]
    elif name.endswith("idx-0"):
        for column, shift in (("tok0", 0), ("tok1", 1), ("tok2", 2)):
            columns[column] = ((np.arange(len(columns[column])) + shift) % H).astype(token)
    elif part == "f":
        columns["pool"] = (np.arange(len(columns["pool"])) % H).astype(token)
        columns["acts"] = np.maximum(columns["acts"], 30)
        for column in ("tok", "top", "bottom", "raw_top", "raw_bottom", "x_next", "x_up", "x_down"):
            columns[column] = (np.arange(len(columns[column])) % H).astype(token)
    elif part == "p":
        columns["token"] = (np.arange(len(columns["token"])) % H).astype(token)


@pytest.fixture(scope="module")
def chunks() -> dict[str, str]:
    return synthetic_texts(all_hostile, d_sae=48, compare=True, heads=4, vocab=200, labels=1.0)


@pytest.fixture(scope="module")
def page(tmp_path_factory, chunks) -> Path:
    # A folder whose name must be escaped in a URL.
    return single_file(tmp_path_factory.mktemp("a b#c%20ü") / "x.html", chunks)


@pytest.mark.parametrize("form", ["single", "bundle"])
def test_every_page_is_clean_and_light(browser, chunks, page, tmp_path, form):  # noqa: F811
    path = page if form == "single" else bundle(tmp_path / "dash #1", chunks)
    with Watched(browser) as watched:
        watched.open(path)
        for place in PAGES:
            watched.go(place)
            assert watched.page.locator("main .alert").count() == 0, (place, watched.text())
            assert watched.nodes() <= MAXIMUM_NODES, place
        assert watched.verdict() == []


def test_index_shows_hostile_labels_and_tokens(browser, page):  # noqa: F811
    with Watched(browser) as watched:
        watched.open(page, "#s=id&show=all")
        seen = ""
        for _ in range(4):
            seen += watched.text(".grid")
            watched.page.locator(".grid .view").focus()
            watched.page.keyboard.press("PageDown")
            watched.page.wait_for_timeout(60)
        seen += watched.text(".grid")
        for string in HOSTILE:
            assert string in seen, repr(string)
            assert seen.count(string) >= 3  # as a label, and as a token of three latents
        assert HOSTILE[0] in watched.text("main h1")
        assert HOSTILE[0] in watched.text("#brand") and HOSTILE[1] in watched.text("footer")
        assert watched.verdict() == []


def test_feature_and_card_show_hostile_strings(browser, page):  # noqa: F811
    with Watched(browser) as watched:
        watched.open(page, "#f=5")
        assert HOSTILE[5] in watched.text("h1")
        texts = watched.page.locator(".example .line").all_text_contents()
        for string in HOSTILE:
            assert any(string in text for text in texts), repr(string)
        left = watched.text(".left")  # row 5 of the [L x 10] columns
        assert all(HOSTILE[(50 + i) % H] in left for i in range(10))
        row = watched.page.locator(".example").first
        row.locator("button").click()  # whole text, so that each token can be reached
        titles = set()
        for token in row.locator(".t").all():
            token.focus()
            titles.add(watched.page.locator(".hover h3").text_content())
        assert titles >= set(HOSTILE)
        assert watched.verdict() == []


def test_prompt_and_comparison_show_hostile_strings(browser, page):  # noqa: F811
    with Watched(browser) as watched:
        watched.open(page, "#p=0")
        strip = watched.text(".strip")
        assert all(string in strip for string in HOSTILE)
        for token in watched.page.locator(".strip .t").all()[:6]:
            token.focus()
            assert watched.page.locator(".hover h3").text_content() in HOSTILE
        watched.go("#f=7,9@B")
        for half in watched.page.locator(".half").all():
            shown = half.text_content()
            assert all(string in shown for string in HOSTILE)
        assert HOSTILE[9] in watched.page.locator(".half h2").nth(1).text_content() or HOSTILE[7] in watched.text(
            ".half h2"
        )
        watched.go("#view=compare")
        assert HOSTILE[0] in watched.text() and HOSTILE[1] in watched.text()
        row = watched.page.locator("tr", has_text="selection")
        assert row.locator("td").all_text_contents() == ["selection", "plain", "plain"]  # text, among figures
        assert watched.verdict() == []


def exported(watched: Watched, kind: str) -> str:
    watched.page.locator(".actions button", has_text="Export").click()
    with watched.page.expect_download() as download:
        watched.page.locator("dialog button", has_text=re.compile(f"^{kind}$")).click()
    assert re.fullmatch(r"[\w.-]+", download.value.suggested_filename)
    return Path(download.value.path()).read_bytes().decode("utf-8")


@pytest.mark.parametrize("place, field", [("#f=5", "text"), ("#p=0", "token"), ("#s=id&show=all", "label"),
                                          ("#view=compare", "label"), ("#f=7,9@B", "text")])  # fmt: skip
def test_exports_carry_hostile_strings(browser, page, place, field):  # noqa: F811
    with Watched(browser, accept_downloads=True) as watched:
        watched.open(page, place)
        rows = json.loads(exported(watched, "JSON"))
        latents = rows if isinstance(rows, list) else [rows]
        rows = [example for latent in latents for example in latent["examples"]] if "examples" in latents[0] else rows
        cells = list(csv.DictReader(io.StringIO(exported(watched, "CSV").removeprefix("\ufeff"), newline="")))
        assert len(rows) == len(cells) > 0
        whole = "\n".join(str(row[field]) for row in rows)
        assert all(string in whole for string in HOSTILE)
        for row, cell in zip(rows, cells, strict=True):
            value, written = row[field], cell[field]
            # A spreadsheet must not run a cell: those that begin like a formula begin with an apostrophe instead.
            assert written == ("'" + value if value[:1] in tuple("=+-@\t\r\n") and value else value)
        assert watched.verdict() == []


def test_notes_are_text_too(browser, page, tmp_path):  # noqa: F811
    """Labels and notes of a foreign JSON file: hostile values are shown, keys of another shape are passed over."""
    foreign = {
        "labels": {
            "A:5": HOSTILE[1],
            "A:6": "[x](javascript:window.__pwned=1)",
            "__proto__": {"polluted": 1},
            "x": "no",
        },
        "notes": {"A:5": HOSTILE[0], "A:7": 5},
        "pins": ["A:5", "<img>", 7],
    }
    (tmp_path / "notes.json").write_text(json.dumps(foreign))
    with Watched(browser) as watched:
        watched.open(page, "#f=5")
        watched.page.keyboard.press("Escape")
        watched.page.locator("#view").click()
        with watched.page.expect_file_chooser() as chooser:
            watched.page.locator("dialog button", has_text="Import JSON").click()
        chooser.value.set_files(tmp_path / "notes.json")
        assert watched.until(lambda: "Took 4 entries" in watched.text("#status"))
        watched.page.keyboard.press("Escape")
        watched.go("#f=6").go("#f=5")
        assert HOSTILE[1] in watched.text("h1")
        assert watched.page.locator("#note").input_value() == HOSTILE[0]
        assert watched.page.evaluate("({}).polluted") is None
        assert watched.verdict() == []


ADDRESSES = ["#f=-1", "#f=1e309", "#f=<svg onload=window.__pwned=1>", "#f=999999", "#p=9", "#p=-1", "#f=5,<img>", "#f=%00",
             "#f=1@Z", "#tab=__proto__&f=5", "#s=-__proto__", "#s=constructor", "#show=__proto__", "#d=x..y", "#q=re:/(/",
             "#q=~99999", "#f=5&ex=-1&t=1e9", "#%%%", "#sae=Q"]  # fmt: skip


def test_hostile_addresses(browser, page):  # noqa: F811
    with Watched(browser) as watched:
        watched.open(page, ADDRESSES[0])
        assert "no such latent" in watched.text()
        for place in ADDRESSES[1:]:
            watched.go(place)
            assert watched.text().strip(), place
            watched.go("#f=5")
            assert HOSTILE[5] in watched.text("h1"), place  # the page lives
        assert watched.verdict() == []


# Does the harness bite? The same page with one function, the one that makes text nodes, written as others write it.
SAFE = re.compile(r"if\(!\w+\.test\((\w+)\)\)return\[document\.createTextNode\(\1\)\]")
UNSAFE = r"{ const span = document.createElement('span'); span.innerHTML = \1; return [span]; }"


def spoiled(page: Path, target: Path, policy: bool) -> Path:
    html, times = SAFE.subn(UNSAFE, page.read_text(encoding="utf-8"))
    assert times == 1
    found = re.search(r'<meta http-equiv="Content-Security-Policy"[^>]*>', html)
    assert found is not None
    if policy:  # the script has changed: its own hash is let in, so that only the policy on what it does is left
        from saelab.pages.shell import policy as of

        script, style = (re.search(f"<{tag}>(.*?)</{tag}>", html, re.DOTALL).group(1) for tag in ("script", "style"))  # type: ignore[union-attr]
        html = html.replace(found[0], f'<meta http-equiv="Content-Security-Policy" content="{of(script, style)}">')
    else:
        html = html.replace(found[0], "")
    target.write_text(html, encoding="utf-8", newline="\n")
    return target


def test_control_an_unsafe_template_is_caught(browser, page, tmp_path):  # noqa: F811
    with Watched(browser) as watched:
        watched.open(spoiled(page, tmp_path / "unsafe.html", policy=False), "#s=id&show=all")
        watched.until(lambda: watched.page.evaluate("window.__pwned !== undefined"))
        assert "executed: the canary is set" in watched.verdict()


def test_control_the_policy_stops_an_unsafe_template(browser, page, tmp_path):  # noqa: F811
    with Watched(browser) as watched:
        watched.open(spoiled(page, tmp_path / "unsafe.html", policy=True), "#s=id&show=all")
        verdict = " ".join(watched.verdict())
        assert "trusted-types" in verdict or "require-trusted-types-for" in verdict
        assert "executed" not in verdict


def test_control_data_in_a_script_is_caught(browser, tmp_path):  # noqa: F811
    (tmp_path / "x.html").write_text(
        f"<!doctype html><html data-shown=1><meta charset=utf-8><script>const data = {json.dumps(HOSTILE)};</script></html>"
    )
    with Watched(browser) as watched:
        watched.open(tmp_path / "x.html")
        assert "executed: the canary is set" in watched.verdict()


def test_inside_a_sandboxed_frame(browser, page, tmp_path):  # noqa: F811
    """As in a notebook: srcdoc, scripts only, no origin. The page works and the parent stays untouched."""
    import html

    source = html.escape(page.read_text(encoding="utf-8"), quote=True)
    (tmp_path / "parent.html").write_text(
        '<!doctype html><html data-shown=1><meta charset=utf-8><iframe sandbox="allow-scripts" width=1200 height=800 '
        f'srcdoc="{source}"></iframe>',
        encoding="utf-8",
    )
    with Watched(browser) as watched:
        watched.open(tmp_path / "parent.html")
        frame = watched.page.frame_locator("iframe")
        frame.locator(".grid .row").first.wait_for()
        frame.locator(".grid .row a").nth(2).click()
        frame.locator(".example").first.wait_for()
        frame.locator("#nav-pages a", has_text="Prompts").click()
        frame.locator(".strip .t").first.wait_for()
        assert watched.page.evaluate("Object.keys(window).filter((k) => k.startsWith('__sl') || k === '__pwned')") == []
        assert watched.verdict() == []


def test_a_page_of_one_latent_begins_with_it(browser, tmp_path):  # noqa: F811
    """As `sae.show(123)` in a notebook, where the address names no place; its index is still there."""
    with Watched(browser) as watched:
        watched.open(single_file(tmp_path / "one.html", synthetic_texts(pages=1, prompts=0)))
        assert watched.page.locator("h1").first.text_content().startswith("#") and watched.verdict() == []
        before = watched.shown
        watched.page.locator("#nav-pages a", has_text="Index").click()
        assert watched.settled(before).page.locator(".grid .row").count()
