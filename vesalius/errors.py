"""Refusals: errors a user can act on, printed as one line by the command line (exit code 2)."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class VesaliusError(Exception):
    """A refusal with the offending value and the remedy in its message.

    The command line prints the message on one line and exits with 2; Python callers catch it as usual.
    """


class UnknownName(VesaliusError):
    """A name that is not in a list of known ones; suggests the nearest.

    Example:
        >>> str(UnknownName("task", "iio", ["ioi", "induction"]))
        "unknown task 'iio'; did you mean 'ioi'? (known: induction, ioi)"
    """

    def __init__(self, kind: str, name: str, known: Iterable[str], hint: str = "") -> None:
        names = sorted(known)
        near = difflib.get_close_matches(name, names, n=3, cutoff=0.5)
        guess = "; did you mean " + " or ".join(f"'{n}'" for n in near) + "?" if near else ""
        shown = ", ".join(names[:40]) + (", ..." if len(names) > 40 else "")
        text = f"unknown {kind} '{name}'{guess}" + (f" (known: {shown})" if names else "; there are none")
        super().__init__(text + (f" {hint}" if hint else ""))


class ModelError(VesaliusError):
    """A model that cannot be opened or used, and why."""


class DownloadError(ModelError):
    """A fetch that failed, was cut short, or does not match its sha256."""


class PartError(VesaliusError):
    """A part address that cannot be parsed, or does not exist in the opened model."""


class TaskError(VesaliusError):
    """A task that cannot be built for this tokenizer or model, naming the example at fault."""


class RunError(VesaliusError):
    """A run folder that cannot be written, read or resumed."""


class OutOfMemory(VesaliusError):
    """The device ran out of memory; the message says what to lower."""
