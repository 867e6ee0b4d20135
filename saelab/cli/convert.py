"""`saelab convert`: an autoencoder of any project that saelab reads, written in the layout of another."""

from typing import Any

import saelab
from saelab.autoencoders.sae import SAE
from saelab.cli.commands import command, of
from saelab.interop.loading import load_sae

WHAT, READ_AS = of(load_sae, "what"), of(load_sae, "format")
PATH, FORMAT = of(SAE.save, "path"), of(SAE.save, "format")


@command(load_sae)
def convert(what: Any = WHAT, path: Any = PATH, *, format: Any = FORMAT, read_as: Any = READ_AS, **how: Any) -> int:
    """Read an autoencoder of any project and write it in the layout of another.

    Args:
        path: the folder to write
        format: saelens, dictionary_learning, sparsify or circuit-tracer (default: saelab's own, which is SAELens' and more)

    Examples:
        saelab convert my-sae for-sparsify/layers.3 --format sparsify
        saelab convert gemma-scope-2b-pt-res-canonical gemma \\
            --sae-id layer_12/width_16k/canonical
    """
    sae = saelab.load_sae(what, format=read_as, **how)
    sae.save(path, format=format)
    print(f"{sae!r} is written to {path}" + (f" as {format}" if format else ""))
    return 0
