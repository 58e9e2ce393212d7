"""What every command shares: progress on standard error, options, errors as one line."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from vesalius.errors import UnknownName, VesaliusError
from vesalius.records import Checkpoint, plain

QUIET_SECONDS = 2.0  # steps shorter than this leave no trace where there is no terminal


class Screen:
    """Standard error for progress and notes, standard output for results."""

    def __init__(self, as_json: bool = False) -> None:
        self.as_json = as_json
        self.err = Console(stderr=True, highlight=False)
        self.out = Console(highlight=False)

    @contextmanager
    def step(self, name: str) -> Iterator[Callable[..., None]]:
        """A long step: yields a callback that takes (done, total) or (message, fraction)."""
        began = time.monotonic()
        columns = (
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
        )
        with Progress(*columns, console=self.err, transient=True, disable=not self.err.is_terminal) as bar:
            task = bar.add_task(name, total=None)

            def report(first: Any, second: Any = None) -> None:
                if isinstance(first, str):
                    bar.update(task, description=first, total=None if second is None else 1.0, completed=second or 0)
                else:
                    bar.update(task, completed=first, total=second)

            yield report
        took = time.monotonic() - began
        if took >= QUIET_SECONDS:
            self.err.print(f"  {name}: {took:.0f} s", style="dim")

    def note(self, text: str, style: str = "") -> None:
        """A line for people, on standard error."""
        self.err.print(text, style=style, markup=False)

    def show(self, summary: Any, *lines: Any) -> None:
        """The result: JSON with `--json`, otherwise the lines (text or tables)."""
        if self.as_json:
            sys.stdout.write(json.dumps(plain(summary), indent=1, default=str) + "\n")
            return
        for line in lines:
            if isinstance(line, pd.DataFrame):
                self.out.print(frame_table(line))
            else:
                self.out.print(line, markup=False)


def frame_table(frame: pd.DataFrame, title: str | None = None) -> Table:
    """A pandas frame as a table for the terminal."""
    table = Table(title=title, title_justify="left", show_edge=False, pad_edge=False)
    for column in frame.columns:
        numeric = pd.api.types.is_numeric_dtype(frame[column])
        table.add_column(str(column), justify="right" if numeric else "left", overflow="fold")
    for row in frame.itertuples(index=False):
        table.add_row(*[_cell(v) for v in row])
    return table


def _cell(value: Any) -> str:
    if value is None or value is pd.NA or (isinstance(value, float) and np.isnan(value)):
        return "-"
    if isinstance(value, (bool, np.bool_)):
        return "yes" if value else "no"
    return f"{value:.3f}" if isinstance(value, (float, np.floating)) else str(value)


class RunStore:
    """A run's checkpoint as the store sweeps write their finished pieces to."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.checkpoint = checkpoint

    def get(self, key: str) -> NDArray[np.float64] | None:
        found = self.checkpoint.get([key]).get(key)
        return None if found is None else np.asarray(found, dtype=float)

    def put(self, key: str, values: NDArray[np.float64]) -> None:
        self.checkpoint.put([key], np.asarray(values, dtype=float)[None])


def settings(items: Sequence[str], known: dict[str, Any], what: str) -> dict[str, Any]:
    """`KEY=VALUE` options as Python values of the types of the defaults in `known`."""
    found: dict[str, Any] = {}
    for item in items:
        name, sign, text = item.partition("=")
        if not sign:
            raise VesaliusError(f"'{item}' is not of the form KEY=VALUE")
        name = name.strip().replace("-", "_")
        if name not in known:
            raise UnknownName(f"parameter of {what}", name, known)
        found[name] = convert(text.strip(), known[name], name)
    return found


def convert(text: str, default: Any, name: str) -> Any:
    """A flag's text as the type of its default."""
    try:
        if isinstance(default, bool):
            return {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}[text.lower()]
        if isinstance(default, int):
            return int(text)
        if isinstance(default, float):
            return float(text)
    except (ValueError, KeyError):
        raise VesaliusError(f"{name}={text!r} is not a value of type {type(default).__name__}") from None
    if default is None:
        return int(text) if text.lstrip("-").isdigit() else text
    return text


def set_threads(threads: int | None) -> int:
    """Uses the cores this process may use, and no more; waiting threads sleep (set before torch starts)."""
    import torch

    available = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if threads is not None and threads < 1:
        raise VesaliusError(f"--threads {threads} is not a number of threads; give 1 or more")
    torch.set_num_threads(threads or min(available, torch.get_num_threads()))
    return torch.get_num_threads()
