"""What the panels say is what the data says: neighbours, sources of attention, seeds, null, sweeps, prompts."""

import csv
import io
import json
from pathlib import Path

import numpy as np
import pytest

from saelab.dashboards.writing import codec
from saelab.pages import packing
from tests import synthetic_dashboard
from tests.browser import Watched, browser, single_file, synthetic_texts, texts  # noqa: F401

ARGUMENTS = dict(d_sae=80, compare=True, heads=4, vocab=400)
LATENT = 8


@pytest.fixture(scope="module")
def data() -> dict[str, dict]:
    return {name: codec.decode(container)[1] for name, container in synthetic_dashboard.chunks(**ARGUMENTS)}


def breaking(name: str, header: dict, columns: dict) -> None:
    """Every latent raises a line feed, a tab and a carriage return the most."""
    if name.startswith("f-"):
        vocab = synthetic_dashboard.tokens(ARGUMENTS["vocab"])
        top = columns["top"].reshape(-1, 10).copy()
        top[:, :3] = [vocab.index(token) for token in (b"\n", b"\t", b"\r\n")]
        columns["top"] = top.ravel()


@pytest.fixture(scope="module")
def page(tmp_path_factory) -> Path:
    return single_file(tmp_path_factory.mktemp("page") / "x.html", synthetic_texts(breaking, **ARGUMENTS))


def number(text: str) -> float:
    """A figure of the page, to its three digits."""
    return float(text.replace("−", "-").replace("%", "").replace(",", ""))


def cells(watched: Watched, selector: str) -> list[list[str]]:
    return watched.page.locator(f"{selector} tbody tr").evaluate_all(
        "(rows) => rows.map((row) => [...row.cells].map((cell) => cell.textContent))"
    )


def test_of_few_tokens_latents_are_called_silent_not_dead(browser, tmp_path):  # noqa: F811
    arguments = dict(d_sae=20, pages=2, prompts=0)
    made = synthetic_dashboard.manifest(**arguments)
    for dead, word in ((0, "silent"), (3, "dead")):
        made["saes"][0] |= {"dead": dead, "silent": 3}
        chunks = texts(synthetic_dashboard.chunks(**arguments), made)
        with Watched(browser) as watched:
            watched.open(single_file(tmp_path / f"{word}.html", chunks))
            card = watched.page.locator(".figure-card").nth(1).inner_text()
            assert card.startswith(f"{word}\n15%\n3 silent in "), card


def test_a_chip_is_one_line_whatever_its_token(browser, page):  # noqa: F811
    with Watched(browser) as watched:
        watched.open(page, f"#f={LATENT}")
        first = watched.page.locator(".columns .chip").all()[:3]
        assert [chip.text_content() for chip in first] == ["\n", "\t", "\r\n"]
        heights = watched.page.locator(".columns .chip").evaluate_all("(all) => all.map((chip) => chip.offsetHeight)")
        assert len(heights) >= 20 and max(heights) - min(heights) <= 1  # two lines differ by some twenty pixels


@pytest.mark.parametrize("width", [360, 1440])
def test_chips_are_whole_or_not_there(browser, page, width):  # noqa: F811
    """Where there is no room for a chip it goes to a line that is not seen: none is cut at the edge of its cell."""
    cut = """(lines) => lines.flatMap((line) => [...line.children].filter((chip) =>
      chip.getBoundingClientRect().right > line.getBoundingClientRect().right + 1))"""
    with Watched(browser, viewport={"width": width, "height": 780}) as watched:
        watched.open(page, "#show=all&s=id")
        for place in ("#show=all&s=-id", "#f=8", "#p=0"):
            watched.go(place)
            chips = watched.page.locator(".chips")
            assert chips.count() >= 5
            assert chips.evaluate_all(cut) == []
            assert max(chips.evaluate_all("(lines) => lines.map((line) => line.offsetHeight)")) <= 20


