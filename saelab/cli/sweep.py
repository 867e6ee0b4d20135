"""`saelab sweep`: train several sparse autoencoders on one stream of activations."""

from typing import Any

import saelab
from saelab.cli import train
from saelab.cli.options import REQUIRED, Command, Option, autoencoder

SAES = Option("saes", autoencoder, REQUIRED, "the architectures, e.g. 'TopK(k=8, d_sae=4096)' ...", many=True)
# A sweep has one table of figures for all its runs, and no tracker.
OPTIONS = tuple(SAES if option.name == "sae" else option for option in train.OPTIONS if option.name != "loggers")


def run(values: dict[str, Any]) -> int:
    """Say what it takes, train them together, print a line for each; 130 when Ctrl-C ended it early."""
    lm, corpus = train.opened(values)
    saes = values.pop("saes")
    print(train.cost(lm, corpus, values, saes), flush=True)
    results = saelab.sweep(lm, corpus, saes, **values)
    for result in results:
        print(f"{result.sae.cfg!r}  {train.summary(result)}")
    return train.INTERRUPTED if any(result.interrupted for result in results) else 0


COMMAND = Command(
    name="sweep",
    summary="Train several sparse autoencoders on one stream of activations.",
    examples=(
        "saelab sweep --site blocks.3.hook_resid_post --saes 'TopK(k=16, d_sae=4096)' 'MutualChoice(k=16, d_sae=4096)' \\",
        "             --tokens 500_000 --out runs/compared",
    ),
    options=OPTIONS,
    run=run,
)
