"""The command line: `saelab demo | train | sweep | harvest | evaluate | benchmark | dashboard | steer | analyze | hspace |
convert | sites | doctor`.

Exit codes: 0 done, 2 an error with its way out on one line of stderr (`--debug` shows the traceback), 130 interrupted by
Ctrl-C, 141 where nobody reads the output any more. `import saelab.cli` and `saelab --help` import no torch: a command's file is
imported when the command is run.
"""

import os
import sys
import warnings
from collections.abc import Sequence
from typing import Any

from cyclopts import App, CycloptsError, UnusedCliTokensError

from saelab import __version__
from saelab.base.errors import ConfigError, SaelabError
from saelab.cli.configuration import configure, near

INTERRUPTED, UNREAD = 130, 141
TOGETHER = ("train", "sweep")  # what the processes of torchrun do as one
COMMANDS = {
    "demo": (
        "demonstration:demo_",
        "Train, evaluate and look into a TopK SAE on the bundled model, offline, in minutes.",
    ),
    "train": ("training:train", "Train a sparse autoencoder on a site of a language model."),
    "sweep": ("training:sweep", "Train several sparse autoencoders on one stream of activations."),
    "harvest": ("training:harvest", "Write a model's activations to disk."),
    "evaluate": (
        "evaluate:evaluate",
        "Evaluate a trained autoencoder on held-out text: reconstruction, sparsity, cross-entropy, KL.",
    ),
    "benchmark": (
        "benchmark:benchmark",
        "Measure what the latents of autoencoders are good for: stability, absorption, sparse probing, perturbation.",
    ),
    "dashboard": (
        "dashboard:dashboard",
        "Make a dashboard of an autoencoder's latents: one HTML file, or a folder, that opens anywhere.",
    ),
    "steer": ("steer:steer", "Generate text under steering, find latents to steer with, or replay a receipt."),
    "analyze": (
        "analyze:analyze",
        "Analyse a trained autoencoder: what it misses (dark-matter), heads and sources of its latents (attention); "
        "or a denoiser.",
    ),
    "hspace": (
        "hspace:hspace_",
        "Sample a diffusion denoiser, find directions of its bottleneck, edit with them, report what they do.",
    ),
    "convert": ("convert:convert", "Write an autoencoder of any project in the layout of another."),
    "sites": ("training:sites", "List the sites of a language model: where its activations can be read and written."),
    "doctor": ("doctor:doctor", "What is installed, what the machine can do, what is missing and how to get it."),
}


def application() -> App:
    """All commands; every `--help` ends with examples."""
    app = App(
        "saelab",
        help="Train, evaluate and look into sparse autoencoders.",
        help_epilogue="start with: saelab doctor; saelab demo",
        help_format="plaintext",
        version=f"saelab {__version__}",
        config=configure,
        suppress_keyboard_interrupt=False,
        exit_on_error=False,
        print_error=False,
        verbose=False,
        result_action="return_value",
    )
    for name, (place, summary) in COMMANDS.items():
        app.command(f"saelab.cli.{place}", name=name, help=summary, sort_key=len(list(app)))
    app.register_install_completion_command(
        help="Complete commands and flags in this shell: bash, zsh, fish, PowerShell."
    )
    return app


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return the exit code.

    >>> main(["sites", "--devise", "cpu"])
    2
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    with warnings.catch_warnings():
        warnings.showwarning = _show_warning
        try:
            app = application()
            _check_names(app, argv)
            _check_processes(argv)
            code = app(argv) or 0
            sys.stdout.flush()
            return code
        except KeyboardInterrupt:
            print("saelab: interrupted", file=sys.stderr)
            return INTERRUPTED
        except BrokenPipeError:  # what is left in the buffer goes nowhere, so that closing it at the end cannot fail
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return UNREAD
        except (SaelabError, CycloptsError) as error:
            if "--debug" in argv:
                raise
            print(f"saelab: {_line(error)}", file=sys.stderr)
            return 2


def _check_names(app: App, argv: list[str]) -> None:
    """Refuse a command or a flag that is not there, naming near ones, before anything that is missing is asked for."""
    chain, apps, rest = app.parse_commands(argv)
    line = " ".join(["saelab", *chain])
    if apps[-1].default_command is None:
        known = [name for name in apps[-1] if not name.startswith("-")]
        if not rest:
            raise ConfigError(f"{line} needs a command: {', '.join(known)} ({line} --help says what they do)")
        raise ConfigError(f"{line} has no command {rest[0]!r}; {near(rest[0], known)}")
    flags = {name for argument in apps[-1].assemble_argument_collection() for name in argument.names} if rest else set()
    for flag in (token.partition("=")[0] for token in rest):
        if flag.startswith("--") and flag not in {*flags, "--help"}:
            raise ConfigError(f"{line} has no {flag}; {near(flag, flags)}")


def _check_processes(argv: list[str]) -> None:
    """Refuse what one process does where torchrun has started several, which would each do all of it."""
    processes, name = int(os.environ.get("WORLD_SIZE", 1)), next(iter(argv), "")
    if processes > 1 and name in COMMANDS and name not in TOGETHER and "TORCHELASTIC_RUN_ID" in os.environ:
        raise ConfigError(
            f"torchrun has started {processes} processes, and each would do all that saelab {name} does: run it without "
            f"torchrun (what many processes do together is {' and '.join(TOGETHER)})"
        )


def _line(error: Exception) -> str:
    if isinstance(error, CycloptsError) and isinstance(
        error.__cause__, SaelabError
    ):  # what our reader of a value raised
        error = error.__cause__
    if isinstance(error, UnusedCliTokensError):
        line = " ".join(["saelab", *(error.command_chain or ())])
        error = ConfigError(
            f"{line} does not take {' '.join(error.unused_tokens or ())!r} ({line} --help says what it takes)"
        )
    name = f"{type(error).__name__}: " if isinstance(error, SaelabError) else ""
    return name + " ".join(str(error).split())


def _show_warning(message: Warning | str, *where: Any, **more: Any) -> None:
    print(f"saelab: warning: {' '.join(str(message).split())}", file=sys.stderr)
