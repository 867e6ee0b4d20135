"""A command is made of a function: parameters, defaults and help are its own and those of the functions that it calls."""

import dataclasses
import inspect
import textwrap
from collections.abc import Callable
from inspect import Parameter
from typing import Any

import docstring_parser
from cyclopts import App, default_name_transform

from saelab.cli.values import written

KEYWORD, GREEDY = Parameter.KEYWORD_ONLY, (Parameter.VAR_POSITIONAL, Parameter.VAR_KEYWORD)
Function = Callable[..., Any]


@dataclasses.dataclass(frozen=True)
class Of:
    """Stands as the default of a parameter that is another function's: annotation, default and help are there."""

    function: Function
    name: str


def of(function: Function, name: str) -> Any:
    """The parameter of this name of a function, as the default of one here."""
    return Of(function, name)


def command(
    *functions: Function, opening: Function | None = None, without: str = "", required: str = ""
) -> Callable[[Function], App]:
    """Make a command of a function that returns its exit code.

    It takes what the function takes and, for its `**how`, all that `functions` take but what is named `without`; what is
    `required` has no default, whatever there. `opening` is called before: it takes what it names from the line too, and what
    it returns are the function's positional-only arguments. Help is what the docstrings' `Args` say; the `Examples` of the
    function's own stand at the end of `--help`.
    """

    def make(run: Function) -> App:
        own, helps = _described(run)
        given = [name for name, parameter in own.items() if parameter.kind is Parameter.POSITIONAL_ONLY]
        passed = {name: own[name] for name in own if name not in given}
        opened, more = _described(opening) if opening else ({}, {})
        helps = more | helps
        for function in functions:
            public, more = _described(function)
            helps = more | helps
            named = {*passed, *given, *without.split()}
            passed |= {name: public[name].replace(kind=KEYWORD) for name in public if name not in named}
        parameters = passed | opened | _described(_everywhere)[0]
        helps |= _described(_everywhere)[1]
        for name in required.split():
            parameters[name] = parameters[name].replace(default=Parameter.empty)
        shown = [written(parameter, helps.get(name, "")) for name, parameter in parameters.items()]
        signature = inspect.Signature(sorted(shown, key=lambda parameter: parameter.kind))

        def call(*positional: Any, **named: Any) -> int:
            bound = signature.bind(*positional, **named)
            bound.apply_defaults()
            first = opening(**{name: bound.arguments[name] for name in opened}) if opening else ()
            return run(*first, **{name: bound.arguments[name] for name in passed})

        call.__signature__ = signature  # type: ignore[attr-defined]
        call.__annotations__ = {name: parameter.annotation for name, parameter in signature.parameters.items()}
        summary, _, rest = (inspect.getdoc(run) or "").partition("\n\n")
        examples = textwrap.dedent(rest.partition("Examples:\n")[2])
        app = App(default_name_transform(run.__name__), help=summary, help_epilogue=f"examples:\n{examples}")
        app.default(call)
        return app

    return make


def group(name: str, *apps: App) -> App:
    """A command that has commands, with the examples of them all."""
    examples = "\n".join((app.help_epilogue or "").removeprefix("examples:\n") for app in apps)
    made = App(name, help_epilogue=f"examples:\n{examples}")
    for place, app in enumerate(apps):
        app.sort_key = place
        made.command(app)
    return made


def _everywhere(*, config: str | None = None, debug: bool = False) -> None:
    """What every command takes, before it is run.

    Args:
        config: YAML file with values by the names of the flags, written with underscores; flags override it
        debug: show the whole traceback of an error
    """


def _described(function: Function) -> tuple[dict[str, Parameter], dict[str, str]]:
    """A function's parameters by name, and what its docstring's `Args` say of them."""
    parsed = docstring_parser.parse(function.__doc__ or "", docstring_parser.DocstringStyle.GOOGLE)
    texts = {entry.arg_name: " ".join((entry.description or "").split()) for entry in parsed.params}
    helps = {name.strip(): text for names, text in texts.items() for name in names.split(",")}
    parameters = {}
    for name, parameter in inspect.signature(function).parameters.items():
        if isinstance(there := parameter.default, Of):
            public, more = _described(there.function)
            helps |= {name: more[there.name]} if there.name in more and name not in helps else {}
            parameter = public[there.name].replace(name=name, kind=parameter.kind)
        if parameter.kind not in GREEDY:
            parameters[name] = parameter
    return parameters, helps
