"""One self-contained page of a sweep: summary, curves, texts side by side. No script runs in it and nothing is fetched.

Everything that a model, a tokenizer or a user wrote passes `shown`, which escapes it and makes visible what a page could
not hold (control characters, halves of surrogate pairs); each text is a `bdi`, so that right-to-left marks stay inside.
"""

import base64
import hashlib
import html
import math
import os
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from saelab.steering.grid import NONE, RANDOM_DIRECTION, RANDOM_LATENT, STEERED
from saelab.steering.summaries import curve
from saelab.steering.sweep_figures import band

if TYPE_CHECKING:
    from pandas import DataFrame

    from saelab.steering.sweep_table import Sweep

STYLE = """
:root { color-scheme: light dark; --line: #8886; --soft: #8881; --new: #e8a33d44; }
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 78rem; padding: 0 1rem; }
table { border-collapse: collapse; width: 100%; margin: .5rem 0 1.5rem; }
th, td { border-bottom: 1px solid var(--line); padding: .3rem .5rem; text-align: left; vertical-align: top; }
th { font-weight: 600; }
td.number { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
.wide { overflow-x: auto; }
.text { unicode-bidi: isolate; white-space: pre-wrap; overflow-wrap: anywhere; }
.text mark { background: var(--new); color: inherit; }
.figures { color: #777; font-size: 12px; font-variant-numeric: tabular-nums; }
summary { cursor: pointer; padding: .25rem 0; }
details > details { margin-left: 1rem; }
svg { width: 23rem; max-width: 100%; height: auto; margin-right: 1rem; }
svg text { font: 11px system-ui, sans-serif; fill: currentColor; }
.prompt { background: var(--soft); padding: .4rem .6rem; }
"""

SUMMARY = (
    "latent operation matched_effect matched_kl matched_random directions p note best_strength effect effect_low effect_high "
    "kl random_direction random_latent area monotonicity perplexity_ranked output_score input_score"
).split()


def page(sweep: "Sweep", effect: str, kl: str, budget: float) -> str:
    """The HTML of `Sweep.to_html`."""
    table, settings = sweep.to_pandas(), sweep.settings
    digest = base64.b64encode(hashlib.sha256(STYLE.encode()).digest()).decode()
    policy = f"default-src 'none'; style-src 'sha256-{digest}'; base-uri 'none'; form-action 'none'"
    summary = sweep.summary(effect, kl, budget)
    asked = {
        "model": settings["model"], "site": settings["site"], "later site": settings["later_site"],
        "unit": settings["unit"], "scope": settings["scope"], "temperature": settings["temperature"],
        "rows": f"{len(sweep):,} of {sweep.total:,}",
    }  # fmt: skip
    parts = [
        "<!doctype html>",
        '<html lang="en"><head><meta charset="utf-8">',
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>Steering sweep: {shown(settings['model'])}</title><style>{STYLE}</style></head><body>",
        "<h1>Steering sweep</h1><p>",
        " &middot; ".join(f"{name} <b>{text(value)}</b>" for name, value in asked.items() if value is not None),
        "</p><h2>Summary</h2>",
        f"<p>Effect: {shown(effect)}, the rise of the probability of the latent's own top logit tokens unless another "
        f"was chosen. Matched: at the strength whose {shown(kl)} is {budget:g} nats (or the most that all reach), found on "
        "other prompts, for the latent and for random directions on their own tokens; p is the latent's rank among them. The "
        "best strength within the budget is chosen on the prompts that its effect is shown for, which flatters it; intervals "
        "are 95% over prompts.</p>",
        _summary(summary),
    ]
    for place, latent in enumerate(settings["latents"]):
        mine = table[table.latent == latent]
        if len(mine):
            parts.append(_latent(mine, table[table.baseline == NONE], settings, sweep.scores, place, effect, kl))
    return "\n".join([*parts, "</body></html>\n"])


def shown(value: Any) -> str:
    """A value as escaped text, with what a page cannot hold made visible.

    >>> shown("<b>" + chr(0) + chr(0xD800))
    '&lt;b&gt;\u2400\\\\ud800'
    """
    return "".join(_visible(character) for character in html.escape(str(value)))


def _visible(character: str) -> str:
    code = ord(character)
    if code < 0x20 and character not in "\n\t":
        return chr(0x2400 + code)
    if code == 0x7F:
        return "\u2421"
    if 0x80 <= code < 0xA0 or 0xD800 <= code < 0xE000 or code & 0xFFFE == 0xFFFE:
        return f"\\u{code:04x}"
    return character


def text(value: Any) -> str:
    """A text that cannot reach out of its place."""
    return f'<bdi class="text">{shown(value)}</bdi>'


def _continuation(words: str, unsteered: str) -> str:
    """A continuation with what differs from the unsteered one marked, from the first difference on."""
    same = len(os.path.commonprefix([words, unsteered]))
    rest = f"<mark>{shown(words[same:])}</mark>" if words[same:] else ""
    return f'<bdi class="text">{shown(words[:same])}{rest}</bdi>'


def _number(value: Any) -> str:
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return "&ndash;"
    return shown(f"{value:.3g}" if isinstance(value, float) else value)


def _summary(summary: "DataFrame") -> str:
    if not len(summary):
        return "<p>No steered text yet.</p>"
    head = "".join(f"<th>{shown(name.replace('_', ' '))}</th>" for name in SUMMARY)
    rows = []
    for row in summary.to_dict("records"):
        cells = [f'<td><a href="#latent-{int(row["latent"])}">{int(row["latent"])}</a></td>']
        cells += [f"<td>{shown(row['operation'])}</td>"]
        cells += [f'<td class="number">{_number(row[name])}</td>' for name in SUMMARY[2:]]
        rows.append(f"<tr>{''.join(cells)}</tr>")
    return f'<div class="wide"><table><tr>{head}</tr>{"".join(rows)}</table></div>'


