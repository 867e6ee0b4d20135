"""The command line: `saelab demo | train | sweep | harvest | evaluate | dashboard | steer | analyze | hspace | doctor`.

Exit codes: 0 done, 2 an error with its way out on one line of stderr (`--debug` shows the traceback), 130
interrupted by Ctrl-C.
"""

import argparse
import sys
import warnings
from collections.abc import Sequence
from typing import Any

from saelab import __version__
from saelab.base.errors import SaelabError
from saelab.cli import analyze, dashboard, demo, doctor, evaluate, harvest, hspace, steer, sweep, train
from saelab.cli.options import Help, add_arguments, settings

COMMANDS = tuple(
    module.COMMAND for module in (demo, train, sweep, harvest, evaluate, dashboard, steer, analyze, hspace, doctor)
)
INTERRUPTED = 130


def build_parser() -> argparse.ArgumentParser:
    """The parser of all commands; every `--help` ends with examples."""
    parser = argparse.ArgumentParser(
        prog="saelab",
        description="Train, evaluate and look into sparse autoencoders.",
        epilog="start with: saelab doctor; saelab demo",
    )
    parser.add_argument("--version", action="version", version=f"saelab {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="command", required=True)
    for command in COMMANDS:
        sub = commands.add_parser(
            command.name,
            help=command.summary,
            description=command.summary,
            epilog="examples:\n" + "\n".join(f"  {line}" for line in command.examples),
            formatter_class=Help,
            argument_default=argparse.SUPPRESS,
            allow_abbrev=False,
        )
        add_arguments(sub, command)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return the exit code.

    >>> main(["train", "--tokenz", "3"])
    Traceback (most recent call last):
    SystemExit: 2
    """
    given = vars(build_parser().parse_args(argv))
    name = given.pop("command")
    command = next(command for command in COMMANDS if command.name == name)
    debug = given.pop("debug", False)
    with warnings.catch_warnings():
        warnings.showwarning = _show_warning
        try:
            return command.run(settings(command, given))
        except KeyboardInterrupt:
            print("saelab: interrupted", file=sys.stderr)
            return INTERRUPTED
        except SaelabError as error:
            if debug:
                raise
            print(f"saelab: {type(error).__name__}: {' '.join(str(error).split())}", file=sys.stderr)
            return 2


def _show_warning(message: Warning | str, *where: Any, **more: Any) -> None:
    print(f"saelab: warning: {' '.join(str(message).split())}", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