def test_latents_that_fire_together(browser, page, data):  # noqa: F811
    """Jaccard, pointwise mutual information (bits) and phi, from the counts of contexts; the lag as it is stored."""
    chunk, n = data["f-00000"], synthetic_dashboard.manifest(**ARGUMENTS)["coactivation"]["contexts"]
    row = slice(10 * LATENT, 10 * LATENT + 10)
    both, b = chunk["coact_both"][row].astype(float), chunk["coact_contexts"][row].astype(float)
    a = float(chunk["contexts"][LATENT])
    wanted = np.stack([
        100 * both / (a + b - both),
        np.log2(n * both / (a * b)),
        (n * both - a * b) / np.sqrt(a * b * (n - a) * (n - b)),
        chunk["coact_lag"][row],
    ], 1)  # fmt: skip
    with Watched(browser) as watched:
        watched.open(page, f"#f={LATENT}")
        watched.page.get_by_role("tab", name="together in a context").click()
        shown = cells(watched, ".under .panel")
        assert [int(cell[0][1:]) for cell in shown] == chunk["coact"][row].tolist()
        np.testing.assert_allclose([[number(c) for c in cell[2:]] for cell in shown], wanted, rtol=0.06, atol=0.006)
        title = watched.page.locator(".under .panel td span[title]").first.get_attribute("title")
        before, after = chunk["coact_before"][row][0], chunk["coact_after"][row][0]
        assert f"first in {before}, later in {after}" in title
        assert watched.verdict() == []


def test_bars_are_as_high_as_their_counts(browser, page, data):  # noqa: F811
    """Top and left edge of every bar of both histograms, as drawn: heights go with the counts, the highest fills the chart."""
    read = """(drawing) => [...drawing.querySelectorAll('path.bars, path.plus, path.minus')]
      .flatMap((path) => [...path.getAttribute('d').matchAll(/M([\\d.]+) ([\\d.]+)V([\\d.]+)h/g)]
      .map((bar) => bar.slice(1).map(Number))).sort((a, b) => a[0] - b[0])"""
    chunk = data["f-00000"]
    bins = chunk["hist_bins"].astype(int)
    mine = slice(bins[:LATENT].sum(), bins[: LATENT + 1].sum())
    below = int(min(chunk["null_first"][LATENT] - chunk["hist_first"][LATENT], 0))  # bins that only the null model has
    stored = {"Activations of": chunk["hist"][mine], "Logits of": chunk["logit_hist"].reshape(len(bins), -1)[LATENT]}
    with Watched(browser) as watched:
        watched.open(page, f"#f={LATENT}")
        for words, scale in (("logarithmic", np.log1p), ("linear", np.asarray)):
            if words == "linear":
                watched.page.keyboard.press("l")
            watched.page.wait_for_selector(f"svg[aria-label$='{words} counts']")
            for label, counts in stored.items():
                drawing = watched.page.locator(f"svg[aria-label^='{label} latent {LATENT}']")
                n = int(drawing.locator("xpath=..").get_attribute("aria-valuemax")) + 1
                there, tallest, shift = np.flatnonzero(counts), scale(counts.max()), 0
                if label == "Activations of":
                    null_bins = chunk["null_bins"].astype(int)
                    null = chunk["null_hist"][null_bins[:LATENT].sum() : null_bins[: LATENT + 1].sum()]
                    tallest, shift = max(tallest, scale(null.max(initial=0))), -below
                left, base, top = np.array(drawing.evaluate(read)).T
                np.testing.assert_allclose(left, (there + shift) * 340 / n, atol=0.006)
                wanted = np.maximum(1.5, scale(counts[there]) / tallest * (base - 4))
                np.testing.assert_allclose(base - top, wanted, atol=0.006)
                assert (base - top).max() > 0.5 * base.max()


def test_latents_stand_at_their_density_and_maximum(browser, page, data):  # noqa: F811
    """The cells of the map that are painted are those of the latents, by the logarithms of density and maximum."""
    lit = """(canvas) => {
      const [context, found] = [canvas.getContext('2d'), []];
      const ground = [...context.getImageData(9, 9, 1, 1).data].join();  // between two cells
      for (let y = 0; y < 40; y++) for (let x = 0; x < 72; x++)
        if ([...context.getImageData(10 * x + 4, 10 * y + 4, 1, 1).data].join() !== ground) found.push([x, 39 - y]);
      return found;
    }"""
    index, counted = data["idx-0"], synthetic_dashboard.manifest(**ARGUMENTS)["corpus"]["counted"]
    fired = index["count"] > 0
    most = index["max"].astype(float)[fired]
    top, bottom = most.max(), max(min(most.min(), most.max() / 2), most.max() / 1e4)
    x = 72 * (1 - np.log(index["count"][fired] / counted) / np.log(1 / counted))
    y = 40 * np.log(most / bottom) / np.log(top * 1.02 / bottom)
    wanted = {(int(a), int(b)) for a, b in zip(x.clip(0, 71), y.clip(0, 39), strict=True)}
    with Watched(browser) as watched:
        watched.open(page, "#show=all")
        found = {tuple(cell) for cell in watched.page.locator("canvas").first.evaluate(lit)}
    near = {(a + i, b + j) for a, b in wanted for i in (-1, 0, 1) for j in (-1, 0, 1)}  # on the edge of a cell
    assert len(found) > 20 and found <= near
    assert len(found & wanted) >= 0.95 * len(wanted)
    assert max(a for a, _ in found) > 60


