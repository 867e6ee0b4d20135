"""The page of a circuit (`saelab.analysis.circuits.circuit`): the graph, one node's particulars, a table; one file, no network.

Addresses of dashboards are checked here, and once more where they are shown.
"""

import re
from collections.abc import Mapping
from typing import Any

from saelab.base.errors import ConfigError
from saelab.pages.shell import report

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
    return report("circuit", {**circuit, "saes": saes})


def _address(address: str | None) -> str | None:
    # browsers drop these from an address before they read its scheme
    plain = re.sub(r"[\x00-\x20]", "", address or "")
    found = _SCHEME.match(plain)
    if found and found[0].lower() not in _HARMLESS:
        raise ConfigError(
            f"{address!r} is no address of a page: give one relative to the circuit's, file:, http: or https:"
        )
    return address
