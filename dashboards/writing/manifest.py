"""The manifest: what a page was made from, and what each of its SAEs is. `docs/dashboard-format.md`."""

import importlib.metadata
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict
from itertools import zip_longest
from typing import TYPE_CHECKING, Any

from saelab.base import digests
from saelab.dashboards.collecting.effects import FULL_CONTEXTS
from saelab.dashboards.collecting.one_pass import Reader
from saelab.dashboards.collecting.prompts import Prompt
from saelab.dashboards.plan import Plan
from saelab.dashboards.writing.chunks import DEAD, DENSE, DUPLICATE, PER_CHUNK, SEED_COSINE, SILENT, Part
from saelab.models.purpose import Purpose
from saelab.pages.packing import plain

if TYPE_CHECKING:
    from saelab.reading.corpus import Corpus


def manifest_of(
    parts: list[Part],
    reader: Reader,
    corpus: "Corpus",
    plan: Plan,
    prompts: Sequence[Prompt],
    evaluations: Sequence[Any],
) -> dict[str, Any]:
    part, lm = parts[0], reader.lm
    site = part.site.name
    return {
        "format": "saelab-dashboard",
        "version": 1,
        "title": plan.title or f"{part.sae.cfg!r} at {site} of {lm.name}",
        "versions": _versions(),
        "model": {"name": lm.name, "digest": lm.digest, "d_vocab": lm.d_vocab},
        "corpus": {
            "name": corpus.name, "digest": corpus.digest, "split": plan.split, "seed": corpus.seed,
            "contexts": reader.n_contexts, "context_length": reader.length, "tokens": reader.n_contexts * reader.length,
            "counted": part.collection.n_counted,
            "skip_positions": Purpose.of(part.sae).skip_positions,
            "norm_limit": plain(float(part.sae.state.norm_limit)),
        },
        "settings": {"tokens": plan.tokens, "windows": sum(part.layout.sizes), "window": part.layout.window,
                     "effects": plan.effects, "latents": len(part.pages), "seed": part.seed},
        "saes": [_described(one, parts, evaluation, plan) for one, evaluation in zip_longest(parts, evaluations)],
        "groups": part.layout.groups,
        "prompts": [
            {"chunk": f"p-{i:03d}", "text": prompt.text, "tokens": prompt.tokens.ids.shape[1], "prefix": ""}
            for i, prompt in enumerate(prompts)
        ],
        "coactivation": {"contexts": int(part.sample.sum())},
    }  # fmt: skip


def _described(part: Part, parts: list[Part], evaluation: Any, plan: Plan) -> dict[str, Any]:
    sae, collection, flags = part.sae, part.collection, part.flags
    rival = next((other for other in parts if other is not part), None)
    mode = plan.effects if plan.effects != "direct" or any(part._methods == 1) else "first-order"
    return {
        "prefix": part.prefix, "name": str(sae.metadata.get("name") or ("B" if part.prefix else "A")),
        "digest": digests.of_tensors(sae.state_dict()), "architecture": type(sae.cfg).__name__,
        "config": {key: plain(value) for key, value in sae.cfg.to_dict().items()},
        "site": part.site.name, "kind": part.site.kind, "d_in": sae.d_in, "d_sae": sae.d_sae, "pages": len(part.pages),
        "per_chunk": PER_CHUNK, "heads": part.target.heads, "firings": int(collection.counts.sum()), "l0": collection.l0,
        "explained_variance": plain(collection.explained_variance), "dead": int((flags & DEAD > 0).sum()),
        "silent": int((flags & SILENT > 0).sum()), "dense": int((flags & DENSE > 0).sum()),
        "duplicates": int((flags & DUPLICATE > 0).sum()),
        "evaluation": {key: plain(value) for key, value in asdict(evaluation).items()} if evaluation is not None else None,
        "effects": {"mode": mode, "rank_correlation": part.correlation, "n": part.full_pairs, "contexts": FULL_CONTEXTS}
        if plan.effects else None,
        "seeds": {"others": len(part.others), "threshold": SEED_COSINE} if part.others else None,
        "null": {"name": f"re-initialised {plan.null.name}", "l0": part.null.l0} if plan.null and part.null else None,
        "matches": rival.prefix if rival is not None and part.rival is not None else None,
    }  # fmt: skip


def _versions() -> dict[str, str]:
    found = {}
    for package in ("saelab", "torch", "transformers", "numpy"):
        with suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    return found
