"""`saelab dashboard`: the page of an autoencoder's latents."""

from typing import Any

import saelab
from saelab.base.errors import ConfigError
from saelab.cli.evaluate import load
from saelab.cli.options import (
    DEVICE,
    ITS_CONTEXT_LENGTH,
    ITS_PREPEND_BOS,
    REQUIRED,
    Command,
    Of,
    Option,
    limit,
    positive,
)


def effects(text: str) -> str | None:
    """ "direct", "full", or "none" for none."""
    if text.lower() not in ("direct", "full", "none"):
        raise ConfigError(f"{text!r}: choose direct, full or none")
    return None if text.lower() == "none" else text.lower()


def latents(text: str) -> Any:
    """A count, "all", or a list as in "3,17,123".

    >>> latents("512"), latents("all"), latents("3,17")
    (512, None, [3, 17])
    """
    if text.lower() == "all":
        return None
    if "," in text:
        return [int(part) for part in text.split(",") if part.strip()]
    return positive(text)


BUILD = "saelab.dashboards.assembly:build"
OPTIONS = (
    Option("sae", str, REQUIRED, "folder of a run or of a saved SAE", positional=True),
    Option("out", str, "dashboard.html", "the page: a single file where it ends in .html, else a folder"),
    Option("model", str, None, "the model (default: the one it was trained on)"),
    Option("corpus", str, None, "the corpus (default: the one it was trained on)"),
    Option("latents", latents, 512, "how many latents get a page, a list as in 3,17,123, or all"),
    Option("tokens", positive, Of(BUILD, "tokens"), "tokens of the corpus to read"),
    Option("windows", positive, Of(BUILD, "windows"), "examples a latent"),
    Option("window", positive, Of(BUILD, "window"), "tokens an example"),
    Option("effects", effects, Of(BUILD, "effects"), "effects of ablation: direct, full or none (the quickest by far)"),
    ITS_CONTEXT_LENGTH,
    ITS_PREPEND_BOS,
    Option("prompts", str, Of(BUILD, "prompts"), "texts that get a page of their own", many=True),
    Option("labels", str, None, "JSON file of labels by latent"),
    Option("compare", str, None, "folder of a second SAE to compare with"),
    Option("neuronpedia", str, None, "also write Neuronpedia's JSON to this file", written=True),
    Option("memory", limit, 1.0, "GiB that collecting may take, or none"),
    DEVICE,
)


def run(values: dict[str, Any]) -> int:
    """Load, build, say where the page is."""
    from saelab.dashboards.showing import sources

    sae = load(values.pop("sae"))
    lm_name, corpus_name, device = values.pop("model"), values.pop("corpus"), values.pop("device")
    lm = saelab.load_model(lm_name or sae.metadata.get("model") or "smollm2-135m", device=device)
    lm, corpus = sources(sae, lm, corpus_name)
    rival, export, memory = values.pop("compare"), values.pop("neuronpedia"), values.pop("memory")
    page = saelab.dashboards.build(
        sae.to(lm.device), lm, corpus, values.pop("out"), compare=load(rival).to(lm.device) if rival else None,
        memory=2**60 if memory is None else int(memory * 2**30), **values,
    )  # fmt: skip
    print(f"{page.path}: open it in a browser")
    if export:
        print(f"{page.to_neuronpedia(export)}: for Neuronpedia")
    return 0


COMMAND = Command(
    name="dashboard",
    summary="Make a dashboard of an autoencoder's latents: one HTML file, or a folder, that opens anywhere.",
    examples=(
        "saelab dashboard runs/demo --out features.html",
        "saelab dashboard runs/demo --latents all --effects none --out features/",
        "saelab dashboard runs/demo --latents 3,17,123 --effects full --prompts 'The state of the union'",
    ),
    options=OPTIONS,
    run=run,
)
