"""`saelab sites | harvest | train | sweep`: what is read from a language model, and trained on it."""

from collections.abc import Callable, Sequence
from typing import Any

import saelab
from saelab.autoencoders.architecture import Architecture
from saelab.base import processes
from saelab.cli import INTERRUPTED
from saelab.cli.commands import command
from saelab.cli.inputs import DEVICE, MODEL, language
from saelab.reading.harvest import harvest as activations
from saelab.reading.reader import ContextReader
from saelab.training import estimating, loop


@command()
def sites(model: Any = MODEL, *, device: Any = DEVICE) -> int:
    """Print the table of a model's sites.

    Examples:
        saelab sites
        saelab sites gpt2
    """
    print(saelab.load_model(model, device=device).sites().to_string(index=False))
    return 0


@command(activations, opening=language, without="site dtype", required="sites out")
def harvest(lm: Any, corpus: Any, /, **how: Any) -> int:
    """Say what it takes, harvest, print where the rows are.

    Examples:
        saelab harvest --sites blocks.3.hook_resid_post --tokens 50_000 \\
                       --out stores/blocks.3
        saelab harvest --sites blocks.3.hook_resid_post blocks.3.attn.hook_z \\
                       --tokens 50_000 --out stores/both
    """
    sites = [lm.site(name) for name in how.pop("sites")]
    contexts = corpus.contexts(lm, how["context_length"], how["split"], how["prepend_bos"])
    tokens, gradients = how["tokens"], bool(how["gradients"])
    reader = ContextReader(
        lm, contexts, [site.name for site in sites], skip_positions=how["skip_positions"], gradients=how["gradients"]
    )
    time = estimating.duration(estimating.reading_seconds(reader) * tokens)
    on_disk = estimating.size(sum(site.width for site in sites) * 4 * tokens * (1 + gradients))
    print(f"{tokens:,} tokens at {len(sites)} site(s): about {time}, {on_disk} on disk", flush=True)
    stores: Any = saelab.harvest(lm, corpus, sites=[site.name for site in sites], **how)
    for name, store in stores.items():
        print(f"{name}: {len(store):,} rows of {store.d_in} at {store.path}")
    return 0


@command(loop.train, opening=language, without="source", required="site out")
def train(lm: Any, corpus: Any, /, **how: Any) -> int:
    """Say what it takes, train, print the last figures; 130 when Ctrl-C ended it early.

    Args:
        sae: the architecture, written as in Python: 'TopK(k=32, d_sae=4096)'

    Examples:
        saelab train --site blocks.3.hook_resid_post --sae 'TopK(k=32, d_sae=4096)' \\
                     --tokens 500_000 --out runs/first
        saelab train --config run.yaml --seed 1 --out runs/seed-1
        torchrun --nproc-per-node 2 -m saelab train --config run.yaml \\
                 --out runs/two

        run.yaml, with the names of the flags:
          site: blocks.3.hook_resid_post
          sae: TopK(k=32, d_sae=4096)
          tokens: 500_000
    """
    say(lambda: cost(lm, corpus, [how["sae"]], **{name: value for name, value in how.items() if name != "sae"}))
    result = saelab.train(lm, corpus, **how)
    say(lambda: summary(result))
    return INTERRUPTED if result.interrupted else 0


# A sweep has one table of figures for all its runs, and no tracker.
@command(loop.sweep, loop.train, opening=language, without="source sae loggers", required="site out")
def sweep(lm: Any, corpus: Any, /, *, saes: Sequence[Architecture], **how: Any) -> int:
    """Say what it takes, train them together, print a line for each; 130 when Ctrl-C ended it early.

    Args:
        saes: the architectures, written as in Python

    Examples:
        saelab sweep --saes 'TopK(k=16, d_sae=4096)' 'MutualChoice(k=16, d_sae=4096)' \\
                     --site blocks.3.hook_resid_post --tokens 500_000 --out runs/both
    """
    say(lambda: cost(lm, corpus, saes, **how))
    results = saelab.sweep(lm, corpus, saes, **how)
    say(lambda: "\n".join(f"{result.sae.cfg!r}  {summary(result)}" for result in results))
    return INTERRUPTED if any(result.interrupted for result in results) else 0


def say(make: Callable[[], str]) -> None:
    """Print a line: of processes that train together, all make it and the first one does."""
    processes.join()
    line = make()
    if processes.first():
        print(line, flush=True)


def cost(lm: Any, corpus: Any, saes: Sequence[Any], *, tokens: int, **how: Any) -> str:
    """One line: what it takes to train these SAEs on one stream; of many processes, in each of them."""
    contexts = corpus.contexts(lm, how["context_length"], prepend_bos=how["prepend_bos"])
    estimated = saelab.estimate(lm, corpus, sae=list(saes), tokens=tokens, **how)
    return f"{tokens:,} tokens ({tokens / contexts.n_tokens:.2f} epochs of {contexts.n_tokens:,}): {estimated}"


def summary(result: Any) -> str:
    """One line: where a run is and its last figures."""
    last = result.history.iloc[-1]
    return (
        f"{result.path}: step {last['step']:.0f}, {last['tokens']:,.0f} tokens, "
        f"explained variance {last['explained_variance']:.3f}, l0 {last['l0']:.1f}, dead {last['dead']:.0f}"
    )
