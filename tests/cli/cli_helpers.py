"""Running the command line inside this process, or beside it where a signal is the point."""

from __future__ import annotations

import contextlib
import io
import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from vesalius.cli import main
from vesalius.runs import Run

ROOT = Path(__file__).parents[2]
SMALL = ("--n", "8", "--prove-n", "8", "--compare", "none")


@dataclass(frozen=True)
class Outcome:
    """What a command left: its exit code, and what it wrote."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        """Standard output as exactly one strict JSON document."""

        def refuse(name: str) -> None:
            raise AssertionError(f"{name} is not JSON")

        return json.loads(self.out, parse_constant=refuse)

    @property
    def error(self) -> str:
        """The one line of the refusal, without its `error: `."""
        assert self.code == 2, self
        assert "Traceback" not in self.err, self.err
        lines = [line for line in self.err.splitlines() if line.startswith("error: ")]
        assert len(lines) == 1 and self.err.endswith(f"{lines[0]}\n"), self.err
        return lines[0].removeprefix("error: ")


def vesalius(*arguments: object) -> Outcome:
    """`vesalius ARGUMENTS ...` in this process."""
    given = [str(a) for a in arguments]
    out, err, before = io.StringIO(), io.StringIO(), sys.argv
    sys.argv = ["vesalius", *given]
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            main(given)
    except SystemExit as left:
        code = left.code if isinstance(left.code, int) else 0
    finally:
        sys.argv = before
    return Outcome(code, out.getvalue(), err.getvalue())


def beside(script: str, *arguments: object) -> subprocess.Popen[str]:
    """`python -c SCRIPT ARGUMENTS ...` as a process of its own that finds the package."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive"}
    command = [sys.executable, "-c", script, *(str(a) for a in arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)


def only_run(folder: Path, command: str = "") -> Run:
    """The run in a folder that holds one (of that command)."""
    found = [p.parent for p in folder.glob(f"{command}*/request.json")]
    assert len(found) == 1, found
    return Run.open(found[0])


def content(run: Run) -> dict[str, Any]:
    """Everything a run stored, as values that can be compared; the command as typed left out."""
    found: dict[str, Any] = {}
    for name in run.files:
        if name.endswith(".parquet"):
            found[name] = run.table(name)
        elif name.endswith(".json"):
            value = run.json(name)
            found[name] = {k: v for k, v in value.items() if k != "command"} if isinstance(value, dict) else value
        else:
            found[name] = run.bytes(name)
    return found


def assert_same(a: Run, b: Run) -> None:
    """Two runs stored the same, to the last bit."""
    left, right = content(a), content(b)
    assert left.keys() == right.keys()
    for name, value in left.items():
        if isinstance(value, pd.DataFrame):
            pd.testing.assert_frame_equal(value, right[name], check_exact=True)
        else:
            assert value == right[name], name
