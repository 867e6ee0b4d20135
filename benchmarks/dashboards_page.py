"""How fast the page is in Chromium: first paint, switching latents, the index of a million.

    python benchmarks/dashboards_page.py [--latents 1000000] [--pages 512] [--repeats 5]

Synthetic data in a temporary folder, opened from file:// with the network off. Medians over repeats, milliseconds.
"""

import argparse
import statistics
import tempfile
from pathlib import Path
from typing import Any
from urllib.parse import quote

from playwright.sync_api import sync_playwright

from saelab.dashboards import bundle, synthetic

CHROMIUM = "/usr/bin/chromium"
# Milliseconds from a change of the URL to the frame after the page says that it is shown.
UNTIL_SHOWN = """(hash) => new Promise((resolve) => {
  const from = performance.now();
  const before = document.documentElement.dataset.shown;
  location.hash = hash;
  const look = () => {
    if (document.documentElement.dataset.shown === before) setTimeout(look, 1);
    else requestAnimationFrame(() => resolve(performance.now() - from));
  };
  look();
})"""
# Milliseconds from a click on a column's head to the frame with the new order.
UNTIL_SORTED = """(column) => new Promise((resolve) => {
  const state = () => document.querySelector(".grid .head [aria-sort]").textContent;
  const before = state();
  const from = performance.now();
  document.querySelector(`.grid .head > :nth-child(${column}) button`).click();
  const look = () => {
    if (state() === before) setTimeout(look, 1);
    else requestAnimationFrame(() => resolve(performance.now() - from));
  };
  look();
})"""


def opened(browser: Any, path: Path, hash_: str = "") -> tuple[Any, float, float]:
    """A fresh page with its first contentful paint and the time until it can be used."""
    page = browser.new_context(offline=True, viewport={"width": 1440, "height": 900}).new_page()
    page.goto("file://" + quote(str(path)) + hash_)
    page.wait_for_selector("html[data-shown]", timeout=60_000)
    ready = page.evaluate("performance.now()")
    paint = page.evaluate("performance.getEntriesByName('first-contentful-paint')[0]?.startTime ?? NaN")
    return page, paint, ready


def switching(page: Any, pages: int) -> tuple[float, float]:
    """Median milliseconds to another latent: of a chunk not read yet, and of one in memory."""
    cold = [page.evaluate(UNTIL_SHOWN, f"#f={64 * i + 3}") for i in range(1, max(2, pages // 64))]
    cached = [page.evaluate(UNTIL_SHOWN, f"#f={4 + i % 7}") for i in range(21)]
    return statistics.median(cold), statistics.median(cached[1:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--latents", type=int, default=1_000_000)
    parser.add_argument("--pages", type=int, default=512)
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    small: dict[str, Any] = dict(d_sae=args.pages, vocab=5_000)
    large: dict[str, Any] = dict(d_sae=args.latents, pages=256, windows=False, effects=False, extras=False, prompts=0)
    large |= dict(labels=0.02, vocab=50_000)
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        for name, kind in (("single file", "small.html"), ("bundle", "small")):
            path = bundle.write(Path(folder) / kind, synthetic.chunks(**small), synthetic.manifest(**small))
            runs = [opened(browser, path) for _ in range(args.repeats)]
            paint, usable = (statistics.median(run[i] for run in runs) for i in (1, 2))
            cold, cached = switching(runs[-1][0], args.pages)
            print(f"{name} of {args.pages}: first paint {paint:.0f} ms, usable {usable:.0f} ms")
            print(f"{name} of {args.pages}: another latent, cold {cold:.0f} ms, cached {cached:.0f} ms")
        path = bundle.write(Path(folder) / "large", synthetic.chunks(**large), synthetic.manifest(**large))
        runs = [opened(browser, path, "#show=all") for _ in range(max(1, args.repeats // 2))]
        paint, usable = (statistics.median(run[i] for run in runs) for i in (1, 2))
        print(f"index of {args.latents:,}: first paint {paint:.0f} ms, usable {usable:.0f} ms")
        page = runs[-1][0]
        page.wait_for_timeout(1_000)  # the second index chunk comes on its own
        for name, column in (("max", 6), ("mean", 7), ("id", 2), ("density", 5)):
            print(f"index of {args.latents:,}: sort by {name} {page.evaluate(UNTIL_SORTED, column):.0f} ms")
        nodes = page.evaluate("document.querySelectorAll('*').length")
        heap = page.evaluate("performance.memory.usedJSHeapSize") / 2**20
        print(f"index of {args.latents:,}: heap {heap:.0f} MiB, {nodes} nodes")
        browser.close()


if __name__ == "__main__":
    main()
