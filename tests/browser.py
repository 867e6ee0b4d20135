"""Chromium for the tests of the page: started once a test file, watched for everything that a dashboard must not do."""

import hashlib
import importlib.util
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest

from saelab.dashboards.writing import codec
from saelab.pages import packing
from saelab.pages.shell import shell
from tests import synthetic_dashboard

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
QUIET = [
    "--no-sandbox",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-gpu",
    "--no-first-run",
]
WATCH = """
window.__violations = [];
addEventListener("securitypolicyviolation", (e) => __violations.push(`${e.violatedDirective} ${e.blockedURI} ${e.sample}`));
"""


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """A headless Chromium. Import it into a test file; playwright's loop is gone when the file is done."""
    api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed: pip install playwright")
    if CHROMIUM is None:
        pytest.skip("no Chromium on the path: apt-get install chromium")
    with api.sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=CHROMIUM, args=QUIET)
        yield chromium
        chromium.close()


AXE = """async () => {
  const result = await axe.run(document, { resultTypes: ["violations"] });
  const where = (v) => v.nodes.slice(0, 3).map((n) => n.html.slice(0, 200)).join(" | ");
  return result.violations.map((v) => `${v.id}: ${v.help}: ${where(v)}`);
}"""


def axe_script() -> str:
    """The checker's script; skips where it is not installed. `Watched.axe()` asks it."""
    found = importlib.util.find_spec("axe_playwright_python")
    if found is None or found.origin is None:
        pytest.skip("axe is not installed: pip install axe-playwright-python")
    return (Path(found.origin).parent / "axe.min.js").read_text(encoding="utf-8")


class Watched:
    """A page, offline, with what it did that it must not: `verdict()` is empty for a clean one."""

    def __init__(self, browser: Any, **context: Any) -> None:
        self.context = browser.new_context(**{"viewport": {"width": 1440, "height": 900}, "offline": True, **context})
        self.context.set_default_timeout(120_000)  # a busy machine takes its time
        self.context.add_init_script(WATCH)
        self.page = self.context.new_page()
        self.complaints: list[str] = []
        self.context.route("**/*", self._request)
        self.page.on("console", lambda message: self.complaints.append(f"console {message.type}: {message.text}"))
        self.page.on("pageerror", lambda error: self.complaints.append(f"error: {error}"))
        self.page.on("dialog", self._dialog)

    def _request(self, route: Any) -> None:
        if route.request.url.startswith(("file:", "data:", "blob:", "about:")):
            route.continue_()
        else:
            self.complaints.append(f"request: {route.request.url}")
            route.abort()

    def _dialog(self, dialog: Any) -> None:
        self.complaints.append(f"dialog: {dialog.message}")
        dialog.dismiss()

    def open(self, path: Path, hash_: str = "") -> "Watched":
        self.page.goto("file://" + quote(str(path)) + hash_)
        self.page.wait_for_selector("html[data-shown]")
        return self._loaded()

    def go(self, hash_: str) -> "Watched":
        """Another place of the same page (another than now), as a typed URL does it."""
        before = int(self.page.locator("html").get_attribute("data-shown") or 0)
        self.page.evaluate("(hash) => { location.hash = hash; }", hash_)
        return self.settled(before)

    def settled(self, before: int) -> "Watched":
        """Waits until a later page than number `before` is shown, with what it loads apart."""
        assert self.until(lambda: self.shown > before), f"the page stayed at {before}: {self.complaints}"
        return self._loaded()

    def _loaded(self) -> "Watched":
        assert self.until(lambda: not self.page.locator("main[aria-busy=true], main [aria-busy=true]").count()), (
            "a part of the page is still busy"
        )
        return self

    def until(self, condition: Callable[[], bool], seconds: float = 30) -> bool:
        """Whether a condition came true in that time: a busy machine takes its time."""
        for _ in range(int(seconds * 40)):
            if condition():
                return True
            self.page.wait_for_timeout(25)
        return condition()

    @property
    def shown(self) -> int:
        return int(self.page.locator("html").get_attribute("data-shown") or 0)

    def text(self, selector: str = "main") -> str:
        return self.page.locator(selector).first.text_content()

    def axe(self) -> list[str]:
        """What axe finds wrong with the page as it is."""
        if not self.page.evaluate("typeof axe !== 'undefined'"):
            self.page.evaluate(axe_script())
        return self.page.evaluate(AXE)

    def nodes(self) -> int:
        return self.page.evaluate("document.querySelectorAll('*').length")

    def verdict(self) -> list[str]:
        found = list(self.complaints) + [f"violation: {v}" for v in self.page.evaluate("window.__violations")]
        if self.page.evaluate("window.__pwned !== undefined"):
            found.append("executed: the canary is set")
        return found

    def __enter__(self) -> "Watched":
        return self

    def __exit__(self, *_: object) -> None:
        self.context.close()


def texts(chunks: Iterable[tuple[str, bytes]], manifest: Mapping[str, Any]) -> dict[str, str]:
    """Base64 of every chunk by name, the manifest first."""
    members = {name: packing.compress(container) for name, container in chunks}
    described = {name: [hashlib.sha256(member).hexdigest(), len(member), 0] for name, member in members.items()}
    first = {"manifest": packing.to_text(codec.manifest_bytes({**manifest, "chunks": described}))}
    return first | {name: packing.to_text(member) for name, member in members.items()}


def synthetic_texts(change: Callable[[str, dict, dict], None] | None = None, **arguments: Any) -> dict[str, str]:
    """The chunks of a made-up dashboard; `change(name, header, columns)` may edit a chunk's columns before it is written."""

    def changed() -> Iterator[tuple[str, bytes]]:
        for name, container in synthetic_dashboard.chunks(**arguments):
            if change is None:
                yield name, container
                continue
            header, columns = codec.decode(container)
            change(name, header, columns)
            extra = {key: value for key, value in header.items() if key not in ("kind", "columns")}
            yield name, codec.encode(header["kind"], columns, **extra)

    return texts(changed(), synthetic_dashboard.manifest(**arguments))


def single_file(path: Path, chunks: Mapping[str, str]) -> Path:
    path.write_text("".join(shell(chunks.items())), encoding="utf-8", newline="\n")
    return path


def bundle(folder: Path, chunks: Mapping[str, str]) -> Path:
    (folder / "data").mkdir(parents=True)
    for name, text in chunks.items():
        (folder / "data" / f"{name}.js").write_text(codec.script(name, text), encoding="ascii")
    (folder / "index.html").write_text("".join(shell()), encoding="utf-8", newline="\n")
    return folder / "index.html"
