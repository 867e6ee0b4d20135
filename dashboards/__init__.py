"""HTML feature dashboards, imported as `saelab.dashboards`: `build` makes one, a `Dashboard`.

`docs/dashboard-format.md` describes what a page holds.
"""

import importlib
from typing import TYPE_CHECKING, Any

_PUBLIC = {
    "build": "saelab.dashboards.assembly",
    "Dashboard": "saelab.dashboards.dashboard",
}

__all__ = sorted(_PUBLIC)


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'saelab.dashboards' has no attribute {name!r}")
    value = getattr(importlib.import_module(_PUBLIC[name]), name)
    globals()[name] = value
    return value


if TYPE_CHECKING:
    from saelab.dashboards.assembly import build as build
    from saelab.dashboards.dashboard import Dashboard as Dashboard
