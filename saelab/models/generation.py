"""Continue prompts token by token: key-value cache, padding on the left, one random generator a row."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from saelab.base import checks
from saelab.base.errors import ConfigError, DataError
from saelab.base.seeds import named_generator
from saelab.models.texts import given
from saelab.models.tokens import Tokens, padded
from saelab.models.where import prompt

if TYPE_CHECKING:
    from saelab.models.language import LanguageModel


Seed = int | Sequence[tuple[int, int]]  # of the whole batch, or (seed, row) of each row


@dataclass(frozen=True)
class Generation:
    """What was asked of `LanguageModel.generate`, and the continuations that it gave."""

    prompts: list[list[int]]
    texts: list[str]
    max_new_tokens: int
    temperature: float
    seed: Seed
    use_cache: bool


def generate_text(
    lm: "LanguageModel", prompts: Any, max_new_tokens: int, temperature: float, seed: Seed, use_cache: bool,
    prepend_bos: bool | None = None,
) -> Any:  # fmt: skip
    """See `LanguageModel.generate`."""
    if lm.tokenizer is None:
        raise ConfigError("text needs a tokenizer: load_model(model, tokenizer=...), "
                          "or saelab.models.generation.generate_ids for token ids")  # fmt: skip
    asked = given(prompts)
    tokens = lm.to_tokens(asked, prepend_bos)
    before = tokens.rows()
    new = generate_ids(lm, tokens, max_new_tokens, temperature, seed, use_cache)
    texts = [continuation_text(lm.tokenizer, *row) for row in zip(before, new, strict=True)]
    generation = Generation(before, texts, max_new_tokens, temperature, seed, use_cache)
    for receipt in lm.receipts:
        receipt.generated(generation)
    return texts[0] if asked.single else texts


def generate_ids(
    lm: "LanguageModel",
    tokens: Tokens,
    max_new_tokens: int,
    temperature: float = 1.0,
    seed: Seed = 0,
    use_cache: bool = True,
) -> list[list[int]]:
    """The continuation of each row as token ids, the token that ended it left out; see `LanguageModel.generate`.

    `seed` may give each row its own (seed, row), so that rows batched together draw as they would elsewhere.
    """
    max_new_tokens = checks.count("max_new_tokens", max_new_tokens)
    temperature = checks.number("temperature", temperature, least=0)
    rows = tokens.rows()
    longest = max(len(row) for row in rows)
    if lm.max_context is not None and longest + max_new_tokens > lm.max_context:
        raise DataError(f"a prompt of {longest} tokens and {max_new_tokens} new ones do not fit into the model's "
                        f"context of {lm.max_context}: lower max_new_tokens or shorten the prompt")  # fmt: skip
    end = lm.eos_ids
    fill = min(end) if end else 0
    # where padding before a text would be read it stands behind, and everything is read anew for each token
    left = len(set(map(len, rows))) == 1 or lm.backend.pads_left
    context = padded(rows, fill, left=left).to(lm.device)
    seeds = list(seed) if isinstance(seed, (list, tuple)) else [(checks.seed(seed), i) for i in range(len(rows))]
    if len(seeds) != len(rows):
        raise ConfigError(f"{len(seeds)} seeds for {len(rows)} prompts: give one (seed, row) for each, or one number")
    generators = [named_generator(f"{seed},{row}") for seed, row in seeds]
    continuations: list[list[int]] = [[] for _ in rows]
    open_rows = torch.ones(len(rows), dtype=torch.bool)
    ids, mask, cache = context.ids, context.mask, None
    step = ids
    with torch.no_grad(), prompt(ids.shape[1] if left else mask.sum(1)):
        for _ in range(max_new_tokens):
            logits, cache = lm.backend.logits(step, mask, last_only=left, cache=cache, use_cache=use_cache and left)
            last = logits[:, -1] if left else logits[torch.arange(len(rows)), mask.sum(1) - 1]
            chosen = pick(last, temperature, generators)
            open_rows &= torch.tensor([token not in end for token in chosen.tolist()])
            for i in open_rows.nonzero().flatten().tolist():
                continuations[i].append(int(chosen[i]))
            if not open_rows.any():
                break
            if not left:
                context = padded([row + more for row, more in zip(rows, continuations, strict=True)], fill).to(
                    lm.device
                )
                step, mask = context.ids, context.mask
                continue
            new = torch.where(open_rows, chosen, fill).to(ids)[:, None]
            ids = torch.cat([ids, new], 1)
            mask = torch.cat([mask, open_rows.to(mask.device)[:, None]], 1)
            step = ids if cache is None else new
    return continuations


def pick(
    logits: Float[Tensor, "batch vocabulary"], temperature: float, generators: list[torch.Generator]
) -> Int[Tensor, "batch"]:
    """One token for each row of logits [batch, vocabulary]: int64 [batch], on the CPU.

    At temperature 0 the largest (of equals the lower id); else one uniform number a row through the inverse of the
    cumulated probabilities, in fp64, so that other rows and rounding do not change the draw.
    """
    logits = logits.double().cpu()
    if not torch.isfinite(logits).any(1).all() or torch.isnan(logits).any():
        raise DataError("the model's logits are NaN: an intervention too strong, or a dtype too narrow")
    if temperature == 0:
        return logits.argmax(1)
    draws = torch.stack([torch.rand(1, generator=generator, dtype=torch.float64) for generator in generators])
    return _at(logits / temperature, draws)


def drawn(logits: Float[Tensor, "batch position vocabulary"], seeds: Sequence[int]) -> Int[Tensor, "batch position"]:
    """Labels as the model would have them: one draw from each distribution of logits [batch, position, vocabulary].

    int64 [batch, position], on the device of the logits; each row by a generator of its own, seeded by its seed.
    """
    rows = []
    for row, seed in zip(logits.detach(), seeds, strict=True):
        draws = torch.rand(len(row), 1, generator=named_generator(f"{seed},0"), dtype=torch.float64)
        rows.append(_at(row.double().cpu(), draws))
    return torch.stack(rows).to(logits.device)


def _at(logits: Tensor, draws: Tensor) -> Tensor:
    """The tokens [n] at which the cumulated probabilities of logits [n, vocabulary] pass the draws [n, 1]."""
    cumulated = torch.softmax(logits, 1).cumsum(1)
    found = torch.searchsorted(cumulated, draws * cumulated[:, -1:], right=True).squeeze(1)
    return found.clamp(max=logits.shape[1] - 1)


def continuation_text(tokenizer: Any, prompt_ids: list[int], new_ids: list[int]) -> str:
    """The text that the new tokens add to the prompt's (some tokenizers drop a space at the start of a text)."""
    before = tokenizer.decode(prompt_ids, skip_special_tokens=True)
    both = tokenizer.decode(prompt_ids + new_ids, skip_special_tokens=True)
    if both.startswith(before):
        return both[len(before) :]
    return tokenizer.decode(new_ids, skip_special_tokens=True)
