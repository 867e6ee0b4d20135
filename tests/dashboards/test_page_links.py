"""What the URL says is what is shown, there and back; and the index sorts, filters and finds as the data says."""

import re
from pathlib import Path

import numpy as np
import pytest

from saelab.dashboards.writing import codec
from tests import synthetic_dashboard
from tests.browser import Watched, browser, single_file, synthetic_texts  # noqa: F401

ARGUMENTS = dict(d_sae=300, pages=150, compare=True, vocab=400)


@pytest.fixture(scope="module")
def data() -> dict[str, dict]:
    return {name: codec.decode(container)[1] for name, container in synthetic_dashboard.chunks(**ARGUMENTS)}


@pytest.fixture(scope="module")
def page(tmp_path_factory) -> Path:
    return single_file(tmp_path_factory.mktemp("page") / "x.html", synthetic_texts(**ARGUMENTS))


def rows(watched: Watched) -> list[int]:
    """Latents of the rows that the table shows now."""
    return [int(text) for text in watched.page.locator(".grid .row > :nth-child(2)").all_text_contents()]


def found(watched: Watched) -> int:
    return int(re.match(r"[\d,]+", watched.text(".count"))[0].replace(",", ""))  # type: ignore[index]


def test_history_there_and_back(browser, page):  # noqa: F811
    places = ["#show=all&s=id", "#f=2&tab=random&show=all", "#f=4,9@B", "#p=1&metric=effect", "#view=compare", "#f=6@B"]
    with Watched(browser) as watched:
        watched.open(page, places[0])
        shown = [watched.text()]
        for place in places[1:]:
            shown.append(watched.go(place).text())
        assert len(set(shown)) == len(places)
        for i in range(len(places) - 2, -1, -1):
            at = watched.shown
            watched.page.evaluate("history.back()")
            assert watched.settled(at).text() == shown[i]
        for i in range(1, len(places)):
            at = watched.shown
            watched.page.evaluate("history.forward()")
            assert watched.settled(at).text() == shown[i]
        assert watched.verdict() == []


def test_a_link_carries_the_view(browser, page, data):  # noqa: F811
    """What one does to the view is in the URL; the URL in another browser shows the same."""
    busy = int(max(data["pages"]["latent"], key=data["idx-0"]["count"].__getitem__))
    with Watched(browser) as watched:
        watched.open(page, f"#f={busy}")
        watched.page.locator("[role=tab]", has_text="Quantiles").click()
        watched.page.locator(".example .t").nth(3).focus()
        watched.until(lambda: "ex=" in watched.page.url)  # the URL is written at rest
        url, shown = watched.page.url, watched.text(".right")
        place = "[document.activeElement.closest('.example')?.dataset.w, document.activeElement.dataset.i]"
        token = watched.page.evaluate(place)
        assert "tab=quantile" in url and token[0] is not None
        with Watched(browser) as other:
            other.open(page, url[url.index("#") :])
            assert other.text(".right") == shown
            assert other.page.evaluate(place) == token


def test_what_colours_the_tokens_is_kept(browser, tmp_path):  # noqa: F811
    """In the URL, over the next latent, and with the focus where it was."""
    path = single_file(tmp_path / "x.html", synthetic_texts(d_sae=64, heads=4, vocab=400))
    pressed = "[...document.querySelectorAll('.toolbar [aria-pressed=true]')].map((b) => b.textContent)"
    place = "[document.activeElement.closest('.example')?.dataset.w, document.activeElement.dataset.i]"
    with Watched(browser) as watched:
        watched.open(path, "#f=8&s=id")
        watched.page.locator(".example .t.peak").nth(2).focus()
        token = watched.page.evaluate(place)
        for key, by in (("s", "Sources"), ("r", "What the SAE misses")):
            watched.page.keyboard.press(key)
            assert watched.until(lambda by=by: watched.page.evaluate(pressed) == [by])  # type: ignore[misc]
            assert watched.page.evaluate(place) == token
        watched.page.locator(".toolbar button", has_text="Scale").click()
        at = watched.shown
        watched.page.keyboard.press("j")
        assert watched.settled(at).text("h1 .num") == "#9"
        assert watched.page.evaluate(pressed) == ["What the SAE misses", "Scale by row"]
        assert watched.until(lambda: "by=miss&scale=row" in watched.page.url)
        assert watched.go("#f=8&by=source").page.evaluate(pressed) == ["Sources"]
        assert watched.verdict() == []


