"""`saelab dashboard`: the page of an autoencoder's latents."""

from typing import Annotated, Any

import saelab
from saelab.base.errors import ConfigError
from saelab.cli.commands import command
from saelab.cli.inputs import DEVICE, ITS_CORPUS, ITS_MODEL, SAE, load
from saelab.cli.values import File, whole
from saelab.dashboards import assembly
from saelab.dashboards.showing import PAGES, sources


def latents(text: str) -> Any:
    """A count, "all", or a list as in "3,17,123".

    >>> latents("512"), latents("all"), latents("3,17")
    (512, None, [3, 17])
    """
    if text.lower() == "all":
        return None
    try:
        return [int(part) for part in text.split(",") if part.strip()] if "," in text else whole(text)
    except ValueError:
        raise ConfigError(f"{text!r} is not a whole number, a list as in 3,17,123 or all") from None


@command(assembly.build, without="lm path evaluation seeds null sweeps")
def dashboard(
    sae: str = SAE, *, out: str = "dashboard.html", model: Any = ITS_MODEL, corpus: Any = ITS_CORPUS, device: Any = DEVICE,
    latents: Annotated[Any, latents] = PAGES, compare: str | None = None, neuronpedia: File | None = None,
    memory: float | None = 1.0, **how: Any,
) -> int:  # fmt: skip
    """Load, build, say where the page is.

    Args:
        out: the page: a single file where it ends in .html, else a folder
        latents: how many live latents get a page at most, a list as in 3,17,123, or all
        compare: folder of a second SAE to compare with
        neuronpedia: also write Neuronpedia's JSON to this file
        memory: GiB that collecting may take

    Examples:
        saelab dashboard runs/demo --out features.html
        saelab dashboard runs/demo --latents all --effects none --out features/
        saelab dashboard runs/demo --latents 3,17,123 --effects full \\
                         --prompts 'The state of the union'
    """
    read = load(sae)
    lm = saelab.load_model(model or read.metadata.get("model") or "smollm2-135m", device=device)
    lm, text = sources(read, lm, corpus)
    page = saelab.dashboards.build(
        read.to(lm.device), lm, text, out, latents=latents, compare=load(compare).to(lm.device) if compare else None,
        memory=2**60 if memory is None else int(memory * 2**30), **how,
    )  # fmt: skip
    print(f"{page.path}: open it in a browser")
    if neuronpedia:
        print(f"{page.to_neuronpedia(neuronpedia)}: for Neuronpedia")
    return 0
