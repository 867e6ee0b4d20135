"""Compares `saelab/interop/releases.json` with SAELens' table of pretrained SAEs, entry by entry.

    pip download --no-deps 'sae-lens==6.54.*' && unzip -p sae_lens-*.whl sae_lens/pretrained_saes.yaml > table.yaml
    python benchmarks/check_releases.py table.yaml

Prints how many of its SAEs saelab knows by the same release and id and finds at the same place, and each that it does not.
Exit code 1 where a place, a scale or the centring differs. Models are compared by the last part of their names, in lower case.
"""

import argparse
import re
import sys
from collections import Counter

import yaml

from saelab.base.errors import ConfigError
from saelab.interop.releases import names, release_of


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("table", help="pretrained_saes.yaml of sae-lens")
    with open(parser.parse_args().table) as file:
        theirs = yaml.load(file, getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    count: Counter[str] = Counter()
    models: dict[str, str] = {}
    for name, release in theirs.items():
        overrides = release.get("config_overrides") or {}
        centred = (overrides.get("model_from_pretrained_kwargs") or {}).get("center_writing_weights")
        for sae in release["saes"]:
            what = compare(name, release, sae, bool(centred), models)
            count[what] += 1
            if what not in ("the same", "refused"):
                print(f"{name} {sae['id']}: {what}")
    print(f"{sum(count.values()):,} SAEs in {len(theirs)} releases of SAELens: "
          + ", ".join(f"{n:,} {what}" for what, n in count.most_common()))  # fmt: skip
    for said, ours in sorted(models.items()):
        print(f"  the model {said} is {ours} here")
    print(f"{len(names())} releases here, of which SAELens has not: {', '.join(sorted(set(names()) - set(theirs)))}")
    return 1 if set(count) - {"the same", "refused"} else 0


def compare(name: str, release: dict, sae: dict, centred: bool, models: dict[str, str]) -> str:
    try:
        entry = release_of(name, str(sae["id"]))
    except ConfigError as error:
        return "refused" if "no architecture" in str(error) else "not known by its id"
    if entry is None:
        return "not known by its release"
    if (entry.repository, entry.path) != (release["repo_id"], str(sae["path"])):
        return f"{entry.repository} {entry.path}, not {release['repo_id']} {sae['path']}"
    if entry.model.rpartition("/")[2].lower() != str(release["model"]).rpartition("/")[2].lower():
        models[release["model"]] = entry.model
    if entry.normalised != (release.get("config_overrides") or {}).get("normalize_activations"):
        return f"normalised is {entry.normalised}"
    if bool(entry.centred) != centred:
        return "centring differs"
    scale = sae.get("norm_scaling_factor")
    if entry.input_scale != scale and not re.match("llama_scope_lx", name):  # whose files have it
        return f"input_scale is {entry.input_scale}, not {scale}"
    return "the same"


if __name__ == "__main__":
    sys.exit(main())
