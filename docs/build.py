"""What mkdocs builds beside the pages of this folder: those at the repository's root, and the reference, made of the code."""

import importlib
import inspect
import pkgutil
import re
from pathlib import Path
from types import ModuleType
from typing import Any

from mkdocs.structure.files import File

import saelab
from saelab.cli import application

ROOT = Path(__file__).parents[1]
ABOVE = {"README.md": "index.md", "CONTRIBUTING.md": "contributing.md", "CHANGELOG.md": "changelog.md"}
ROOMS = (
    "saelab",
    "saelab.steering",
    "saelab.dashboards",
    "saelab.hspace",
    "saelab.analysis.attention",
    "saelab.analysis.circuits",
    "saelab.analysis.dark_matter",
    "saelab.analysis.denoisers",
    "saelab.interop",
)


def on_files(files: Any, config: Any) -> Any:
    """Add the pages that are no files of this folder."""
    for source, page in ABOVE.items():
        files.append(File.generated(config, page, content=from_root((ROOT / source).read_text())))
    for room in ROOMS:
        files.append(File.generated(config, f"reference/{room}.md", content=room_page(importlib.import_module(room))))
    files.append(File.generated(config, "reference/rooms.md", content=rooms()))
    files.append(File.generated(config, "reference/command-line.md", content=command_line()))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Links out of this folder, as a code host follows them, become those of the site."""
    for source, page in ABOVE.items():
        markdown = markdown.replace(f"](../{source}", f"]({page}")
    return markdown


def from_root(text: str) -> str:
    """A page at the root: its links into this folder are the site's, those to other folders plain text."""
    for source, page in ABOVE.items():
        text = text.replace(f"]({source}", f"]({page}")
    text = re.sub(r"\]\(docs/", "](", text)
    return re.sub(r"(?<!!)\[([^\]]+)\]\((?:notebooks|tests|benchmarks)/[^)]*\)", r"\1", text)


def public(room: ModuleType) -> dict[str, str]:
    """The public names of a room, each with the module that it is written in."""
    if hasattr(room, "_PUBLIC"):
        return dict(sorted(room._PUBLIC.items()))
    return {
        name: getattr(room, name).__module__ for name in room.__all__ if not isinstance(getattr(room, name), ModuleType)
    }


def room_page(room: ModuleType) -> str:
    """A page with every public name of a room, its signature and docstring."""
    lines = [f"# {room.__name__}", "", (room.__doc__ or "").partition("\n\n")[0], ""]
    if not hasattr(room, "_PUBLIC") and not hasattr(room, "__all__"):  # whose names are those of its modules
        modules = (module.name for module in pkgutil.iter_modules(room.__path__, f"{room.__name__}."))
        return "\n".join([*lines, *(f"::: {name}\n" for name in modules)])
    for name, module in public(room).items():
        title = f"{room.__name__}.{name}"
        lines += [f"::: {module}.{name}", "    options:", f"      heading: {title}", f"      toc_label: {name}", ""]
    return "\n".join(lines)


def rooms() -> str:
    """What each room says of itself."""
    packages = (module.name for module in pkgutil.iter_modules(saelab.__path__, "saelab.") if module.ispkg)
    parts = (f"## {name}\n\n{inspect.getdoc(importlib.import_module(name))}" for name in packages)
    return "\n\n".join(["# The rooms", *parts])


def command_line() -> str:
    """The reference of every command, made of the parser, with its examples."""
    app = application()
    text = app.generate_docs().replace("# saelab\n", "# Command line\n", 1)
    text = re.sub(r"## Table of Contents\n.*?(?=\*\*Commands\*\*)", "", text, count=1, flags=re.S)

    parts = re.split(r"(?m)^(?=##+ saelab )", text)
    return "".join(part.rstrip() + "\n\n" + _examples(app, part) for part in parts)


def _examples(app: Any, part: str) -> str:
    """The examples of the command that a part of the reference is about."""
    names = part.partition("\n")[0].partition(" saelab ")[2].split()
    commands = app.parse_commands(names)[1]
    epilogue = commands[-1].help_epilogue or "" if names and not list(_below(commands[-1])) else ""
    examples = epilogue.removeprefix("examples:\n").strip("\n")
    return f"```console\n{examples}\n```\n\n" if examples else ""


def _below(app: Any) -> list[str]:
    return [name for name in app if not name.startswith("-")]
