"""No dead ends: every link of a page leads to a page, whatever latents were asked for."""

import re
from pathlib import Path

import pytest

import saelab
from saelab.dashboards.assembly import build
from tests.browser import Watched, browser  # noqa: F401
from tests.toy_dashboard import TEXTS, make_sae

PROMPT = "The cat sat on the mat."


@pytest.fixture(scope="module")
def made(tiny_llama, tmp_path_factory) -> Path:
    """A toy dashboard as it comes from `Run.dashboard`'s count, with a prompt and a second SAE."""
    sae, other = make_sae(tiny_llama), make_sae(tiny_llama, seed=1)
    folder = tmp_path_factory.mktemp("followed")
    page = build(
        sae, tiny_llama, saelab.load_corpus(TEXTS), folder / "x.html", tokens=2_000, latents=12, compare=other, effects=None,
        prompts=[PROMPT], evaluation=None, parquet=False, work=folder / "work", progress=False,
    )  # fmt: skip
    return page.path


def test_prompt_latents_have_a_page(made):
    data = saelab.dashboards.Dashboard(made).data
    assert set(data["p-000"]["latent"].tolist()) <= set(data["pages"]["latent"].tolist())
    assert len(data["pages"]["latent"]) > 12
    assert len(data["b-pages"]["latent"]) == 12


def test_every_link_leads_to_a_page(browser, made):  # noqa: F811
    """Breadth first, each latent's page once: a row without a page says so and is no link."""
    with Watched(browser) as watched:
        watched.open(made, "#show=all&s=id")
        waiting, seen = ["#", "#show=all&s=id", "#p=0", "#view=compare", "#sae=B&show=all"], set()
        while waiting:
            place = waiting.pop(0)
            key = re.sub(r"&?(s|show|tab|q|t|metric|ex)=[^&]*", "", place)
            if key in seen:
                continue
            seen.add(key)
            watched.go(place)
            assert "No page was made" not in watched.text("#main"), place
            assert not watched.page.locator("#main .alert").count(), place
            hrefs = "[...document.querySelectorAll('#main a[href]')].map((a) => a.getAttribute('href'))"
            waiting += [href for href in watched.page.evaluate(hrefs) if href.startswith("#")]
        latents = {key for key in seen if "f=" in key}
        assert len(latents) > 20
        watched.go("#show=all&s=id")
        assert watched.page.locator(".grid .row span[title^='no page was made']").count() > 0
        assert watched.verdict() == []
