"""`saelab evaluate`: what a trained autoencoder loses on held-out text."""

from typing import Any

import saelab
from saelab.base.files import write_csv
from saelab.cli.commands import command
from saelab.cli.inputs import trained
from saelab.cli.values import File
from saelab.evaluation import fidelity


@command(fidelity.evaluate, opening=trained)
def evaluate(sae: Any, lm: Any, corpus: Any, /, *, csv: File | None = None, **how: Any) -> int:
    """Evaluate on the held-out split, print the table.

    Args:
        csv: also write the table to this file

    Examples:
        saelab evaluate runs/demo
        saelab evaluate my-sae --tokens 32_768 --csv table.csv
    """
    report = saelab.evaluate(sae, lm, corpus, **how)
    print(repr(sae))
    print(repr(report))
    if csv:
        write_csv(csv, report.to_pandas())
    return 0
