"""Induction: heads that look for what came after an earlier copy of the current token.

Head scores on random tokens that repeat, and the long-prefix protocol (Kissane et al., arXiv 2406.17759, "long-prefix
induction"): does a head attend more, the more tokens before the current one match? Heads are numbered by query heads;
nothing here needs an autoencoder. Latents are in `saelab.analysis.attention.families_of_latents`.

Shapes: B texts, T destinations, S sources, H heads, E width of a head, D width of the stream, V vocabulary.

>>> import saelab
>>> from saelab.analysis.attention import induction
>>> lm = saelab.load_model("smollm2-135m")  # doctest: +SKIP
>>> induction.head_scores(lm).nlargest(3, "induction")  # doctest: +SKIP
"""

from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from saelab.analysis.attention.proxies import same_word
from saelab.analysis.circuits import frozen
from saelab.base import seeds
from saelab.base.errors import ConfigError, DataError
from saelab.models.tokens import Tokens
from saelab.models.unembedding import Unembedding, unembedding
from saelab.reading.corpus import load_corpus

if TYPE_CHECKING:
    from pandas import DataFrame

    from saelab.models.language import LanguageModel
    from saelab.reading.corpus import Corpus

BATCH = 8
ATTENDED = 0.3  # of the natural variant: the authors' threshold
LAST_START = 30  # the first copy starts at least this far from the end: 98 of 128 in our notes of the code
LONGEST = LAST_START // 2 - 1


def head_scores(lm: "LanguageModel", *, length: int = 50, n: int = 8, seed: int = 0) -> "DataFrame":
    """How much each head attends to where induction, previous-token and duplicate-token heads do, on random repeated
    tokens.

    `n` texts: the model's BOS where it has one, `length` distinct random tokens, the same tokens again. Attention is
    averaged over the second copy, where all three can be told apart: `induction` to the token after the earlier copy,
    `duplicate` to the earlier copy itself, `previous_token` to the position before.

    A pandas.DataFrame: block, head, induction, previous_token, duplicate, all between 0 and 1.

    Raises `ConfigError` for texts that do not fit into the model's context, and as `attention.patterns` does.

    >>> induction.head_scores(lm).set_index(["block", "head"]).induction.idxmax()  # doctest: +SKIP
    (18, 6)
    """
    import pandas as pd

    start = _bos(lm)
    _check_length(lm, len(start) + 2 * length)
    generator = torch.Generator().manual_seed(seed)
    ordinary = _ordinary(lm)
    once = torch.stack([_distinct(ordinary, length, generator) for _ in range(n)])
    ids = torch.cat([start.expand(n, -1), once, once], dim=1)
    here = torch.arange(len(start) + length, ids.shape[1])
    there = {"induction": here - length + 1, "previous_token": here - 1, "duplicate": here - length}
    sums: dict[str, Any] = {name: 0.0 for name in there}
    for batch in ids.split(BATCH):
        layers = frozen.read(lm, _tokens(lm, batch), range(lm.n_layers)).layers
        for context in range(len(batch)):
            rows = [layers[block].pattern.rows(context, here) for block in range(lm.n_layers)]  # of [H, T, S]
            for name, source in there.items():
                sums[name] += torch.stack([_at(A_HTS, source).mean(1) for A_HTS in rows])
    scores = {name: (total / n).cpu() for name, total in sums.items()}
    blocks, heads = scores["induction"].shape
    grid = torch.cartesian_prod(torch.arange(blocks), torch.arange(heads)).T
    return pd.DataFrame(
        {"block": grid[0].numpy(), "head": grid[1].numpy(), **{k: x.flatten().numpy() for k, x in scores.items()}}
    )


def long_prefix(
    lm: "LanguageModel",
    heads: Sequence[tuple[int, int]],
    *,
    prefixes: Iterable[int] = range(1, 10),
    examples: int = 400,
    length: int = 128,
    seed: int = 0,
) -> "DataFrame":
    """Attention of heads to the token after an earlier copy of the last p tokens, for each prefix length p.

    Texts are distinct random tokens (BOS first where the model has one), `length` in all; p of them, at a1, are copied
    to a2. `score` is A[a2 + p - 1, a1 + p]; `dla` what the head writes there, through the last norm with its scale
    frozen, to the logit of the token at a1 + p, less the mean over the vocabulary (of a model with a soft cap what the capped
    logits lose with it). a1 is uniform from 1 to length - 30,
    a2 from a1 + p + 1 to length - p - 1 (their protocol and its constants; theirs are 400 examples a prefix).

    A pandas.DataFrame: block, head, prefix, score, score_se, dla, dla_se (standard errors over examples).

    Raises `ConfigError` for prefixes that do not fit and heads that are not there.

    >>> induction.long_prefix(lm, [(18, 6), (17, 3)], examples=20)  # doctest: +SKIP
    """
    prefixes = list(prefixes)
    if not prefixes or not all(1 <= p <= LONGEST for p in prefixes) or length <= LAST_START + 1:
        raise ConfigError(
            f"prefixes={prefixes} in texts of {length} tokens: prefixes are 1 to {LONGEST} long, "
            f"texts more than {LAST_START + 1}"
        )
    _check_length(lm, length)
    blocks = sorted({block for block, _ in heads})
    out = unembedding(lm)
    last = next(name for name, module in lm.inner.named_modules() if module is out.module)
    found: dict[tuple[int, int, int], list[tuple[float, float]]] = {}
    for p in prefixes:
        generator = torch.Generator().manual_seed(seeds.derived(seed, p))
        copies = _copies(lm, p, examples, length, generator)
        for start in range(0, examples, BATCH):
            batch = [part[start : start + BATCH] for part in copies]
            for block, head, score, dla in _scored(lm, out, last, blocks, heads, *batch):
                found.setdefault((block, head, p), []).append((score, dla))
    return _summed(found)


