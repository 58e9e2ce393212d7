"""The command line's root: which commands there are, and how errors leave it."""

from __future__ import annotations

import os

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # spinning threads make a loaded machine many times slower

import sys
from typing import Annotated

import typer

from vesalius.errors import VesaliusError

app = typer.Typer(
    name="vesalius",
    help="The anatomist's bench for transformer language models: find which parts do a job, prove it, compare it.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    rich_markup_mode="markdown",
)


def _version(value: bool) -> None:
    if value:
        from vesalius import __version__

        typer.echo(__version__)
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


def _register() -> None:
    from vesalius.cli import check, circuit, compare, listing, reuse

    for module in (listing, circuit, reuse, compare, check):
        module.register(app)


def main(arguments: list[str] | None = None) -> None:
    """Runs a command; errors a user can act on are one line on standard error, with exit code 2."""
    _register()
    try:
        code = app(args=arguments, standalone_mode=False)
    except VesaliusError as error:
        _leave(str(error))
    except (KeyboardInterrupt, typer.Abort):
        _leave("interrupted; what was finished is kept, and the same command goes on from there")
    except BrokenPipeError:
        sys.stderr.close()
        sys.exit(2)
    except OSError as error:
        _leave(f"{error.strerror or error}{f': {error.filename}' if error.filename else ''}")
    except Exception as error:
        if type(error).__module__.split(".")[0] not in ("click", "typer") or not hasattr(error, "format_message"):
            raise
        _leave(f"{error.format_message()} (see --help)")
    else:
        sys.exit(code if isinstance(code, int) else 0)


def _leave(message: str) -> None:
    sys.stderr.write(f"error: {' '.join(message.split())}\n")
    sys.exit(2)
