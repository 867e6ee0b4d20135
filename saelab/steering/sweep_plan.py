"""SweepPlan: what `steering.sweep` was asked for, checked once."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from saelab.base import checks
from saelab.base.errors import ConfigError
from saelab.base.protocols import Dictionary
from saelab.models.identity import refuse_interventions, weights_digest
from saelab.models.purpose import Purpose, fitting
from saelab.models.sites import Site
from saelab.models.texts import given
from saelab.reading.corpus import Corpus, load_corpus
from saelab.steering import grid
from saelab.steering.grid import NONE, Cell

if TYPE_CHECKING:
    from saelab.models.language import LanguageModel


@dataclass(frozen=True)
class SweepPlan:
    """The arguments of `sweep` as plain values (`sweep` says what each means), prompts as ids, sites found in the model."""

    latents: list[int]
    operations: list[str]
    strengths: list[float]
    prompts: list[list[int]]
    seeds: list[int]
    scope: str
    baselines: Sequence[str]
    max_new_tokens: int
    unit: str | None
    draws: int
    temperature: float
    site: Site
    later: Site | None
    corpus: Corpus | None
    batch_size: int

    @classmethod
    def of(cls, arguments: Mapping[str, Any]) -> "SweepPlan":
        """From the arguments of a call. Raises `ConfigError` for those that cannot be."""
        from saelab.steering.scope import Scope

        lm, sae, operations, strengths, corpus, unit = (
            arguments[name] for name in ("lm", "sae", "operations", "strengths", "corpus", "unit")
        )
        checks.language_model("lm", lm), checks.autoencoder("sae", sae)
        most = sae.d_sae - 1
        latents = checks.counts("latents", arguments["latents"], least=0, most=most, of="the autoencoder's latents")
        operations = [operations] if isinstance(operations, str) else list(operations)
        prompts = _prompt_ids(lm, sae, arguments["prompts"], arguments["prepend_bos"])
        corpus = None if corpus is None else load_corpus(corpus)
        strengths = [strengths] if isinstance(strengths, (int, float)) else strengths
        strengths = [checks.number("a strength", strength) for strength in strengths]
        seeds = checks.counts("seeds", arguments["seeds"], least=0, most=checks.LARGEST_SEED)
        counts = {name: checks.count(name, arguments[name]) for name in ("draws", "batch_size", "max_new_tokens")}
        temperature = checks.number("temperature", arguments["temperature"], least=0)
        _check(latents, operations, strengths, prompts, seeds, arguments["baselines"])
        site, later = _places(lm, sae, arguments["site"], arguments["later_site"])
        unit = _resolved_unit(sae, latents, operations, unit, site.name)
        if arguments["out"] is not None:
            refuse_interventions(lm, f"the sweep in {arguments['out']}")
        return cls(
            latents=latents, operations=operations, strengths=strengths, prompts=prompts, seeds=seeds,
            scope=repr(arguments["scope"] or Scope()), baselines=arguments["baselines"], unit=unit, temperature=temperature,
            site=site, later=later, corpus=corpus, **counts,
        )  # fmt: skip

    def cells(self, controls: grid.Controls) -> list[Cell]:
        """The whole grid."""
        return grid.cells(self.latents, self.operations, self.strengths, len(self.prompts), self.seeds, self.baselines,
                          self.draws, controls)  # fmt: skip

    def settings(self, lm: "LanguageModel", sae: Dictionary, texts: int) -> dict[str, Any]:
        """What a folder says that it holds: another sweep is refused by it."""
        names = "latents operations strengths unit seeds scope draws max_new_tokens temperature".split()
        return {
            "model": lm.name,
            "model_digest": lm.digest,
            "sae_digest": weights_digest(sae),
            "site": self.site.name,
            "later_site": self.later.name if self.later else None,
            "prompts": [str(row) if lm.tokenizer is None else lm.tokenizer.decode(row) for row in self.prompts],
            "prompt_ids": self.prompts,
            "baselines": sorted({*self.baselines, NONE}),
            "corpus": None if self.corpus is None else self.corpus.digest,
            "texts": texts,
            **{name: getattr(self, name) for name in names},
        }


def _prompt_ids(lm: "LanguageModel", sae: Dictionary, prompts: Any, prepend_bos: bool | None) -> list[list[int]]:
    found = given(prompts)
    if found.single or found.texts == []:
        raise ConfigError(f"prompts is {prompts!r}: give a list with at least one text")
    return lm.tokens_for(sae, found, prepend_bos).rows()


def _check(
    latents: list[int], operations: list[str], strengths: list[float], prompts: list[list[int]], seeds: list[int],
    baselines: Sequence[str],
) -> None:  # fmt: skip
    for name, values in (("latents", latents), ("operations", operations), ("prompts", prompts), ("seeds", seeds)):
        if not values:
            raise ConfigError(f"{name} is empty: give at least one")
        if len({str(value) for value in values}) < len(values):
            raise ConfigError(f"{name} has one twice: {values!r}")
    wrong = [name for name in operations if name not in grid.OPERATIONS]
    if wrong:
        raise ConfigError(f"operations {wrong} are not among {', '.join(grid.OPERATIONS)}")
    wrong = [name for name in baselines if name not in grid.BASELINES]
    if wrong:
        raise ConfigError(f"baselines {wrong} are not among {', '.join(grid.BASELINES)}")
    if not strengths and set(operations) & set(grid.WITH_STRENGTH):
        raise ConfigError(f"strengths is empty, and {', '.join(operations)} need at least one")


def _places(lm: "LanguageModel", sae: Dictionary, site: str | None, later_site: str | None) -> tuple[Site, Site | None]:
    """Where the sweep reads and writes, and where it encodes again."""
    purpose = Purpose.of(sae, site)
    if purpose.target_site not in (None, sae.metadata.get("site")):
        raise ConfigError("a sweep reads and writes at one site, and this is a transcoder: steer with lm.steer instead")
    place = purpose.source(lm)
    later = lm.site(later_site) if later_site else _next_residual(lm, place)
    if later is not None:
        fitting(later, sae.d_in, "input")
    return place, later


def _next_residual(lm: "LanguageModel", site: Site) -> Site | None:
    match = re.fullmatch(r"blocks\.(\d+)\.hook_resid_\w+", site.name)
    following = f"blocks.{int(match[1]) + 1}.hook_resid_post" if match else ""
    return lm.site(following) if following in lm.backend.named else None


def _resolved_unit(
    sae: Dictionary, latents: Sequence[int], operations: Sequence[str], unit: str | None, site: str
) -> str | None:
    """The unit that the operations end up with. Raises `ConfigError` for a dead latent or a missing figure, before the
    work begins."""
    from saelab.steering import add, unit_size

    made = [add(sae, latent, strength=1.0, unit=unit, site=site) for latent in latents]
    if not set(operations) & set(grid.WITH_UNIT):
        return None
    for one in made:
        unit_size(one)
    return made[0].unit
