"""The files of an SAE from the Hugging Face hub, or from what stands in its place.

`SAELAB_HUB` is one setting for both: a folder that holds `<owner>/<name>/<files>`, or the address of a mirror.
"""

import os
import re
from pathlib import Path, PurePosixPath

from saelab.base.errors import ConfigError
from saelab.base.files import user_path
from saelab.base.manifests import held, inside

_BESIDE = (  # the small files that readers look for beside weights
    "cfg.json", "config.json", "config.yaml", "hyperparams.json", "activation_scaler.json", "activation_whitening.safetensors",
)  # fmt: skip
_WEIGHTS = (
    "sae_weights.safetensors", "saelab.safetensors", "sparsity.safetensors", "ae.pt", "sae.safetensors", "params.npz",
    "params.safetensors", "checkpoints/final.safetensors",
)  # fmt: skip


def fetched(repository: str, path: str, revision: str | None) -> Path:
    """The local folder or file at `path` of a repository, its files fetched if they are not there yet.

    Raises `ConfigError` when the repository or path cannot be had, with the way out.
    """
    place = os.environ.get("SAELAB_HUB")
    if place and not re.match("https?://", place):
        folder = inside(user_path(place), repository)
        found = held(folder, path) if path else folder
        if not found.exists():
            raise ConfigError(
                f"SAELAB_HUB is the folder {place}, and {found} is not in it: put the files there, or unset it"
            )
        return found
    return _from_hub(repository, path, revision, place)


def revision_of(path: Path) -> str | None:
    """The commit that a file in the hub's cache is of."""
    parts = path.absolute().parts
    return parts[parts.index("snapshots") + 1] if "snapshots" in parts[:-1] else None


def _from_hub(repository: str, path: str, revision: str | None, endpoint: str | None) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    name = PurePosixPath(path)  # of a file or of a folder: its name does not say
    wanted = [str(name / file) for file in (*_BESIDE, *_WEIGHTS)]
    wanted += [str(name), *(str(name.with_name(file)) for file in (*_BESIDE, f"{name.stem}_cfg.json") if name.name)]
    try:
        root = Path(snapshot_download(repository, revision=revision, allow_patterns=wanted, endpoint=endpoint))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ConfigError(
            f"{repository} cannot be had from the hub ({reason}). Without a network: fetch its files elsewhere (hf download "
            f"{repository} --include '{name}/*'), and give the folder, or one with {repository}/ in it as SAELAB_HUB"
        ) from error
    found = held(root, path) if path else root
    if not found.exists():
        raise ConfigError(f"{repository} has no {path!r}{f' at {revision}' if revision else ''}")
    return found
