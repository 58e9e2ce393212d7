"""Ctrl-C, a kill and a closed pipe: the same command goes on, and ends with the numbers of a run left alone."""

from __future__ import annotations

import signal
import subprocess
import time
from pathlib import Path

import pytest
from cli_helpers import SMALL, Outcome, assert_same, beside, only_run, vesalius

from vesalius.runs import Run

# The real command, which sleeps a little after each finished piece so that a signal meets it at work.
SLOW = """
import sys, time
from vesalius.records import Checkpoint
put = Checkpoint.put
def slow(self, keys, values):
    put(self, keys, values)
    time.sleep(0.3)
Checkpoint.put = slow
from vesalius.cli import main
main()
"""


PATIENCE_S = 120  # on a busy machine


def pieces(out: Path) -> dict[str, int]:
    """Finished pieces by name, and when each was written."""
    return {str(p): p.stat().st_mtime_ns for p in out.glob("*/checkpoints/**/*.npz")}


def wait_for(n: int, out: Path, process: subprocess.Popen[str]) -> None:
    """Returns once the process has finished `n` pieces."""
    end = time.monotonic() + PATIENCE_S
    while len(pieces(out)) < n:
        if process.poll() is not None or time.monotonic() > end:
            process.kill()
            pytest.fail(f"{n} pieces were not there in time: {process.communicate()}")
        time.sleep(0.02)


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL])
def test_an_interrupted_run_goes_on(first: Outcome, mover: Path, tmp_path: Path, how: signal.Signals) -> None:
    command = ("circuit", "--model", mover, "--task", mover / "ioi.jsonl", "--out", tmp_path, *SMALL)
    process = beside(SLOW, *command)
    wait_for(3, tmp_path, process)
    process.send_signal(how)
    out, err = process.communicate(timeout=PATIENCE_S)
    if how == signal.SIGINT:
        refusal = Outcome(process.returncode, out, err).error
        assert refusal.startswith("interrupted") and "the same command" in refusal
    else:
        assert process.returncode == -signal.SIGKILL
    run, kept = only_run(tmp_path), pieces(tmp_path)
    assert run.state == "interrupted" and not run.has("scores.parquet")
    assert "again" in vesalius("report", run.folder).error

    assert vesalius(*command).code == 0
    whole = Run.open(first.json["run"])
    assert only_run(tmp_path).done
    assert_same(only_run(tmp_path), whole)
    after = pieces(tmp_path)
    assert {name: after[name] for name in kept} == kept  # what was finished was not computed again
    assert len(after) == len(pieces(whole.folder.parent)) > len(kept)


def test_a_second_process_does_not_write_the_same_run(first: Outcome, mover: Path, tmp_path: Path) -> None:
    command = ("circuit", "--model", mover, "--task", mover / "ioi.jsonl", "--out", tmp_path, *SMALL)
    process = beside(SLOW, *command)
    try:
        wait_for(1, tmp_path, process)
        error = vesalius(*command).error
        assert f"process {process.pid}" in error and "wait for it" in error
    finally:
        process.kill()
        process.communicate()


def test_a_reader_that_closes_the_pipe() -> None:
    with beside("from vesalius.cli import main; main()", "tasks", "--json") as process:
        assert process.stdout is not None and process.stderr is not None
        process.stdout.close()
        assert process.stderr.read() == ""
        assert process.wait(timeout=PATIENCE_S) == 1


def test_an_interrupt_while_the_command_starts() -> None:
    script = "import os, signal, vesalius.cli as c\nimport vesalius.cli.app as a\n"
    script += "a.command_line = lambda: os.kill(os.getpid(), signal.SIGINT)\nc.main()"
    process = beside(script, "tasks")
    out, err = process.communicate(timeout=PATIENCE_S)
    assert Outcome(process.returncode, out, err).error.startswith("interrupted")
