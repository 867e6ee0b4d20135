"""Parts of self-contained pages of images: document, picture, table, curve. In the dashboards' style and under their policy.

Nothing is fetched, only the page's own script runs, and everything that a user named passes `shown`, which escapes it. The
policy forbids style attributes: sizes and colours are classes and attributes of SVG.
"""

import base64
import html
import io
import math
from collections.abc import Iterable, Sequence
from typing import Any

from jaxtyping import Float
from torch import Tensor

from saelab.dashboards.shell import built, policy
from saelab.steering.report import shown

COLOURS = ("var(--accent)", "var(--mark)", "var(--muted)")
DASHED = 'stroke-dasharray="4,3"'

OURS = """
main { max-width: 84rem; margin: 0 auto; padding: 1.2rem 1.4rem 4rem; width: 100%; }
header.top { border-bottom: 1px solid var(--hair); }
header.top > div { max-width: 84rem; margin: 0 auto; padding: 0.9rem 1.4rem; display: flex; gap: 1rem; align-items:
baseline; flex-wrap: wrap; } header.top b { font-weight: 650; }
h1 { font-size: var(--s4); font-weight: 300; letter-spacing: -0.01em; margin: 0.4rem 0 0.3rem; }
h2 { font-size: var(--s3); font-weight: 600; margin: 2.2rem 0 0.5rem; padding-top: 0.8rem; border-top: 1px solid var(--hair); }
h3 { font-size: var(--s1); font-weight: 600; margin: 0.9rem 0 0.3rem; }
p.lead { max-width: 46rem; color: var(--muted); }
.side { display: flex; gap: 1.6rem 2.4rem; flex-wrap: wrap; align-items: flex-start; }
.wide { overflow-x: auto; max-width: 100%; }
table { border-collapse: collapse; font-size: var(--s1); }
th { font-weight: 600; text-align: right; color: var(--muted); padding: 0.25rem 0.6rem; vertical-align: bottom; }
td { text-align: right; padding: 0.25rem 0.6rem; border-top: 1px solid var(--hair); white-space: nowrap; }
th:first-child, td:first-child { text-align: left; }
table.pictures td, table.pictures th { border: 0; padding: 2px; text-align: center; }
table.pictures td.now { outline: 2px solid var(--accent); outline-offset: -1px; border-radius: 3px; }
img { display: block; width: 4rem; height: 4rem; image-rendering: pixelated; border-radius: 2px; background: var(--sunk); }
img.large { width: 6.5rem; height: 6.5rem; }
svg { display: block; width: 21rem; max-width: 100%; height: auto; }
svg text { font: 11px var(--sans); fill: var(--muted); }
.slider { display: flex; align-items: center; gap: 0.8rem; margin: 0.4rem 0; font-size: var(--s1); }
.slider input { width: 14rem; accent-color: var(--accent); }
.strip { display: flex; gap: 4px; flex-wrap: wrap; max-width: 30rem; }
.key { display: inline-block; width: 0.8em; height: 0.8em; border-radius: 2px; vertical-align: -0.08em; }
"""
# Eleven steps from lower to higher, for cells of a matrix.
HEAT = "".join(
    f".heat{level} {{ background: color-mix(in oklab, var(--{'plus' if level > 0 else 'minus'}) {abs(level) * 9}%, "
    "transparent); }\n"
    for level in range(-5, 6)
)


class Markup(str):
    """A string that is HTML already."""


def document(title: str, body: Iterable[str], script: str = "", more_style: str = "") -> str:
    """A whole page.

    >>> page = document("<b>", ["<p>content</p>"])
    >>> "&lt;b&gt;" in page, "default-src 'none'" in page, "<b>" in page
    (True, True, False)
    """
    style = built("document.css") + OURS + HEAT + more_style
    running = f'"use strict";\n{script}' if script else ""
    return "\n".join(
        [
            '<!doctype html><html lang="en"><head><meta charset="utf-8">',
            f'<meta http-equiv="Content-Security-Policy" content="{policy(running, style)}">',
            '<meta name="viewport" content="width=device-width, initial-scale=1"><meta name="referrer" content="no-referrer">',
            f"<title>{shown(title)}</title><style>{style}</style></head><body>",
            '<a class="skip" href="#main">Skip to the content</a><header class="top"><div><span class="brand">saelab</span>'
            f'<span class="muted">h-space</span></div></header><main id="main" tabindex="-1"><h1>{shown(title)}</h1>',
            *body,
            "</main>" + (f"<script>{running}</script>" if script else "") + "</body></html>\n",
        ]
    )


