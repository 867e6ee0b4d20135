"""What is written on the command line, or in a YAML file, as a value of the type that a parameter's annotation names."""

import ast
import dataclasses
import inspect
from collections.abc import Callable, Sequence
from types import NoneType, UnionType
from typing import Annotated, Any, Union, get_args, get_origin

from cyclopts import Parameter, Token

import saelab
from saelab.autoencoders.architecture import Architecture
from saelab.base.errors import ConfigError, SaelabError
from saelab.base.files import try_file
from saelab.cli.configuration import near


def whole(text: str) -> int:
    """
    >>> whole("500_000"), whole("5e5")
    (500000, 500000)
    """
    try:
        return int(text)
    except ValueError:
        if float(text).is_integer():
            return int(float(text))
        raise


def yes(text: str) -> bool:
    """
    >>> yes("yes"), yes("False")
    (True, False)
    """
    known = {"yes": True, "true": True, "no": False, "false": False}
    if text.lower() not in known:
        raise ValueError(text)
    return known[text.lower()]


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


def _tried(text: str) -> str:
    try_file(text)
    return text


File = Annotated[str, _tried]  # that the command writes when all is done: tried before

# In the order in which they are tried: what reads the text, and what it is called in an error and in the help.
READERS: dict[Any, tuple[Callable[[str], Any], str, str]] = {
    Architecture: (autoencoder, "an architecture", "ARCHITECTURE"),
    bool: (yes, "yes or no", "yes|no"),
    int: (whole, "a whole number", "N"),
    float: (float, "a number", "X"),
    str: (str, "text", "TEXT"),
}


def kinds_of(annotation: Any) -> list[Any]:
    """What of an annotation a text can give: types of `READERS`, in their order, functions that read, None. `Any` is a text.

    >>> kinds_of(int | str | None), kinds_of(Sequence[float]), kinds_of(dict | None)
    ([<class 'int'>, <class 'str'>, <class 'NoneType'>], [<class 'float'>], [<class 'NoneType'>])
    """
    if get_origin(annotation) in (Union, UnionType, Sequence):
        found = [kind for part in get_args(annotation) for kind in kinds_of(part)]
        return [kind for kind in READERS if kind in found] + [kind for kind in found if kind not in READERS]
    if get_origin(annotation) is Annotated:
        return [annotation.__metadata__[0]]
    if annotation is Any:
        return [str]
    return [annotation] if annotation in (*READERS, NoneType) else []


def reader(kinds: Sequence[Any]) -> Callable[[str], Any]:
    """A function that reads a text as one of these kinds; None is written "none", or "auto" beside yes and no.

    >>> reader([int, str])("131_072"), reader([int, str])("2GiB"), reader([float, NoneType])("none")
    (131072, '2GiB', None)
    """
    nothing = "auto" if bool in kinds else "none"
    known = [READERS.get(kind, (kind, "", "")) for kind in kinds if kind is not NoneType]

    def read(text: str) -> Any:
        if NoneType in kinds and text.lower() == nothing:
            return None
        for convert, _, _ in known:
            try:
                return convert(text)
            except SaelabError:
                raise
            except (ValueError, OverflowError):
                pass
        names = [name for _, name, _ in known] + [nothing] * (NoneType in kinds)
        raise ConfigError(f"{text!r} is not {' or '.join(names)}")

    return read


def written(parameter: inspect.Parameter, text: str) -> inspect.Parameter:
    """A function's parameter as cyclopts is to read it, with its help; one whose annotation names a `Sequence` takes several
    values.
    """
    kinds, several = kinds_of(parameter.annotation), "Sequence" in str(parameter.annotation)
    default = parameter.default
    shown = Parameter(help=text, show_default=default not in (None, ()) and default is not False)
    if kinds == [bool]:
        return parameter.replace(annotation=Annotated[bool, shown, Parameter(negative=None if default else ())])
    if not set(kinds) - {NoneType}:
        raise TypeError(f"{parameter} cannot be written on a command line: leave it out of the command")
    read = reader(kinds)

    def convert(_: Any, tokens: Sequence[Token]) -> Any:
        values = [_placed(read, token) for token in tokens]
        return values if several else values[-1]

    names = [READERS[kind][2] if kind in READERS else "TEXT" for kind in kinds if kind is not NoneType]
    if NoneType in kinds and (bool in kinds or default not in (None, parameter.empty)):
        names.append("auto" if bool in kinds else "none")
    metavar = "|".join(names) + "..." * several
    how = Parameter(
        converter=convert, metavar=metavar, allow_repeating=True, negative=(), consume_multiple=1 if several else None
    )
    # "| Any": where pydantic is imported, cyclopts holds what `convert` gave against the annotation
    return parameter.replace(annotation=Annotated[list[str] | Any if several else str | Any, shown, how])


def _placed(read: Callable[[str], Any], token: Token) -> Any:
    """What `read` gives; a `ConfigError` says where the text stood."""
    try:
        return read(token.value)
    except ConfigError as error:
        name = (token.keyword or "").strip("[]")
        place = name if token.source == "cli" else f"{token.source}: {name}"
        raise ConfigError(f"{place}: {error}" if place else str(error)) from error
