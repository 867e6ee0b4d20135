"""Dashboard: a written page, shown in a notebook in a frame that can reach nothing."""

import html
import os
from pathlib import Path

from saelab.base.files import user_path
from saelab.dashboards.writing import bundle, tables

EMBEDDED = 40 * 2**20  # larger pages are linked, not copied into a notebook


class Dashboard:
    """A dashboard on disk; `path` is the page to open. Made by `saelab.dashboards.build`.

    In a notebook a single file is shown in a frame without access to the notebook's page, its storage or the network.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = user_path(path)

    def __repr__(self) -> str:
        written = self.path.stat().st_size / 2**20 if self.path.is_file() else 0
        return f"Dashboard({str(self.path)!r}, {written:.1f} MiB)"

    def _repr_html_(self) -> str:
        """A sandboxed frame with the page itself in `srcdoc`; a link for bundles and for pages over 40 MiB."""
        where = html.escape(str(self.path.absolute()))
        if self.path.name == "index.html" and (self.path.parent / "data").is_dir():
            return f"<p>A bundle: open <code>{where}</code> in a browser.</p>"
        if self.path.stat().st_size > EMBEDDED:
            return f"<p>{self.path.stat().st_size:,} bytes: open <code>{where}</code> in a browser.</p>"
        page = html.escape(self.path.read_text(encoding="utf-8"), quote=True)
        return (
            f'<iframe title="Feature dashboard" sandbox="allow-scripts allow-downloads" srcdoc="{page}" '
            'style="width:100%;height:720px;border:1px solid #8884"></iframe>'
        )

    @property
    def data(self) -> tables.Data:
        """What the page holds: the manifest and the decoded chunks. Raises `FormatError` where it was damaged."""
        return tables.Data(*bundle.read(self.path))

    def open(self) -> None:
        """Open the page in the browser."""
        import webbrowser

        webbrowser.open(self.path.absolute().as_uri())

    def to_neuronpedia(
        self, path: str | os.PathLike[str], model_id: str | None = None, sae_set: str | None = None
    ) -> Path:
        """Write the pages as a batch of Neuronpedia's JSON; `model_id` and `sae_set` default to the names of model and
        site."""
        from saelab.dashboards.writing import neuronpedia

        return neuronpedia.write(self.data, user_path(path), model_id, sae_set)

    def to_parquet(self, folder: str | os.PathLike[str]) -> Path:
        """Write the tables as Parquet files."""
        target = user_path(folder)
        tables.write_parquet(self.data, target)
        return target
