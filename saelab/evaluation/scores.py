"""What a benchmark found: one row a figure, with its interval and the controls beside it."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from saelab.base import checks
from saelab.base.errors import ConfigError
from saelab.base.files import user_path, whole_file
from saelab.base.protocols import Dictionary
from saelab.base.statistics import mean_interval

if TYPE_CHECKING:
    from pandas import DataFrame

SAE_ITSELF = "sae"
SHOWN = 12  # rows that are printed


@dataclass(frozen=True)
class Score:
    """One figure of one task for one autoencoder.

    >>> Score.mean("f1", [0.5, 1.0], of="children").value
    0.75
    """

    figure: str
    value: float
    low: float
    """bounds of the 95% interval; NaN where none can be given"""
    high: float
    n: int
    """how many of what the interval is over (the task says: texts, features, words, ...)"""
    of: str = ""
    """the part it is about: a data set, a class, a number of latents"""
    source: str = SAE_ITSELF
    """"sae", or the control that stands in its place"""

    @classmethod
    def mean(cls, figure: str, values: Any, of: str = "", source: str = SAE_ITSELF) -> "Score":
        """The mean of independent values, with its bootstrap interval."""
        values = [float(value) for value in values]
        value = sum(values) / len(values) if values else float("nan")
        return cls(figure, value, *mean_interval(values), len(values), of, source)


class Scores:
    """The figures of `saelab.benchmark` or `saelab.synthetic.recovery`.

    `rows` are they as dicts; `details` has a table a task, with what the figures are means of.

    | column | meaning |
    |---|---|
    | sae, task, figure, of | whose, of which task, which figure, of which part (data set, class, number of latents) |
    | source | "sae", or the control that was measured in its place |
    | value, low, high, n | the figure, its 95% interval, over how many units that is |

    >>> scores = Scores.of("a", "counting", [Score.mean("length", [1.0, 3.0]), Score.mean("length", [1, 1], source="chance")])
    >>> scores.value("length"), scores.value("length", source="chance")
    (2.0, 1.0)
    """

    def __init__(
        self,
        rows: Iterable[Mapping[str, Any]],
        details: "Mapping[str, DataFrame] | None" = None,
        settings: Mapping[str, Any] | None = None,
    ) -> None:
        self.rows = [dict(row) for row in rows]
        self.details, self.settings = dict(details or {}), dict(settings or {})

    @classmethod
    def of(cls, sae: str, task: str, scores: "Sequence[Score]", details: "DataFrame | None" = None) -> "Scores":
        """Of one task and one autoencoder."""
        return cls(
            [{"sae": sae, "task": task, **asdict(score)} for score in scores],
            {} if details is None else {task: details.assign(sae=sae)},
        )

    def __add__(self, other: "Scores") -> "Scores":
        import pandas

        details = {
            task: pandas.concat(
                [part.details[task] for part in (self, other) if task in part.details], ignore_index=True
            )
            for task in {**self.details, **other.details}
        }
        return Scores([*self.rows, *other.rows], details, self.settings | other.settings)

    def to_pandas(self) -> "DataFrame":
        """One row a figure, a pandas.DataFrame; see the class for the columns."""
        import pandas

        columns = ["sae", "task", "figure", "of", "source", "value", "low", "high", "n"]
        return pandas.DataFrame(self.rows, columns=columns)

    def value(self, figure: str, **where: str) -> float:
        """The one figure of this name, of the SAE itself unless `source` names a control.

        Args:
            where: `sae`, `task`, `of` and `source`, where several rows have the name.

        Raises `ConfigError` unless that is exactly one row.
        """
        wanted = {"figure": figure, "source": SAE_ITSELF, **where}
        found = [row for row in self.rows if all(row.get(name) == value for name, value in wanted.items())]
        if len(found) > 1 and "of" not in where:
            found = [row for row in found if row["of"] == ""] or found
        if len(found) != 1:
            near = sorted(
                {f"{row['task']}: {row['figure']}" + (f" of {row['of']}" if row["of"] else "") for row in self.rows}
            )
            raise ConfigError(
                f"{len(found)} rows have {wanted}; there are {'; '.join(near[:20])}: give sae=, task=, of= or source="
            )
        return float(found[0]["value"])

    def plot(self) -> Any:
        """A plotly figure: a panel a task, each figure with its interval, the autoencoders and their controls by colour."""
        import plotly.express

        table = self.to_pandas()
        table["figure"] = [written(row) for row in self.rows]
        table["whose"] = [whose(row) for row in self.rows]
        table["above"], table["below"] = table.high - table.value, table.value - table.low
        drawn = plotly.express.scatter(
            table, x="value", y="figure", color="whose", error_x="above", error_x_minus="below", facet_row="task",
            height=120 * table.task.nunique() + 22 * table.groupby("task").figure.nunique().sum(),
        )  # fmt: skip
        return drawn.update_yaxes(matches=None, autorange="reversed", title="")

    def to_html(self, path: Any) -> Path:
        """Write one self-contained page: a section a task, each figure beside its controls, on one scale. It needs no network;
        whatever the names hold is shown, not obeyed. Raises `CheckpointError` on a full or read-only disk."""
        from saelab.evaluation.scores_page import page

        target = user_path(path)
        with whole_file(target) as temporary:
            temporary.write_text(page(self), encoding="utf-8")
        return target

    def __len__(self) -> int:
        return len(self.rows)

    def __repr__(self) -> str:
        shown = self.to_pandas().head(SHOWN).to_string(index=False, float_format="{:.3f}".format, max_colwidth=24)
        rest = len(self) - SHOWN
        return shown if rest <= 0 else f"{shown}\n... and {rest:,} more: to_pandas() has all"

    def _repr_html_(self) -> str:
        return str(self.to_pandas().to_html(index=False, float_format="{:.3f}".format))


def written(row: Mapping[str, Any]) -> str:
    """A figure with the part that it is about.

    >>> written({"figure": "f1", "of": "k 1"})
    'f1, k 1'
    """
    return row["figure"] + (f", {row['of']}" if row["of"] else "")


def whose(row: Mapping[str, Any]) -> str:
    """The autoencoder, or its control."""
    return row["sae"] if row["source"] == SAE_ITSELF else f"{row['source']} ({row['sae']})"


def named(saes: Any) -> dict[str, Dictionary]:
    """Autoencoders by name: one, a run, or a list, sweep or mapping of them; unless named, by configuration and number.

    >>> import saelab
    >>> list(named([saelab.SAE(saelab.TopK(k=1, d_sae=4), 2)] * 2))
    ['TopK(k=1, d_sae=4)', 'TopK(k=1, d_sae=4) 2']
    """
    one = hasattr(saes, "encode_sparse") or hasattr(saes, "sae")
    given = (
        saes
        if isinstance(saes, Mapping)
        else [saes]
        if one or not isinstance(saes, Iterable | Sequence)
        else list(saes)
    )
    if not len(given):
        raise ConfigError("there is no autoencoder to score: give one, or a list or mapping of them")
    pairs = given.items() if isinstance(given, Mapping) else [(None, value) for value in given]
    found: dict[str, Dictionary] = {}
    for name, value in pairs:
        sae = checks.autoencoder("one of saes", getattr(value, "sae", value))
        label, number = str(repr(sae.cfg) if name is None else name), 2
        free = label
        while free in found:
            free, number = f"{label} {number}", number + 1
        found[free] = sae
    return found
