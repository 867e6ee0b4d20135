"""Several tasks over several autoencoders of one model: `saelab.benchmark`."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from saelab.base import checks, digests
from saelab.base.errors import ConfigError
from saelab.base.files import try_folder, user_path, whole_file
from saelab.base.manifests import read_json
from saelab.base.protocols import Dictionary
from saelab.evaluation.absorption import Absorption
from saelab.evaluation.labelled import is_installed
from saelab.evaluation.perturbation import Perturbation
from saelab.evaluation.scores import Scores, named
from saelab.evaluation.sparse_probing import SparseProbing
from saelab.evaluation.spurious_correlation import SpuriousCorrelation
from saelab.evaluation.stability import Stability
from saelab.evaluation.text_means import reading_once
from saelab.models.purpose import Purpose
from saelab.pages.packing import plain

if TYPE_CHECKING:
    from saelab.models.language import LanguageModel


class Task(Protocol):
    """What `benchmark` runs: a frozen dataclass, whose fields are its settings.

    `run` gets all autoencoders by name, each checked to fit the model, and gives the figures of each beside its controls.
    What it gives depends on its arguments and its fields alone, so that it can be kept and read again.
    """

    @property
    def name(self) -> str: ...
    def run(self, saes: Mapping[str, Dictionary], lm: "LanguageModel") -> Scores: ...


TASKS: dict[str, type[Task]] = {
    "stability": Stability,
    "absorption": Absorption,
    "sparse probing": SparseProbing,
    "perturbation": Perturbation,
    "spurious correlation": SpuriousCorrelation,
}


def benchmark(
    sae_or_saes: Any, lm: "LanguageModel", tasks: str | Task | Sequence[str | Task] | None = None, out: Any = None
) -> Scores:
    """Figures of autoencoders that say what their latents are good for, each with an interval and beside its controls.

    Args:
        sae_or_saes: an autoencoder, a run, or a list, sweep or mapping of them, all of this model.
        lm: the model.
        tasks: names of tasks, or tasks with settings of their own; None is all that need nothing that is not there:
            "stability" (`saelab.evaluation.stability.Stability`): would another seed or size find the same latents? Needs
            two autoencoders.
            "absorption" (`saelab.evaluation.absorption.Absorption`): is a concept split over latents, or taken over by others?
            "sparse probing" (`saelab.evaluation.sparse_probing.SparseProbing`): can a concept be read from few latents?
            "perturbation" (`saelab.evaluation.perturbation.Perturbation`): do the latents of a class move its probe alone?
            "spurious correlation" (`saelab.evaluation.spurious_correlation.SpuriousCorrelation`): can what a probe learnt
            in another's place be taken out? These three need the package sae-probes, or labelled texts of your own.
        out: a folder to keep each task's figures in as soon as it is done; the same call takes them from there.

    Raises `ConfigError` for a task that is none and for autoencoders that do not say where they read, `SiteError` for one of
    another model or site, both before anything is computed.

    >>> scores = saelab.benchmark([first, second], lm, out="scores")  # doctest: +SKIP
    >>> scores.value("matched cosine", sae="first"), scores.to_pandas()  # doctest: +SKIP
    """
    saes = named(sae_or_saes)
    checks.language_model("lm", lm)
    for sae in saes.values():
        purpose = Purpose.of(sae)
        purpose.source(lm), purpose.target(lm)
    given: Any = _possible(saes) if tasks is None else tasks
    chosen = [_task(task) for task in (given if isinstance(given, list | tuple) else [given])]
    if not chosen:
        raise ConfigError(f"there is no task: give some of {', '.join(TASKS)}")
    with reading_once():
        if out is None:
            return _summed(task.run(saes, lm) for task in chosen)
        folder = user_path(out)
        try_folder(folder)
        names = [[name, digests.of_tensors(sae.state_dict())] for name, sae in saes.items()]
        about = {"model": lm.digest, "tokenizer": lm.tokenizer_digest, "saes": names}
        return _summed(_kept(folder, task, about, saes, lm) for task in chosen)


def _possible(saes: Mapping[str, Dictionary]) -> list[str]:
    """Names of the tasks that need nothing that is not there."""
    there = {"stability": len(saes) > 1, "absorption": True}
    return [name for name in TASKS if there.get(name, is_installed())]


def _task(given: str | Task) -> Task:
    return TASKS[checks.choice("one of tasks", given, list(TASKS))]() if isinstance(given, str) else given


def _summed(parts: Any) -> Scores:
    return sum(parts, Scores([]))


def _kept(
    folder: Path, task: Task, about: dict[str, Any], saes: Mapping[str, Dictionary], lm: "LanguageModel"
) -> Scores:
    """The task's figures from its file in the folder, or computed and written there."""
    path = folder / f"{task.name}-{digests.of_json({**about, 'task': repr(task)})[:16]}.json"
    if not path.exists():
        scores = task.run(saes, lm)
        tables = [[name, _plain(table.to_dict("records"))] for name, table in scores.details.items()]
        with whole_file(path) as temporary:
            temporary.write_text(json.dumps({"rows": _plain(scores.rows), "details": tables}, indent=1))
    return _read(path)


def _plain(rows: Sequence[Mapping[Any, Any]]) -> list[dict[str, Any]]:
    return [{name: plain(value) for name, value in row.items()} for row in rows]


def _read(path: Path) -> Scores:
    import pandas

    kept = read_json(path, {"rows": list, "details": list})
    nothing = float("nan")
    rows = [{name: nothing if value is None else value for name, value in row.items()} for row in kept["rows"]]
    return Scores(rows, {name: pandas.DataFrame(table) for name, table in kept["details"]})
