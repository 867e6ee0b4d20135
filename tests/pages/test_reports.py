"""Every report: hostile strings shown as they are, nothing run and nothing asked for, axe, narrow, by keys, cut off."""

import base64
import io

import pytest
from PIL import Image

from saelab.pages.packing import packed
from saelab.pages.shell import report
from tests.browser import Watched, browser  # noqa: F401
from tests.synthetic_dashboard import HOSTILE


def png(level: int) -> str:
    buffer = io.BytesIO()
    Image.new("L", (4, 4), level).save(buffer, "PNG")
    return base64.b64encode(buffer.getvalue()).decode()


def direction(name: str) -> dict:
    return {
        "name": name, "strengths": [-1.0, 0.0, 1.0], "images": [[png(80 * s + n) for n in range(3)] for s in range(3)],
        "control": {"kind": "covariance", "images": [[png(9 + n) for n in range(3)], None, [png(5 + n) for n in range(3)]]},
        "measure": "rms", "series": [{"name": "edit", "points": [[-1, 1], [0, 0], [1, 2]]}],
        "heads": ["kind", "strength", "rms"], "rows": [["edit", 1.0, 0.25], ["covariance", 1.0, None]],
    }  # fmt: skip


def sweep() -> dict:
    row = {"latent": 3, "operation": "add", "p": 1 / 21, "directions": 20, "matched_effect": 0.5, "matched_kl": 1.0,
           "matched_random": 0.1, "note": HOSTILE[0]}  # fmt: skip
    texts = [{"kind": kind, "control": None, "text": f"the {HOSTILE[0]} {word}", "figures": {"kl_text": 0.5}}
             for kind, word in (("steered", HOSTILE[1]), ("random_direction", "same"))]  # fmt: skip
    strengths, unsteered = [{"strength": 2.0, "texts": texts}], f"the {HOSTILE[0]} same"
    prompts = [{"prompt": string, "seed": 0, "unsteered": unsteered, "strengths": strengths} for string in HOSTILE]
    operation = {"operation": "add", "points": [[1, 0.1, 0.2], [2, 0.5, 0.9]], "band": [[1, -0.1, 0.2], [2, -0.1, 0.3]],
                 "prompts": prompts}  # fmt: skip
    return {
        "about": {"model": HOSTILE[0], "rows": "8 of 8"}, "effect": "rise_text", "kl": "kl_text", "budget": 1.0,
        "columns": list(row), "summary": [row, {**row, "latent": 4, "p": None}],
        "latents": [{"latent": 3, "top_tokens": HOSTILE, "scores": {"output_score": None}, "operations": [operation]}],
    }  # fmt: skip


def latents() -> dict:
    example = {"sample": 1, "t": 50, "peak": 2.0, "x0": png(3), "heat": png(4), "done": png(5)}
    return {
        "title": HOSTILE[0], "d_sae": 64, "live": 60, "samples": 12, "timesteps": [75, 50, 25],
        "latents": [{"latent": i, "density": 0.1, "largest": 2.0, "peaks_at": 50, "most": string, "profile": [0.5, 1.0, 0.0],
                     "map": png(7), "map_largest": 0.3, "examples": [example] * 10} for i, string in enumerate(HOSTILE)],
    }  # fmt: skip


def directions() -> dict:
    return {"title": HOSTILE[0], "strength": 1.0, "classes": HOSTILE, "changes": [[0.01 * i for i in range(len(HOSTILE))]] * 2,
            "directions": [direction(HOSTILE[1]), direction("pca 1")]}  # fmt: skip


def scores() -> dict:
    row = {"who": HOSTILE[1], "control": False, "value": 0.5, "low": 0.25, "high": 0.75, "n": 20}
    rows = [row, {**row, "who": "chance", "control": True, "value": -0.1, "low": None, "high": None}]
    return {
        "saes": HOSTILE,
        "parts": [{"task": HOSTILE[0], "asks": "Is it?", "groups": [{"figure": "f1", "rows": rows}]}],
    }


DATA = {"scores": scores, "sweep": sweep, "hspace-latents": latents, "hspace-directions": directions}


@pytest.fixture(scope="module", params=DATA)
def page(request, tmp_path_factory):
    path = tmp_path_factory.mktemp("a b#c%20ü") / f"{request.param}.html"
    path.write_text(report(request.param, DATA[request.param]()), encoding="utf-8", newline="\n")
    return path


def test_hostile_strings_are_shown_and_do_nothing(browser, page):  # noqa: F811
    assert not any(string in page.read_text(encoding="utf-8") for string in HOSTILE if "__pwned" in string)
    with Watched(browser) as watched:
        watched.open(page)
        assert watched.page.locator(".alert").count() == 0, watched.text()
        shown = watched.text() + watched.text("footer")
        assert all(string in shown for string in (HOSTILE if page.stem != "hspace-latents" else HOSTILE[:1]))
        assert watched.verdict() == []


@pytest.mark.parametrize("look", [{"color_scheme": "light"}, {"color_scheme": "dark"}, {"forced_colors": "active"}],
                         ids=["light", "dark", "forced"])  # fmt: skip
def test_axe_finds_nothing(browser, page, look):  # noqa: F811
    with Watched(browser, **look) as watched:
        assert watched.open(page).axe() == []


@pytest.mark.parametrize("width", [360, 390, 720])
def test_nothing_runs_out_of_a_narrow_page(browser, page, width):  # noqa: F811
    with Watched(browser, viewport={"width": width, "height": 780}) as watched:
        watched.open(page)
        assert watched.page.evaluate("document.documentElement.scrollWidth") <= width
        assert watched.page.evaluate("brand.scrollWidth <= brand.clientWidth")  # its name is not cut


def test_by_keys(browser, page):  # noqa: F811
    """From the top to the foot with the tab key: the skip link, the theme, each thing that scrolls or can be set."""
    with Watched(browser) as watched:
        watched.open(page)
        stops = set()
        for _ in range(60):
            watched.page.keyboard.press("Tab")
            stops.add(
                watched.page.evaluate(
                    "(document.activeElement.getAttribute('aria-label') ?? document.activeElement.textContent).slice(0, 20)"
                )
            )
        assert {"Skip to the content", "Light or dark"} <= stops and len(stops) > 3
        before = watched.page.evaluate("getComputedStyle(document.body).color")
        watched.page.get_by_text("Light or dark").press("Enter")
        assert watched.page.evaluate("getComputedStyle(document.body).color") != before
        assert watched.verdict() == []


def test_a_file_that_was_cut_says_so(browser, page, tmp_path):  # noqa: F811
    text = page.read_text(encoding="utf-8")
    for cut in (text[: text.rindex('id="data">') + 300], text.replace(packed(DATA[page.stem]()), packed({}))):
        (tmp_path / "cut.html").write_text(cut, encoding="utf-8")
        with Watched(browser) as watched:
            watched.open(tmp_path / "cut.html")
            assert "could not be read" in watched.text()
