"""`steering.sweep`: latents x operations x strengths x prompts x seeds, with controls, batched and resumable."""

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from saelab.base.errors import CheckpointError
from saelab.base.files import user_path
from saelab.base.progress import progress_bar
from saelab.base.protocols import Dictionary
from saelab.steering import grid, records
from saelab.steering.grid import NONE, RANDOM_DIRECTION, Cell
from saelab.steering.sweep_plan import SweepPlan
from saelab.steering.sweep_table import Sweep

if TYPE_CHECKING:
    from saelab.models.language import LanguageModel
    from saelab.steering.scope import Scope


def sweep(
    lm: "LanguageModel",
    sae: Dictionary,
    latents: int | Sequence[int],
    operations: str | Sequence[str],
    strengths: Sequence[float],
    prompts: Any,
    seeds: Sequence[int] = (0,),
    scope: "Scope | None" = None,
    baselines: Sequence[str] = grid.BASELINES,
    max_new_tokens: int = 20,
    out: str | Path | None = None,
    *,
    unit: str | None = None,
    draws: int = 20,
    temperature: float = 1.0,
    site: str | None = None,
    later_site: str | None = None,
    corpus: Any = None,
    prepend_bos: bool | None = None,
    batch_size: int = 32,
    progress: bool = True,
) -> Sweep:
    """Steer every prompt with every latent, operation and strength, beside controls, and measure without a judge.

    Each cell of the grid is generated as `with lm.steer(operation): lm.generate(prompt, max_new_tokens, temperature,
    seed)` would give it, but in batches whose rows have different operations, sorted by the prompts' lengths.

    Args:
        lm: the model.
        sae: the autoencoder whose latents are steered with.
        latents: numbers of its latents.
        operations: of "add", "clamp", "scale", "cap" (once a strength), "ablate", "project_out" (once).
        strengths: in units of `unit`; "scale" has none.
        prompts: texts or conversations (a list of them), or ids, as `LanguageModel.to_tokens` takes them.
        seeds: one text each. At temperature 0 they are all the same: give one.
        scope: where the operations act; every ordinary token but the first, where nothing is said.
        baselines: controls of each steered cell. "random_direction": directions of the decoder row's norm, drawn
            uniformly, which change the activation by as much at every position ("project_out" alone removes what
            lies along them). "random_latent": live latents drawn from the others, at the same strength in their own
            unit. "none", the unsteered text, always runs, because the measures refer to it.
        draws: random directions for each latent; a p value needs 20 of them. Texts are made with the first 3 alone (the
            others are measured on the unsteered continuation, as all are, which costs little); 3 random latents at most.
        unit: of the strengths: "max_activation" (the default for latents), "activation", "residual_norm" or "std".
        site: where to steer; the SAE's own when nothing is said.
        later_site: where latents are encoded again; else the residual stream after the next block, for residual sites.
        corpus: what `load_corpus` gives or takes, read (50,000 held-out tokens) for the input score, which is NaN without.
        prepend_bos: whether prompts begin with the model's BOS; by default as in the SAE's training, else as the
            tokenizer does.
        batch_size: texts generated together.
        out: a folder; rows are kept there batch by batch, and the same call goes on where it ended.

    The first Ctrl-C ends the sweep after the batch at work and gives what there is (`.interrupted`). Columns and their
    definitions: `Sweep`.

    Raises `ConfigError` for arguments that cannot work, a latent that is unknown or dead and a missing unit;
    `CheckpointError`, listing what differs, when `out` holds another sweep; `DataError` when prompt and continuation do
    not fit into the model's context.

    >>> import saelab
    >>> from saelab import steering
    >>> found = steering.sweep(lm, sae, [123, 9], ["add", "ablate"], [0.5, 1, 2, 4], ["The economy"])  # doctest: +SKIP
    >>> found.summary()[["latent", "operation", "matched_effect", "matched_random", "p", "note"]]  # doctest: +SKIP
    """
    from saelab.steering import observe, scores

    plan = SweepPlan.of(locals())
    controls = grid.draw_controls(sae, plan.latents, plan.draws if set(plan.baselines) - {NONE} else 0)
    source = grid.Extended(sae, controls.vectors if RANDOM_DIRECTION in plan.baselines else {})
    operation = _maker(source, plan.site.name, unit, scope)
    cells = plan.cells(controls)
    settings = plan.settings(lm, sae, len(cells))
    with records.opened(out, settings) as store:
        if store.scores is None:
            store.keep_scores(scores.known_scores(lm, sae, plan.latents, plan.site, plan.corpus))
        setting = observe.Setting(
            lm, sae, operation, plan.site, plan.later, plan.prompts, plan.max_new_tokens, plan.temperature
        )
        if not scores.why_no_logits(lm, plan.site):
            setting.tops = _tops(lm, sae, cells, controls)
        _run(setting, cells, store, plan.batch_size, progress)
        found = Sweep(list(store.rows.values()), settings, store.scores or {}, store.path)
    if found.interrupted:
        again = f"run the same call again to go on (out={str(out)!r})" if out else "give out= to be able to go on"
        print(f"interrupted after {len(found):,} of {len(cells):,} texts: {again}", file=sys.stderr)
    return found


