"""The shell of a dashboard: one HTML page with its style and its script inline, under a policy that allows nothing else.

The sources are small files in `page/`, joined here in order. The policy names the style and the script by their SHA-256:
no other runs, no connection is possible, and only scripts that the page's own script asks for (`data/<name>.js`, in a
bundle) are loaded.
"""

import base64
import hashlib
import re
from collections.abc import Iterable, Iterator, Sequence
from functools import cache
from pathlib import Path

PAGE = Path(__file__).parent / "page"

# What any report of saelab can use, and what makes it a dashboard of latents.
STYLES = ("tokens", "base", "components", "overlays", "examples", "charts", "grid", "pages", "print")
PARTS = ("dom", "numbers", "colour", "text", "route", "notes", "export", "dialogs", "charts", "grid", "chunks", "card")
DASHBOARD = ("columns", "feature-data", "search", "examples", "examples-view", "panels", "panel-neighbours", "density",
             "keys", "index-columns", "index-page", "feature-head", "feature-page", "compare-saes", "compare-page",
             "prompt-page", "steer", "provenance", "main")  # fmt: skip
# The page of a circuit (`saelab.analysis.circuit`), of the same parts.
CIRCUIT_STYLES = ("tokens", "base", "components", "overlays", "examples", "pages", "circuit", "print")
CIRCUIT = ("dom", "numbers", "colour", "text", "route", "notes", "export", "circuit-layout", "circuit-graph",
           "circuit")  # fmt: skip


@cache
def joined(kind: str, names: Sequence[str]) -> str:
    """The sources of one kind ("css" or "js"), in order, without what only its writers need: comment lines and white space."""
    text = "\n".join((PAGE / f"{name}.{kind}").read_text(encoding="utf-8") for name in names)
    text = re.sub(r"^\s*(//[^\n]*|/\*(?:(?!\*/).)*\*/[ \t]*)$", "", text, flags=re.MULTILINE | re.DOTALL)
    lines: list[str] = []
    going_on = "([{," if kind == "js" else "{},;"
    for line in filter(None, map(str.strip, text.split("\n"))):
        line = tightened(line, kind)
        # No statement ends after an opening bracket or a comma, nor before a closing one; a comment ends with its line.
        if lines and "//" not in lines[-1] and (lines[-1][-1] in going_on or line[0] in ")]}"):
            lines[-1] += line
        else:
            lines.append(line)
    return "\n".join(lines)


QUOTED = re.compile(r"""("(?:[^"\\\n]|\\.)*")""")
# Around these a space says nothing: the words and signs that need one are not among them (+ +a, a - -b, calc(1px + 2px)).
SPACED = {"js": re.compile(r" ?([=(){}\[\],:;<>?&|!*]) ?"), "css": re.compile(r" ?([{},;>]) ?|(?<=:) ")}


def tightened(line: str, kind: str) -> str:
    """A line of source without spaces around punctuation.

    Quoted strings stay as they are, and so do whole lines of script with a template or a slash (a pattern, a comment).

    >>> tightened('if (a === "x = 1") b = { c: d + e };', "js")
    'if(a==="x = 1")b={c:d + e};'
    >>> tightened("--sans: a, \\"b, c\\";", "css")
    '--sans:a,"b, c";'
    """
    if kind == "js" and ("`" in line or "/" in line or "'" in line):
        return line
    parts = QUOTED.split(line)
    parts[::2] = [SPACED[kind].sub(lambda m: m[1] or "", part) for part in parts[::2]]
    return "".join(parts)


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


def shell(
    inline_chunks: Iterable[tuple[str, str]] | None = None,
    scripts: Sequence[str] = PARTS + DASHBOARD,
    styles: Sequence[str] = STYLES,
    frame: str = "shell",
) -> Iterator[str]:
    """The page in pieces, to be written one after the other as UTF-8.

    Args:
        inline_chunks: (name, base64) of every chunk, `manifest` first, for a single file; None for a bundle, whose chunks
            are `data/<name>.js` beside the page.
        scripts: names of the scripts in `page/`, joined in this order; another report keeps `PARTS` and adds its own.
        styles: the same of the style sheets.
        frame: name of the HTML file in `page/` that holds them.

    No title and no name enters here: strings of a data set are in its chunks only, and reach the page as text.

    >>> page = "".join(shell())
    >>> page.startswith("<!doctype html>"), len(page.encode()) <= 150_000
    (True, True)
    """
    style = joined("css", tuple(styles))
    script = f'"use strict";\n(() => {{\n{joined("js", tuple(scripts))}\n}})();\n'
    form = "bundle" if inline_chunks is None else "single"
    yield (
        (PAGE / f"{frame}.html")
        .read_text(encoding="utf-8")
        .replace("{policy}", policy(script, style))
        .replace("{form}", form)
        .replace("{style}", style)
        .replace("{script}", script)
    )
    for name, text in inline_chunks or ():
        yield f'<script type="text/plain" id="{name}">{text}</script>\n'
    yield "</html>\n"
