"""The typer application, exit codes, and the one place where exceptions become a line on stderr."""

from __future__ import annotations

import errno
import os
import sys
import traceback
from collections.abc import Callable
from functools import wraps

import typer

from transquant import __version__
from transquant.cli import commands, features, searching
from transquant.cli.launch import be_silent, joined, leads, leave
from transquant.errors import OutputError, TransquantError

EXIT_CODES = """Exit codes: 0 ok; 1 internal error; 2 usage or input; 3 target not reachable; 4 bad compressed file;
5 an optional dependency is missing; 6 output cannot be written; 130 interrupted."""

app = typer.Typer(
    name="transquant",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    help="Make trained neural networks small: one file of the size you ask for, bit-exact decoding.",
    epilog=EXIT_CODES,
)


class _Interrupted(Exception):
    """Control-C, in a form that the parser does not answer by itself."""


def _guarded(command: Callable[..., None]) -> Callable[..., None]:
    """The command with its output flushed, and what ends it from outside turned into what `main` documents."""

    @wraps(command)
    def run(*arguments: object, **options: object) -> None:
        try:
            with joined(command.__name__) as needed:
                if needed:
                    command(*arguments, **options)
                sys.stdout.flush()
        except (KeyboardInterrupt, EOFError):
            raise _Interrupted from None
        except BrokenPipeError:  # whoever read stdout has seen enough
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        except TransquantError:
            raise
        except OSError as error:
            if error.errno != errno.ENOSPC:
                raise
            raise OutputError(f"cannot write the result: {error.strerror}") from None
        except Exception as error:  # compiled code wraps an interrupt in an error of its own
            if isinstance(error.__cause__ or error.__context__, KeyboardInterrupt):
                raise _Interrupted from None
            raise

    return run


maps = typer.Typer(no_args_is_help=True, rich_markup_mode=None, help="Code what a network passes from layer to layer.")
for group, verbs in ((app, {**commands.COMMANDS, "search": searching.search}), (maps, features.COMMANDS)):
    for name, command in verbs.items():
        group.command(name)(_guarded(command))
app.add_typer(maps, name="features")


@app.callback(invoke_without_command=True)
def _root(version: bool = typer.Option(False, "--version", help="Print the version and exit.")) -> None:
    if version:
        typer.echo(f"transquant {__version__}")
        raise typer.Exit()


def main(arguments: list[str] | None = None) -> None:
    """Run the command line and exit with a documented code."""
    given = sys.argv[1:] if arguments is None else arguments
    if not leads():
        be_silent()
    try:
        _run(given)
    except SystemExit as end:
        leave(end.code)
        raise


def _run(given: list[str]) -> None:
    try:
        app(given, prog_name="transquant")
    except TransquantError as error:
        _fail(str(error), error.exit_code, given)
    except (KeyboardInterrupt, _Interrupted):
        _fail("interrupted; no file was left half written", 130, given)
    except MemoryError:
        _fail("out of memory", 1, given)
    except Exception as error:
        _fail(f"internal error: {type(error).__name__}: {error}", 1, given)


def _fail(message: str, code: int, given: list[str]) -> None:
    if "-v" in given or "--verbose" in given:
        traceback.print_exc()
    typer.echo(f"error: {message}", err=True)
    raise SystemExit(code)
