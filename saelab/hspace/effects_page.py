"""The data of the page of `Effects.to_html`: what each direction does to samples, and the figures."""

from typing import TYPE_CHECKING, Any

from torch import Tensor

from saelab.hspace.effect_measures import CONTROLS
from saelab.hspace.pictures import picture
from saelab.pages.shell import report

if TYPE_CHECKING:
    from pandas import DataFrame, Series

    from saelab.hspace.reporting import Effects

MEASURES = ("p_target", "change_target", "off_target", "flip_rate", "confidence", "rms", "identity", "nearest")


def page(effects: "Effects", title: str) -> str:
    """The whole HTML."""
    most = float(max(effects.table.strength))
    matrix = effects.matrix(most)
    data = {
        "title": title, "strength": most, "classes": list(effects.classes), "changes": matrix.to_numpy().tolist(),
        "directions": [_direction(effects, name) for name in effects.images],
    }  # fmt: skip
    return report("hspace-directions", data)


def _direction(effects: "Effects", name: str) -> dict[str, Any]:
    strengths, images_SNCHW = effects.images[name]
    mine = effects.table[effects.table.direction == name]
    measure = "p_target" if mine.target.notna().any() else "rms"
    heads, rows = _figures(mine)
    return {
        "name": name, "strengths": strengths, "images": [_pictures(images) for images in images_SNCHW],
        "control": _control(effects, name), "measure": measure, "series": _series(mine, measure), "heads": heads, "rows": rows,
    }  # fmt: skip


def _pictures(images_NCHW: Tensor) -> list[str]:
    return [picture(image) for image in images_NCHW]


def _control(effects: "Effects", name: str) -> dict[str, Any] | None:
    """The pictures of a random direction at the strengths of the others, None at 0."""
    if name not in effects.control_images:
        return None
    kind, images = effects.control_images[name]
    return {"kind": kind, "images": [_pictures(images[s]) if s in images else None for s in effects.images[name][0]]}


def _series(mine: "DataFrame", measure: str) -> list[dict[str, Any]]:
    """The measure against strength, of the edit and of each control; at strength 0 a control is the edit: nothing."""
    zero = mine[(mine.kind == "edit") & (mine.strength == 0)][measure]
    series = []
    for kind, some in mine.groupby("kind", sort=False):
        means = some.groupby("strength")[measure].mean()
        points = list(means.items()) + [(0.0, value) for value in zero if kind != "edit"]
        series.append({"name": kind, "points": sorted(points)})
    return series


def _rank(kinds: "Series") -> "Series":
    return kinds.map({kind: rank for rank, kind in enumerate(("edit", *CONTROLS))})


def _figures(mine: "DataFrame") -> tuple[list[str], list[list[Any]]]:
    measures = [name for name in MEASURES if name in mine and mine[name].notna().any()]
    means = mine.groupby(["kind", "strength"])[measures].mean().reset_index()
    rows = means.sort_values("kind", key=_rank, kind="stable")
    return list(rows.columns), rows.to_numpy().tolist()