def _maker(source: grid.Extended, site: str, unit: str | None, scope: "Scope | None") -> Callable[[Cell], list[Any]]:
    """What gives the one operation of a cell (none for an unsteered one): the same object where they are the same."""
    from saelab.steering import operations as verbs

    made: dict[Any, Any] = {}

    def operation(cell: Cell) -> list[Any]:
        if cell.operation is None or cell.latent is None:
            return []
        key = (cell.baseline, cell.latent, cell.operation, cell.strength, cell.draw)
        if key not in made:
            latent = cell.latent if cell.control is None else cell.control
            if cell.baseline == RANDOM_DIRECTION and cell.draw is not None:
                latent = source.latent(cell.latent, cell.draw)
            of_unit = unit if cell.operation in grid.WITH_UNIT else None
            verb = getattr(verbs, cell.operation)
            made[key] = verb(source, latent, strength=cell.strength, unit=of_unit, site=site, scope=scope)
        return [made[key]]

    return operation


def _run(setting: Any, cells: list[Cell], store: "records.Records", batch_size: int, progress: bool) -> None:
    """Runs the cells that the store does not hold yet, batch by batch, to the end or the first Ctrl-C."""
    from saelab.steering.observe import generate, observe
    from saelab.training.running import first_interrupt_noted

    unsteered = {(row["prompt_id"], row["seed"]): row["ids"] for row in store.rows.values() if row["baseline"] == NONE}
    bar = progress_bar(len(cells), "sweep", "text", progress, initial=len(store.rows))
    with bar, first_interrupt_noted() as stop:
        for batch in batches(cells, setting.prompts, batch_size):
            todo = [cell for cell in batch if cell.row not in store.rows]
            if not todo:
                continue
            if stop.is_set():
                return
            written = [cell for cell in todo if cell.written]
            made = dict(zip(written, generate(setting, written) if written else [], strict=True))
            texts = [made.get(cell) for cell in todo]
            if todo[0].baseline == NONE:
                unsteered |= {(cell.prompt_id, cell.seed): ids for cell, ids in made.items()}
            references = [unsteered[cell.prompt_id, cell.seed] for cell in todo]
            found = observe(setting, todo, texts, references)
            store.add([{**cell.to_dict(), **figures} for cell, figures in zip(todo, found, strict=True)])
            bar.update(len(todo))


def batches(cells: Sequence[Cell], prompts: Sequence[Sequence[int]], size: int) -> list[list[Cell]]:
    """The cells in batches: the unsteered ones first (the others are measured against them), then by the length of the
    prompt, so that padding is little."""
    found = []
    for group in ([c for c in cells if c.baseline == NONE], [c for c in cells if c.baseline != NONE]):
        ordered = sorted(group, key=lambda cell: (len(prompts[cell.prompt_id]), cell.prompt_id, cell.seed, cell.row))
        found += [ordered[start : start + size] for start in range(0, len(ordered), size)]
    return found


def _tops(lm: "LanguageModel", sae: Dictionary, cells: list[Cell], controls: grid.Controls) -> dict[Any, Any]:
    """Top logit tokens of every direction that the cells steer with."""
    import torch

    from saelab.steering.scores import top_tokens

    directions = {}
    for cell in cells:
        if cell.latent is None:
            continue
        key = (cell.latent, cell.baseline, cell.draw)
        if cell.baseline == RANDOM_DIRECTION and cell.draw is not None:
            directions[key] = controls.vectors[cell.latent][cell.draw]
        else:
            directions[key] = sae.W_dec.detach()[cell.latent if cell.control is None else cell.control]
    if not directions:
        return {}
    return dict(zip(directions, top_tokens(lm, torch.stack(list(directions.values()))), strict=True))


def load_sweep(path: str | Path) -> Sweep:
    """Reopen the sweep in a folder, finished or not. Raises `CheckpointError` when it holds none.

    >>> load_sweep("runs/sweep").summary()  # doctest: +SKIP
    """
    folder = user_path(path)
    store = records.of_folder(folder) if folder.is_dir() else None
    if store is None:
        raise CheckpointError(f"{folder} holds no sweep: no {records.SWEEP} is in it")
    return Sweep(list(store.rows.values()), store.settings, store.scores or {}, folder)
