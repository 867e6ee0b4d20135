"""Options of a command: one table makes the flags, checks the YAML file and fills in the defaults."""

import argparse
import ast
import dataclasses
import difflib
import importlib
import inspect
import operator
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import saelab
from saelab.base.errors import ConfigError, FormatError
from saelab.base.files import try_file, user_path
from saelab.base.manifests import read_text
from saelab.reading.buffer import parse_bytes

REQUIRED: Any = object()


@dataclasses.dataclass(frozen=True)
class Of:
    """The default that a public function has for the argument: it is written there, and only there.

    >>> Of("saelab.training.loop:train", "batch_size").value
    4096
    """

    function: str
    argument: str

    @property
    def value(self) -> Any:
        module, _, name = self.function.partition(":")
        function = operator.attrgetter(name)(importlib.import_module(module))
        return inspect.signature(function).parameters[self.argument].default


@dataclasses.dataclass(frozen=True)
class Option:
    """`--name` on the command line and `name:` in the file (underscores there)."""

    name: str
    convert: Callable[[str], Any]
    default: Any
    help: str
    many: bool = False
    positional: bool = False
    written: bool = False  # a file that the command writes when all is done: tried before

    @property
    def key(self) -> str:
        return self.name.replace("-", "_")

    @property
    def value(self) -> Any:
        """The default."""
        return self.default.value if isinstance(self.default, Of) else self.default


