"""The whole page by keyboard alone."""

from pathlib import Path

import pytest

from tests.browser import Watched, browser, single_file, synthetic_texts  # noqa: F401


@pytest.fixture(scope="module")
def page(tmp_path_factory) -> Path:
    chunks = synthetic_texts(d_sae=80, compare=True, heads=4, vocab=400)
    return single_file(tmp_path_factory.mktemp("page") / "x.html", chunks)


def focused(watched: Watched) -> str:
    """Class names of the focused element, or its id."""
    return watched.page.evaluate(
        "document.activeElement.id || document.activeElement.className || document.activeElement.tagName"
    )


def marked(watched: Watched, **wanted: str | None) -> bool:
    """Whether the URL comes to say so (None: not to name it); it is written at rest."""
    read = "Object.fromEntries(new URLSearchParams(location.hash.slice(1)))"

    def said() -> bool:
        parameters = watched.page.evaluate(read)
        return all(parameters.get(name) == value for name, value in wanted.items())

    return watched.until(said)


def test_walk_without_a_pointer(browser, page):  # noqa: F811
    with Watched(browser) as watched:
        keys = watched.page.keyboard
        watched.open(page)
        keys.press("Tab")
        assert "skip" in focused(watched)
        keys.press("Enter")
        assert focused(watched) == "main"
        # Search: the number of a latent, then Enter.
        keys.press("/")
        assert focused(watched) == "search"
        at = watched.shown
        keys.type("17")
        keys.press("Enter")
        watched.settled(at)
        assert "#17" in watched.text("h1")
        keys.press("Escape")
        # g 1 Enter: the latent that fires on every token, first in the order by density.
        at = watched.shown
        keys.type("g1")
        keys.press("Enter")
        assert watched.settled(at).text("h1 .num") == "#1"
        # Next and previous in the order of the index, there and back.
        at = watched.shown
        keys.press("j")
        assert watched.settled(at).text("h1 .num") != "#1"
        at = watched.shown
        keys.press("k")
        assert watched.settled(at).text("h1 .num") == "#1"
        # Groups of examples by key, and by arrows on the tabs.
        keys.press("]")
        assert marked(watched, tab="interval")
        keys.press("[")
        assert marked(watched, tab=None)
        watched.page.locator(".right [role=tab][aria-selected=true]").first.focus()
        keys.press("ArrowRight")
        assert marked(watched, tab="interval")
        keys.press("Home")
        # Tokens: Tab reaches one, arrows walk, Enter pins the card, Escape lets it go.
        while "t " not in focused(watched) + " " or "tab" in focused(watched):
            keys.press("Tab")
        assert watched.page.locator(".hover").is_visible()
        place = "[document.activeElement.closest('.example').dataset.w, document.activeElement.dataset.i]"
        before = watched.page.evaluate(place)
        keys.press("ArrowDown")
        assert watched.page.evaluate(place)[0] != before[0]
        keys.press("ArrowRight")
        example, token = watched.page.evaluate(place)
        assert marked(watched, ex=example, t=token)
        keys.press("Enter")
        assert "pinned" in watched.page.locator(".hover").get_attribute("class")
        keys.press("Escape")
        assert not watched.page.locator(".hover").is_visible()
        # Pin, note, compare.
        keys.press("x")
        assert watched.page.locator("button", has_text="Pinned").get_attribute("aria-pressed") == "true"
        keys.press("n")
        assert focused(watched) == "note"
        keys.type("seen by keyboard")
        keys.press("Escape")
        assert watched.page.evaluate("Object.values(localStorage).some((v) => v.includes('seen by keyboard'))")
        keys.press("c")
        at = watched.shown
        keys.type("9@B")
        keys.press("Enter")
        assert watched.settled(at).page.locator(".half").count() == 2
        # The index: rows by arrows, Enter opens; help and its way out.
        at = watched.shown
        keys.press("i")
        watched.settled(at)
        watched.page.locator(".grid .view").focus()
        keys.press("ArrowDown")
        keys.press("ArrowDown")
        wanted = watched.page.locator(".row[aria-selected=true] a").first.text_content()
        at = watched.shown
        keys.press("Enter")
        assert f"#{wanted}" in watched.settled(at).text("h1")
        keys.press("?")
        assert watched.until(lambda: watched.page.locator("dialog").is_visible())
        keys.press("Escape")
        assert watched.until(lambda: watched.page.locator("dialog").count() == 0)
        # Looks: theme, palette, fixed width; counts.
        colour = "getComputedStyle(document.documentElement).backgroundColor"
        theme = watched.page.evaluate(colour)
        keys.press("t")
        assert watched.page.evaluate(colour) != theme
        ramp = "getComputedStyle(document.documentElement).getPropertyValue('--a10')"
        before = watched.page.evaluate(ramp)
        keys.press("p")
        assert watched.page.evaluate(ramp) != before
        keys.press("m")
        assert watched.page.evaluate("'mono' in document.documentElement.dataset")
        chart = watched.page.locator(".left .chart path.bars").first
        drawn = chart.get_attribute("d")
        keys.press("l")
        assert watched.page.locator(".left .chart path.bars").first.get_attribute("d") != drawn
        keys.press("r")
        watched.page.locator("button[aria-pressed=true]", has_text="misses").wait_for()
        keys.press("s")
        watched.page.locator("button[aria-pressed=true]", has_text="Sources").wait_for()
        assert watched.page.locator("button[aria-pressed=true]", has_text="misses").count() == 0
        assert watched.verdict() == []


def test_bars_by_keyboard(browser, page):  # noqa: F811
    """A histogram is a slider: arrows read the bars out, Enter shows the examples of one."""
    with Watched(browser) as watched:
        watched.open(page, "#f=5")
        chart = watched.page.locator(".chart[role=slider]").first
        chart.focus()
        watched.page.keyboard.press("End")
        assert "firing" in chart.get_attribute("aria-valuetext")
        low, high = chart.get_attribute("aria-valuetext").split(":")[0].split(" to ")
        assert float(low) < float(high)
        watched.page.keyboard.press("Enter")
        assert watched.page.locator(".group.aim").count() == 1
        watched.page.locator("button", has_text="Back to all groups").click()
        assert watched.page.locator(".group.aim").count() == 0


def test_keys_leave_fields_alone(browser, page):  # noqa: F811
    with Watched(browser) as watched:
        watched.open(page, "#f=5")
        watched.page.locator("#note").fill("")
        watched.page.locator("#note").type("jk?x/")
        assert watched.page.locator("#note").input_value() == "jk?x/"
        assert "#5" in watched.text("h1")
