"""Run: what training gives back, and what `load_run` reopens."""

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, overload

from saelab.autoencoders.sae import SAE
from saelab.autoencoders.serialization import architecture, of_state
from saelab.base.errors import CheckpointError, ConfigError, FormatError
from saelab.base.files import user_path, write_csv
from saelab.base.lazy import provided
from saelab.base.manifests import read_text
from saelab.base.protocols import Dashboard
from saelab.training import checkpoint

COLUMNS = ["step", "tokens", "loss", "l0", "explained_variance", "dead", "lr", "tokens_per_second"]


@dataclass
class Run:
    """A finished or interrupted training run.

    `sae` is the trained SAE; `path` its folder, None when no `out` was given; `interrupted` whether it ended before its
    tokens did. `report` holds the norms' figures (median, limit, share of the rows and of the variance left out).

    >>> import torch, saelab
    >>> run = saelab.train(torch.randn(512, 8), sae=saelab.TopK(k=2, d_sae=16), tokens=1024, batch_size=128, progress=False)
    >>> run.interrupted, list(run.history.columns)[:4]
    (False, ['step', 'tokens', 'loss', 'l0'])
    """

    sae: SAE
    rows: list[dict[str, Any]] = field(repr=False)
    path: Path | None = None
    interrupted: bool = False
    report: dict[str, Any] = field(default_factory=dict)

    @property
    def history(self) -> Any:
        """One row a logged step, a pandas.DataFrame: step, tokens, loss, l0, explained_variance, dead, lr, tokens_per_second.

        `loss`, `l0` and `explained_variance` (1 - sum |x - x_hat|^2 / sum |x - mean|^2) are of that step's batch; `dead` is
        the number of latents that have not fired for the run's dead-after span.
        """
        import pandas

        frame = pandas.DataFrame(self.rows)
        return frame[COLUMNS + [name for name in frame.columns if name not in COLUMNS]] if len(frame) else frame

    def plot(self) -> Any:
        """A plotly figure of loss, explained variance, L0 and dead latents over tokens, and of what the architecture shows over
        the ranks of the latents (Feature Choice: densities, budgets and the law)."""
        from plotly.subplots import make_subplots

        history, curves = self.history, self.sae.cfg.by_rank(self.sae.state)
        shown = [("loss", "loss"), ("explained_variance", "explained variance"), ("l0", "L0"), ("dead", "dead latents")]
        titles = [title for _, title in shown] + [", ".join(curves)]
        rows = 3 if curves else 2
        layout = [[{}, {}], [{}, {}], [{"colspan": 2}, None]]
        figure = make_subplots(rows=rows, cols=2, specs=layout[:rows], subplot_titles=titles[: 2 * rows])
        for i, (name, title) in enumerate(shown):
            figure.add_scatter(x=history.tokens, y=history[name], name=title, row=i // 2 + 1, col=i % 2 + 1)
        figure.update_xaxes(title_text="tokens", row=2)
        for name, curve in curves.items():
            figure.add_scatter(x=list(range(1, len(curve) + 1)), y=curve.tolist(), name=name, row=3, col=1)
        if curves:
            figure.update_xaxes(title_text="rank of the latent", type="log", row=3)
            figure.update_yaxes(title_text="share of the tokens", type="log", row=3)
        figure.update_layout(title=repr(self.sae), showlegend=False, height=280 * rows)
        return figure

    def dashboard(
        self, path: str | os.PathLike[str] | None = None, lm: Any = None, corpus: Any = None, **options: Any
    ) -> Dashboard:
        """A dashboard of the run's SAE: `dashboard.html` in its folder, or `path`. Up to 4,096 live latents have a page unless
        `latents=` says otherwise.

        Model and corpus are those of the training unless given; `options` are those of `saelab.dashboards.build`.

        >>> saelab.load_run("runs/demo").dashboard(latents=64, effects=None)  # doctest: +SKIP
        """
        return provided("of_run")(self, path, lm, corpus, **options)

    def __repr__(self) -> str:
        if not self.rows:
            return f"Run({self.sae!r}, nothing logged)"
        last = self.rows[-1]
        state = "interrupted at" if self.interrupted else "finished after"
        return (
            f"Run({self.sae!r}, {state} {last['tokens']:,} tokens: explained variance {last['explained_variance']:.4f}, "
            f"L0 {last['l0']:.1f}, {last['dead']:,} dead" + (f", in {self.path})" if self.path else ")")
        )

    def write(self) -> None:
        """Write `sae/` and `history.csv` into the run's folder."""
        if self.path is not None:
            self.sae.save(self.path / "sae")
            write_csv(self.path / "history.csv", self.history)


def load_run(path: str | os.PathLike[str]) -> Run:
    """Reopen the run in a folder: finished, interrupted or killed.

    Raises `CheckpointError` when the folder holds no run, or one that was killed before its first checkpoint.

    >>> import tempfile, torch, saelab
    >>> folder = tempfile.mkdtemp()
    >>> run = saelab.train(torch.randn(512, 8), sae=saelab.TopK(k=2, d_sae=16), tokens=1024, batch_size=128, out=folder,
    ...                    progress=False)
    >>> torch.equal(saelab.load_run(folder).sae.W_dec, run.sae.W_dec)
    True
    """
    folder = user_path(path)
    found = checkpoint.read_run(folder) if folder.is_dir() else None
    if found is None:
        where = f"no {checkpoint.RUN} is in it" if folder.is_dir() else "there is no such folder"
        raise CheckpointError(f"{folder} holds no run: {where}; give the `out` of a training")
    if found["status"] == "finished" and not (folder / "sae").exists():
        runs = ", ".join(sorted(path.name for path in folder.iterdir() if path.is_dir()))
        raise CheckpointError(f"{folder} holds a sweep: load one of its runs ({runs})")
    if found["status"] == "finished":
        try:
            return Run(SAE.load(folder / "sae"), _rows(folder / "history.csv"), folder, False, found["report"])
        except FormatError as error:
            raise CheckpointError(f"the run in {folder} was finished, and was changed since: {error}") from error
    if "sae" not in found["fingerprint"]:
        raise CheckpointError(f"{folder} holds an unfinished sweep: run the same call again to continue it")
    latest = checkpoint.load_latest(folder)
    if latest is None:
        raise CheckpointError(f"the run in {folder} ended before its first checkpoint: start it again")
    _, tensors, histories = latest
    weights = checkpoint.part(tensors, "0.sae.")
    try:
        cfg = architecture(found["fingerprint"]["sae"], f"{folder / checkpoint.RUN}")
        sae = of_state(cfg, weights, found["metadata"], f"{folder}")
    except FormatError as error:
        raise CheckpointError(f"the run in {folder} cannot be reopened: {error}") from error
    return Run(sae, histories[0], folder, True, found["report"])


def _rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a history.csv."""
    import io

    import pandas

    try:
        table = pandas.read_csv(io.StringIO(read_text(path)))
        numbers = table[COLUMNS].astype(float)
    except (ValueError, KeyError) as error:  # every parser's error of pandas is a ValueError
        raise FormatError(f"{path} is not the history of a run: {error}") from error
    if not len(numbers) or not bool((numbers[["step", "tokens", "dead"]] >= 0).all(axis=None)):
        raise FormatError(f"{path} is not the history of a run: a step, a count of tokens or of dead latents is none")
    return [{str(name): value for name, value in row.items()} for row in table.to_dict("records")]


class Sweep(Sequence[Run]):
    """The runs of `saelab.sweep`, in the order of its list.

    >>> import torch, saelab
    >>> x = torch.randn(512, 8)
    >>> runs = saelab.sweep(x, [saelab.TopK(k=k, d_sae=16) for k in (1, 2)], tokens=512, batch_size=128, progress=False)
    >>> runs.to_pandas().l0.tolist()
    [1.0, 2.0]
    """

    def __init__(self, runs: list[Run]) -> None:
        self.runs = runs

    def __len__(self) -> int:
        return len(self.runs)

    @overload
    def __getitem__(self, i: int) -> Run: ...
    @overload
    def __getitem__(self, i: slice) -> "Sweep": ...
    def __getitem__(self, i: int | slice) -> "Run | Sweep":
        return Sweep(self.runs[i]) if isinstance(i, slice) else self.runs[i]

    def to_pandas(self) -> Any:
        """One row a run, a pandas.DataFrame: its configuration and the last row of its history."""
        import pandas

        return pandas.DataFrame([{"sae": repr(run.sae.cfg), **(run.rows[-1] if run.rows else {})} for run in self.runs])

    def plot(self, against: str = "explained_variance") -> Any:
        """A plotly figure of L0 against a column of `to_pandas`, such as "explained_variance", or "delta_ce" where the
        sweep evaluated; `ConfigError` when there is no such column.
        """
        import plotly.express

        table = self.to_pandas()
        if against not in table:
            raise ConfigError(
                f"there is no column {against!r}: choose one of {', '.join(table.columns)} "
                "(sweep(..., evaluate_every=...) adds those of an evaluation)"
            )
        table["architecture"] = table.sae.str.partition("(")[0]
        return plotly.express.line(
            table.sort_values("l0"), x="l0", y=against, color="architecture", markers=True, hover_name="sae"
        )

    def __repr__(self) -> str:
        return (
            f"Sweep of {len(self)} runs:\n{self.to_pandas().to_string(index=False)}" if self.runs else "Sweep of no run"
        )
