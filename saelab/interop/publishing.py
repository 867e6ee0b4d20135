"""SAEs to a repository of the Hugging Face hub, with a card that says what they are."""

import dataclasses
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from saelab.autoencoders import serialization
from saelab.autoencoders.sae import SAE
from saelab.base.errors import CheckpointError, ConfigError
from saelab.base.files import plain_names, user_path
from saelab.interop import cards

if TYPE_CHECKING:
    from pandas import DataFrame

CARD = "README.md"


@dataclasses.dataclass(frozen=True, repr=False)
class Publication:
    """What was sent to the hub, or with `dry_run` would be."""

    repo: str
    """the repository"""
    files: dict[str, int]
    """the bytes of each file, by its name in the repository"""
    card: str
    """the README.md"""
    private: bool
    """whether a new repository is private"""
    url: str | None
    """the commit; None where nothing was sent"""

    def to_pandas(self) -> "DataFrame":
        """One row a file."""
        from pandas import DataFrame

        return DataFrame({"file": list(self.files), "bytes": list(self.files.values())})

    def __repr__(self) -> str:
        done = f"sent: {self.url}" if self.url else "nothing was sent (dry run)"
        head = f"{self.repo}, {'private' if self.private else 'public'}, {done}"
        return "\n".join([head, *(f"  {size:>14,}  {name}" for name, size in self.files.items())])


def publish(
    sae: SAE,
    repo: str,
    report: Any = None,
    *,
    folder: str | None = None,
    dashboard: Any = None,
    license: str | None = None,
    private: bool = True,
    dry_run: bool = False,
) -> Publication:
    """Send an SAE to a repository of the Hugging Face hub in one commit: our folder, which is SAELens', and a card.

    The card says what it is, what it was trained on, its figures and how to load it in both libraries. A repository may have
    several SAEs, each in a folder: a card that is there keeps what it says, and gets or renews the section of this folder.
    The weights go with `sae.metadata`, in which foreign SAEs have the path that they were read from.

    Args:
        sae: the SAE.
        repo: "name" or "organisation/name"; it is made where it is not there.
        report: what `saelab.evaluate` gives, for the card's figures.
        folder: where in the repository; by default the name of the site.
        dashboard: a `Dashboard`, or the path of a page or of a bundle's index.html, to be put beside it.
        license: an identifier of the hub's ("mit"), of a new card.
        private: whether nobody else sees a new repository.
        dry_run: send and ask nothing, only say what would be sent (a card as of a new repository).

    Raises `ConfigError` for what is no repository, folder, report or page, and for a public repository where `private` is left
    True; `CheckpointError` where the hub cannot be reached or refuses.

    >>> import saelab
    >>> sae = SAE(saelab.TopK(k=2, d_sae=8), 4, {"site": "blocks.3.hook_resid_post"})
    >>> publish(sae, "me/my-saes", dry_run=True)  # doctest: +ELLIPSIS
    me/my-saes, private, nothing was sent (dry run)
               ...  README.md
               ...  blocks.3.hook_resid_post/cfg.json
               ...  blocks.3.hook_resid_post/sae_weights.safetensors
               ...  blocks.3.hook_resid_post/saelab.safetensors
    """
    import huggingface_hub as hub

    folder = _checked(repo, folder or str(sae.metadata.get("site") or "sae"))
    with tempfile.TemporaryDirectory() as name:
        staged = Path(name)
        serialization.save(sae, staged / "sae")
        files = {f"{folder}/{path.name}": path for path in (staged / "sae").iterdir()}
        files |= {f"{folder}/dashboard/{name}": path for name, path in _page(dashboard).items()}
        text, url, api = cards.card(sae, repo, folder, report, license), None, hub.HfApi()
        if not dry_run:
            with _hub_errors_named(repo):
                repo = api.create_repo(repo, private=private, exist_ok=True).repo_id
                if private and not api.repo_info(repo).private:
                    raise ConfigError(
                        f"{repo} is public: say private=False to send this SAE to it, or give another name"
                    )
                if api.file_exists(repo, CARD):
                    present = Path(api.hf_hub_download(repo, CARD, local_dir=staged / "present")).read_text("utf-8")
                    text = cards.merged(present, sae, repo, folder, report)
        files[CARD] = staged / CARD
        files[CARD].write_text(text, encoding="utf-8")
        sizes = {name: files[name].stat().st_size for name in sorted(files)}
        if not dry_run:
            operations = [hub.CommitOperationAdd(name, files[name]) for name in sizes]
            with _hub_errors_named(repo):
                commit = api.create_commit(repo, operations, commit_message=f"Add {folder} ({sae.cfg!r})")
            url = str(commit.commit_url)
    return Publication(repo, sizes, text, private, url)


def _checked(repo: str, folder: str) -> str:
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils._validators import validate_repo_id

    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        raise ConfigError(f"{repo!r} is no name of a repository: {error}") from error
    if plain_names([folder]) != [folder] or folder != folder.strip("/. "):
        raise ConfigError(f"folder is {folder!r}: give the name of a folder in the repository, such as 'layer_3/topk'")
    return folder


def _page(dashboard: Any) -> dict[str, Path]:
    """The files of a dashboard by their names in its folder."""
    if dashboard is None:
        return {}
    page = user_path(getattr(dashboard, "path", dashboard))
    if page.is_dir():
        page = page / "index.html"
    if not page.is_file():
        raise ConfigError(f"there is no page {page}: give a Dashboard or the path of one")
    data = page.parent / "data"
    bundled = page.name == "index.html" and data.is_dir()
    more = {path.relative_to(page.parent).as_posix(): path for path in sorted(data.rglob("*")) if path.is_file()}
    return {page.name: page} | (more if bundled else {})


@contextmanager
def _hub_errors_named(repo: str) -> Iterator[None]:
    from huggingface_hub import constants
    from huggingface_hub.errors import HfHubHTTPError

    refusals: tuple[type[BaseException], ...] = (*HfHubHTTPError.__bases__, OSError)  # of the client that it asks with

    try:
        yield
    except refusals as error:
        offline = " (HF_HUB_OFFLINE is set)" if constants.HF_HUB_OFFLINE else ""
        raise CheckpointError(
            f"cannot write to {repo} on the hub{offline}: {error}. A commit is whole or not at all; log in with "
            "`hf auth login` as somebody who may write there, or look first with dry_run=True"
        ) from error
