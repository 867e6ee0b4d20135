"""`saelab demo`: the whole of it on the bundled model and corpus."""

from typing import Any

from saelab.cli.demonstration import demo
from saelab.cli.options import Command, Of, Option, positive

OPTIONS = (
    Option("tokens", positive, Of("saelab.cli.demonstration:demo", "tokens"), "tokens to train on"),
    Option("d-sae", positive, Of("saelab.cli.demonstration:demo", "d_sae"), "latents"),
    Option("out", str, Of("saelab.cli.demonstration:demo", "out"), "folder of the run"),
)


def run(values: dict[str, Any]) -> int:
    """130 when Ctrl-C ended the training early."""
    return 130 if demo(**values).interrupted else 0


COMMAND = Command(
    name="demo",
    summary="Train, evaluate and look into a TopK SAE on the bundled model, offline, in minutes.",
    examples=("saelab demo", "saelab demo --tokens 100_000 --d-sae 1024 --out runs/small"),
    options=OPTIONS,
    run=run,
)
