"""The well-known releases: what a name and the number of an SAE mean, from `releases.json`.

A release has a `repository` and the `model`; `paths` from patterns of ids to those of paths (`{id}` is the whole, another
letter a number; without, an id is a path), single `named` ones, and Gemma Scope's `canonical` choice of an L0 by width and
layer. `centred` says that the model's writing weights were centred, `input_scale` by what the input was multiplied and
`normalised` how each vector was by itself where the files do not, `refused` what saelab has no architecture for.
`benchmarks/check_releases.py` compares with SAELens' table.
"""

import difflib
import json
import re
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any

from saelab.base.errors import ConfigError
from saelab.interop.given import Given


@dataclass(frozen=True)
class Entry:
    """One SAE of a release: where it is, and what its files do not say."""

    repository: str
    path: str
    model: str
    revision: str | None = None
    site: str | None = None
    input_scale: float | None = None
    normalised: str | None = None
    centred: bool | None = None

    def adding_to(self, given: Given) -> Given:
        """What the caller gave, and what the release knows beside."""
        return Given(
            given.site or self.site,
            given.target_site,
            given.model or self.model,
            given.k,
            self.input_scale,
            self.normalised,
            self.centred,
        )


def names() -> list[str]:
    """The releases that are known by name.

    >>> "gemma-scope-2b-pt-res" in names()
    True
    """
    return list(_table())


def release_of(name: str, sae_id: str | None) -> Entry | None:
    """The SAE that a release and id mean; None where no release has this name.

    Raises `ConfigError` for an id that is none of the release, or missing, and for what saelab has no architecture for.

    >>> release_of("gemma-scope-2b-pt-res", "layer_12/width_16k/canonical").path
    'layer_12/width_16k/average_l0_82'
    """
    found = _table().get(name) or _table().get(name.removesuffix("-canonical"))
    if found is None:
        if "/" not in name and (near := difflib.get_close_matches(name, names(), 3, 0.7)):
            raise ConfigError(f"{name!r} is no release that is known by name; near it: {', '.join(near)}")
        return None
    if "refused" in found:
        raise ConfigError(f"{name} has {found['refused']}, which saelab has no architecture for")
    if sae_id is None:
        raise ConfigError(f"which SAE of {name}? Give sae_id, such as {_example(found)!r}")
    path = _path(found, sae_id)
    if path is None:
        raise ConfigError(f"{name} has no {sae_id!r}: an id of it is {_example(found)!r}")
    known = {field: found.get(field) for field in ("revision", "site", "normalised", "centred")}
    return Entry(
        found["repository"], path, found["model"], input_scale=found.get("input_scale", {}).get(sae_id), **known
    )


@cache
def _table() -> dict[str, Any]:
    table: dict[str, Any] = json.loads(files("saelab.interop").joinpath("releases.json").read_text())
    return table


def _path(release: dict[str, Any], sae_id: str) -> str | None:
    if sae_id in release.get("named", {}):
        return str(release["named"][sae_id])
    if choice := re.fullmatch(r"layer_(\d+)/(width_\w+)/canonical", sae_id):
        l0 = release.get("canonical", {}).get(choice[2], {}).get(choice[1])
        return f"layer_{choice[1]}/{choice[2]}/average_l0_{l0}" if l0 is not None else None
    patterns = release.get("paths", {} if "named" in release and "canonical" not in release else {"{id}": "{id}"})
    for pattern, path in patterns.items():
        expression = re.escape(pattern).replace(r"\{id\}", "(?P<id>.+)")
        if found := re.fullmatch(re.sub(r"\\\{(\w)\\\}", r"(?P<\1>[0-9]+)", expression), sae_id):
            return re.sub(r"\{(\w+)\}", lambda m: found[m[1]], path)  # noqa: B023 (used at once)
    return None


def _example(release: dict[str, Any]) -> str:
    if "canonical" in release:
        width, layers = next(iter(release["canonical"].items()))
        return f"layer_{next(iter(layers))}/{width}/canonical"
    if "named" in release:
        return str(next(iter(release["named"])))
    pattern = next(iter(release.get("paths", {"{id}": ""})))
    return "a path in its repository" if pattern == "{id}" else re.sub(r"\{\w\}", "0", pattern)
