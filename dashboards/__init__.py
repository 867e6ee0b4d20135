"""HTML feature dashboards, imported as `saelab.dashboards`: `build` makes one, a `Dashboard`.

`docs/dashboard-format.md` describes what a page holds.
"""

from typing import TYPE_CHECKING

from saelab.base.lazy import lazily

_PUBLIC = {
    "build": "saelab.dashboards.assembly",
    "Dashboard": "saelab.dashboards.result",
    "Label": "saelab.dashboards.labels",
    "read_labels": "saelab.dashboards.labels",
    "write_labels": "saelab.dashboards.labels",
}

__all__ = sorted(_PUBLIC)


__getattr__, __dir__ = lazily(globals(), _PUBLIC)


if TYPE_CHECKING:
    from saelab.dashboards.assembly import build as build
    from saelab.dashboards.labels import Label as Label
    from saelab.dashboards.labels import read_labels as read_labels
    from saelab.dashboards.labels import write_labels as write_labels
    from saelab.dashboards.result import Dashboard as Dashboard
