"""`saelab train`: train a sparse autoencoder on a site of a language model."""

from collections.abc import Sequence
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
    autoencoder,
    capacity,
    limit,
    natural,
    positive,
)
from saelab.reading.buffer import parse_capacity

INTERRUPTED = 130

TRAIN = "saelab.training.loop:train"
OPTIONS = (
    MODEL,
    CORPUS,
    Option("site", str, REQUIRED, "where the activations are, e.g. blocks.3.hook_resid_post"),
    Option("sae", autoencoder, REQUIRED, "the architecture, e.g. 'TopK(k=32, d_sae=4096)'"),
    Option("target-site", str, None, "what a transcoder predicts, e.g. blocks.3.hook_mlp_out"),
    Option("tokens", positive, REQUIRED, "tokens to train on, e.g. 500_000 or 5e5"),
    Option("out", str, REQUIRED, "folder of the run; one that holds part of the same run is continued"),
    Option("batch-size", positive, Of(TRAIN, "batch_size"), "tokens in a step"),
    CONTEXT_LENGTH,
    Option("skip-positions", natural, Of(TRAIN, "skip_positions"), "first positions of a context to leave out"),
    PREPEND_BOS,
    Option("max-norm", limit, Of(TRAIN, "max_norm"), "leave out tokens above this many median norms, or none"),
    Option("buffer-tokens", capacity, Of(TRAIN, "buffer_tokens"), "tokens shuffled together, or bytes as in 2GiB"),
    Option(
        "lr", float, Of(TRAIN, "lr"), "learning rate (default: the architecture's, by its width, raised for short runs)"
    ),
    Option(
        "log-every",
        positive,
        Of(TRAIN, "log_every"),
        "tokens between rows of the history (default: a hundredth of the run)",
    ),
    Option(
        "checkpoint-every",
        positive,
        Of(TRAIN, "checkpoint_every"),
        "tokens between checkpoints (default: a tenth of the run, at most one a minute)",
    ),
    Option(
        "evaluate-every",
        positive,
        Of(TRAIN, "evaluate_every"),
        "tokens between evaluations on held-out text (default: none)",
    ),
    Option("loggers", str, Of(TRAIN, "loggers"), "wandb, tensorboard or both (default: none)", many=True),
    DEVICE,
    Option("seed", natural, Of(TRAIN, "seed"), "seed of everything"),
)


def run(values: dict[str, Any]) -> int:
    """Say what it takes, train, print the last figures; 130 when Ctrl-C ended it early."""
    lm, corpus = opened(values)
    print(cost(lm, corpus, values, [values["sae"]]), flush=True)
    result = saelab.train(lm, corpus, **values)
    print(summary(result))
    return INTERRUPTED if result.interrupted else 0


def opened(values: dict[str, Any]) -> tuple[Any, Any]:
    """The model and the corpus, taken out of the values."""
    lm = saelab.load_model(values.pop("model"), device=values["device"])
    return lm, saelab.load_corpus(values.pop("corpus"), seed=values["seed"])


def cost(lm: Any, corpus: Any, values: dict[str, Any], saes: Sequence[Any]) -> str:
    """One line: what it takes to train these SAEs on one stream."""
    tokens = values["tokens"]
    sites = [lm.site(values[name]) for name in ("site", "target_site") if values[name] is not None]
    site = sites[0]
    contexts = corpus.contexts(lm, values["context_length"], prepend_bos=values["prepend_bos"])
    buffer = parse_capacity(values["buffer_tokens"], 4 * site.width)
    memory = {"model": estimate.model_bytes(lm)}
    for i, sae in enumerate(saes):
        # one buffer for all
        parts = estimate.training_bytes(site.width, sae.d_sae, values["batch_size"], 0 if i else buffer)
        memory |= {name: memory.get(name, 0) + size for name, size in parts.items()}
    estimated = estimate.Estimate(
        seconds={
            "model": estimate.model_seconds(lm, contexts, sites, tokens, any(sae.needs_gradients for sae in saes)),
            "autoencoder": sum(estimate.step_seconds(site.width, sae.d_sae, tokens) for sae in saes),
        },
        memory=memory,
        available=estimate.physical_memory(),
    )
    return f"{tokens:,} tokens ({tokens / contexts.n_tokens:.2f} epochs of {contexts.n_tokens:,}): {estimated}"


def summary(result: Any) -> str:
    """One line: where a run is and its last figures."""
    last = result.history.iloc[-1]
    return (
        f"{result.path}: step {last['step']:.0f}, {last['tokens']:,.0f} tokens, "
        f"explained variance {last['explained_variance']:.3f}, l0 {last['l0']:.1f}, dead {last['dead']:.0f}"
    )


COMMAND = Command(
    name="train",
    summary="Train a sparse autoencoder on a site of a language model.",
    examples=(
        "saelab train --site blocks.3.hook_resid_post --sae 'TopK(k=32, d_sae=4096)' --tokens 500_000 --out runs/first",
        "saelab train --config run.yaml --seed 1 --out runs/seed-1",
        "",
        "run.yaml, with the names of the flags:",
        "  site: blocks.3.hook_resid_post",
        "  sae: TopK(k=32, d_sae=4096)",
        "  tokens: 500_000",
    ),
    options=OPTIONS,
    run=run,
)