class Help(argparse.RawDescriptionHelpFormatter):
    """Shows an option's default, which is looked up only then: it may be that of a function whose module takes long to load."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        option: Option | None = getattr(action, "option", None)
        if option is None or option.default is not REQUIRED and option.value in (None, ()):
            return action.help
        return f"{action.help} ({'required' if option.default is REQUIRED else f'default {option.value}'})"


@dataclasses.dataclass(frozen=True)
class Command:
    """A command: what it takes, what it does, and lines to copy."""

    name: str
    summary: str
    examples: tuple[str, ...]
    options: tuple[Option, ...]
    run: Callable[[dict[str, Any]], int]


def add_arguments(parser: argparse.ArgumentParser, command: Command) -> None:
    """Give the parser the flags of a command; a flag that is not given leaves no trace in the namespace."""
    for option in command.options:
        keywords: dict[str, Any] = {"type": _flag(option.convert), "help": option.help}
        if option.positional:
            action = parser.add_argument(option.key, metavar=option.name, nargs="?", **keywords)
        elif option.many:
            action = parser.add_argument(f"--{option.name}", dest=option.key, nargs="+", metavar="X", **keywords)
        else:
            action = parser.add_argument(f"--{option.name}", dest=option.key, metavar="X", **keywords)
        action.option = option  # type: ignore[attr-defined]
    if command.options:
        parser.add_argument("--config", metavar="FILE.yaml", help="read options from a file; flags override it")
    parser.add_argument("--debug", action="store_true", help="show the whole traceback of an error")


def _flag(convert: Callable[[str], Any]) -> Callable[[str], Any]:
    def checked(text: str) -> Any:
        try:
            return convert(text)
        except (ValueError, TypeError) as error:
            raise argparse.ArgumentTypeError(str(error)) from error

    return checked


def settings(command: Command, given: Mapping[str, Any]) -> dict[str, Any]:
    """Defaults, overridden by the file under "config", overridden by the flags.

    Raises `ConfigError` for an unknown key (near names are listed), a value of the wrong type, a file that
    cannot be read and a required option that is nowhere, `CheckpointError` where a file that the command would write at its
    end cannot be written.
    """
    flags = dict(given)
    file = flags.pop("config", None)
    values = {option.key: option.value for option in command.options}
    values |= _from_file(command, user_path(file)) if file else {}
    values |= flags
    missing = [option for option in command.options if values[option.key] is REQUIRED]
    if missing:
        names = ", ".join(o.name if o.positional else f"--{o.name}" for o in missing)
        raise ConfigError(f"saelab {command.name} needs {names}: give it as an argument or in a --config file")
    for option in command.options:
        if option.written and values[option.key] is not None:
            try_file(values[option.key])
    return values


def _from_file(command: Command, path: Path) -> dict[str, Any]:
    import yaml

    try:
        content = yaml.safe_load(read_text(path))
    except (FormatError, RecursionError, yaml.YAMLError) as error:
        raise ConfigError(f"cannot read the configuration {path}: {error}") from error
    if not isinstance(content, dict):
        raise ConfigError(f"{path} must hold 'key: value' lines, not {type(content).__name__}")
    options = {option.key: option for option in command.options}
    for key in content:
        if key not in options:
            raise ConfigError(f"{path}: unknown key {key!r}; {near(str(key), options)}")
    return {key: _from_yaml(path, options[key], value) for key, value in content.items()}


def _from_yaml(path: Path, option: Option, value: Any) -> Any:
    if value is None and option.value in (None, ()):
        return option.value
    try:
        if option.many:
            return [option.convert(str(item)) for item in (value if isinstance(value, list) else [value])]
        if isinstance(value, list | dict):
            raise ValueError(f"one value expected, not a {type(value).__name__}")
        return option.convert(str(value))
    except (ValueError, TypeError) as error:
        raise ConfigError(f"{path}: {option.key}: {error}") from error


def near(name: str, known: Iterable[str]) -> str:
    """ "did you mean ...?" where something is near, else the list of what there is."""
    known = sorted(known)
    close = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    return f"did you mean {' or '.join(close)}?" if close else f"known are {', '.join(known)}"


def positive(text: str) -> int:
    """A whole number of at least 1; `500_000` and `5e5` are the same.

    >>> positive("500_000"), positive("5e5")
    (500000, 500000)
    """
    try:
        number = float(text)
    except ValueError:
        raise ConfigError(f"{text!r} is not a number") from None
    if not number.is_integer() or number < 1:
        raise ConfigError(f"{text!r} is not a whole number of at least 1")
    return int(number)


def natural(text: str) -> int:
    """A whole number of at least 0."""
    return 0 if text.strip() == "0" else positive(text)


def capacity(text: str) -> int | str:
    """Rows as a number, or bytes as in "2GiB".

    >>> capacity("131_072"), capacity("2GiB")
    (131072, '2GiB')
    """
    if text[-1:].isalpha():
        parse_bytes(text)
        return text
    return positive(text)


def limit(text: str) -> float | None:
    """A number, or "none" for no limit.

    >>> limit("4"), limit("none")
    (4.0, None)
    """
    return None if text.lower() == "none" else float(text)


def follow(text: str) -> bool | None:
    """ "yes", "no", or "auto" for what the tokenizer does itself.

    >>> follow("yes"), follow("auto")
    (True, None)
    """
    known = {"yes": True, "true": True, "no": False, "false": False, "auto": None}
    if text.lower() not in known:
        raise ConfigError(f"{text!r}: choose yes, no or auto")
    return known[text.lower()]


MODEL = Option(
    "model", str, Of("saelab.cli.demonstration:demo", "model"), "bundled name, Hugging Face name or local folder"
)
CORPUS = Option(
    "corpus", str, Of("saelab.cli.demonstration:demo", "corpus"), "bundled name, text file or folder, or data-set name"
)
DEVICE = Option("device", str, Of("saelab.models.language:load_model", "device"), "cpu, cuda, mps or auto")
CONTEXT_LENGTH = Option(
    "context-length", positive, None, "tokens in a context (default: 256, or the model's maximum where that is less)"
)
PREPEND_BOS = Option(
    "prepend-bos",
    follow,
    None,
    "begin each context with the model's BOS: yes, no or auto (default: as its tokenizer does)",
)
# of an autoencoder that is there already
ITS_CONTEXT_LENGTH = dataclasses.replace(CONTEXT_LENGTH, help="tokens in a context (default: that of the training)")
ITS_PREPEND_BOS = dataclasses.replace(
    PREPEND_BOS, help="begin each text with the model's BOS: yes, no or auto (default: as in the training)"
)


def autoencoder(text: str) -> Any:
    """An architecture written as in Python, `TopK(k=32, d_sae=4096)`; nothing is executed.

    Raises `ConfigError` for an unknown architecture or argument (near names are listed).

    >>> autoencoder("TopK(k=32, d_sae=4096)")
    TopK(k=32, d_sae=4096)
    >>> autoencoder("Transcoder(of=TopK(k=32, d_sae=4096), skip=True)")
    Transcoder(of=TopK(k=32, d_sae=4096), skip=True)
    """
    try:
        call: Any = ast.parse(text.strip(), mode="eval").body
    except SyntaxError:
        call = None
    return _architecture(call, text)


def _architecture(call: Any, text: str) -> Any:
    if not isinstance(call, ast.Call) or not isinstance(call.func, ast.Name) or call.args:
        raise ConfigError(f"{text!r} is not an architecture: write for example 'TopK(k=32, d_sae=4096)'")
    names = [name for name, module in saelab._PUBLIC.items() if module.startswith("saelab.autoencoders.")]
    architectures = {name: getattr(saelab, name) for name in names if "d_sae" in _fields(getattr(saelab, name))}
    if call.func.id not in architectures:
        raise ConfigError(f"unknown architecture {call.func.id!r}; {near(call.func.id, architectures)}")
    chosen = architectures[call.func.id]
    try:
        arguments = {
            str(keyword.arg): _architecture(keyword.value, text)
            if isinstance(keyword.value, ast.Call) and not keyword.value.args
            else ast.literal_eval(keyword.value)
            for keyword in call.keywords
        }
    except ConfigError:
        raise
    except ValueError:
        raise ConfigError(f"{text!r}: arguments must be plain numbers, strings or architectures") from None
    for name in arguments:
        if name not in _fields(chosen):
            raise ConfigError(f"{call.func.id} has no {name!r}; {near(name, _fields(chosen))}")
    try:
        return chosen(**arguments)
    except TypeError as error:
        raise ConfigError(f"{text!r}: {error}") from error


def _fields(kind: type) -> list[str]:
    return [field.name for field in dataclasses.fields(kind)] if dataclasses.is_dataclass(kind) else []
