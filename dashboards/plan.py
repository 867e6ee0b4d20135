"""Plan: what `build` was asked for, checked once."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from saelab.base import checks
from saelab.base.errors import ConfigError
from saelab.base.files import user_path
from saelab.base.protocols import Dictionary
from saelab.dashboards.collecting.examples import Layout
from saelab.dashboards.collecting.given import labels_of, sweep_rows
from saelab.dashboards.labels import Label
from saelab.dashboards.writing import bundle as bundles
from saelab.evaluation.report import Report

if TYPE_CHECKING:
    from saelab.models.language import LanguageModel

EFFECTS = ("direct", "full", None)


@dataclass(frozen=True)
class Plan:
    """The arguments of `build` as plain values; `build` says what each means."""

    saes: list[Dictionary]
    seeds: list[Dictionary]
    null: "LanguageModel | None"
    path: Path
    bundle: bool | None
    latents: int | Sequence[int] | None
    tokens: int
    layout: Layout
    effects: str | None
    labels: dict[int, Label]
    sweeps: dict[int, list[dict[str, Any]]]
    split: str
    parquet: bool
    title: str | None
    seed: int
    collecting: dict[str, Any]
    work: Path | None
    progress: bool

    @classmethod
    def of(cls, arguments: Mapping[str, Any]) -> "Plan":
        """From the arguments of a call. Raises as `build` for those that cannot be."""
        sae, compare, null, seeds, work = (arguments[name] for name in ("sae", "compare", "null", "seeds", "work"))
        checks.autoencoder("sae", sae), checks.maybe(checks.autoencoder, "compare", compare)
        seeds = [seeds] if hasattr(seeds, "W_dec") else list(seeds)
        for other in seeds:
            checks.autoencoder("one of seeds", other)
            if other.d_out != sae.d_out:
                raise ConfigError(f"an SAE of another seed gives vectors {other.d_out} wide, and this one {sae.d_out}: they "
                                  "cannot have the same latents")  # fmt: skip
        checks.language_model("lm", arguments["lm"]), checks.maybe(checks.language_model, "null", null)
        checks.choice("effects", arguments["effects"], EFFECTS)
        saes = [sae] if compare is None else [sae, compare]
        if arguments["effects"] is not None and any(one.cfg.per_token for one in saes):
            raise ConfigError("effects are those of a latent's decoder row times its code, and this SAE's codes are of vectors "
                              "normalised one by one: give effects=None")  # fmt: skip
        if not isinstance(arguments["evaluation"], Report):
            checks.choice("evaluation", arguments["evaluation"], (True, None))
        counts = {name: checks.count(name, arguments[name]) for name in ("tokens", "batch_tiles", "memory")}
        shards = checks.maybe(checks.count, "shards", arguments["shards"])
        path = user_path(arguments["path"])
        bundles.check(path, arguments["bundle"], arguments["parquet"])
        as_given = ("bundle", "latents", "effects", "split", "parquet", "title", "progress")
        return cls(
            saes=saes, seeds=seeds, null=null, path=path,
            tokens=counts.pop("tokens"), layout=Layout.of(arguments["windows"], arguments["window"]),
            labels=labels_of(arguments["labels"], sae.d_sae), sweeps=sweep_rows(arguments["sweeps"], sae.d_sae),
            seed=checks.seed(arguments["seed"]), work=None if work is None else user_path(work),
            collecting={"shards": shards, **counts, "progress": arguments["progress"]},
            **{name: arguments[name] for name in as_given},
        )  # fmt: skip
