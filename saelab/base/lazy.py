"""Names that are imported at their first use: public names of a package (PEP 562), and what a higher room provides to a
lower one."""

import importlib
from collections.abc import Callable, Mapping
from typing import Any


def lazily(
    namespace: dict[str, Any], public: Mapping[str, str], subpackages: tuple[str, ...] = ()
) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """A package's `__getattr__` and `__dir__`: `public` has each name's module; what a name resolves to is kept.

    `subpackages` are found as attributes without an import of their own. `dir` shows both, and no import of the package.

    >>> package = {"__name__": "some.package"}
    >>> get, names = lazily(package, {"ConfigError": "saelab.base.errors"})
    >>> get("ConfigError").__name__, "ConfigError" in package, "ConfigError" in names()
    ('ConfigError', True, True)
    >>> get("ConfigEror")
    Traceback (most recent call last):
    AttributeError: module 'some.package' has no attribute 'ConfigEror'
    """

    def get(name: str) -> Any:
        if name in subpackages:
            return importlib.import_module(f"{namespace['__name__']}.{name}")
        if name not in public:
            raise AttributeError(f"module {namespace['__name__']!r} has no attribute {name!r}")
        namespace[name] = getattr(importlib.import_module(public[name]), name)
        return namespace[name]

    return get, lambda: sorted({*public, *subpackages, *(name for name in namespace if name.startswith("__"))})


_PROVIDED: dict[str, str] = {}


def provide(places: Mapping[str, str]) -> None:
    """Say in which module each function is that `provided` finds, so that no room has to name one above it."""
    _PROVIDED.update(places)


def provided(name: str) -> Any:
    """A function of a room above the caller's: methods such as `lm.steer` are written where their objects are, and done above.

    >>> provided("steer").__module__
    'saelab.steering.apply'
    """
    return getattr(importlib.import_module(_PROVIDED[name]), name)
