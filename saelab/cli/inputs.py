"""What commands open before they are run: models, corpora, trained autoencoders."""

from typing import Any

import saelab
from saelab.base.errors import ConfigError
from saelab.base.files import user_path
from saelab.cli.commands import of
from saelab.cli.demonstration import demo
from saelab.models.language import load_model
from saelab.reading.corpus import load_corpus

MODEL, CORPUS = of(demo, "model"), of(demo, "corpus")
DEVICE, SEED = of(load_model, "device"), of(load_corpus, "seed")


def language(*, model: Any = MODEL, corpus: Any = CORPUS, device: Any = DEVICE, seed: Any = SEED) -> tuple[Any, Any]:
    """A model and a corpus."""
    return saelab.load_model(model, device=device), saelab.load_corpus(corpus, seed=seed)


def load(sae: str) -> "saelab.SAE":
    """The SAE of a run's folder or of a folder written by `SAE.save`.

    Args:
        sae: folder of a run or of a saved SAE
    """
    return saelab.SAE.load(sae) if (user_path(sae) / "cfg.json").exists() else saelab.load_run(sae).sae


def known(sae: Any, name: str, given: str | None) -> str:
    """What is given, or what the autoencoder says it was trained on."""
    value = given or sae.metadata.get(name)
    if value is None:
        raise ConfigError(f"this SAE does not say which {name} it was trained on: give --{name}")
    return value


SAE = of(load, "sae")


def trained(
    sae: str = SAE, *, model: str | None = None, corpus: str | None = None, device: Any = DEVICE
) -> tuple[Any, Any, Any]:
    """An SAE with the model and the corpus that it was trained on, unless others are given.

    Args:
        model: the model (default: the one it was trained on)
        corpus: the corpus (default: the one it was trained on)
    """
    found = load(sae)
    lm = saelab.load_model(known(found, "model", model), device=device)
    return found, lm, saelab.load_corpus(known(found, "corpus", corpus), seed=int(found.metadata.get("seed") or 0))


ITS_MODEL, ITS_CORPUS = of(trained, "model"), of(trained, "corpus")
