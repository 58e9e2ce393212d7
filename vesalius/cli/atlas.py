"""`vesalius atlas`: the anatomy of a model on one page, from the other commands' runs."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import pandas as pd
import typer

from vesalius.cli import options as o
from vesalius.cli.console import Screen, set_threads
from vesalius.errors import UnknownName, VesaliusError
from vesalius.records import write_atomic
from vesalius.report.atlas import Section, agreement, circuits, closely, needed, page, roles
from vesalius.runs import Run
from vesalius.tasks import TASKS
from vesalius.tasks.files import is_path

TASKS_DEFAULT = "ioi,greater-than,successor,induction,capital"
EXIT_REFUSED = 2
OPENING = """
What the heads of this model do, by which evidence, and which of them the model needs for which task. Every part of the
page stands under the commands that measured it; each leaves a run with a report of its own.
"""
COMPARED = ("relp", "eap-ig", "attribution-patching")


def register(app: typer.Typer) -> None:
    """Adds the command."""
    app.command("atlas")(atlas)


def atlas(
    model: o.ModelName = o.MODEL_DEFAULT,
    tasks: Annotated[
        str,
        typer.Option(
            "--tasks", help="Tasks whose circuits are looked for, by commas; roles and methods are judged in the first."
        ),
    ] = (TASKS_DEFAULT),
    n: o.Number = None,
    page: Annotated[
        Path | None, typer.Option("--page", help="The Markdown file to write; atlas-MODEL.md by default.")
    ] = None,
    seed: o.Seed = 0,
    out: o.Out = None,
    as_json: o.AsJson = False,
    threads: o.Threads = None,
) -> None:
    """The anatomy of a model on one page: which heads do what, by which evidence, and which a circuit needs.

    Runs the other commands (heads, circuit, codes, lens), each of which leaves a run of its own, and puts what they
    found together. The page names the command behind every part of it. Runs that exist are found again, so a stopped
    atlas goes on where it was; expect about half an hour on two cores the first time.
    """
    screen = Screen(as_json)
    set_threads(threads)
    names = list(dict.fromkeys(o.listed(tasks)))
    for name in names:
        if name not in TASKS and not is_path(name):
            raise UnknownName("task", name, TASKS.names())
    if not names:
        raise VesaliusError("--tasks is empty; name one or more (see `vesalius tasks`)")
    target = page or Path(f"atlas-{Path(model).name}.md")
    if target.is_dir():
        raise VesaliusError(f"--page {target} is a folder; give the file to write")
    made = _Atlas(screen, model, names, n, seed, out, threads)
    made.write(target, "vesalius " + shlex.join(sys.argv[1:]))
    table = pd.DataFrame(made.runs.items(), columns=["command", "run"])
    screen.show({"page": str(target), "runs": made.runs}, table, f"\npage  {target}")


class _Refused(VesaliusError):
    """What a command had to say when it ended with exit code 2."""


class _Atlas:
    """Runs the commands and writes the page."""

    def __init__(
        self,
        screen: Screen,
        model: str,
        tasks: list[str],
        n: int | None,
        seed: int,
        out: Path | None,
        threads: int | None,
    ) -> None:
        self.screen, self.model, self.tasks, self.n, self.seed, self.out = screen, model, tasks, n, seed, out
        self.threads = threads
        self.runs: dict[str, str] = {}

    def ask(self, *words: str) -> dict[str, Any]:
        """The result of `vesalius WORDS --json`.

        Raises:
            _Refused: with the command's own line, where it refused.
        """
        said = self.shown(*words)
        self.screen.note(said)
        more = [] if self.out is None else ["--out", str(self.out)]
        more += [] if self.threads is None else ["--threads", str(self.threads)]
        command = [sys.executable, "-m", "vesalius", *words, *more, "--json"]
        with (
            tempfile.TemporaryFile("w+") as result,
            subprocess.Popen(command, stdout=result, stderr=subprocess.PIPE, text=True) as process,
        ):
            assert process.stderr is not None
            last = ""
            try:
                for line in process.stderr:  # its progress is ours
                    last = line.strip() or last
                    sys.stderr.write(line)
            except BaseException:
                process.terminate()
                raise
            code = process.wait()
            if code == EXIT_REFUSED:
                raise _Refused(last.removeprefix("error: "))
            if code:
                raise VesaliusError(f"'{said}' ended with {code}: {last[:300]}")
            result.seek(0)
            found: dict[str, Any] = json.load(result)
        self.runs[said] = found["run"]
        return found

    def run(self, words: Sequence[str]) -> tuple[str, Run]:
        """A command as the page shows it, and its run."""
        found = self.ask(*words)
        return self.shown(*words), Run.open(found["run"])

    def shown(self, *words: str) -> str:
        """A command as a reader types it."""
        return "vesalius " + shlex.join(words)

    def common(self, n: bool = True) -> list[str]:
        """Options every command is given; the number of prompts with `n`."""
        given = [] if self.model == o.MODEL_DEFAULT else ["--model", self.model]
        given += [] if self.n is None or not n else ["--n", str(self.n)]
        return given + ([] if not self.seed else ["--seed", str(self.seed)])

    def write(self, target: Path, made_by: str) -> None:
        """All sections, then the page at once."""
        heads_command, heads = self.run(["heads", "--task", self.tasks[0], *self.common()])
        scores, leading = heads.table("heads"), heads.table("leading")
        summary = heads.json("summary")
        role = dict(zip(leading["part"], leading["role"], strict=True))
        commands, found, refused = [], [], {}
        exact: Run | None = None
        for task in self.tasks:
            try:
                command, run = self.run(["circuit", "--task", task, *self.common()])
            except _Refused as why:
                refused[task] = str(why)
                continue
            commands.append(command)
            found.append(needed(task, run))
            exact = run if task == self.tasks[0] else exact
        sections = [
            Section("Which heads play which role", [heads_command], roles(summary, scores, leading)),
            Section("What circuits need", commands, circuits(found, refused, role)),
            Section("The heads that circuits need most", [heads_command, *commands], closely(found, scores, leading)),
        ]
        if exact is not None:
            sections.append(self.agreement(exact, summary))
        write_atomic(target, page(f"Atlas of {summary['model']}", OPENING, sections, made_by).encode())

    def agreement(self, exact: Run, heads: Mapping[str, Any]) -> Section:
        """Other methods, and the detectors, against the circuit of exact patching."""
        known = needed(self.tasks[0], exact)
        others = {name: exact.scores(f"scores-{name}") for name in COMPARED if exact.has(f"scores-{name}.parquet")}
        commands = [self.shown("circuit", "--task", self.tasks[0], *self.common())]
        try:
            command, run = self.run(["codes", "--task", self.tasks[0], *self.common(n=False)])
            others |= {"sae-codes": run.scores("scores"), "activation-difference": run.scores("baseline")}
            commands.append(command)
        except _Refused as why:
            self.screen.note(f"no codes: {why}", style="yellow")
        body = agreement(exact.scores("scores").kind("head"), list(known.heads), others, heads["found"])
        return Section(f"Do the methods agree? ({self.tasks[0]})", commands, body)
