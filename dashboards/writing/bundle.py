"""Chunks become a bundle (a folder) or a single file; both whole or not at all. `docs/dashboard-format.md`."""

import hashlib
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from saelab.base.errors import ConfigError, FormatError
from saelab.base.files import (
    PENDING,
    check_replaceable,
    current,
    listed_files,
    pending,
    plain_names,
    strangers,
    try_file,
    try_folder,
    user_path,
    whole_file,
    whole_folder,
)
from saelab.base.manifests import COUNT, DIGEST, SIZE, TEXT, Kind, exactly, parse_json, read_text
from saelab.dashboards.writing import codec
from saelab.dashboards.writing.tables import TABLES
from saelab.pages.packing import compress, to_text

_CHUNK = Kind(
    "[SHA-256, packed bytes, bytes]",
    lambda value: (
        isinstance(value, list) and len(value) == 3 and DIGEST.holds(value[0]) and all(map(COUNT.holds, value[1:]))
    ),
)
SCHEMA = {
    "format": exactly("saelab-dashboard"), "version": exactly(1), "chunks": {"*": _CHUNK}, "groups": [{"name": TEXT}],
    "saes": [{"prefix": TEXT, "pages": COUNT, "per_chunk": SIZE}], "tables?": [TEXT],
}  # fmt: skip
SINGLE_FILE_LIMIT = 100 * 2**20
PARQUET, MANIFEST = "parquet", "data/manifest.js"


def is_bundle(path: str | os.PathLike[str], bundle: bool | None = None) -> bool:
    """Whether a folder is meant: what `bundle` says, else any path without .html."""
    return bundle if bundle is not None else user_path(path).suffix.lower() not in (".html", ".htm")


def check(path: Path, bundle: bool | None, tables: bool) -> None:
    """Raise, before anything long is done, where `write` could not write or would have to replace what is the user's.

    `ConfigError` for a folder of something else; `CheckpointError` for files of the user's with names that are needed, and
    where nothing can be written.
    """
    if is_bundle(path, bundle):
        if path.exists() and listed(path) is None and (not path.is_dir() or (strangers(path) and not pending(path))):
            raise ConfigError(f"{path} is there already and is no dashboard: give another path, or remove it")
        names = [f"{PARQUET}/{name}" for name in TABLES] if tables else []
        check_replaceable(path, listed, "a dashboard", ["index.html", *names])
        try_folder(path)
        return
    try_file(path)
    if tables:
        check_replaceable(_beside(path), listed_files)


def listed(folder: Path) -> list[str] | None:
    """The files of a bundle, by its manifest; None for anything else."""
    try:
        manifest = _manifest(_texts(folder / MANIFEST), folder)
    except FormatError:
        return None
    chunks = [f"data/{name}.js" for name in manifest["chunks"]]
    tables = [f"{PARQUET}/{name}" for name in manifest.get("tables", TABLES)]  # bundles of before do not name them
    return plain_names([*tables, "index.html", *chunks, MANIFEST])


def _texts(file: Path) -> dict[str, str]:
    """The base64 of a chunk's file, by its name. Raises `FormatError` for another file."""
    found = re.fullmatch(r'__sl\("([a-z0-9-]+)","([A-Za-z0-9+/=]*)"\)\n', read_text(file))
    if found is None:
        raise FormatError(f"{file} is not a chunk of a dashboard")
    return {found[1]: found[2]}


def _beside(path: Path) -> Path:
    return path.with_suffix(f".{PARQUET}")


def write(
    path: str | os.PathLike[str],
    chunks: Iterable[tuple[str, bytes]],
    manifest: Mapping[str, Any],
    bundle: bool | None = None,
    beside: Callable[[Path], None] | None = None,
) -> Path:
    """Write containers as a single file, or with `bundle=True` as a folder; None goes by the suffix of `path`.

    `beside(folder)` writes the tables: into the bundle, or into `<name>.parquet` beside a single file. Returns the
    path of the page. Raises `ConfigError` where a single file would exceed 100 MiB.
    """
    if is_bundle(path, bundle):
        return _write_bundle(user_path(path), chunks, manifest, beside)
    return _write_single(user_path(path), chunks, manifest, beside)


