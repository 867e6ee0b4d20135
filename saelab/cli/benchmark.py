"""`saelab benchmark`: what the latents of autoencoders are good for."""

from collections.abc import Sequence
from typing import Any

import saelab
from saelab.base.files import write_csv
from saelab.cli.commands import command
from saelab.cli.inputs import DEVICE, known, load
from saelab.cli.values import File
from saelab.evaluation import benchmarking


@command(benchmarking.benchmark, without="sae_or_saes lm tasks")
def benchmark(
    saes: Sequence[str],
    *,
    tasks: Sequence[str] | None = None,
    model: str | None = None,
    html: File | None = None,
    csv: File | None = None,
    device: Any = DEVICE,
    **how: Any,
) -> int:
    """Run tasks over autoencoders of one model and print each figure with its interval, beside its controls.

    Args:
        saes: folders of runs or of saved SAEs
        tasks: their names, such as absorption and "sparse probing" (default: all that need nothing that is not there)
        model: the model (default: the one the first was trained on)
        html: also write a page to this file
        csv: also write the table to this file

    Examples:
        saelab benchmark runs/demo
        saelab benchmark runs/a runs/b --tasks stability absorption \\
                         --out scores --html scores.html
    """
    loaded = {name: load(name) for name in saes}
    lm = saelab.load_model(known(next(iter(loaded.values())), "model", model), device=device)
    scores = saelab.benchmark(loaded, lm, tasks, **how)
    print(scores.to_pandas().to_string(index=False, float_format="{:.3f}".format))
    if html:
        scores.to_html(html)
    if csv:
        write_csv(csv, scores.to_pandas())
    return 0
