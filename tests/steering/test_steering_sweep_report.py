"""The page of a sweep: hostile texts shown verbatim, no script, no network."""

import html
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from saelab.steering.records import MEASURES
from saelab.steering.sweep_page import STYLE, shown
from saelab.steering.sweep_table import Sweep

CHROMIUM = Path("/usr/bin/chromium")
HOSTILE = [
    "</script><script>window.__pwned=1</script>",
    '<img/src="x"/onerror="window.__pwned=1">',
    "<!--<script>",
    '<!-- <script <img </ "><!-- ]]> </style></bdi></details>',
    "javascript:alert(1) [link](javascript:alert(1)) =HYPERLINK(\"http://evil\") @SUM `x` &lt;b&gt; &amp;",
    "line\u2028separator\u2029paragraph \x00 \x1b[31mred \ud800 lone",
    "abc\u202egnirts\u202c \u2067isolate",
    "z\u0351\u0300\u0301\u0489algo \u200b\u200d\ufeff \U0001f469\u200d\U0001f680 \u042f",
    "__proto__ constructor a|b {{x}} ${y} %s",
    "long" * 25_000,
]  # fmt: skip


def made(texts, latent=3):
    """A sweep with these texts: as prompts, unsteered and steered, as top tokens, as names."""
    rows, figures = [], {name: 0.25 for name in MEASURES}
    for i, words in enumerate(texts):
        for baseline in ("none", "steered", "random_direction", "random_latent"):
            steered = None if baseline == "none" else latent
            rows.append(
                {"row": len(rows), "baseline": baseline, "latent": steered, "operation": steered and "add",
                 "strength": steered and 2.0, "draw": 0 if baseline.startswith("random") else None,
                 "control": 5 if baseline == "random_latent" else None, "prompt_id": i, "seed": 0, "ids": [1],
                 "text": words if baseline == "none" else f"{words[:3]}{baseline} {words}", **figures}
            )  # fmt: skip
    settings = {
        "model": texts[0], "site": texts[1 % len(texts)], "later_site": None, "unit": "max_activation", "scope": "Scope()",
        "temperature": 1.0, "latents": [latent], "operations": ["add"], "strengths": [2.0], "prompts": list(texts),
        "texts": len(rows),
    }  # fmt: skip
    scores = {"top_tokens": [list(texts)], "output_score": [0.5], "input_score": [float("nan")]}
    return Sweep(rows, settings, scores)


class Reader(HTMLParser):
    """The texts in `bdi` elements, and every tag and attribute."""

    def __init__(self):
        super().__init__()
        self.texts, self.tags, self.attributes, self.depth = [], set(), set(), 0

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        self.attributes |= {name for name, _ in attrs}
        if tag == "bdi":
            self.texts.append("")
            self.depth += 1

    def handle_endtag(self, tag):
        self.depth -= tag == "bdi"

    def handle_data(self, data):
        if self.depth:
            self.texts[-1] += data


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    return made(HOSTILE).to_html(tmp_path_factory.mktemp("page") / "sweep.html")


def test_every_text_is_shown_verbatim(page):
    reader = Reader()
    reader.feed(page.read_text(encoding="utf-8"))
    for words in HOSTILE:
        visible = html.unescape(shown(words))
        assert reader.texts.count(visible) >= 2, words[:60]  # as a prompt and as an unsteered text
        for baseline in ("steered", "random_direction", "random_latent"):
            assert f"{visible[:3]}{baseline} {visible}" in reader.texts, words[:60]


def test_nothing_but_the_pages_own_elements(page):
    reader = Reader()
    reader.feed(page.read_text(encoding="utf-8"))
    assert not reader.tags & {"script", "img", "link", "iframe", "object", "form", "base"}
    assert not {name for name in reader.attributes if name.startswith("on")} and "style" not in reader.attributes
    assert "src" not in reader.attributes
    text = page.read_text(encoding="utf-8")
    assert text.count("<style>") == 1 and "default-src 'none'" in text
    assert re.findall(r'href="([^"]*)"', text) == ["#latent-3"]


def test_what_a_page_cannot_hold_is_made_visible():
    assert shown("a\x00b\x1bc\x7f\x85\ud800\n\t") == "a\u2400b\u241bc\u2421\\u0085\\ud800\n\t"
    assert shown("<&>\"'") == "&lt;&amp;&gt;&quot;&#x27;"
    assert shown("\u202eא\u200d😀") == "\u202eא\u200d😀"


def test_marks_begin_where_the_texts_part(tmp_path):
    sweep = made(["one two three"])
    sweep.rows[1]["text"] = "one two <b>four"
    assert "one two <mark>&lt;b&gt;four</mark></bdi>" in sweep.to_html(tmp_path / "p.html").read_text()
    sweep.rows[1]["text"] = "one two three"
    assert '<td><bdi class="text">one two three</bdi>' in sweep.to_html(tmp_path / "p.html").read_text()


def test_an_unfinished_sweep_has_a_page(tmp_path):
    sweep = made(["one", "two"])
    assert "random directions: p needs 20" in sweep.to_html(tmp_path / "p.html").read_text()
    part = Sweep(sweep.rows[:1], sweep.settings, sweep.scores)
    assert "1 of 8" in part.to_html(tmp_path / "p.html").read_text()
    assert "No steered text yet" in Sweep([], sweep.settings, {}).to_html(tmp_path / "p.html").read_text()


@pytest.mark.skipif(not CHROMIUM.exists(), reason=f"no browser at {CHROMIUM}")
def test_in_a_browser(page):
    """Nothing runs, nothing is asked of the network, nothing breaks the policy, and the texts are what they were."""
    sync = pytest.importorskip("playwright.sync_api")
    with sync.sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=str(CHROMIUM), args=["--no-sandbox", "--disable-background-networking"]
        )
        try:
            tab = browser.new_page()
            said, asked = [], []
            tab.on("console", lambda message: said.append(message.text))
            tab.on("dialog", lambda dialog: (said.append(dialog.message), dialog.dismiss()))
            tab.on("request", lambda request: asked.append(request.url))
            tab.goto(page.as_uri())
            assert said == [] and asked == [page.as_uri()]
            assert tab.evaluate("typeof window.__pwned") == "undefined"
            assert tab.evaluate("getComputedStyle(document.querySelector('.text')).unicodeBidi") == "isolate"
            prompts = tab.evaluate("[...document.querySelectorAll('p.prompt .text')].map(e => e.textContent)")
        finally:
            browser.close()
    assert prompts == [html.unescape(shown(words)) for words in HOSTILE]


def test_the_style_has_no_address():
    assert "url(" not in STYLE and "@import" not in STYLE
