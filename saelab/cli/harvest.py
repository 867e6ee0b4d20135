"""`saelab harvest`: write a model's activations to disk, once for any number of sites."""

from typing import Any

import saelab
from saelab.cli import estimate
from saelab.cli.options import (
    CONTEXT_LENGTH,
    CORPUS,
    DEVICE,
    MODEL,
    PREPEND_BOS,
    REQUIRED,
    Command,
    Of,
    Option,
    natural,
    positive,
)

HARVEST = "saelab.reading.harvest:harvest"
OPTIONS = (
    MODEL,
    CORPUS,
    Option("sites", str, REQUIRED, "one or more sites, read in one pass", many=True),
    Option("tokens", positive, REQUIRED, "rows to keep, e.g. 50_000 or 5e4"),
    Option("out", str, REQUIRED, "folder of the store; one that was cut short is continued"),
    CONTEXT_LENGTH,
    Option("skip-positions", natural, Of(HARVEST, "skip_positions"), "first positions of a context to leave out"),
    PREPEND_BOS,
    Option("split", str, Of(HARVEST, "split"), "train, heldout or all"),
    DEVICE,
    Option("seed", natural, Of(HARVEST, "seed"), "seed of the corpus"),
)


def run(values: dict[str, Any]) -> int:
    """Say what it takes, harvest, print where the rows are."""
    lm = saelab.load_model(values.pop("model"), device=values.pop("device"))
    corpus = saelab.load_corpus(values.pop("corpus"), seed=values["seed"])
    sites = [lm.site(name) for name in values.pop("sites")]
    contexts = corpus.contexts(lm, values["context_length"], values["split"], values["prepend_bos"])
    tokens = values["tokens"]
    cost = estimate.Estimate(
        seconds={"model": estimate.model_seconds(lm, contexts, sites, tokens)},
        memory={"model": estimate.model_bytes(lm)},
        available=estimate.physical_memory(),
    )
    on_disk = sum(site.width for site in sites) * 4 * tokens
    print(f"{tokens:,} tokens at {len(sites)} site(s): {cost}; {estimate.size(on_disk)} on disk", flush=True)
    stores: Any = saelab.harvest(lm, corpus, sites=[site.name for site in sites], **values)
    for name, store in stores.items():
        print(f"{name}: {len(store):,} rows of {store.d_in} at {store.path}")
    return 0


COMMAND = Command(
    name="harvest",
    summary="Write a model's activations to disk.",
    examples=(
        "saelab harvest --sites blocks.3.hook_resid_post --tokens 50_000 --out stores/blocks.3",
        "saelab harvest --sites blocks.3.hook_resid_post blocks.3.attn.hook_z --tokens 50_000 --out stores/both",
    ),
    options=OPTIONS,
    run=run,
)
