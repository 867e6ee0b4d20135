"""Files are written whole or not at all: temporary sibling, fsync, rename, checksummed manifest.

A folder that is not there yet is made as a temporary sibling and renamed. In one that is there only what a manifest of ours
lists is replaced, because the rest is the user's: the new files are made within it, in a hidden folder, which becomes
`.saelab-pending` in one step. From then on the folder holds the new version, wherever its files are (`current` finds them).
They are moved to their places, the manifest last, and the next write finishes what a kill has interrupted.
`saelab.base.manifests` reads.
"""

import contextlib
import errno
import json
import os
import re
import secrets
import shutil
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path, PurePosixPath
from typing import Any

from saelab.base import digests
from saelab.base.errors import CheckpointError, ConfigError, FormatError, disk_errors_named, existing
from saelab.base.locks import lock

MANIFEST = "manifest.json"
PENDING = ".saelab-pending"  # in a folder: a whole new version of our files in it, on the way to their places
_NOT_THERE = (errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.EBADF, errno.EINVAL)  # `Path.exists` raises others
Listed = Callable[[Path], list[str] | None]
"""The files in a folder that a manifest of ours in it lists, itself the last; None where there is none."""

_TEMPORARY = re.compile(r"\.(.+)\.tmp-\d+-[0-9a-f]{8}", re.DOTALL)
_NO_SYNC = (
    errno.EINVAL,
    errno.ENOTSUP,
    errno.EOPNOTSUPP,
    errno.ENOSYS,
    errno.EBADF,
)  # the file system knows no fsync of it


def cache_folder() -> Path:
    """The folder for what can be made again: `$SAELAB_CACHE`, else `~/.cache/saelab`."""
    return user_path(os.environ.get("SAELAB_CACHE") or "~/.cache/saelab")


def user_path(path: Any, or_text: bool = False) -> Path:
    """A path that a user gives, a string or `os.PathLike`: `~` is the home folder, a relative one stays relative.

    Every function that takes a path from a user takes it through this one. Raises `ConfigError` for what is no path, and for
    one that cannot even be looked up: in a closed folder, or with a name that is too long (with `or_text` it may be).

    >>> user_path("runs/demo"), user_path("~/runs").is_absolute()
    (PosixPath('runs/demo'), True)
    """
    text = os.fspath(path) if isinstance(path, str | os.PathLike) else None
    if not isinstance(text, str) or not text or "\0" in text:
        raise ConfigError(f"{path!r} is not a path: give the name of a file or folder, a string or pathlib.Path")
    try:
        found = Path(text).expanduser()
        os.stat(os.path.join(found, "."))  # "." needs that a folder may be entered
    except UnicodeEncodeError as error:
        if not or_text:
            raise ConfigError(
                f"{text[:300]!r} is no path: it holds half of a surrogate pair. Give another name"
            ) from error
    except RuntimeError as error:
        raise ConfigError(
            f"{text!r}: {error} (`~` is the home folder, `~name` that of a user): write it out"
        ) from error
    except OSError as error:
        if error.errno not in _NOT_THERE and not (or_text and error.errno == errno.ENAMETOOLONG):
            raise ConfigError(f"{text[:300]} cannot be looked up: {error.strerror}. Give another path") from error
    return found


def _fsync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in _NO_SYNC:
            raise
    finally:
        os.close(handle)


def strangers(folder: Path) -> list[str]:
    """The names in a folder, hidden ones left out: locks, and what a killed writer left, are in nobody's way."""
    return sorted(path.name for path in folder.iterdir() if not path.name.startswith("."))


def check_free(folder: Path, what: str) -> None:
    """Raise `CheckpointError` where a folder is a file, or holds files of which none says that they are a `what` of ours."""
    with disk_errors_named(folder):
        names = strangers(folder) if folder.is_dir() else [folder.name] if folder.exists() else []
    if names:
        raise CheckpointError(
            f"{folder} holds other files ({', '.join(names[:3])}) and no {what}: "
            f"it is not a {what} to go on with, give a new or empty folder"
        )


def try_folder(path: Path) -> None:
    """Raise `CheckpointError` unless a folder, there or not yet, can be written to; nothing stays behind."""
    with disk_errors_named(path):
        there = existing(path)
        remove_left_over(there, "saelab")
        with _temporary(there / "saelab"):
            pass


def try_file(path: str | os.PathLike[str]) -> Path:
    """The path, as `user_path` gives it. Raises `CheckpointError` unless a file can be written there, before long work."""
    target = _through_links(user_path(path))
    with disk_errors_named(target):
        _check_replaceable_file(target)
    try_folder(target.parent)
    return user_path(path)


