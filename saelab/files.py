"""Files are written whole or not at all: temporary sibling, fsync, rename, checksummed manifest."""

import contextlib
import ctypes
import errno
import hashlib
import json
import os
import secrets
import shutil
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from saelab.errors import CheckpointError, ConfigError, FormatError

MANIFEST = "manifest.json"


def cache_folder() -> Path:
    """The folder for what can be made again: `$SAELAB_CACHE`, else `~/.cache/saelab`."""
    return user_path(os.environ.get("SAELAB_CACHE") or "~/.cache/saelab")


def user_path(path: Any) -> Path:
    """A path that a user gives, a string or `os.PathLike`: `~` is the home folder, a relative one stays relative.

    Every function that takes a path from a user takes it through this one. Raises `ConfigError` for what is no path.

    >>> user_path("runs/demo"), user_path("~/runs").is_absolute()
    (PosixPath('runs/demo'), True)
    """
    text = os.fspath(path) if isinstance(path, str | os.PathLike) else None
    if not isinstance(text, str) or not text or "\0" in text:
        raise ConfigError(f"{path!r} is not a path: give the name of a file or folder, a string or pathlib.Path")
    try:
        return Path(text).expanduser()
    except RuntimeError as error:
        raise ConfigError(
            f"{text!r}: {error} (`~` is the home folder, `~name` that of a user): write it out"
        ) from error


def sha256(path: str | os.PathLike) -> str:
    """Hexadecimal SHA-256 of a file's bytes."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _fsync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _sibling(path: Path) -> Path:
    return path.with_name(f".{path.name}.tmp-{os.getpid()}-{secrets.token_hex(4)}")


@contextlib.contextmanager
def _disk_errors_named(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES):
            free = shutil.disk_usage(_existing(path)).free
            raise CheckpointError(
                f"cannot write {path}: {error.strerror} ({free:,} bytes free). What was there before is "
                "untouched: free some space or give another folder, and run again."
            ) from error
        raise
    except Exception as error:  # safetensors reports the operating system's errors as its own class
        if type(error).__name__ == "SafetensorError" and "os error" in str(error).lower():
            free = shutil.disk_usage(_existing(path)).free
            raise CheckpointError(
                f"cannot write {path}: {error} ({free:,} bytes free). What was there before is "
                "untouched: free some space or give another folder, and run again."
            ) from error
        raise


def _exchange(one: Path, other: Path) -> None:
    """Swap two folders, in one step where the system can (Linux), so that a kill never leaves neither in place."""
    here, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    renameat2 = getattr(ctypes.CDLL(None), "renameat2", None) if sys.platform == "linux" else None
    if renameat2 is not None and renameat2(here, bytes(one), here, bytes(other), exchange) == 0:
        return
    aside = _sibling(other)
    os.rename(other, aside)
    os.rename(one, other)
    os.rename(aside, one)


def _existing(path: Path) -> Path:
    path = path.absolute()
    while not path.exists():
        path = path.parent
    return path


@contextlib.contextmanager
def whole_file(path: str | os.PathLike) -> Iterator[Path]:
    """Yield a temporary sibling to write to; on success it replaces `path`, on error nothing changes.

    Raises `CheckpointError` on a full or read-only disk.

    >>> import tempfile, pathlib
    >>> target = pathlib.Path(tempfile.mkdtemp()) / "a.txt"
    >>> with whole_file(target) as temporary:
    ...     _ = temporary.write_text("done")
    >>> target.read_text()
    'done'
    """
    target = user_path(path)
    temporary = _sibling(target)
    with _disk_errors_named(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            yield temporary
            _fsync(temporary)
            os.replace(temporary, target)
            _fsync(target.parent)
        finally:
            temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def whole_folder(path: str | os.PathLike, manifest: dict[str, Any] | None = None) -> Iterator[Path]:
    """Yield a temporary sibling folder; on success it takes the place of `path`.

    With `manifest`, `manifest.json` is written last, with the size and SHA-256 of every file under
    "files" beside the given entries. An older folder at `path` is removed only once the new one stands.
    """
    target = user_path(path)
    temporary = _sibling(target)
    with _disk_errors_named(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary.mkdir()
        try:
            yield temporary
            if manifest is not None:
                files = {
                    str(file.relative_to(temporary)): {"bytes": file.stat().st_size, "sha256": sha256(file)}
                    for file in sorted(temporary.rglob("*"))
                    if file.is_file()
                }
                (temporary / MANIFEST).write_text(json.dumps({**manifest, "files": files}, indent=1))
            for file in temporary.rglob("*"):
                _fsync(file)
            _fsync(temporary)
            if target.exists():
                _exchange(temporary, target)  # the older folder then goes with the temporary one
            else:
                os.rename(temporary, target)
            _fsync(target.parent)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


def write_csv(path: str | os.PathLike, frame: Any, index: bool = False) -> None:
    """Write a pandas.DataFrame as CSV, whole. Raises `CheckpointError` on a full or read-only disk."""
    with whole_file(path) as temporary:
        frame.to_csv(temporary, index=index)


def write_tensors(path: str | os.PathLike, form: str, tensors: Mapping[str, Any], strings: Mapping[str, str]) -> None:
    """Write one safetensors file, whole, whose header names its format `form` beside the strings; None is left out.

    Raises `CheckpointError` on a full or read-only disk.
    """
    from safetensors.torch import save_file

    kept = {name: value.detach().cpu().contiguous() for name, value in tensors.items() if value is not None}
    with whole_file(path) as temporary:
        save_file(kept, temporary, metadata={"format": form, **strings})


def read_tensors(path: str | os.PathLike, form: str) -> tuple[dict[str, Any], dict[str, str]]:
    """The tensors and strings that `write_tensors` wrote. Raises `FormatError` for any other file, or part of one."""
    from safetensors import SafetensorError, safe_open

    path = user_path(path)
    try:
        with safe_open(path, framework="pt") as file:
            strings = file.metadata() or {}
            if strings.get("format") != form:
                raise FormatError(f"{path} is not of the format {form}: it says {strings.get('format', 'none')}")
            return {name: file.get_tensor(name) for name in file.keys()}, strings  # noqa: SIM118 (not a mapping)
    except (OSError, SafetensorError) as error:
        raise FormatError(f"{path} cannot be read as {form}: {error}") from error


def read_manifest(folder: str | os.PathLike, verify: bool = True) -> dict[str, Any]:
    """The manifest of a folder written by `whole_folder`; with `verify`, after checking every file.

    Raises `FormatError` when the manifest is missing or unreadable, or a file is missing, truncated or
    changed; the message names it.
    """
    folder = user_path(folder)
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
        files = dict(manifest["files"])
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise FormatError(f"{folder} has no readable {MANIFEST}: it is not a complete saelab folder") from error
    if verify:
        for name, expected in files.items():
            verify_file(folder / name, expected["bytes"], expected["sha256"])
    return manifest


def verify_file(path: Path, size: int, digest: str) -> None:
    """Raise `FormatError` unless the file has this size and SHA-256."""
    found = path.stat().st_size if path.exists() else None
    if found != size:
        raise FormatError(
            f"{path} should have {size:,} bytes and has {'none' if found is None else f'{found:,}'}: "
            "it was cut short or removed; make it again"
        )
    if sha256(path) != digest:
        raise FormatError(f"{path} does not have the checksum of its manifest: it was changed; make it again")
