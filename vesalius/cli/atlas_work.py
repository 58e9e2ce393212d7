"""What `vesalius atlas` does: commands run one after another, and a page written of what they found."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vesalius.cli import options as o
from vesalius.cli.console import Screen
from vesalius.errors import VesaliusError
from vesalius.records import write_atomic
from vesalius.report.atlas import Section, agreement, circuits, closely, needed, page, roles
from vesalius.runs import Run

EXIT_REFUSED, ERROR = 2, "error: "
OPENING = """
What the heads of this model do, by which evidence, and which of them the model needs for which task. Every part of the
page stands under the commands that measured it; each leaves a run with a report of its own.
"""
COMPARED = ("relp", "eap-ig", "attribution-patching")


class Refused(VesaliusError):
    """What a command had to say when it ended with exit code 2."""


class Atlas:
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
            Refused: with the command's own line, where it refused.
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
                for line in process.stderr:  # its progress is ours, and its last word is told by who asked
                    last = line.strip() or last
                    if not line.startswith(ERROR):
                        sys.stderr.write(line)
            except BaseException:
                process.terminate()
                raise
            code = process.wait()
            if code == EXIT_REFUSED:
                raise Refused(last.removeprefix(ERROR))
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
            except Refused as why:
                refused[task] = str(why)
                self.screen.note(f"{task}: {why}", style="yellow")
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
        except Refused as why:
            self.screen.note(f"no codes: {why}", style="yellow")
        body = agreement(exact.scores("scores").kind("head"), list(known.heads), others, heads["found"])
        return Section(f"Do the methods agree? ({self.tasks[0]})", commands, body)
