"""The page of `Effects.to_html`: what each direction does to samples, with a slider of strengths, and the figures."""

from typing import TYPE_CHECKING

from saelab.hspace.effect_measures import CONTROLS
from saelab.hspace.image_pages import document, lines_svg, matrix, picture, shown, table

if TYPE_CHECKING:
    from pandas import DataFrame, Series

    from saelab.hspace.reporting import Effects

LARGE = 4
FIGURES = (
    "Flip rate: share of samples whose most probable class changes. Off target: mean absolute change of the other classes' "
    "probabilities. Confidence: the largest probability, a proxy of quality. Identity: distance to the same sample unedited in "
    "the classifier's feature space; 1 is as far as another sample. To data: distance to the nearest real image, over that "
    "before the edit."
)
MEASURES = ("p_target", "change_target", "off_target", "flip_rate", "confidence", "rms", "identity", "nearest")
WORDS = {"p_target": "P(target)", "change_target": "its change", "off_target": "off target", "flip_rate": "flip rate",
         "rms": "pixel rms", "nearest": "to data"}  # fmt: skip


def page(effects: "Effects", title: str) -> str:
    """The whole HTML."""
    most = max(effects.table.strength)
    body = [
        '<p class="lead">Each direction is added to the bottleneck of the denoiser at every step of the same trajectories. '
        "Strengths are in units of the direction's scale. Random controls are as long as the direction at each step: "
        "isotropic ones point anywhere, covariance-matched ones where the bottleneck varies.</p>",
        f"<h2>Change of each class's mean probability at strength {most:g}</h2>",
        _matrix(effects, most),
        *(_direction(effects, name, number) for number, name in enumerate(effects.images)),
        "<h2>What the figures are</h2>",
        f'<p class="lead">{FIGURES}</p>',
    ]
    return document(title, body, "gallery.js")


def _matrix(effects: "Effects", strength: float) -> str:
    found = effects.matrix(strength)
    return matrix(
        "direction",
        [str(name) for name in found.index],
        [str(name) for name in found.columns],
        found.to_numpy().tolist(),
    )


def _direction(effects: "Effects", name: str, number: int) -> str:
    strengths, images_SNCHW = effects.images[name]
    start = min(range(len(strengths)), key=lambda i: abs(strengths[i]))
    head = "".join(f"<th>{s:g}</th>" for s in strengths)
    rows = [
        "<tr>"
        + "".join(
            f'<td data-at="{at}" data-strength="{s:g}">{picture(images_SNCHW[at, n], f"sample {n} at strength {s:g}")}</td>'
            for at, s in enumerate(strengths)
        )
        + "</tr>"
        for n in range(images_SNCHW.shape[1])
    ]
    large = "".join(
        picture(images_SNCHW[start, n], f"sample {n}", "large") for n in range(min(LARGE, images_SNCHW.shape[1]))
    )
    mine = effects.table[effects.table.direction == name]
    slider = (
        f'<div class="slider" hidden><label for="strength-{number}">strength</label><input id="strength-{number}" type="range" '
        f'min="0" max="{len(strengths) - 1}" step="1" value="{start}"><output for="strength-{number}"></output></div>'
    )
    return (
        f'<section class="direction"><h2>{shown(name)}</h2><div class="side"><div>{slider}<div class="strip">{large}</div>'
        f'<h3>Samples at each strength</h3><div class="wide"><table class="pictures">'
        f"<tr>{head}</tr>{''.join(rows)}</table></div></div>"
        f"<div>{_curve(mine)}{_figures(mine)}</div></div></section>"
    )


def _curve(mine: "DataFrame") -> str:
    """The target's probability, or the change of the pixels, against strength; the controls beside it."""
    measure = "p_target" if mine.target.notna().any() else "rms"
    zero = mine[(mine.kind == "edit") & (mine.strength == 0)]
    series = []
    for kind, some in mine.groupby("kind", sort=False):
        points = _means(some, measure) + [(0.0, float(v)) for v in zero[measure] if kind != "edit"]
        series.append((str(kind), sorted(points)))
    words = "mean probability of the target" if measure == "p_target" else "pixel rms"
    return f"<h3>{words.capitalize()}</h3>" + lines_svg("strength", words, series)


def _means(some: "DataFrame", measure: str) -> list[tuple[float, float]]:
    means = some.groupby("strength")[measure].mean()
    return list(zip(means.index.tolist(), means.tolist(), strict=True))


def _rank(kinds: "Series") -> "Series":
    return kinds.map({kind: rank for rank, kind in enumerate(("edit", *CONTROLS))})


def _figures(mine: "DataFrame") -> str:
    measures = [name for name in MEASURES if name in mine and mine[name].notna().any()]
    rows = (
        mine.groupby(["kind", "strength"])[measures].mean().reset_index().sort_values("kind", key=_rank, kind="stable")
    )
    lines = [
        [row.kind, f"{row.strength:g}", *(float(getattr(row, name)) for name in measures)] for row in rows.itertuples()
    ]
    return table(["kind", "strength", *(WORDS.get(name, name) for name in measures)], lines)
