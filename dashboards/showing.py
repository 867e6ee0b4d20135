"""Dashboards of what is at hand: of a run, or of one latent in a notebook. Model and corpus are those of the training
unless given."""

import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from saelab.base import checks
from saelab.base.errors import ConfigError, DataError
from saelab.base.protocols import Dictionary
from saelab.dashboards.assembly import build
from saelab.dashboards.result import Dashboard
from saelab.models.language import load_model
from saelab.reading.corpus import load_corpus

if TYPE_CHECKING:
    from saelab.models.language import LanguageModel
    from saelab.reading.corpus import Corpus

SHOWN_TOKENS = 50_000
PAGES = 4_096  # about 20 MB and a few processor seconds: every live latent of most SAEs


def show(
    sae: Dictionary,
    latents: int | Sequence[int],
    lm: Any = None,
    corpus: Any = None,
    tokens: int = SHOWN_TOKENS,
    **options: Any,
) -> Dashboard:
    """A page of one latent or of a few, in a temporary folder that goes with the process; see `SAE.show`."""
    wanted = checks.counts("latents", latents, least=0)
    options = {"effects": None, "evaluation": None, "parquet": False, **options}
    lm, corpus = sources(sae, lm, corpus)
    return build(sae, lm, corpus, _temporary(), latents=wanted, tokens=tokens, **options)


def of_run(
    run: Any, path: str | os.PathLike[str] | None = None, lm: Any = None, corpus: Any = None, **options: Any
) -> Dashboard:
    """The dashboard of a run's SAE, `dashboard.html` in its folder unless `path`; see `Run.dashboard`."""
    lm, corpus = sources(run.sae, lm, corpus)
    where = path or (run.path / "dashboard.html" if run.path is not None else _temporary())
    return build(run.sae, lm, corpus, where, **{"latents": PAGES, **options})


def sources(sae: Dictionary, lm: Any = None, corpus: Any = None) -> "tuple[LanguageModel, Corpus]":
    """Model and corpus: as given (objects or names), else those named in the SAE's metadata.

    Raises `ConfigError` where the metadata name none, or what has that name is no longer what the SAE was trained on.
    """
    loaded_lm = load_model(_named(sae, "model") if lm is None else lm)
    if lm is None and sae.metadata.get("model_digest") not in (None, loaded_lm.digest):
        raise ConfigError(f"the model {loaded_lm.name!r} is not the one that this SAE was trained on: give lm=")
    seed = int(sae.metadata.get("seed") or 0)
    try:
        loaded = load_corpus(_named(sae, "corpus") if corpus is None else corpus, seed=seed)
    except DataError as error:
        raise ConfigError(
            f"the corpus {sae.metadata.get('corpus')!r} cannot be read by that name: give corpus= ({error})"
        ) from error
    if corpus is None and sae.metadata.get("corpus_digest") not in (None, loaded.digest):
        raise ConfigError(f"the corpus {loaded.name!r} is not the one that this SAE was trained on: give corpus=")
    return loaded_lm, loaded


def _named(sae: Dictionary, what: str) -> str:
    name = sae.metadata.get(what)
    if name is None:
        raise ConfigError(
            f"this SAE does not say which {what} it was trained on: give {'lm' if what == 'model' else what}="
        )
    return str(name)


def _temporary() -> Path:
    folder = tempfile.TemporaryDirectory(prefix="saelab-dashboard-")
    _KEPT.append(folder)
    return Path(folder.name) / "dashboard.html"


_KEPT: list[tempfile.TemporaryDirectory[str]] = []  # removed when the process ends