def _check_replaceable_file(target: Path) -> None:
    if target.exists() and not target.is_file():
        raise IsADirectoryError(errno.EISDIR, "it is a folder or a device", str(target))


def _through_links(path: Path) -> Path:
    """What a symbolic link stands for: the link itself stays."""
    return Path(os.path.realpath(path)) if path.is_symlink() else path


@contextlib.contextmanager
def _temporary(target: Path, folder: bool = False) -> Iterator[Path]:
    """A new sibling of `target`, locked for as long as its writer lives; it is gone afterwards, unless renamed."""
    name = f".{target.name}.tmp-{os.getpid()}-"
    while True:
        path = target.with_name(name + secrets.token_hex(4))
        path.mkdir() if folder else path.touch(exist_ok=False)
        # until it is locked, somebody who cleans up may take it for a dead writer's: then another one is made
        try:
            handle = os.open(path, os.O_RDONLY if folder else os.O_RDWR)
        except FileNotFoundError:
            continue
        if lock(handle) is not False and path.exists():
            break
        os.close(handle)
    try:
        yield path
    finally:
        os.close(handle)
        shutil.rmtree(path, ignore_errors=True) if folder else path.unlink(missing_ok=True)


def listed_files(folder: Path) -> list[str] | None:
    """The files that the `manifest.json` of `whole_folder` lists."""
    from saelab.base.manifests import TABLE, read_json

    try:
        return plain_names([*read_json(folder / MANIFEST, {"files": TABLE})["files"], MANIFEST])
    except FormatError:
        return None


def plain_names(names: Iterable[Any]) -> list[str]:
    """Those that are names of files within a folder, which "/x" and "../x" are not."""
    paths = {name: PurePosixPath(name) for name in names if isinstance(name, str)}
    return [name for name, path in paths.items() if path.parts and not path.is_absolute() and ".." not in path.parts]


def remove_left_over(folder: Path, name: str | None = None, listed: Listed = listed_files) -> None:
    """Remove the temporaries in a folder (those for one name, or all) whose writer was killed.

    Whoever writes holds a lock on its temporary, on this machine or another: what cannot be locked here stays.
    """
    with contextlib.suppress(OSError):
        for entry in list(os.scandir(folder)):
            found = _TEMPORARY.fullmatch(entry.name)
            if found and not entry.is_symlink() and name in (None, found[1]):
                _remove_if_dead(Path(entry.path), entry.is_dir(), listed)


def _remove_if_dead(path: Path, folder: bool, listed: Listed) -> None:
    with contextlib.suppress(OSError):
        handle = os.open(path, os.O_RDONLY if folder else os.O_RDWR)
        try:
            if lock(handle):
                remove_listed(path, listed) if folder else path.unlink()
        finally:
            os.close(handle)


def remove_listed(folder: Path, listed: Listed) -> None:
    """Remove what a manifest of ours lists, and the folder if nothing else is in it; one without a manifest was never whole
    and goes as it is."""
    names = listed(folder)
    if names is None:
        shutil.rmtree(folder, ignore_errors=True)
        return
    _remove(folder, names)
    _remove_empty([folder])


def _remove(folder: Path, names: Iterable[str]) -> None:
    """Remove files of a folder, and the folders in it that they leave empty."""
    paths = [folder / name for name in names]
    for path in paths:
        if path.is_symlink() or not path.is_dir():  # a folder of that name is the user's
            path.unlink(missing_ok=True)
    _remove_empty(path.parent for path in paths if path.parent != folder)


def _remove_empty(folders: Iterable[Path]) -> None:
    for folder in sorted(set(folders), reverse=True):  # the deeper first
        with contextlib.suppress(OSError):
            folder.rmdir()


