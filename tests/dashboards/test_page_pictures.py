"""Charts leave the page as SVG that needs no style sheet, and as PNG."""

import io
from pathlib import Path

import pytest

from tests.browser import Watched, browser, single_file, synthetic_texts  # noqa: F401


@pytest.mark.parametrize(("place", "chart"), [("#f=4", "Activations of latent 4"), ("#", "Latents by density")])
def test_charts_as_pictures(browser, tmp_path, place, chart):  # noqa: F811
    from PIL import Image

    page = single_file(tmp_path / "x.html", synthetic_texts(d_sae=16, vocab=400))
    with Watched(browser) as watched:
        watched.open(page, place)

        def saved(kind: str) -> bytes:
            watched.page.locator(".actions button", has_text="Export").click()
            with watched.page.expect_download() as download:
                watched.page.locator(f"button[aria-label^='{kind} of {chart}']").first.click()
            watched.page.locator("dialog button[data-close]").click()
            return Path(download.value.path()).read_bytes()

        drawing = saved("SVG").decode()
        assert drawing.startswith("<svg") and "class=" not in drawing and "var(" not in drawing
        picture = Image.open(io.BytesIO(saved("PNG"))).convert("RGB")
        assert len(picture.getcolors(2**24)) > 1 and picture.width > 300
        assert watched.verdict() == []
