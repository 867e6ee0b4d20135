"""Generate and measure the cells of one batch: rows with different operations, side by side.

Shapes: B rows, T columns, V vocabulary, D width, F latents. Prompts end at column `width`, whatever their length.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Int
from torch import Tensor

from saelab.base.codes import SparseCodes
from saelab.base.errors import InterventionError
from saelab.base.protocols import Dictionary
from saelab.base.statistics import kl
from saelab.models.generation import continuation_text, generate_ids
from saelab.models.sites import Site
from saelab.models.tokens import Tokens, padded
from saelab.models.where import prompt
from saelab.steering import text_measures as measures
from saelab.steering.grid import RANDOM_DIRECTION, RANDOM_LATENT, Cell
from saelab.steering.records import OF_THE_TEXT

if TYPE_CHECKING:
    from saelab.models.language import LanguageModel

LOGITS_BYTES = 2**29  # of one teacher-forced pass: a batch is cut into parts that stay below


@dataclass
class Setting:
    """What all cells of a sweep share. `tops[key]` are the top logit tokens of a target, or of one of its controls
    (latent, baseline, draw); empty where the site does not write to the residual stream."""

    lm: "LanguageModel"
    sae: Dictionary
    operations: Callable[[Cell], list[Any]]
    site: Site
    later: Site | None
    prompts: list[list[int]]
    max_new_tokens: int
    temperature: float
    tops: dict[tuple[int | None, str, int | None], Tensor] = field(default_factory=dict)

    def top(self, cell: Cell, own: bool) -> Int[Tensor, "k"] | None:
        """Top tokens of the cell's target, or of the direction that it really steers with."""
        key = (cell.latent, cell.baseline, cell.draw)
        if own and cell.baseline in (RANDOM_DIRECTION, RANDOM_LATENT):
            return self.tops.get(key)
        return self.tops.get((cell.latent, "steered", None))


@contextmanager
def steering_rows(setting: Setting, cells: Sequence[Cell]) -> Iterator[None]:
    """Row i of every batch gets the operations of cell i; nothing happens where no cell has any.

    Raises `InterventionError` when nothing at all was touched, unless there was nothing to touch: a prompt of one token
    (left out as the first of the context) after which the model says the end.
    """
    from saelab.steering.apply import steer_rows

    rows = [setting.operations(cell) for cell in cells]
    if not any(rows):
        yield
        return
    finished, receipt = False, None
    try:
        with steer_rows(setting.lm, rows) as receipt:
            yield
            finished = True
    except InterventionError:
        longer = any(len(setting.prompts[cell.prompt_id]) > 1 for cell in cells)
        if not finished or receipt is None or (longer and not any(int(tally.positions) for tally in receipt.tallies)):
            raise


def generate(setting: Setting, cells: Sequence[Cell]) -> list[list[int]]:
    """The continuation of each cell, as `lm.generate` gives it for that prompt and seed alone."""
    tokens = _left_padded([setting.prompts[cell.prompt_id] for cell in cells], [[]] * len(cells))
    seeds = [(cell.seed, 0) for cell in cells]
    with steering_rows(setting, cells):
        return generate_ids(setting.lm, tokens, setting.max_new_tokens, setting.temperature, seeds)


def observe(
    setting: Setting, cells: Sequence[Cell], continuations: Sequence[list[int] | None], references: list[list[int]]
) -> list[dict[str, Any]]:
    """One dict a cell: its text and its measures; `references` are the unsteered continuations.

    Where no text was made (a continuation is None) there is none, and its figures are NaN.
    """
    found: list[dict[str, Any]] = [{"text": None, "ids": None, **dict.fromkeys(OF_THE_TEXT, math.nan)} for _ in cells]
    written = {i: ids for i, ids in enumerate(continuations) if ids is not None}
    for i, ids in written.items():
        found[i] |= _of_the_text(setting, cells[i], ids, references[i])
    longest = max(len(setting.prompts[cell.prompt_id]) for cell in cells) + setting.max_new_tokens
    for part in _parts(setting, list(written), longest):
        prompts = [setting.prompts[cells[i].prompt_id] for i in part]
        tokens = _left_padded(prompts, [written[i] for i in part])
        width = max(map(len, prompts))
        with torch.no_grad(), prompt(width):
            logits_BTV = setting.lm.forward(tokens.to(setting.lm.device))
        for i, logits_TV in zip(part, logits_BTV, strict=True):
            targets = torch.tensor(written[i], dtype=torch.int64, device=logits_TV.device)
            value = measures.perplexity(logits_TV[width - 1 : width - 1 + len(targets)], targets)
            looping = found[i]["repetition_4"] > measures.LOOPING
            found[i] |= {"perplexity": value, "perplexity_ranked": math.nan if looping else value}
    steered = [i for i, cell in enumerate(cells) if cell.latent is not None]
    for part in _parts(setting, steered, 2 * longest):  # steered and unsteered side by side
        figures = _side_by_side(setting, [cells[i] for i in part], [references[i] for i in part])
        for i, of_one in zip(part, figures, strict=True):
            found[i] |= of_one
    return found


def _of_the_text(setting: Setting, cell: Cell, ids: list[int], reference: list[int]) -> dict[str, Any]:
    before = setting.prompts[cell.prompt_id]
    tokenizer = setting.lm.tokenizer
    return {
        "text": str(ids) if tokenizer is None else continuation_text(tokenizer, before, ids),
        "ids": ids,
        "repetition_4": measures.repetition(ids, 4),
        "distinct_2": measures.distinct(ids, 2),
        "changed_share": measures.changed_share(ids, reference),
        "first_divergence": measures.first_divergence(ids, reference),
    }


