"""How fast the page is in Chromium: first paint, switching latents, the index of a million.

    python -m benchmarks.dashboards_page --prepare            # writes made-up dashboards to benchmarks/.cache/page
    python -m benchmarks.dashboards_page [--out results/dashboards_page.md]

Each figure ends with the frame that shows the result (the task after its animation frame), as the page's own clock has it;
medians over repeats, the slowest beside them. Opened from file://, offline; a fresh browser context each time it is opened.
"""

import argparse
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

from playwright.sync_api import sync_playwright

from saelab.dashboards.writing import bundle
from tests import synthetic_dashboard

CHROMIUM = "/usr/bin/chromium"
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-crash-reporter", "--disable-breakpad"]
CACHE = Path(__file__).parent / ".cache" / "page"
BARS = {"first paint": 300, "cached": 50, "cold": 150, "usable, 1M": 2_500, "sort, 1M": 300}

# `painted(change)`: milliseconds from now to the frame after `change` is seen in the document. `__usable`: the same from the
# start of the navigation until a page is shown.
CLOCK = """
globalThis.painted = (attribute, within, act, from = performance.now()) => new Promise((resolve) => {
  const observer = new MutationObserver(() => {
    observer.disconnect();
    requestAnimationFrame(() => {
      const channel = new MessageChannel();
      channel.port1.onmessage = () => resolve(performance.now() - from);
      channel.port2.postMessage(0);
    });
  });
  observer.observe(within(), { attributes: true, attributeFilter: [attribute], subtree: true });
  act();
});
globalThis.__usable = painted("data-shown", () => document, () => {}, 0);
globalThis.__long = [];
const watch = new PerformanceObserver((list) => __long.push(...list.getEntries().map((e) => e.duration)));
watch.observe({ type: "longtask", buffered: true });
"""
GO = """(hash) => painted("data-shown", () => document.documentElement, () => { location.hash = hash; })"""
SORT = """(title) => painted("aria-sort", () => document.querySelector(".grid .head"), () => {
  [...document.querySelectorAll(".grid .head button")].find((b) => b.textContent.startsWith(title)).click();
})"""
TYPE = """(query) => painted("aria-rowcount", () => document.querySelector(".grid"), () => {
  const field = document.getElementById("search");
  field.value = query;
  field.dispatchEvent(new Event("input"));
})"""


def small(pages: int) -> dict[str, Any]:
    """A dashboard as `build` makes it: every latent has a page with 45 windows of up to 48 tokens, effects, sources."""
    return dict(d_sae=pages, vocab=5_000, heads=9)


def large(latents: int) -> dict[str, Any]:
    return dict(
        d_sae=latents, pages=256, windows=False, effects=False, extras=False, prompts=0, labels=0.02, vocab=50_000
    )


def prepare(args: argparse.Namespace) -> None:
    for name, arguments in (
        ("small.html", small(args.pages)),
        ("small", small(args.pages)),
        ("large", large(args.latents)),
    ):
        bundle.write(CACHE / name, synthetic_dashboard.chunks(**arguments), synthetic_dashboard.manifest(**arguments))


def opened(browser: Any, path: Path, hash_: str = "") -> tuple[Any, float, float]:
    """A fresh page, its first contentful paint, and the time until it can be used."""
    context = browser.new_context(offline=True, viewport={"width": 1440, "height": 900})
    context.add_init_script(CLOCK)
    page = context.new_page()
    page.goto("file://" + quote(str(path)) + hash_)
    usable = page.evaluate("__usable")
    paint = page.evaluate("performance.getEntriesByName('first-contentful-paint')[0]?.startTime ?? NaN")
    return page, paint, usable


def idle(page: Any) -> None:
    page.wait_for_selector("main:not([aria-busy=true])")
    page.wait_for_timeout(200)


def figure(name: str, values: Sequence[float], bar: int | None = None) -> str:
    return f"| {name} | {statistics.median(values):.0f} | {max(values):.0f} | {len(values)} | {bar or ''} |"


def forms(browser: Any, args: argparse.Namespace) -> list[str]:
    lines = []
    for form, path in (("single file", CACHE / "small.html"), ("bundle", CACHE / "small" / "index.html")):
        paints, usables, cold, cached = [], [], [], []
        for _ in range(args.repeats):
            page, paint, usable = opened(browser, path)
            idle(page)
            paints.append(paint)
            usables.append(usable)
            for start in range(0, args.pages, 64):  # the first latent of a chunk reads it, the next finds it in memory
                cold.append(page.evaluate(GO, f"#f={start + 3}"))
                idle(page)
                cached.append(page.evaluate(GO, f"#f={start + 4}"))
                idle(page)
            page.context.close()
        what = f"{form}, {args.pages} pages"
        lines += [
            figure(f"{what}: first contentful paint", paints, BARS["first paint"]),
            figure(f"{what}: index usable", usables),
            figure(f"{what}: another latent, its chunk not read yet", cold, BARS["cold"]),
            figure(f"{what}: another latent, its chunk in memory", cached, BARS["cached"]),
        ]
    return lines


def million(browser: Any, args: argparse.Namespace) -> list[str]:
    paints, usables, longest = [], [], []
    sorts: dict[str, list[float]] = {title: [] for title in ("max", "mean", "latent", "label", "density", "nearest")}
    searches: dict[str, list[float]] = {"trade": [], 'tok:" the"': [], "re:/^words.*7$/": []}
    for _ in range(args.repeats):
        page, paint, usable = opened(browser, CACHE / "large" / "index.html", "#show=all")
        paints.append(paint)
        usables.append(usable)
        page.wait_for_selector("main:not([aria-busy=true])")  # the second index chunk comes on its own
        page.wait_for_timeout(1_000)
        longest.append(max(page.evaluate("__long"), default=0))
        for title, times in sorts.items():
            times.append(page.evaluate(SORT, title))
        for query, times in searches.items():
            times.append(page.evaluate(TYPE, query) - 160)  # the page waits that long for the next key
        heap = page.evaluate("performance.memory.usedJSHeapSize") / 2**20
        nodes = page.evaluate("document.querySelectorAll('*').length")
        page.context.close()
    what = f"index of {args.latents:,}"
    return [
        figure(f"{what}: first contentful paint", paints, BARS["first paint"]),
        figure(f"{what}: usable", usables, BARS["usable, 1M"]),
        figure(f"{what}: longest task while opening", longest),
        *(figure(f"{what}: sort by {title}", times, BARS["sort, 1M"]) for title, times in sorts.items()),
        *(figure(f"{what}: search `{query}`", times) for query, times in searches.items()),
        f"\nIndex of {args.latents:,}: heap {heap:.0f} MiB, {nodes} nodes.",
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prepare", action="store_true", help="write the dashboards and stop")
    parser.add_argument("--latents", type=int, default=1_000_000)
    parser.add_argument("--pages", type=int, default=512)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    if args.prepare:
        prepare(args)
        return
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        head = [
            "# The page in Chromium\n",
            f"`python -m benchmarks.dashboards_page {' '.join(sys.argv[1:])}`: Chromium {browser.version}, headless, 2 cores.",
            "Milliseconds. " + " ".join(str(__doc__).split("\n\n")[2].split()) + "\n",
            "| what | median | slowest | n | bar |\n|---|---|---|---|---|",
        ]
        lines = [*head, *forms(browser, args), *million(browser, args)]
        browser.close()
    print("\n".join(lines))
    if args.out:
        args.out.write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