def test_sources_stand_at_their_tokens(browser, page, data):  # noqa: F811
    """Each source in the window is marked at its token, with its sign; the card says what it gives, and what is left."""
    chunk = data["f-00000"]
    offsets = np.r_[0, np.cumsum(chunk["dfa_n"].astype(int))]
    first = int(chunk["windows"][:LATENT].astype(int).sum())
    with Watched(browser) as watched:
        watched.open(page, f"#f={LATENT}")
        watched.page.keyboard.press("s")
        assert watched.page.locator("button[aria-pressed=true]", has_text="Sources").count() == 1
        marked = watched.page.locator(".example").evaluate_all(
            """(rows) => rows.map((row) => [Number(row.dataset.w), [...row.querySelectorAll("[data-source]")].map((t) =>
                 [Number(t.dataset.i), Number(t.dataset.n), t.dataset.source, Number(t.dataset.a)])])"""
        )
        assert len(marked) > 10
        for w, tokens in marked:
            span = slice(offsets[first + w], offsets[first + w + 1])
            places = int(chunk["peak"][first + w]) - chunk["dfa_back"][span].astype(int)
            values = dict(zip(places.tolist(), chunk["dfa"][span].tolist(), strict=True))
            inside = {place for place in values if place >= 0}
            seen = {place for i, n, _, _ in tokens for place in range(i, i + n)}
            assert inside <= seen
            for i, n, sign, step in tokens:
                value = sum(values.get(place, 0.0) for place in range(i, i + n))
                assert sign == ("▲" if value > 0 else "▽")
                assert step == min(10, np.ceil(10 * abs(value) / max(map(abs, values.values()))))
        peak = watched.page.locator(".example .t.peak").first
        peak.focus()
        w = marked[0][0]
        card = cells(watched, ".hover table:last-child")
        span = slice(offsets[first + w], offsets[first + w + 1])
        order = np.argsort(-np.abs(chunk["dfa"][span]), kind="stable")
        values = chunk["dfa"][span][order]
        wanted = [*values, chunk["act"][first + w] - values.sum()]
        np.testing.assert_allclose([number(row[3]) for row in card], wanted, rtol=0.01, atol=1e-3)
        assert [row[2] for row in card[:-1]] == [f"head {h}" for h in chunk["dfa_head"][span][order]]
        # Where it reads from, by head and by distance: shares of what the sources of the top examples give.
        heads = watched.page.locator("[role=slider]", has=watched.page.locator("[aria-label^='Attention heads']"))
        heads.focus()
        assert "at peaks" in heads.get_attribute("aria-valuetext")
        assert watched.verdict() == []


def test_nearest_match_and_null_in_the_index(browser, page, data):  # noqa: F811
    more = data["idx-1"]
    with Watched(browser) as watched:
        watched.open(page, "#show=all&s=-null_count")
        order = np.argsort(-more["null_count"].astype(float), kind="stable")
        rows = [int(text) for text in watched.page.locator(".grid .row > :nth-child(2)").all_text_contents()]
        assert rows == order[: len(rows)].tolist()
        titles = watched.page.locator(".grid .head > div").all_text_contents()
        near = watched.page.locator(f".grid .row >> nth=0 >> :nth-match(div, {titles.index('nearest') + 1})")
        match = watched.page.locator(f".grid .row >> nth=0 >> :nth-match(div, {titles.index('in SAE B') + 1})")
        assert near.text_content().split()[0] == f"#{more['near'][order[0]]}"
        assert match.text_content().split()[0] == f"#{more['match'][order[0]]}"
        at = watched.shown
        match.locator("a").click()
        heading = watched.settled(at).text("h1")
        assert f"#{more['match'][order[0]]}" in heading and "SAE B" in heading
        assert watched.verdict() == []