def _scored(
    lm: "LanguageModel", out: Unembedding, last: str, blocks: list[int], heads: Sequence[tuple[int, int]],
    ids: Tensor, destinations: Tensor, sources: Tensor,
) -> Iterator[tuple[int, int, float, float]]:  # fmt: skip
    """Block, head, attention from destination to source, and what is written to the source's logit, for each text and head."""
    layers, sites = frozen.read(lm, _tokens(lm, ids), blocks, [last + ".input", last])
    places: list[tuple[int, int, int]] = []  # block, head, context
    scores, written = [], []
    for context, (t, s) in enumerate(zip(destinations.tolist(), sources.tolist(), strict=True)):
        for block, head in heads:
            _check_head(layers[block], head)
            places.append((block, head, context))
            scores.append(float(layers[block].pattern.rows(context, torch.tensor([t]))[head, 0, s]))
            written.append(_written(layers[block], context, t, head))
    at = torch.tensor([context for *_, context in places], device=lm.device)
    ends = destinations.to(lm.device)[at]
    read, normed = sites[last + ".input"][at, ends], sites[last][at, ends]
    lost_NV = -out.change(normed, out.norm.sigma(read, normed), torch.stack(written))
    targets = ids.to(lm.device)[at, sources.to(lm.device)[at]]
    dlas = lost_NV.gather(1, targets[:, None])[:, 0] - lost_NV.mean(1)
    for (block, head, _), score, dla in zip(places, scores, dlas.tolist(), strict=True):
        yield block, head, score, dla


def _summed(found: dict[tuple[int, int, int], list[tuple[float, float]]]) -> "DataFrame":
    import pandas as pd

    summed = []
    for place, values in found.items():
        table = torch.tensor(values, dtype=torch.float64)
        mean, error = table.mean(0).tolist(), (table.std(0) / len(table) ** 0.5).tolist()
        summed.append((*place, mean[0], error[0], mean[1], error[1]))
    columns = ["block", "head", "prefix", "score", "score_se", "dla", "dla_se"]
    return pd.DataFrame(summed, columns=columns).sort_values(["block", "head", "prefix"], ignore_index=True)


def natural_prefixes(
    lm: "LanguageModel",
    corpus: "Corpus",
    head: tuple[int, int],
    *,
    contexts: int = 64,
    context_length: int = 128,
    split: str = "heldout",
    seed: int = 0,
) -> "DataFrame":
    """Where a head attends in real text, how long the matching prefix is there, and attention with the prefix broken.

    Of each context the first pair (destination, source) with attention above .3, neither the first position nor the
    destination itself as source. `prefix` counts the tokens up to the destination that match those before the source,
    upper case and the space before a word left aside. Where it is at least 2, the token two before the source is
    replaced by a random one and the pass repeated: `attention_broken`, NaN elsewhere (the authors' intervention). As the pair
    was chosen for its attention, any change of the text lets it fall: a small fall says nothing of the prefix.

    A pandas.DataFrame, a row a context that has such a pair: context, destination, source, prefix, attention,
    attention_broken.

    Raises `ConfigError` for a head that is not there, `DataError` where no context has a pair.
    """
    import pandas as pd

    block, number = head
    packed = load_corpus(corpus).contexts(lm, context_length, split)
    ids, real = packed.tokens(slice(0, contexts)).ids, packed.tokens(slice(0, contexts)).mask
    generator, ordinary = torch.Generator().manual_seed(seed), _ordinary(lm)
    rows = list(_attended(lm, ids, real, block, number))
    if not rows:
        raise DataError(
            f"head {number} of block {block} attends to no token but the first with more than {ATTENDED} in {len(ids)} texts: "
            "it has no natural case here, read more text or study another head"
        )
    again = [row for row in rows if row[3] >= 2]
    broken = ids[[row[0] for row in again]]
    for text, row in zip(broken, again, strict=True):
        text[row[2] - 2] = _distinct(ordinary, 1, generator)[0]
    for start in range(0, len(again), BATCH):
        some = again[start : start + BATCH]
        masks = real[[row[0] for row in some]]
        layer = frozen.read(lm, _tokens(lm, broken[start : start + BATCH], masks), [block]).layers[block]
        for context, row in enumerate(some):
            row[5] = float(layer.pattern.rows(context, torch.tensor([row[1]]))[number, 0, row[2]])
    columns = ["context", "destination", "source", "prefix", "attention", "attention_broken"]
    return pd.DataFrame(rows, columns=columns)


