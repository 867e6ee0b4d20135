"""Run: what training gives back, and what `load_run` reopens."""

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from saelab.autoencoders.architecture import Architecture
from saelab.autoencoders.sae import SAE
from saelab.errors import CheckpointError
from saelab.files import whole_file
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
        """A plotly figure of loss, explained variance, L0 and dead latents over tokens."""
        from plotly.subplots import make_subplots

        history = self.history
        shown = [("loss", "loss"), ("explained_variance", "explained variance"), ("l0", "L0"), ("dead", "dead latents")]
        figure = make_subplots(rows=2, cols=2, subplot_titles=[title for _, title in shown])
        for i, (name, title) in enumerate(shown):
            figure.add_scatter(x=history.tokens, y=history[name], name=title, row=i // 2 + 1, col=i % 2 + 1)
        figure.update_xaxes(title_text="tokens", row=2)
        figure.update_layout(title=repr(self.sae), showlegend=False, height=560)
        return figure

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
            with whole_file(self.path / "history.csv") as temporary:
                self.history.to_csv(temporary, index=False)


def load_run(path: str | os.PathLike) -> Run:
    """Reopen the run in a folder: finished, interrupted or killed.

    Raises `CheckpointError` when the folder holds no run, or one that was killed before its first checkpoint.

    >>> import tempfile, torch, saelab
    >>> folder = tempfile.mkdtemp()
    >>> run = saelab.train(torch.randn(512, 8), sae=saelab.TopK(k=2, d_sae=16), tokens=1024, batch_size=128, out=folder,
    ...                    progress=False)
    >>> torch.equal(saelab.load_run(folder).sae.W_dec, run.sae.W_dec)
    True
    """
    folder = Path(path)
    found = checkpoint.read_run(folder) if folder.is_dir() else None
    if found is None:
        raise CheckpointError(f"{folder} holds no run: no {checkpoint.RUN} is in it")
    if found["status"] == "finished":
        import pandas

        rows = [
            {str(k): v for k, v in row.items()} for row in pandas.read_csv(folder / "history.csv").to_dict("records")
        ]
        return Run(SAE.load(folder / "sae"), rows, folder, False, found["report"])
    latest = checkpoint.load_latest(folder)
    if latest is None:
        raise CheckpointError(f"the run in {folder} ended before its first checkpoint: start it again")
    _, tensors, rows = latest
    weights = {k.removeprefix("sae."): v for k, v in tensors.items() if k.startswith("sae.")}
    cfg = Architecture.from_dict(found["fingerprint"]["sae"])
    sae = SAE(cfg, weights["encoder_weight"].shape[1], found["metadata"])
    sae.load_state_dict(weights)
    return Run(sae, rows, folder, True, found["report"])
