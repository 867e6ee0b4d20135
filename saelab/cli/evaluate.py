"""`saelab evaluate`: what a trained autoencoder loses on held-out text."""

from typing import Any

import saelab
from saelab.base.errors import ConfigError
from saelab.base.files import user_path, write_csv
from saelab.cli.options import DEVICE, ITS_CONTEXT_LENGTH, ITS_PREPEND_BOS, REQUIRED, Command, Of, Option, positive

EVALUATE = "saelab.evaluation.fidelity:evaluate"
OPTIONS = (
    Option("sae", str, REQUIRED, "folder of a run or of a saved SAE", positional=True),
    Option("model", str, None, "the model (default: the one it was trained on)"),
    Option("corpus", str, None, "the corpus (default: the one it was trained on)"),
    Option("site", str, None, "the site (default: the one it was trained on)"),
    Option("tokens", positive, Of(EVALUATE, "tokens"), "tokens for cross-entropy and reconstruction"),
    Option("sparsity-tokens", positive, Of(EVALUATE, "sparsity_tokens"), "tokens for the share of dead latents"),
    ITS_CONTEXT_LENGTH,
    ITS_PREPEND_BOS,
    Option("selection", str, Of(EVALUATE, "selection"), "how a g-SAE chooses: plain, grad_model or grad_true"),
    DEVICE,
    Option("csv", str, None, "also write the table to this file", written=True),
)


def run(values: dict[str, Any]) -> int:
    """Load, evaluate on the held-out split, print the table."""
    sae = load(values["sae"])
    seed = int(sae.metadata.get("seed") or 0)
    lm = saelab.load_model(known(values, sae, "model"), device=values["device"])
    corpus = saelab.load_corpus(known(values, sae, "corpus"), seed=seed)
    report = saelab.evaluate(
        sae, lm, corpus,
        **{
            name: values[name]
            for name in ("site", "tokens", "sparsity_tokens", "context_length", "prepend_bos", "selection")
        },
    )  # fmt: skip
    print(repr(sae))
    print(repr(report))
    if values["csv"]:
        write_csv(values["csv"], report.to_pandas())
    return 0


def load(path: str) -> "saelab.SAE":
    """The SAE of a run's folder or of a folder written by `SAE.save`."""
    return saelab.SAE.load(path) if (user_path(path) / "cfg.json").exists() else saelab.load_run(path).sae


def known(values: dict[str, Any], sae: Any, name: str) -> str:
    """The option, or what the autoencoder says it was trained on."""
    value = values[name] or sae.metadata.get(name)
    if value is None:
        raise ConfigError(f"this SAE does not say which {name} it was trained on: give --{name}")
    return value


COMMAND = Command(
    name="evaluate",
    summary="Evaluate a trained autoencoder on held-out text: reconstruction, sparsity, cross-entropy, KL.",
    examples=("saelab evaluate runs/demo", "saelab evaluate my-sae --tokens 32_768 --csv table.csv"),
    options=OPTIONS,
    run=run,
)