def test_index_sorts_and_filters_as_the_data_says(browser, page, data):  # noqa: F811
    index, more = data["idx-0"], data["idx-1"]
    with Watched(browser) as watched:
        watched.open(page, "#show=all")

        def order(values, descending=False):
            return np.argsort(-values if descending else values, kind="stable")

        for place, wanted in [
            ("s=id", np.arange(300)),
            ("s=-id", np.arange(300)[::-1]),
            ("s=density", order(index["count"].astype(float))),
            ("s=-max", order(index["max"], True)),
            ("s=mean", order(index["mean"])),
            ("", order(index["focus"].astype(float), True)),  # unless one says otherwise
            ("s=-near_cos", order(more["near_cos"].astype(float), True)),
            ("s=-seeds", order(more["seeds"].astype(float), True)),
            ("s=match_cos", order(more["match_cos"].astype(float))),
        ]:
            watched.go(f"#show=all&{place}")
            shown = rows(watched)
            assert len(shown) > 15 and shown == wanted[: len(shown)].tolist(), place
        for show, flag in [("page", 1), ("silent", 2), ("dense", 4), ("duplicate", 8), ("dead", 16)]:
            watched.go(f"#show={show}&s=id")
            wanted = np.flatnonzero(index["flags"] & flag)
            assert found(watched) == len(wanted)
            assert rows(watched) == wanted[: len(rows(watched))].tolist()
        # A region of the map, by the bounds of the URL and by typing them.
        counted = synthetic_dashboard.manifest(**ARGUMENTS)["corpus"]["counted"]
        inside = (index["count"] >= 1e-3 * counted) & (index["count"] <= 1e-2 * counted) & (index["max"] >= 2)
        watched.go("#show=all&d=0.001..0.01&m=2..&s=id")
        assert found(watched) == inside.sum()
        watched.go("#show=all&s=id")
        for label, value in (("Density from", "0.001"), ("Density to", "0.01"), ("Largest activation from", "2")):
            field = watched.page.get_by_label(label)
            field.fill(value)
            field.press("Enter")
            field.blur()
        assert watched.until(lambda: found(watched) == inside.sum())
        # And by dragging: the whole map keeps every latent that fires.
        watched.go("#show=all&s=id&d=&m=")
        box = watched.page.locator(".chart canvas[aria-label^=Latents]").bounding_box()
        watched.page.mouse.move(box["x"] + 1, box["y"] + 1)
        watched.page.mouse.down()
        watched.page.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] - 1)
        watched.page.mouse.up()
        half = (index["count"] >= 1) & (index["count"] <= counted**0.5 * 1.02)
        assert watched.until(lambda: abs(found(watched) - half.sum()) <= 6)  # a pixel at each edge
        assert watched.verdict() == []


def test_the_map_of_directions_brushes_the_table(browser, page, data):  # noqa: F811
    latents, lying = data["pages"]["latent"], data["map"]
    inside = (np.abs(lying["pca_x"]) <= 0.5) & (lying["pca_y"] >= 0)
    with Watched(browser) as watched:
        watched.open(page, "#show=all&s=id&at=pca:-0.5,0,0.5,1")
        assert watched.until(lambda: found(watched) == inside.sum())
        assert rows(watched) == latents[inside][: len(rows(watched))].tolist()
        watched.go("#show=all&s=id")
        watched.page.locator("[role=tab]", has_text="t-SNE").click()
        box = watched.page.locator("#plane canvas").bounding_box()
        watched.page.mouse.move(box["x"] + 1, box["y"] + 1)
        watched.page.mouse.down()
        watched.page.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] - 1)
        watched.page.mouse.up()
        assert watched.until(
            lambda: abs(found(watched) - (lying["neighbours_x"] <= 0).sum()) <= 2
        )  # a pixel at the edge
        watched.page.get_by_role("button", name="Clear").click()
        assert watched.until(lambda: found(watched) == 300)
        assert watched.verdict() == []


def test_a_sentence_is_matched_by_its_tokens(browser, page, data):  # noqa: F811
    """Each token shows the latents that it characterises, and the page says that no model runs."""
    index, vocab = data["idx-0"], data["vocab"]
    ends, token = np.cumsum(vocab["length"]), 60
    string = bytes(vocab["bytes"][ends[token] - vocab["length"][token] : ends[token]]).decode()
    paged = set(data["pages"]["latent"].tolist())
    first = {latent for latent in np.flatnonzero(index["tok0"] == token).tolist() if latent in paged}
    with Watched(browser) as watched:
        watched.open(page, "#view=sentence")
        assert "no model runs in this page" in watched.text("#main")
        watched.page.get_by_label("A sentence of your own").fill(string)
        links = watched.page.locator("#main .sentence a").all_text_contents()
        assert {int(text[1:]) for text in links[: len(first)]} == first
        assert watched.verdict() == []


