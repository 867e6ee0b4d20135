"""The page of a sweep: hostile texts shown verbatim, what differs marked, a sentence a latent."""

import math

from saelab.steering.records import MEASURES
from saelab.steering.sweep_table import Sweep
from tests.browser import Watched, browser  # noqa: F401

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


def texts(watched, selector):
    return watched.page.locator(selector).all_text_contents()


def test_every_text_is_shown_verbatim(browser, tmp_path):  # noqa: F811
    page = made(HOSTILE).to_html(tmp_path / "sweep.html")
    with Watched(browser) as watched:
        watched.open(page)
        assert texts(watched, ".asked") == HOSTILE == texts(watched, ".unsteered")
        steered = texts(watched, ".steered .text")
        kinds = ("steered", "random_direction", "random_latent")
        assert steered == [f"{words[:3]}{kind} {words}" for words in HOSTILE for kind in kinds]
        assert texts(watched, ".facts .chip")[1].endswith(HOSTILE[1][1:]) and HOSTILE[0] in watched.page.title()
        assert HOSTILE[0] in watched.text("footer") and HOSTILE[1] in watched.text("footer")
        assert watched.verdict() == []


def test_words_that_the_unsteered_text_has_not_are_marked(browser, tmp_path):  # noqa: F811
    sweep = made(["one two three"])
    sweep.rows[1]["text"] = "one two <b>four"
    sweep.rows[2]["text"] = "one two three"
    with Watched(browser) as watched:
        watched.open(sweep.to_html(tmp_path / "p.html"))
        assert texts(watched, ".steered mark")[:1] == ["<b>four"]
        assert watched.page.locator(".steered .text").nth(0).is_visible()  # open, nothing to unfold
        assert watched.page.locator(".steered .text").nth(1).locator("mark").count() == 0


def ranked(latent, effect, lifts):
    """Rows of one strengthless operation: the latent's effect, and those of random directions, on two prompts."""
    rows, nothing = [], {name: math.nan for name in MEASURES}
    for prompt_id in range(2):
        rows.append({"baseline": "none", "latent": None, "operation": None, "draw": None, "text": "a", **nothing})
        for draw, lift in enumerate([effect, *lifts], start=-1):
            figures = nothing | {"rise_text": lift, "own_rise_text": lift, "kl_text": 0.5}
            rows.append({"baseline": "random_direction" if draw >= 0 else "steered", "latent": latent, "operation": "ablate",
                         "draw": draw if draw >= 0 else None, "text": "a" if draw < 3 else None, **figures})  # fmt: skip
        for row in rows:
            row |= {"strength": None, "control": None, "seed": 0, "prompt_id": row.get("prompt_id", prompt_id)}
    return [{**row, "row": i} for i, row in enumerate(rows)]


def test_the_first_thing_is_a_sentence_a_latent(browser, tmp_path):  # noqa: F811
    for effect, place, p in ((0.9, "above the random band", "0.0476"), (0.0875, "inside the random band", "0.143")):
        sweep = made(["one", "two"])
        sweep.settings["operations"] = ["ablate"]
        rows = ranked(3, effect, [i / 200 for i in range(20)])
        with Watched(browser) as watched:
            watched.open(Sweep(rows, sweep.settings, sweep.scores).to_html(tmp_path / "p.html"))
            said = texts(watched, "main .verdicts li")
            assert len(said) == 1 and said[0].startswith(f"Latent 3, ablate: {place}. rise_text is +{effect:.3}")
            assert f"(p = {p} among 20; no strength to match the KL by: at equal norm)" in said[0]
            assert watched.page.locator("main > *").nth(1).get_attribute("class") == "verdicts"
            assert watched.verdict() == []


def test_an_unfinished_sweep_has_a_page(browser, tmp_path):  # noqa: F811
    sweep = made(["one", "two"])
    with Watched(browser) as watched:
        watched.open(sweep.to_html(tmp_path / "p.html"))
        assert "Latent 3, add: not ranked, 1 random directions: p needs 20." in watched.text(".verdicts")
        watched.open(Sweep(sweep.rows[:1], sweep.settings, sweep.scores).to_html(tmp_path / "p.html"))
        assert "1 of 8" in watched.text("footer")
        watched.open(Sweep([], sweep.settings, {}).to_html(tmp_path / "p.html"))
        assert "No steered text yet" in watched.text()
