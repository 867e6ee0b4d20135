"""The shell of every page: one HTML page with its style and its script inline, under a policy that allows nothing else.

Scripts and style sheets are written in `web/` and built into `web/dist` (`make web`), which is kept beside them: who uses
or installs saelab needs no node. The policy names the style and the script by their SHA-256: no other runs, no connection is
possible, and only scripts that the page's own script asks for (`data/<name>.js`, in a bundle) are loaded.
"""

import base64
import hashlib
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

from saelab.pages.packing import packed

PAGE = Path(__file__).parent / "web"
PAGES = ("dashboard", "circuit", "sweep", "hspace-directions", "hspace-latents", "scores")


@cache
def built(name: str) -> str:
    """A file of `web/dist`: page.css, and a script for each of `PAGES`."""
    return (PAGE / "dist" / name).read_text(encoding="utf-8")


def policy(script: str, style: str) -> str:
    """The content-security policy that lets this script and this style run, and nothing else.

    'strict-dynamic' lets that script add the chunks of a bundle; Trusted Types leave it one way to do so, which takes only
    `data/<name>.js`, and no way to turn a string into markup or code.
    """

    def sha256(text: str) -> str:
        return "'sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() + "'"

    return "; ".join(
        [
            "default-src 'none'",
            f"script-src {sha256(script)} 'strict-dynamic'",
            f"style-src {sha256(style)}",
            "img-src data: blob:",
            "connect-src 'none'",
            "base-uri 'none'",
            "form-action 'none'",
            "require-trusted-types-for 'script'",
            "trusted-types saelab",
        ]
    )


def shell(inline_chunks: Iterable[tuple[str, str]] | None = None, page: str = "dashboard") -> Iterator[str]:
    """The page in pieces, to be written one after the other as UTF-8.

    Args:
        inline_chunks: (name, base64) of every chunk, `manifest` first, for a single file; None for a bundle, whose chunks
            are `data/<name>.js` beside the page.
        page: which of `PAGES`: its script.

    No title and no name enters here: strings of a data set are in its chunks only, and reach the page as text.

    >>> page = "".join(shell())
    >>> page.startswith("<!doctype html>"), len(page.encode()) <= 150_000
    (True, True)
    """
    style, script = built("page.css"), built(f"{page}.js")
    form = "bundle" if inline_chunks is None else "single"
    yield (
        (PAGE / "page.html")
        .read_text(encoding="utf-8")
        .replace("{policy}", policy(script, style))
        .replace("{form}", form)
        .replace("{page}", page)
        .replace("{style}", style)
        .replace("{script}", script)
    )
    for name, text in inline_chunks or ():
        yield f'<script type="text/plain" id="{name}">{text}</script>\n'
    yield "</html>\n"


def report(page: str, data: Any) -> str:
    """A whole page of plain data (`packing.packed`), which its script shows.

    >>> "the state of" in report("sweep", {"prompt": "the state of"})  # data are base64, and text once they are shown
    False
    """
    return "".join(shell([("data", packed(data))], page))
