"""`load_sae`: everybody's SAEs, by folder, file, hub repository or well-known name."""

import os
from pathlib import Path

import torch

from saelab.autoencoders import serialization
from saelab.autoencoders.foreign import described
from saelab.autoencoders.sae import SAE
from saelab.base import checks
from saelab.base.errors import ConfigError, FormatError
from saelab.base.files import user_path
from saelab.base.manifests import held
from saelab.interop import hub
from saelab.interop.detection import READERS, format_of
from saelab.interop.given import Given
from saelab.interop.releases import Entry, release_of


def load_sae(
    what: str | os.PathLike[str],
    sae_id: str | None = None,
    *,
    format: str | None = None,
    revision: str | None = None,
    site: str | None = None,
    target_site: str | None = None,
    model: str | None = None,
    k: int | None = None,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | str | None = None,
) -> SAE:
    """An SAE or transcoder of any project that saelab reads, with its own numbers; what it is gets printed.

    `what` is a local folder or file; a release by its well-known name, with `sae_id` one of its SAEs
    ("gemma-scope-2b-pt-res", "layer_12/width_16k/canonical"); or a repository on the Hugging Face hub, with `sae_id` the
    folder or file in it. Of a repository only the needed files are fetched, once. With the environment variable `SAELAB_HUB`
    a folder (holding `<owner>/<name>/...`) or the address of a mirror stands in place of the hub; `HF_HUB_OFFLINE=1` keeps
    to what is in the cache.

    Read are SAELens (6 and before), dictionary_learning, sparsify, OpenAI, Gemma Scope 1 and 2, Llama Scope, Qwen Scope,
    circuit-tracer's transcoders and saelab's own. Codes, biases and thresholds come as for the raw activation, weights in fp32
    unless `dtype`. Its parameters need no gradient. It has no activation statistics: `saelab.calibrate` measures them.

    Args:
        what: folder, file, release or repository.
        sae_id: which SAE of a release, or the path in a repository or folder.
        format: what the files are, where they do not say: one of "saelens", "dictionary_learning", "sparsify", "openai",
            "gemma_scope", "gemma_scope_2", "llama_scope", "llama_scope_r1", "qwen_scope", "kissane", "goodfire",
            "layer_transcoder".
        revision: of the repository, a commit or tag; None is that of the table, else the newest.
        site, target_site, model, k: what the files do not say; what is given here wins.
        device, dtype: as for `SAE.load`.

    Raises `FormatError` for files that are broken, hold code, leave their folder or are of an architecture that saelab has not
    (which is named), `ConfigError` for an unknown name and where the hub cannot be reached.

    >>> load_sae("gemma-scope-2b-pt-res-canonical", "layer_12/width_16k/canonical")  # doctest: +SKIP
    """
    given = Given(site, target_site, model, checks.maybe(checks.count, "k", k))
    if format is not None:
        checks.choice("format", format, tuple(READERS))
    place, kind = checks.device_of(device), checks.dtype_of(dtype)
    path, entry = _found(what, sae_id, revision)
    sae = read_path(path, format, given if entry is None else entry.adding_to(given))
    _say(sae, path, entry)
    return sae.to(device=place, dtype=kind)


def read_path(path: Path, format: str | None = None, given: Given | None = None) -> SAE:
    """The SAE in a local folder or file, of whatever project."""
    given = given or Given()
    found = format or format_of(path)
    if found == "saelab":
        return serialization.load(path).requires_grad_(False)
    if found is None:
        raise FormatError(f"{path} is no SAE that is read here: {described(path)}")
    reader, name = READERS[found]
    if name and path.is_dir():
        there = sorted(path.glob(name))
        if len(there) != 1:
            raise FormatError(f"{path} has {len(there)} files {name}, not one: give that which is meant")
        path = held(path, there[0].name)
    if not name and path.is_file():
        path = path.parent
    return reader(path, given)


def _found(what: str | os.PathLike[str], sae_id: str | None, revision: str | None) -> tuple[Path, Entry | None]:
    local = user_path(what, or_text=True)
    if local.exists():
        return (local if sae_id is None else local / sae_id), None
    if isinstance(what, os.PathLike):
        raise FormatError(f"{local} is no SAE that is read here: there is no such file or folder")
    entry = release_of(what, sae_id)
    if entry is not None:
        return hub.fetched(entry.repository, entry.path, revision or entry.revision), entry
    if what.count("/") != 1:
        raise ConfigError(
            f"{what!r} is no local file or folder, no release that is known by name (saelab.interop.releases.names() lists "
            "them) and no hub repository, owner/name"
        )
    return hub.fetched(what, sae_id or "", revision), None


def _say(sae: SAE, path: Path, entry: Entry | None) -> None:
    origin = f"{entry.repository} {entry.path} at {hub.revision_of(path) or 'a local copy'}" if entry else f"{path}"
    notes = [sae.metadata["model_processing"]] if "model_processing" in sae.metadata else []
    print(f"{origin}: {sae!r}" + "".join(f"; {note}" for note in notes))