def picture(image: Float[Tensor, "C H W"], alt: str, kind: str = "") -> str:
    """An `img` with the picture inside, of values in [-1, 1]; three channels are colours, of others the mean is grey."""
    levels = ((image.float().clamp(-1, 1) + 1) * 127.5).round().byte().cpu()
    levels = levels.permute(1, 2, 0) if len(levels) == 3 else levels.float().mean(0).round().byte()
    return f'<img{f" class={kind}" if kind else ""} alt="{shown(alt)}" src="{png(levels.numpy())}">'


def png(levels: Any) -> str:
    """The data URI of an array of bytes [H, W] or [H, W, 3 or 4]."""
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(levels).save(buffer, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def number(value: Any) -> str:
    """Three digits, a dash where there is none; `Markup` as it is, everything else escaped."""
    if isinstance(value, Markup):
        return value
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return "&ndash;"
    return shown(f"{value:.3g}" if isinstance(value, float) else value)


def matrix(corner: str, rows: Sequence[str], columns: Sequence[str], values: Sequence[Sequence[float]]) -> str:
    """A table whose cells are tinted by their share of the largest absolute value, or of a tenth where all are smaller."""
    largest = max([abs(v) for row in values for v in row if not math.isnan(v)] + [0.1])
    head = "".join(f"<th>{shown(name)}</th>" for name in (corner, *columns))
    lines = []
    for name, row in zip(rows, values, strict=True):
        cells = [f"<td class=heat{0 if math.isnan(v) else round(5 * v / largest)}>{v:+.2f}</td>" for v in row]
        lines.append(f"<tr><td>{shown(name)}</td>{''.join(cells)}</tr>")
    return f'<div class="wide"><table><tr>{head}</tr>{"".join(lines)}</table></div>'


def table(columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """A plain table; the first column is to the left."""
    head = "".join(f"<th>{shown(name)}</th>" for name in columns)
    lines = [f"<tr>{''.join(f'<td>{number(value)}</td>' for value in row)}</tr>" for row in rows]
    return f'<div class="wide"><table><tr>{head}</tr>{"".join(lines)}</table></div>'


def lines_svg(x_name: str, y_name: str, series: Sequence[tuple[str, Sequence[tuple[float, float]]]]) -> str:
    """Lines through points, the first series drawn strongest; each (name, points)."""
    points = [point for _, some in series for point in some if all(map(math.isfinite, point))]
    if not points:
        return ""
    xs, ys = [x for x, _ in points], [0.0] + [y for _, y in points]
    left, right, low, high = min(xs), max(xs), min(ys), max(ys)

    def at(x: float, y: float) -> tuple[float, float]:
        return 46 + 300 * (x - left) / ((right - left) or 1), 178 - 156 * (y - low) / ((high - low) or 1)

    drawn = []
    for (_, some), colour in reversed(list(zip(series, COLOURS, strict=False))):
        path = " ".join("{:.1f},{:.1f}".format(*at(*point)) for point in some if all(map(math.isfinite, point)))
        strong = colour == COLOURS[0]
        drawn.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="{2 if strong else 1.3}"'
                     f'{"" if strong else chr(32) + DASHED}/>')  # fmt: skip
    names = "".join(
        f'<text x="{50 + 105 * i}" y="13"><tspan fill="{colour}">&#9632;</tspan> {shown(name)}</text>'
        for i, ((name, _), colour) in enumerate(zip(series, COLOURS, strict=False))
    )
    base = at(left, low)[1]
    return (
        f'<svg viewBox="0 0 360 222" role="img" aria-label="{html.escape(shown(y_name))} against {shown(x_name)}">{names}'
        f'<line x1="46" x2="346" y1="{base:.1f}" y2="{base:.1f}" stroke="var(--hair)"/>{"".join(drawn)}'
        f'<text x="40" y="26" text-anchor="end">{high:.2g}</text><text x="40" y="182" text-anchor="end">{low:.2g}</text>'
        f'<text x="46" y="196">{left:g}</text><text x="346" y="196" text-anchor="end">{right:g}</text>'
        f'<text x="196" y="214" text-anchor="middle">{shown(x_name)}</text></svg>'
    )
