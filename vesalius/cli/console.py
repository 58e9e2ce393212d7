"""What every command shares: progress on standard error, options, errors as one line."""

from __future__ import annotations

import json
import math
import os
import shlex
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from vesalius.errors import UnknownName, VesaliusError
from vesalius.records import Checkpoint, plain
from vesalius.runs import Run

MOST_THREADS = 1024
SHORT = 12  # characters of a text that is never folded
QUIET_SECONDS = 2.0  # steps shorter than this leave no trace where there is no terminal
SAY_SECONDS = 5.0  # between two messages of one step, where there is no terminal


def typed() -> str:
    """The command line as it could be typed again."""
    return "vesalius " + shlex.join(sys.argv[1:])


class Screen:
    """Standard error for progress and notes, standard output for results."""

    def __init__(self, as_json: bool = False) -> None:
        self.as_json = as_json
        self.err = _console(stderr=True)
        self.out = _console()

    @contextmanager
    def step(self, name: str) -> Iterator[Callable[..., None]]:
        """A long step: yields a callback that takes (done, total) or (message, fraction)."""
        began, said, last = time.monotonic(), set[str](), -math.inf
        columns = (
            SpinnerColumn(),
            TextColumn("{task.description}", markup=False),  # a path may hold [brackets]
            BarColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
        )
        with Progress(*columns, console=self.err, transient=True, disable=not self.err.is_terminal) as bar:
            task = bar.add_task(name, total=None)

            def report(first: Any, second: Any = None) -> None:
                nonlocal last
                if isinstance(first, str):
                    often = second is not None and time.monotonic() - last < SAY_SECONDS  # a log is no moving bar
                    if not self.err.is_terminal and first not in said and not often:
                        said.add(first)
                        last = time.monotonic()
                        self.err.print(f"  {first} ...", style="dim", markup=False)
                    if bar.tasks[0].finished and (second or 0) < 1:  # a new phase: its clock would stand still
                        bar.reset(task)
                    bar.update(task, description=first, total=None if second is None else 1.0, completed=second or 0)
                else:
                    bar.update(task, completed=first, total=second)

            yield report
        took = time.monotonic() - began
        if took >= QUIET_SECONDS:
            self.err.print(f"  {name}: {took:.0f} s", style="dim", markup=False)

    def note(self, text: str, style: str = "") -> None:
        """A line for people, on standard error."""
        self.err.print(text, style=style, markup=False, soft_wrap=True)

    def show(self, summary: Any, *lines: Any) -> None:
        """The result: JSON with `--json`, otherwise the lines (text or tables)."""
        if self.as_json:
            sys.stdout.write(json.dumps(plain(summary), indent=1, allow_nan=False) + "\n")
            return
        for line in lines:
            if isinstance(line, pd.DataFrame):
                self.out.print(frame_table(line))
            else:
                self.out.print(line, markup=False, soft_wrap=True)  # so that a path can be copied whole


def _console(stderr: bool = False) -> Console:
    console = Console(stderr=stderr, highlight=False)
    if not console.is_terminal and "COLUMNS" not in os.environ:
        console.width = 10_000  # a file or a pipe has no edge to fold at
    return console


def frame_table(frame: pd.DataFrame, title: str | None = None) -> Table:
    """A pandas frame as a table for the terminal; where it is too narrow, text is folded and numbers are not."""
    table = Table(
        title=title, title_justify="left", box=SIMPLE_HEAD, padding=(0, 1, 0, 0), show_edge=False, pad_edge=False
    )
    columns: list[list[Text]] = []
    for column in frame.columns:
        cells = [_cell(v) for v in frame[column]]
        head = str(column).replace("_", " ").strip()
        if pd.api.types.is_numeric_dtype(frame[column]):
            table.add_column(head.replace(" ", "\n"), justify="right", no_wrap=True)
        else:
            table.add_column(head, overflow="fold", no_wrap=max(map(len, cells), default=0) <= SHORT)
        columns.append([Text(c) for c in cells])
    for row in zip(*columns, strict=True):
        table.add_row(*row)
    return table


def _cell(value: Any) -> str:
    if value is None or value is pd.NA or value is pd.NaT or (isinstance(value, float) and np.isnan(value)):
        return "-"
    if isinstance(value, (bool, np.bool_)):
        return "yes" if value else "no"
    if isinstance(value, (float, np.floating)):
        return f"{value:.3f}" if abs(float(value)) >= 0.0005 or value == 0 else f"{value:.0e}"
    return str(value)


def estimate(value: Any) -> str:
    """A number with its interval, as far as they are known: `0.93 [0.90, 0.95]`, `0.93`, or `not measured`."""
    found = value if isinstance(value, Mapping) else {"mean": value}
    if not _round(found.get("mean")):
        return "not measured"
    mean, low, high = (_round(found.get(k)) for k in ("mean", "low", "high"))
    return f"{mean} [{low}, {high}]" if low and high else mean


def _round(value: float | None) -> str:
    return "" if value is None or not np.isfinite(value) else f"{round(float(value), 2) + 0.0:.2f}"  # no -0.00


@contextmanager
def staged(run: Run, screen: Screen) -> Iterator[Callable[[str], Any]]:
    """A function that is told each step's name: the step before ends, the run notes the stage, progress is shown."""
    with ExitStack() as current:

        def step(name: str) -> Any:
            current.close()
            current.enter_context(run.stage(name))
            return current.enter_context(screen.step(name))

        yield step


def drawn(screen: Screen, run: Run) -> Path:
    """The run's report, drawn with its name on the screen while it takes its time."""
    from vesalius.report import report

    with screen.step("drawing the report"):
        return report(run)


def conclude(screen: Screen, run: Run, *lines: Any, **more: Any) -> None:
    """What a command ends with: its lines, then the lead, the notes, and where the run and its report lie.

    Args:
        lines: text and tables. more: what the JSON holds beside the summary, `run` and `report`.
    """
    summary = run.json("summary")
    place = {"run": str(run.folder), "report": str(run.folder / "report.html")}
    tail = [f"\n{summary['lead']}", *(f"note: {n}" for n in summary.get("notes", ())), ""]
    if summary.get("checkpoint"):
        tail.append(f"model   {summary['checkpoint']}")
    screen.show(summary | more | place, "", *lines, *tail, *(f"{k:8}{v}" for k, v in place.items()))


def stored_tables(run: Run, names: Sequence[str]) -> dict[str, pd.DataFrame]:
    """Those of some tables that the run has."""
    return {name: run.table(name) for name in names if run.has(f"{name}.parquet")}


def records_of(tables: Mapping[str, pd.DataFrame]) -> dict[str, list[Any]]:
    """Tables as JSON holds them."""
    return {name: table.to_dict("records") for name, table in tables.items()}


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
        return int(text) if text.removeprefix("-").isdecimal() else text
    return text


def set_threads(threads: int | None) -> int:
    """Uses the cores this process may use, and no more; waiting threads sleep (set before torch starts)."""
    import torch

    available = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if threads is not None and not 1 <= threads <= MOST_THREADS:
        raise VesaliusError(f"--threads {threads} is not a number of threads; give 1 or more, at most {MOST_THREADS}")
    torch.set_num_threads(threads or min(available, torch.get_num_threads()))
    return torch.get_num_threads()
