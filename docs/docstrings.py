"""Our docstrings as mkdocstrings is to read them: examples in fences, and underlined sections as those with a colon."""

import re
from typing import Any

import griffe

EXAMPLE = re.compile(r"(?m)^>>> .*(?:\n.+)*")
UNDERLINED = re.compile(r"(?m)^(Attributes|Parameters)\n-+\n((?:.+\n?)+)")


def readable(text: str) -> str:
    """A docstring with its examples fenced."""
    text = UNDERLINED.sub(lambda m: f"{m[1]}:\n" + re.sub(r"(?m)^(?=.)", "    ", m[2]), text)
    return EXAMPLE.sub(lambda m: f"```pycon\n{re.sub(r'  *# doctest:.*', '', m[0])}\n```", text)


class Readable(griffe.Extension):
    """What mkdocstrings calls for each object that it reads."""

    def on_object(self, *, obj: Any, **_: Any) -> None:
        """Change the docstring."""
        if obj.docstring:
            obj.docstring.value = readable(obj.docstring.value)