def _described(member: bytes, container: bytes) -> list[Any]:
    return [hashlib.sha256(member).hexdigest(), len(member), len(container)]


def _write_bundle(path: Path, chunks: Iterable[tuple[str, bytes]], manifest: Mapping[str, Any], beside: Any) -> Path:
    from saelab.pages.shell import shell

    described: dict[str, list[Any]] = {}
    with whole_folder(path, listed=listed, what="a dashboard") as folder:
        (folder / "data").mkdir()
        for name, container in chunks:
            member = compress(container)
            described[name] = _described(member, container)
            _script(folder, name, member)
        if beside is not None:
            beside(folder / PARQUET)
        tables = sorted(path.name for path in (folder / PARQUET).glob("*"))
        _script(folder, "manifest", codec.manifest_bytes({**manifest, "chunks": described, "tables": tables}))
        with open(folder / "index.html", "w", encoding="utf-8", newline="\n") as file:
            file.writelines(shell())
    return path / "index.html"


def _script(folder: Path, name: str, member: bytes) -> None:
    statement = codec.script(name, to_text(member))
    (folder / "data" / f"{name}.js").write_text(statement, encoding="ascii", newline="\n")


def _write_single(path: Path, chunks: Iterable[tuple[str, bytes]], manifest: Mapping[str, Any], beside: Any) -> Path:
    from saelab.pages.shell import shell

    described: dict[str, list[Any]] = {}
    members: dict[str, bytes] = {}
    size = 0
    for name, container in chunks:
        members[name] = compress(container)
        described[name] = _described(members[name], container)
        size += (len(members[name]) + 2) // 3 * 4
        if size > SINGLE_FILE_LIMIT:
            raise ConfigError(
                f"a single file would have more than {SINGLE_FILE_LIMIT:,} bytes: write a bundle (bundle=True, or a path "
                "without .html), or ask for fewer latents or windows"
            )

    def inline() -> Iterator[tuple[str, str]]:
        yield "manifest", to_text(codec.manifest_bytes({**manifest, "chunks": described}))
        for name, member in members.items():
            yield name, to_text(member)

    if beside is not None:
        beside(_beside(path))
    with whole_file(path) as temporary, open(temporary, "w", encoding="utf-8", newline="\n") as file:
        file.writelines(shell(inline()))
    return path


def _manifest(texts: Mapping[str, str], page: Path) -> dict[str, Any]:
    if "manifest" not in texts:
        raise FormatError(f"{page} holds no dashboard: it has no manifest")
    return parse_json(codec.from_text(texts["manifest"]), SCHEMA, f"the manifest of {page}")


def read(path: str | os.PathLike[str]) -> tuple[dict[str, Any], dict[str, bytes]]:
    """(manifest, containers by name) of a written dashboard, single file or bundle.

    Raises `FormatError` for anything else, and where a chunk is damaged or is not as the manifest says.
    """
    path = user_path(path)
    page = path / "index.html" if path.is_dir() else path
    texts: dict[str, str] = {}
    if current(page.parent, MANIFEST).exists() and page.name == "index.html":
        for folder in (page.parent, page.parent / PENDING):  # what is pending after a kill is the newer
            for file in sorted((folder / "data").glob("*.js")):
                texts |= _texts(file)
    else:
        pattern = r'<script type="text/plain" id="([a-z0-9-]+)">([A-Za-z0-9+/=]*)</script>'
        texts = dict(re.findall(pattern, read_text(page)))
    manifest = _manifest(texts, page)
    containers = {}
    for name, (digest, _, size) in manifest["chunks"].items():
        if hashlib.sha256(codec.member(texts.get(name, ""))).hexdigest() != digest:
            raise FormatError(f"chunk {name} does not have the checksum of the manifest: it is missing or was changed")
        containers[name] = codec.from_text(texts[name])
        if len(containers[name]) != size:
            raise FormatError(f"chunk {name} unpacks to {len(containers[name]):,} bytes, the manifest says {size:,}")
    return manifest, containers