def _side_by_side(setting: Setting, cells: list[Cell], references: list[list[int]]) -> Iterator[dict[str, Any]]:
    """Steered and unsteered, teacher-forced on the unsteered continuation, in one batch of both.

    Measured are the positions whose next token is one of the continuation's, the prompt's last one first.
    """
    clean = list(dict.fromkeys((cell.prompt_id, cell.seed) for cell in cells))
    texts = {(cell.prompt_id, cell.seed): ids for cell, ids in zip(cells, references, strict=True)}
    rows = [(cell.prompt_id, cell.seed) for cell in cells] + clean
    prompts = [setting.prompts[prompt_id] for prompt_id, _ in rows]
    tokens = _left_padded(prompts, [texts[row] for row in rows]).to(setting.lm.device)
    width = max(map(len, prompts))
    unsteered = [Cell(-1, "none", None, None, None, None, None, *row) for row in clean]
    seen: dict[str, Tensor] = {}

    def keeper(name: str) -> Callable[[Tensor, Any], Tensor]:
        def keep(x: Tensor, where: Any) -> Tensor:
            seen[name] = x.detach().clone()
            return x

        return keep

    sites = {"site": setting.site} | ({"later": setting.later} if setting.later else {})
    with torch.no_grad(), steering_rows(setting, [*cells, *unsteered]), prompt(width):
        with ExitStack() as stack:  # entered after the steering, so that it sees what that has made
            for name, site in sites.items():
                stack.enter_context(setting.lm.intervene(site, keeper(name)))
            logits_BTV = setting.lm.forward(tokens)
        measured = {name: x[:, width - 1 :] for name, x in seen.items()}
        codes = {name: setting.sae.encode_sparse(x.flatten(0, 1).to(setting.sae.W_dec)) for name, x in measured.items()}
    T = logits_BTV.shape[1] - width + 1
    for i, cell in enumerate(cells):
        j = len(cells) + clean.index(rows[i])
        n = max(len(texts[rows[i]]), 1)
        at = slice(width - 1, width - 1 + n)
        change, ratio = measures.relative_change(seen["site"][j, at], seen["site"][i, at])
        figures = _of_the_logits(setting, cell, logits_BTV[j, at], logits_BTV[i, at])
        figures |= {"relative_change": change, "norm_ratio": ratio}
        for name, suffix in (("site", ""), ("later", "_later")):
            found = (math.nan,) * 4
            if name in codes:
                # a control's target is the latent that it stands beside: how much that one moves without being steered
                before, after = _dense(codes[name], j, T)[:n], _dense(codes[name], i, T)[:n]
                found = measures.latent_changes(before, after, cell.latent or 0)
            names = ("target_before", "target_after", "off_target_l1", "off_target_flipped")
            figures |= {key + suffix: value for key, value in zip(names, found, strict=True)}
        yield figures


def _of_the_logits(setting: Setting, cell: Cell, clean_TV: Tensor, steered_TV: Tensor) -> dict[str, float]:
    divergence = kl(clean_TV.double(), steered_TV.double())
    figures = {
        "kl_next": float(divergence[0]), "kl_text": float(divergence.mean()), "kl_max": float(divergence.max())
    }  # fmt: skip
    for prefix, tokens in (("", setting.top(cell, own=False)), ("own_", setting.top(cell, own=True))):
        if tokens is None:
            figures |= {f"{prefix}{name}": math.nan for name in ("mass_next", "mass_text", "rise_next", "rise_text")}
            continue
        tokens = tokens.to(clean_TV.device)
        before, after = measures.mass(clean_TV, tokens), measures.mass(steered_TV, tokens)
        figures |= {
            f"{prefix}mass_next": float(after[0]),
            f"{prefix}mass_text": float(after.mean()),
            f"{prefix}rise_next": float(after[0] - before[0]),
            f"{prefix}rise_text": float((after - before).mean()),
        }
    return figures


def _dense(codes: SparseCodes, row: int, width: int) -> Tensor:
    """The codes [width, F] of one row of a batch: dense, one row is small where a batch may not be."""
    offsets = codes.offsets[row * width : (row + 1) * width + 1]
    inside = slice(int(offsets[0]), int(offsets[-1]))
    return SparseCodes(codes.values[inside], codes.indices[inside], offsets - offsets[0], codes.n_latents).to_dense()


def _left_padded(prompts: Sequence[list[int]], continuations: Sequence[list[int]]) -> Tokens:
    """Prompts that end at one column, each with its continuation after it, padded on both sides."""
    before, after = padded(prompts, 0, left=True), padded(continuations, 0)
    return Tokens(torch.cat([before.ids, after.ids], 1), torch.cat([before.mask, after.mask], 1))


def _parts(setting: Setting, cells: Sequence[int], longest: int) -> Iterator[list[int]]:
    """The indices in equal parts whose logits fit into `LOGITS_BYTES`."""
    size = max(1, LOGITS_BYTES // (4 * longest * setting.lm.d_vocab))
    parts = -(-len(cells) // size)
    for i in range(parts):
        yield list(cells[i * len(cells) // parts : (i + 1) * len(cells) // parts])
