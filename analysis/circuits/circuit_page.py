"""The page of a circuit (`saelab.analysis.circuits.circuit`): the graph, one node's particulars, a table; one file, no network.

It is made of the dashboards' own parts under their policy. The graph is in the page as base64 of JSON: no string of a text can
end an element, and strings reach the page as text nodes only.
"""

import base64
import json
import re
from collections.abc import Mapping
from typing import Any

from saelab.base.errors import ConfigError
from saelab.pages.shell import shell

_SCHEME = re.compile(r"[a-zA-Z][a-zA-Z0-9+.-]*:")
_HARMLESS = ("file:", "http:", "https:")


def page(circuit: Mapping[str, Any], pages: Mapping[str, str]) -> str:
    """The page of a circuit (`Circuit.to_dict`), with links to the dashboards of its SAEs by site.

    Raises `ConfigError` for a site that no SAE of the circuit has, and for an address that is neither relative nor file:,
    http: or https:.
    """
    saes = [{**sae, "page": _address(pages.get(sae["site"]))} for sae in circuit["saes"]]
    if unknown := sorted(set(pages) - {sae["site"] for sae in saes}):
        raise ConfigError(
            f"pages names {', '.join(unknown)}, and the SAEs here are of {', '.join(s['site'] for s in saes)}"
        )
    text = json.dumps({**circuit, "saes": saes}, allow_nan=False)
    data = base64.b64encode(text.encode()).decode()
    return "".join(shell([("circuit", data)], "circuit"))


def _address(address: str | None) -> str | None:
    # browsers drop these from an address before they read its scheme
    plain = re.sub(r"[\x00-\x20]", "", address or "")
    found = _SCHEME.match(plain)
    if found and found[0].lower() not in _HARMLESS:
        raise ConfigError(
            f"{address!r} is no address of a page: give one relative to the circuit's, file:, http: or https:"
        )
    return address