def _latent(
    mine: "DataFrame", unsteered: "DataFrame", settings: dict[str, Any], scores: dict[str, Any], place: int, effect: str,
    kl: str,
) -> str:  # fmt: skip
    latent = settings["latents"][place]
    tops = " ".join(text(repr(token)) for token in (scores.get("top_tokens") or [[]] * (place + 1))[place])
    figures = ", ".join(
        f"{name.replace('_', ' ')} {_number(scores[name][place])}"
        for name in ("output_score", "input_score")
        if name in scores
    )
    parts = [
        f'<h2 id="latent-{int(latent)}">Latent {int(latent)}</h2><p>Top logit tokens: {tops or "none"}. {figures}.</p>'
    ]
    for operation in settings["operations"]:
        here = mine[mine.operation == operation]
        if not len(here):
            continue
        parts.append(f"<h3>{shown(operation)}</h3>")
        points = curve(here, effect, kl)
        if len(points) > 1:
            around = band(here, effect)
            parts.append(_svg("strength", effect, list(zip(points.strength, points[effect], strict=True)),
                              list(zip(around.strength, around["mean"] - around["std"], around["mean"] + around["std"],
                                       strict=True))))  # fmt: skip
            parts.append(_svg(kl, effect, sorted(zip(points[kl], points[effect], strict=True)), []))
        parts.append("<details><summary>Texts</summary>")
        for (prompt_id, seed), texts in here.groupby(["prompt_id", "seed"]):
            plain = unsteered[(unsteered.prompt_id == prompt_id) & (unsteered.seed == seed)]
            parts.append(_texts(texts, plain.text.iloc[0], settings["prompts"][prompt_id], seed, effect))
        parts.append("</details>")
    return "\n".join(parts)


def _texts(texts: "DataFrame", plain: str, prompt: str, seed: int, effect: str) -> str:
    columns = [kind for kind in (STEERED, RANDOM_DIRECTION, RANDOM_LATENT) if (texts.baseline == kind).any()]
    rows = []
    for strength, at in texts.groupby("strength", dropna=False, sort=True):
        cells = []
        for kind in columns:
            first = at[at.baseline == kind].head(1).to_dict("records")
            if not first:
                cells.append("<td></td>")
                continue
            row = first[0]
            control = f"latent {int(row['control'])}, " if kind == RANDOM_LATENT else ""
            figures = (
                f"{control}KL {_number(row['kl_text'])}, {shown(effect)} {_number(row[effect])}, "
                f"perplexity {_number(row['perplexity_ranked'])}, repetition {_number(row['repetition_4'])}"
            )
            cells.append(f'<td>{_continuation(row["text"], plain)}<div class="figures">{figures}</div></td>')
        rows.append(f'<tr><td class="number">{_number(strength)}</td>{"".join(cells)}</tr>')
    head = "".join(f"<th>{kind.replace('_', ' ')}</th>" for kind in columns)
    return (
        f"<details open><summary>Seed {int(seed)}: {text(prompt)}</summary>"
        f'<p class="prompt"><b>unsteered</b> {text(plain)}</p>'
        f"<table><tr><th>strength</th>{head}</tr>{''.join(rows)}</table></details>"
    )


def _svg(
    x_name: str, y_name: str, points: Sequence[tuple[float, float]], around: Sequence[tuple[float, float, float]]
) -> str:
    """A line through the points, over the band of the random directions."""
    finite = [(x, y) for x, y in points if math.isfinite(x) and math.isfinite(y)]
    if not finite:
        return ""
    heights = [y for _, y in finite] + [y for _, low, high in around for y in (low, high) if math.isfinite(y)] + [0.0]
    widths = [x for x, _ in finite]
    x_low, x_high, y_low, y_high = min(widths), max(widths), min(heights), max(heights)

    def at(x: float, y: float) -> str:
        return (f"{50 + 300 * (x - x_low) / ((x_high - x_low) or 1):.1f},"
                f"{180 - 160 * (y - y_low) / ((y_high - y_low) or 1):.1f}")  # fmt: skip

    def path(some: Iterable[tuple[float, float]]) -> str:
        return " ".join(at(x, y) for x, y in some)

    zone = [(x, low) for x, low, _ in around] + [(x, high) for x, _, high in reversed(around)]
    marks = "".join('<circle cx="{}" cy="{}" r="3" fill="#d62728"/>'.format(*at(x, y).split(",")) for x, y in finite)
    return (
        f'<svg viewBox="0 0 360 225" role="img" aria-label="{shown(y_name)} against {shown(x_name)}">'
        f'<polyline points="{path([(x_low, y_low), (x_high, y_low)])}" fill="none" stroke="currentColor" opacity=".4"/>'
        + (f'<polygon points="{path(zone)}" fill="#888" opacity=".25"/>' if zone else "")
        + f'<polyline points="{path(finite)}" fill="none" stroke="#d62728" stroke-width="1.5"/>{marks}'
        f'<text x="4" y="24">{y_high:.3g}</text><text x="4" y="184">{y_low:.3g}</text>'
        f'<text x="50" y="198">{x_low:.3g}</text><text x="350" y="198" text-anchor="end">{x_high:.3g}</text>'
        f'<text x="200" y="218" text-anchor="middle">{shown(x_name)}</text><text x="50" y="12">{shown(y_name)}</text></svg>'
    )
