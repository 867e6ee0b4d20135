"""Everyone can read the page: axe, contrast of every step of colour, small screens, print, size."""

from pathlib import Path

import pytest

from saelab.pages.shell import PAGES, built, shell
from tests.browser import Watched, browser, single_file, synthetic_texts  # noqa: F401

PLACES = [
    "#s=id",
    "#q=nothing-has-this",
    "#f=5",
    "#f=6&tab=interval",
    "#f=9&tab=near",
    "#f=0",
    "#f=9999",
    "#f=7,9@B",
    "#view=compare",
    "#view=sentence&text=a%20word%20and%20more",
    "#p=0",
    "#p=0&strip=miss",
    "#p=77",
]


@pytest.fixture(scope="module")
def page(tmp_path_factory) -> Path:
    chunks = synthetic_texts(d_sae=80, compare=True, heads=4, vocab=400)
    return single_file(tmp_path_factory.mktemp("page") / "x.html", chunks)


@pytest.mark.parametrize("look, places", [({"color_scheme": "light"}, PLACES), ({"color_scheme": "dark"}, PLACES),
                                          ({"forced_colors": "active"}, PLACES[:3]), ({"contrast": "more"}, PLACES[:3])],
                         ids=["light", "dark", "forced", "contrast"])  # fmt: skip
def test_axe_finds_nothing(browser, page, look, places):  # noqa: F811
    with Watched(browser, **look) as watched:
        watched.open(page, "#show=all")
        found = {}
        for place in places:
            watched.go(place)
            found[place] = watched.axe()
        watched.go("#f=8")
        watched.page.locator(".t.peak").first.focus()
        found["card"] = watched.axe()
        for key in "?e":
            watched.page.keyboard.press(key)
            found[key] = watched.axe()
            watched.page.keyboard.press("Escape")
        watched.page.locator("#view").click()
        found["view"] = watched.axe()
        assert {place: v for place, v in found.items() if v} == {}
        assert watched.verdict() == []


def test_every_step_of_every_palette_reads(browser, page):  # noqa: F811
    """Ink on each step at least 4.5 : 1 (WCAG 1.4.3), and steps in order of luminance."""
    code = """() => {
  const linear = (c) => (c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4);
  const y = (css) => {
    const [r, g, b] = css.match(/[\\d.]+/g).slice(0, 3).map((c) => linear(c / 255));
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const steps = [...document.querySelectorAll(".legend .ramp i")].map((i) => getComputedStyle(i));
  return steps.map((style) => [y(style.backgroundColor), y(style.color)]);
    }"""
    for scheme in ("light", "dark"):
        with Watched(browser, color_scheme=scheme) as watched:
            watched.open(page, "#f=5")
            for _palette in range(3):
                steps = watched.page.evaluate(code)
                assert len(steps) == 10
                backgrounds = [background for background, _ in steps]
                assert backgrounds == sorted(backgrounds, reverse=scheme == "light")
                for background, ink in steps:
                    assert (max(background, ink) + 0.05) / (min(background, ink) + 0.05) >= 4.5
                watched.page.keyboard.press("p")


@pytest.mark.parametrize("width", [360, 720])  # 720: 1440 at a zoom of 200%
def test_nothing_runs_out_of_a_narrow_page(browser, page, width):  # noqa: F811
    with Watched(browser, viewport={"width": width, "height": 780}) as watched:
        watched.open(page, "#show=all")
        for place in PLACES:
            watched.go(place)
            assert watched.page.evaluate("document.documentElement.scrollWidth") <= width, place
        watched.go("#view=compare")  # wide tables scroll; their rows keep their names
        names = watched.page.locator(".scroll > .pairs td:first-child")
        assert names.count() > 8
        assert names.evaluate_all("(all) => all.filter((name) => name.scrollWidth > name.clientWidth).length") == 0


@pytest.mark.parametrize("width", [360, 1100, 1400])
def test_no_figure_is_broken_in_two(browser, page, width):  # noqa: F811
    with Watched(browser, viewport={"width": width, "height": 780}) as watched:
        watched.open(page, "#f=8")
        lines = "(all) => all.map((dd) => Math.round(dd.offsetHeight / parseFloat(getComputedStyle(dd).lineHeight)))"
        assert set(watched.page.locator(".feature .stats dd").evaluate_all(lines)) == {1}


def test_narrow_examples_fade_nowhere(browser, page):  # noqa: F811
    """Where a row is shown whole, at 360 px and when it is opened, its end does not fade as if it went on."""
    faded = "[...document.querySelectorAll(QUERY)].filter((e) => getComputedStyle(e).maskImage !== 'none').length"
    with Watched(browser) as watched:
        watched.open(page, "#f=5")
        watched.page.locator(".example button").first.click()
        assert watched.page.evaluate(faded.replace("QUERY", "'.whole .line > span'")) == 0
        assert watched.page.evaluate(faded.replace("QUERY", "'.line > span'")) > 0
        watched.page.set_viewport_size({"width": 360, "height": 780})
        assert watched.page.evaluate(faded.replace("QUERY", "'.line > span'")) == 0


def test_print_and_reduced_motion(browser, page):  # noqa: F811
    with Watched(browser, reduced_motion="reduce") as watched:
        watched.open(page, "#f=5")
        moving = (
            "[...document.querySelectorAll('*')].filter((e) => getComputedStyle(e).transitionDuration !== '0s').length"
        )
        assert watched.page.evaluate(moving) == 0
        watched.page.emulate_media(media="print")
        assert not watched.page.locator(".bar").is_visible()
        assert watched.page.locator(".example").first.is_visible()
        assert watched.page.pdf()[:5] == b"%PDF-"
        assert watched.verdict() == []


@pytest.mark.parametrize("page", PAGES)
def test_size_and_sinks_of_the_shell(page):
    assert len("".join(shell(page=page)).encode()) <= 150_000
    script = built(f"{page}.js")
    assert "</script" not in script.lower() and "<!--" not in script and "</style" not in built("page.css").lower()
    for sink in (
        "innerHTML",
        "outerHTML",
        "insertAdjacentHTML",
        "document.write",
        "eval(",
        "new Function",
        "srcdoc",
        "fetch(",
        "XMLHttpRequest",
    ):
        assert sink not in script, sink
