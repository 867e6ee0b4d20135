"""Tokens to which the SAE is not applied are hatched, and the legend says so."""

from tests.browser import Watched, browser  # noqa: F401
from tests.toy_dashboard import TEXTS, make_sae


def test_tokens_left_out_are_hatched(browser, tiny_llama, tmp_path):  # noqa: F811
    """Of a corpus with special tokens: the first position of each context, which training skipped, and those."""
    import saelab

    sae = make_sae(tiny_llama)
    page = saelab.dashboards.build(
        sae, tiny_llama, saelab.load_corpus(TEXTS), tmp_path / "x.html", tokens=1_000, latents=4, window=255, effects=None,
        evaluation=None, parquet=False, prompts=["The cat"], work=tmp_path / "work", progress=False,
    )  # fmt: skip
    data = page.data
    latent = int(data["pages"]["latent"][0])
    columns, miss = data["f-00000"], data["m-00000"]["miss"]
    first = columns["offset"][0]
    left_out = int((miss[first : first + columns["length"][0]] == 255).sum())
    assert left_out >= 1
    with Watched(browser) as watched:
        watched.open(page.path, f"#f={latent}")
        hatched = watched.page.locator(".example").first.locator(".left-out")
        assert watched.until(lambda: hatched.count() == left_out)
        assert "left out" in watched.text(".legend")
        watched.go("#p=0")
        assert watched.page.locator(".strip .left-out").count() == 1
        assert "left out" in watched.text(".legend")
        assert watched.verdict() == []
