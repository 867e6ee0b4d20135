"""The YAML file under `--config`, and what is missing when it and the flags have been read."""

import difflib
from collections.abc import Iterable
from typing import Any

from cyclopts import App, Argument, ArgumentCollection
from cyclopts.config import Dict

from saelab.base.errors import ConfigError, FormatError


def near(name: str, known: Iterable[str]) -> str:
    """ "did you mean ...?" where something is near, else the list of what there is.

    >>> near("trian", ["train", "sweep"]), near("x", ["train", "sweep"])
    ('did you mean train?', 'known are sweep, train')
    """
    known = sorted(known)
    close = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    return f"did you mean {' or '.join(close)}?" if close else f"known are {', '.join(known)}"


def configure(app: App, commands: tuple[str, ...], arguments: ArgumentCollection) -> None:
    """Take from the file what no flag gives, and see that nothing is missing: cyclopts calls this before it reads values.

    Raises `ConfigError` for a file that cannot be read, an unknown key (near names are listed; what a command beside this one
    takes is passed over, so that one file serves all of `saelab hspace`) and a required option that is nowhere.
    """
    known = _by_key(arguments)
    if "config" in known and known["config"].tokens:
        path, given = known["config"].tokens[-1].value, {}
        beside = _beside(app) if len(commands) > 1 else set()
        for key, value in _read(path).items():
            if key not in {*known, *beside}:
                raise ConfigError(f"{path}: unknown key {key!r}; {near(str(key), known)}")
            if key not in known or value is None and known[key].field_info.default in (None, ()):
                continue
            if isinstance(value, dict | list) and not known[key].parameter.consume_multiple:
                raise ConfigError(f"{path}: {key}: one value expected, not a {type(value).__name__}")
            given[key] = "none" if value is None else value
        Dict(given, source=path, use_commands_as_keys=False)(app, commands, arguments)
    missing = [argument for argument in arguments if argument.required and not argument.tokens]
    if missing:
        names = ", ".join(a.name if a.index is None else a.name.lstrip("-").upper() for a in missing)
        raise ConfigError(
            f"saelab {' '.join(commands)} needs {names}: give what is missing in the line or in a --config file"
        )


def _by_key(arguments: ArgumentCollection) -> dict[str, Argument]:
    return {argument.name.lstrip("-").replace("-", "_"): argument for argument in arguments}


def _beside(app: App) -> set[str]:
    """The keys of all commands of the group that this one is in."""
    group = app.app_stack.current_frame[-2]
    commands = [group[name] for name in group if not name.startswith("-")]
    return {key for command in commands for key in _by_key(command.assemble_argument_collection())}


def _read(path: str) -> dict[Any, Any]:
    import yaml

    from saelab.base.files import user_path
    from saelab.base.manifests import read_text

    try:
        content = yaml.safe_load(read_text(user_path(path)))
    except (FormatError, RecursionError, yaml.YAMLError) as error:
        raise ConfigError(f"cannot read the configuration {path}: {error}") from error
    if not isinstance(content, dict):
        raise ConfigError(f"{path} must hold 'key: value' lines, not {type(content).__name__}")
    return content