def test_without_labels_tokens_stand_for_them(browser, tmp_path):  # noqa: F811
    """No column of "unlabelled"; a label that the reader gives brings it back. An SAE without a name is called what it is."""
    arguments = dict(d_sae=40, labels=0, extras=False, prompts=0, vocab=200)
    chunks = synthetic_texts(**arguments)
    manifest = json.loads(codec.from_text(chunks["manifest"]))
    manifest["saes"][0]["name"] = "A"
    chunks["manifest"] = packing.to_text(codec.manifest_bytes(manifest))
    with Watched(browser) as watched:
        watched.open(single_file(tmp_path / "x.html", chunks), "#s=id")
        assert watched.text("h1") == "TopK, 40 latents"
        assert watched.page.locator(".grid .head > div").all_text_contents()[2] == "fires on"
        at = watched.shown
        watched.page.locator(".grid .row a .chip").first.click()
        assert watched.settled(at).text("h1 .num") == "#1"  # latent 0 never fired
        watched.page.locator(".actions button", has_text="Label").click()
        watched.page.locator("dialog input").fill("mine")
        watched.page.keyboard.press("Enter")
        watched.go("#s=id")
        assert watched.page.locator(".grid .head > div").all_text_contents()[2:4] == ["label", "fires on"]
        assert watched.verdict() == []


def test_seeds_null_and_sweeps_are_seen(browser, page, data):  # noqa: F811
    """The badge of seeds, the figures of a re-initialised model behind the real ones, the texts of a sweep by strength."""
    latent = int(data["steer"]["latent"][4])
    texts = codec.cut(data["steer"]["text"], data["steer"]["length"])
    rows = [json.loads(texts[int(data["steer"]["rows"][:4].sum()) + i]) for i in range(3)]
    with Watched(browser) as watched:
        watched.open(page, f"#f={latent}")
        assert f"in {data['idx-1']['seeds'][latent]} of 3 other seeds" in watched.text(".page-head")
        assert watched.page.locator(".left path.null").first.get_attribute("d").startswith("M0 ")
        assert "re-initialised model" in watched.text(".left") and "re-initialised model" in watched.text("footer")
        slider = watched.page.get_by_label("Strength", exact=True)
        for i, row in enumerate(rows):
            slider.fill(str(i))
            assert row["text"] in watched.text(".sweep") and row["baseline"] in watched.text(".sweep")
        assert watched.verdict() == []


def test_a_prompt_by_what_is_missed_and_by_surprise(browser, page, data):  # noqa: F811
    prompt = data["p-000"]
    steps = {
        "miss": np.where(prompt["miss"] == 255, 0, prompt["miss"] / 15),
        "loss": np.clip(-np.nan_to_num(prompt["logprob"].astype(float)) / 10, 0, 1),
    }
    read = "(tokens) => tokens.map((t) => [Number(t.dataset.t), Number(t.dataset.a ?? 0)])"
    with Watched(browser) as watched:
        watched.open(page, "#p=0")
        watched.page.keyboard.press("r")
        for kind, share in steps.items():
            shown = watched.page.locator(".strip .t").evaluate_all(read)
            ends = [t for t, _ in shown[1:]] + [len(share)]
            assert [a for _, a in shown] == [
                np.ceil(10 * share[t:end].max()) for (t, _), end in zip(shown, ends, strict=True)
            ]
            if kind == "miss":
                assert watched.until(lambda: "strip=miss" in watched.page.url)
                watched.go("#p=0&strip=loss")
        assert watched.verdict() == []


def test_comparisons_are_exported(browser, page, data):  # noqa: F811
    """Both latents' examples in one table; of two SAEs every latent, with its match."""
    with Watched(browser, accept_downloads=True) as watched:
        watched.open(page, "#f=7,9@B")
        for place, n in (("", data["f-00000"]["windows"][7] + data["b-f-00000"]["windows"][9]), ("#view=compare", 160)):
            if place:
                watched.go(place)
            watched.page.keyboard.press("e")
            with watched.page.expect_download() as download:
                watched.page.locator("dialog button", has_text="CSV").click()
            text = Path(download.value.path()).read_bytes().decode("utf-8").removeprefix("\ufeff")
            rows = list(csv.DictReader(io.StringIO(text, newline="")))
            assert len(rows) == n and {row["sae"] for row in rows} == {"A", "B"}
        matches = [int(row["match"]) for row in rows if row["sae"] == "A"]
        assert matches == data["idx-1"]["match"].tolist()
        assert watched.verdict() == []