def test_search(browser, page, data):  # noqa: F811
    index, vocab, pages = data["idx-0"], data["vocab"], data["pages"]["latent"]
    ends = np.cumsum(vocab["length"])
    token = 60
    string = bytes(vocab["bytes"][ends[token] - vocab["length"][token] : ends[token]]).decode()
    labels = dict(
        zip(data["lab"]["latent"].tolist(), codec.cut(data["lab"]["text"], data["lab"]["length"]), strict=True)
    )
    same = [
        t
        for t in range(400)
        if bytes(vocab["bytes"][ends[t] - vocab["length"][t] : ends[t]]).decode("utf-8", "replace") == string
    ]
    wanted = set()
    for t in same:
        wanted |= {
            latent for column in ("tok0", "tok1", "tok2") for latent in np.flatnonzero(index[column] == t).tolist()
        }
        for kind in ("acts", "logits"):
            lengths = data["inv"][kind + "_n"].astype(int)
            start = lengths[:t].sum()
            wanted |= set(pages[data["inv"][kind][start : start + lengths[t]]].tolist())
    with Watched(browser) as watched:
        watched.open(page, "#show=all")
        pattern = "^words.*7$"
        for query, latents in [
            ("17", {17}),
            ("#17", {17}),
            (f'tok:"{string}"', wanted),
            (f"re:/{pattern}/", {latent for latent, label in labels.items() if re.search(pattern, label)}),
            ('"about trade"', {latent for latent, label in labels.items() if "about trade" in label}),
            ("99999", set()),
        ]:
            watched.page.locator("#search").fill(query)
            n = len(latents)
            assert watched.until(lambda n=n: found(watched) == n), query  # type: ignore[misc]
            assert set(rows(watched)) <= latents
        latent = int(pages[4])
        row = data["f-00000"]["dec_near"][4 * 10 : 5 * 10].tolist()
        watched.go(f"#q=~{latent}")
        assert rows(watched) == list(dict.fromkeys([latent, *row]))
        # Text of examples: latents whose windows have it.
        part = data["f-00000"]
        first = part["pool"][part["offset"][0] : part["offset"][0] + 12]
        words = b"".join(bytes(vocab["bytes"][ends[t] - vocab["length"][t] : ends[t]]) for t in first[2:9])
        text = words.decode("utf-8", "replace")
        watched.go("#show=all&s=id")
        watched.page.locator("#search").fill(f'text:"{text}"')
        watched.page.locator("#search").press("Enter")
        watched.page.locator(".count", has_text="in example texts").wait_for()
        assert part["latent"][0] in rows(watched)
        assert watched.verdict() == []


def test_notes_and_pins_stay(browser, page):  # noqa: F811
    with Watched(browser) as watched:
        watched.open(page, "#f=2")
        watched.page.locator("button", has_text="Pin").click()
        watched.page.locator(".actions button", has_text="Label").click()
        watched.page.locator("dialog input").fill("my own name")
        watched.page.locator("dialog button", has_text="Save").click()
        assert "my own name" in watched.text("h1")
        watched.page.locator("#note").fill("a thought")
        watched.page.locator("#note").blur()
        watched.page.reload()
        watched.page.wait_for_selector("html[data-shown]")
        assert "my own name" in watched.text("h1")
        assert watched.page.locator("#note").input_value() == "a thought"
        watched.go("#show=pinned")
        assert rows(watched) == [2]
        watched.go('#q="own name"')
        assert rows(watched) == [2]
        watched.page.locator("#view").click()
        with watched.page.expect_download() as download:
            watched.page.locator("dialog button", has_text="Export as JSON").click()
        text = Path(download.value.path()).read_text(encoding="utf-8")
        assert '"A:2": "my own name"' in text and '"A:2": "a thought"' in text and '"pins"' in text
        assert watched.verdict() == []


def test_order_of_the_index_is_that_of_next(browser, page, data):  # noqa: F811
    with Watched(browser) as watched:
        watched.open(page, "#show=duplicate&s=-max")
        listed = rows(watched)
        watched.page.locator(".grid .row a").first.click()
        watched.page.locator("h1", has_text=f"#{listed[0]}").wait_for()
        for latent in listed[1:]:
            at = watched.shown
            watched.page.keyboard.press("j")
            assert watched.settled(at).text("h1").startswith(f"#{latent}")
        watched.page.keyboard.press("j")
        assert "last latent" in watched.text("#status")


def test_a_million_rows_scroll(browser, tmp_path):  # noqa: F811
    """Rows far down are reached by scrolling, by End and by the scroll bar: more of them than an element may be high for."""
    arguments = dict(
        d_sae=260_000, pages=64, windows=False, extras=False, effects=False, prompts=0, labels=0, vocab=400
    )
    path = single_file(tmp_path / "x.html", synthetic_texts(**arguments))
    with Watched(browser) as watched:
        watched.open(path, "#show=all&s=id")
        assert rows(watched)[0] == 0
        view = watched.page.locator(".grid .view")
        view.focus()
        watched.page.keyboard.press("End")
        assert watched.until(lambda: rows(watched)[-1] == 259_999)
        view.evaluate("(v) => { v.scrollTop = v.scrollHeight / 2; }")
        assert watched.until(lambda: abs(rows(watched)[0] - 130_000) < 2_000)
        watched.page.wait_for_timeout(400)  # the scroll bar comes to rest
        middle = rows(watched)
        assert middle == list(range(middle[0], middle[0] + len(middle)))
        box = view.bounding_box()
        watched.page.mouse.move(box["x"] + 50, box["y"] + 200)
        watched.page.mouse.wheel(0, 320)
        assert watched.until(lambda: rows(watched)[0] == middle[0] + 10)  # not a share of them all
        assert watched.nodes() < 3_000 and watched.verdict() == []