def _attended(lm: "LanguageModel", ids: Tensor, real: Tensor, block: int, head: int) -> Iterator[list[Any]]:
    """Context, destination, source, prefix, attention and NaN, of the first pair of each context that has one."""
    for start in range(0, len(ids), BATCH):
        batch, masks = ids[start : start + BATCH], real[start : start + BATCH]
        layer = frozen.read(lm, _tokens(lm, batch, masks), [block]).layers[block]
        _check_head(layer, head)
        for context, text in enumerate(batch):
            A_TS = layer.pattern.rows(context)[head]
            after = int(masks[context].int().argmax()) + 1  # the first position
            pairs = (A_TS.tril(-1)[:, after:] > ATTENDED).nonzero()
            if len(pairs):
                t, s = int(pairs[0, 0]), int(pairs[0, 1]) + after
                yield [start + context, t, s, _matching(lm, text, t, s), float(A_TS[t, s]), float("nan")]


def _copies(
    lm: "LanguageModel", p: int, n: int, length: int, generator: torch.Generator
) -> tuple[Tensor, Tensor, Tensor]:
    """Texts [n, length] with p tokens copied, the last position of the copy [n] and the one to be attended to [n]."""

    def uniform(low: int, high: int) -> int:
        return int(torch.randint(low, high + 1, (), generator=generator))

    bos, ordinary = _bos(lm), _ordinary(lm)
    ids, destinations, sources = [], [], []
    for _ in range(n):
        text = torch.cat([bos, _distinct(ordinary, length - len(bos), generator)])
        a1 = uniform(1, length - LAST_START)
        a2 = uniform(a1 + p + 1, length - p - 1)
        text[a2 : a2 + p] = text[a1 : a1 + p]
        ids.append(text)
        destinations.append(a2 + p - 1)
        sources.append(a1 + p)
    return torch.stack(ids), torch.tensor(destinations), torch.tensor(sources)


def _written(layer: frozen.Layer, context: int, position: int, head: int) -> Tensor:
    """What a head adds to the stream at a position, [D]."""
    written = layer.z[context, position, head] @ layer.parts.W_O[head]
    if layer.parts.post_norm is not None and layer.post_sigma is not None:
        written = layer.parts.post_norm.apply(written, layer.post_sigma[context, position])
    return written


def _matching(lm: "LanguageModel", text: Tensor, t: int, s: int) -> int:
    """How many tokens up to t match, word by word, those up to s - 1."""
    words = same_word(lm, text)
    count = 0
    while s - 1 - count >= 0 and words[t - count] == words[s - 1 - count]:
        count += 1
    return count


def _at(A_HTS: Tensor, source_T: Tensor) -> Tensor:
    """[H, T]: of each destination the attention to its source."""
    return A_HTS.gather(2, source_T.to(A_HTS.device).expand(len(A_HTS), -1)[..., None]).squeeze(2)


def _tokens(lm: "LanguageModel", ids: Tensor, mask: Tensor | None = None) -> Tokens:
    return Tokens(ids, torch.ones_like(ids, dtype=torch.bool) if mask is None else mask).to(lm.device)


def _bos(lm: "LanguageModel") -> Tensor:
    return torch.tensor([] if lm.bos_id is None else [lm.bos_id], dtype=torch.int64)


def _ordinary(lm: "LanguageModel") -> Tensor:
    """Every token that is not special."""
    special = torch.tensor(sorted(lm.special_ids), dtype=torch.int64)
    every = torch.arange(lm.d_vocab)
    return every[~torch.isin(every, special)]


def _distinct(ordinary: Tensor, n: int, generator: torch.Generator) -> Tensor:
    if n > len(ordinary):
        raise ConfigError(f"{n} distinct tokens were asked for, and the vocabulary has {len(ordinary)} ordinary ones")
    return ordinary[torch.randperm(len(ordinary), generator=generator)[:n]]


def _check_length(lm: "LanguageModel", length: int) -> None:
    if lm.max_context is not None and length > lm.max_context:
        raise ConfigError(f"texts of {length} tokens do not fit into the model's context of {lm.max_context}")


def _check_head(layer: frozen.Layer, head: int) -> None:
    if not 0 <= head < layer.heads:
        raise ConfigError(f"there is no head {head} in block {layer.parts.layer}: it has {layer.heads}, from 0 on")