@contextlib.contextmanager
def whole_file(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a temporary sibling to write to; on success it replaces `path`, on error nothing changes.

    Where `path` is a symbolic link, what it stands for is replaced. Raises `CheckpointError` where the disk is full or
    nothing can be written there.

    >>> import tempfile, pathlib
    >>> target = pathlib.Path(tempfile.mkdtemp()) / "a.txt"
    >>> with whole_file(target) as temporary:
    ...     _ = temporary.write_text("done")
    >>> target.read_text()
    'done'
    """
    target = _through_links(user_path(path))
    with disk_errors_named(target):
        _check_replaceable_file(target)
        target.parent.mkdir(parents=True, exist_ok=True)
        remove_left_over(target.parent, target.name)
        with _temporary(target) as temporary:
            yield temporary
            _fsync(temporary)
            os.replace(temporary, target)
            _fsync(target.parent)


@contextlib.contextmanager
def whole_folder(
    path: str | os.PathLike[str],
    manifest: dict[str, Any] | None = None,
    listed: Listed = listed_files,
    what: str = "a folder that saelab wrote",
) -> Iterator[Path]:
    """Yield a temporary folder to write to; on success its files are those of `path`, on error nothing changes.

    With `manifest`, `manifest.json` is written last, with the size and SHA-256 of every file under "files" beside the given
    entries. Otherwise the caller writes a manifest of its own, of every file, and `listed` reads it.

    In a folder that is there already only files that its manifest lists are replaced and removed. Raises `CheckpointError`
    where it has other files and no manifest, or a file of the user's with a name that is to be written, and where the disk is
    full or nothing can be written there.
    """
    target = _through_links(user_path(path))
    with disk_errors_named(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        remove_left_over(target.parent, target.name, listed)
        if target.exists():
            check_replaceable(target, listed, what)
            remove_left_over(target, "saelab", listed)
        with _temporary(target / "saelab" if target.exists() else target, folder=True) as temporary:
            yield temporary
            if manifest is not None:
                described = {name: digests.entry(temporary / name) for name in _files(temporary)}
                (temporary / MANIFEST).write_text(json.dumps({**manifest, "files": described}, indent=1))
            for file in temporary.rglob("*"):
                _fsync(file)
            _fsync(temporary)
            if target.exists():
                _replace_within(target, temporary, listed)
            else:
                os.rename(temporary, target)
                _fsync(target.parent)


def check_replaceable(
    target: Path, listed: Listed, what: str = "a folder that saelab wrote", names: Iterable[str] = ()
) -> None:
    """Raise `CheckpointError` where `whole_folder` would have to replace something at `target` that is not ours; `names` are
    those that are to be written."""
    if not target.exists():
        return
    ours = [*(listed(target) or ()), *(listed(target / PENDING) or ())]
    if not target.is_dir() or (not ours and not pending(target) and strangers(target)):
        found = f"holds other files ({', '.join(strangers(target)[:3])})" if target.is_dir() else "is a file"
        raise CheckpointError(
            f"{target} {found} and is not {what}: nothing in it was changed; give a new path, or move it away"
        )
    theirs = sorted(name for name in names if _is_theirs(target, name, ours))
    if theirs:
        raise CheckpointError(
            f"{target} holds files that saelab would write but did not ({', '.join(theirs[:3])}): nothing in it was changed; "
            "move them away, or give a new path"
        )


def _is_theirs(target: Path, name: str, ours: list[str]) -> bool:
    path = target / name
    if path.is_dir() or any(above.exists() and not above.is_dir() for above in path.parents):
        return True
    return name not in ours and (path.exists() or path.is_symlink())


def _replace_within(target: Path, temporary: Path, listed: Listed) -> None:
    handle = os.open(target, os.O_RDONLY)
    try:
        lock(handle, wait=True)
        _settle(target, listed)
        check_replaceable(target, listed, names=listed(temporary) or ())
        os.rename(temporary, target / PENDING)  # from here on the folder holds the new version
        _fsync(target)
        _settle(target, listed)
    finally:
        os.close(handle)


def _settle(target: Path, listed: Listed) -> None:
    """Move what is pending to its places. A kill in between is made good by doing it again."""
    if not pending(target):
        return
    new = target / PENDING
    names = listed(new)
    if names is not None:
        _remove(target, set(listed(target) or ()) - set(names))
        _remove(target, names[-1:])  # whoever knows nothing of what is pending finds no manifest rather than a mixture
        for name in names:
            if (new / name).exists():
                (target / name).parent.mkdir(parents=True, exist_ok=True)
                os.replace(new / name, target / name)
        for folder in {target, *((target / name).parent for name in names)}:
            _fsync(folder)
    _remove_empty([new, *(path for path in new.rglob("*") if path.is_dir())])


def _files(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def pending(folder: Path) -> bool:
    """Whether a kill has left a new version of a folder on the way to its place."""
    return (folder / PENDING).exists()


def current(folder: Path, name: str) -> Path:
    """Where a file of a folder of ours is: in its place, or still pending after a kill."""
    path = folder / PENDING / name
    return path if path.exists() else folder / name


def write_csv(path: str | os.PathLike[str], frame: Any, index: bool = False) -> None:
    """Write a pandas.DataFrame as CSV, whole. Raises `CheckpointError` on a full or read-only disk."""
    with whole_file(path) as temporary:
        frame.to_csv(temporary, index=index)
