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

from saelab.pages.shell import built, policy
from saelab.steering.sweep_page import shown

COLOURS = ("var(--accent)", "var(--mark)", "var(--muted)")
DASHED = 'stroke-dasharray="4,3"'


class Markup(str):
    """A string that is HTML already."""


def document(title: str, body: Iterable[str], script: str = "") -> str:
    """A whole page, with a built script if one is named.

    >>> page = document("<b>", ["<p>content</p>"])
    >>> "&lt;b&gt;" in page, "default-src 'none'" in page, "<b>" in page
    (True, True, False)
    """
    style = built("hspace.css")
    running = built(script) if script else ""
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
