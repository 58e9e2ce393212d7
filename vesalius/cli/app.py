"""The command line's root: which commands there are, and how errors leave it."""

from __future__ import annotations

import os

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # spinning threads make a loaded machine many times slower

import sys
import time
from collections.abc import Sequence
from itertools import pairwise
from typing import Annotated, Any, NoReturn

import typer

from vesalius.errors import VesaliusError


def _version(value: bool) -> None:
    if value:
        from vesalius import __version__

        typer.echo(__version__)
        raise typer.Exit


def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


def command_line() -> typer.Typer:
    """The command line with all its commands."""
    from vesalius.cli import (
        anchor,
        atlas,
        bias,
        card,
        catalogues,
        channels,
        check,
        circuit,
        codebook,
        codes,
        compare,
        data,
        direction,
        distil,
        dynamics,
        forget,
        frequency,
        heads,
        icll,
        lens,
        listing,
        memorize,
        merge,
        observe,
        probe,
        prune,
        quantize,
        race,
        recursion,
        repair,
        reuse,
        sae,
        sparsify,
        steer,
        subnetwork,
        trace,
        train,
        tune,
        write,
    )

    app = typer.Typer(
        name="vesalius",
        help="The anatomist's bench for transformer language models: find which parts do a job, prove it, compare it; "
        "train models worth studying, and open any checkpoint.",
        no_args_is_help=True,
        pretty_exceptions_enable=False,
        context_settings={"help_option_names": ["-h", "--help"]},
        rich_markup_mode="markdown",
    )
    app.callback()(_root)
    rooms = {
        "Find and prove circuits": (circuit, reuse, compare, atlas),
        "Look inside": (heads, lens, channels, trace, anchor, observe),
        "Concepts and features": (direction, probe, bias, frequency, subnetwork, sae, codes, codebook),
        "Train, and see what was learnt": (train, data, race, dynamics, recursion, icll, memorize, tune),
        "Change a model": (prune, sparsify, quantize, merge, distil, repair, forget, card),
        "Write": (write, steer),
        "What there is": (check, listing, catalogues),
    }
    for panel, modules in rooms.items():
        known = len(app.registered_commands), len(app.registered_groups)
        for module in modules:
            module.register(app)
        for command in app.registered_commands[known[0] :]:
            command.rich_help_panel = panel
        for group in app.registered_groups[known[1] :]:
            group.rich_help_panel = panel
    return app


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs a command; errors a user can act on are one line on standard error, with exit code 2."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    _streams()
    try:
        code = command_line()(args=given, prog_name="vesalius", standalone_mode=False)
        sys.stdout.flush()
        if code == 130:  # what typer makes of Ctrl-C, where it does not abort
            raise KeyboardInterrupt
    except VesaliusError as error:
        _leave(str(error))
    except (KeyboardInterrupt, typer.Abort):
        _leave("interrupted; what was finished is kept, and the same command goes on from there")
    except BrokenPipeError:  # who read the output has closed it: what is left to print must not fail again at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except OSError as error:
        _leave(f"{error.strerror or error}{f': {error.filename}' if error.filename else ''}")
    except (MemoryError, RuntimeError) as error:
        _leave(_memory(error))
    except Exception as error:
        if type(error).__module__.split(".")[0] not in ("click", "typer") or not hasattr(error, "format_message"):
            raise
        _leave(_usage(error, given))
    else:
        sys.exit(code if isinstance(code, int) else 0)


def _streams() -> None:
    """Output goes somewhere even where it was closed, and what its encoding lacks is written as an escape."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115  # for the rest of the process
        elif hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")


def _memory(error: BaseException) -> str:
    """What to lower, if memory ran out where nothing else said so; any other error is raised again."""
    from vesalius.errors import OutOfMemory
    from vesalius.model.memory import memory_errors

    try:
        with memory_errors("ask for less at once (this command's --help), or close other programs"):
            raise error
    except OutOfMemory as found:
        return str(found)


def _usage(error: Any, given: Sequence[str]) -> str:
    """A wrong use of the command line: what is wrong, with the value as it was given, and where help is."""
    text = str(error.format_message()).rstrip()
    if not text:  # no command at all: the help was printed
        return ""
    names = tuple(getattr(getattr(error, "param", None), "opts", None) or ())
    values = []  # in the order given: of an option that is repeated the last one counts
    for option, after in pairwise([*given, ""]):
        name, equals, value = option.partition("=")
        if name in names and (equals or after):
            values.append(value if equals else after)
    if values and not any(repr(v) in text for v in values):
        text = f"{text.rstrip('.')}, not {values[-1]!r}"
    context = getattr(error, "ctx", None)
    return f"{text} (see `{context.command_path if context else 'vesalius'} --help`)"


def _leave(message: str) -> NoReturn:
    if os.environ.get("RANK", "0") != "0":  # under torchrun the first process tells what all of them met
        time.sleep(15)  # and torchrun ends this one before; if not, this one met something of its own
    if message:
        sys.stderr.write(f"error: {' '.join(message.split())}\n")
    sys.exit(2)
