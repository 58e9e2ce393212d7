"""What every study does: run commands, keep their results, write a page of docs/results/."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RUNS = ROOT / "runs" / "studies"
RESULTS = ROOT / "docs" / "results"
CHANGING = ("prune", "sparsify", "quantize", "merge", "distil", "repair", "forget")


def run(arguments: str) -> dict[str, Any]:
    """The result of `vesalius ARGUMENTS --json`; a finished run is found again, a refusal ends the study."""
    print(f"vesalius {arguments}", file=sys.stderr, flush=True)
    place = "--runs" if arguments.split()[0] in CHANGING else "--out"  # a change's --out is the new model
    command = [sys.executable, "-m", "vesalius", *arguments.split(), "--json", place, str(RUNS)]
    environment = os.environ | {"OMP_WAIT_POLICY": "passive"}
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, env=environment, check=False)
    if done.returncode:
        raise SystemExit(f"'vesalius {arguments}' ended with {done.returncode}")
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def estimate(value: Mapping[str, float | None] | float | None, digits: int = 2) -> str:
    """A number with its 95 % interval."""
    if value is None:
        return "-"
    if not isinstance(value, Mapping):
        return f"{value:.{digits}f}"
    mean, low, high = (value.get(k) for k in ("mean", "low", "high"))
    if mean is None:
        return "-"
    return f"{mean:.{digits}f}" + ("" if low is None or high is None else f" [{low:.{digits}f}, {high:.{digits}f}]")


def _cell(value: Any) -> str:
    """Text as it may stand between bars."""
    text = re.sub(r"(?<![\w.])nan(?![\w.])", "-", str(value))  # a number that there is not
    return text.replace("\\|", "|").replace("|", "\\|")


def table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """A Markdown table."""
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    lines += ["| " + " | ".join(_cell(cell) for cell in row) + " |" for row in rows]
    return "\n".join(lines) + "\n"


def _commit() -> str:
    """Which sources measured it, where git knows; with a plus sign if they were changed since."""
    git = ["git", "-C", str(ROOT)]
    try:
        found = subprocess.run([*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
        changes = subprocess.run([*git, "diff", "--quiet", "HEAD", "--", "vesalius", "studies"], check=False)
    except OSError:
        return ""
    return f", commit {found.stdout.strip()}{'+' * bool(changes.returncode)}" if not found.returncode else ""


def write(name: str, title: str, study: str, *body: str, seeds: str = "seed 0") -> None:
    """Writes docs/results/NAME.md; `study` is the command that makes the page, `seeds` says which it took."""
    versions = ", ".join(f"{p} {version(p)}" for p in ("vesalius", "torch", "transformers")) + _commit()
    head = f"# {title}\n\nMeasured by `{study}`, {seeds}, float32 on a CPU ({versions}).\n"
    text = "\n".join([head, *(part.strip() + "\n" for part in body)])
    (RESULTS / f"{name}.md").write_text(text)
    print(f"wrote docs/results/{name}.md", file=sys.stderr)


def look_inside(system: str, claims: Sequence[Sequence[Any]], command: str, page: str) -> None:
    """As `summarise`, into docs/results/look-inside.md."""
    summarise("look-inside", system, claims, command, page)


def changed(system: str, claims: Sequence[Sequence[Any]], command: str, page: str) -> None:
    """As `summarise`, into docs/results/change.md."""
    summarise("change", system, claims, command, page)


def claims_of(page: str) -> list[list[str]]:
    """The rows (asked, came out, verdict) of the first table of a page that is written."""
    lines = (RESULTS / f"{page}.md").read_text().splitlines()
    head = next(i for i, line in enumerate(lines) if line.startswith("| asked |"))
    end = next(i for i in range(head, len(lines)) if not lines[i].startswith("|"))
    return [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines[head + 2 : end]]


def summarise(summary: str, system: str, claims: Sequence[Sequence[Any]], command: str, page: str) -> None:
    """Puts a system's section into a page that gathers many systems, in the place of the one it had.

    Args:
        summary: name of that page. system: its name, a heading. claims: rows of (asked, came out, verdict).
        command: that makes the system's own page. page: name of it.
    """
    path = RESULTS / f"{summary}.md"
    head, *sections = re.split(r"^## ", path.read_text(), flags=re.MULTILINE)
    told = {title: text.strip() for title, _, text in (part.partition("\n") for part in sections)}
    judged = [str(verdict) for _, _, verdict in claims if "hold" in str(verdict)]  # the rest is only told
    good = sum(verdict.startswith("holds") for verdict in judged)
    rows = table(["asked", "came out", ""], claims).strip()
    told[system] = f"{good} of {len(judged)} hold. `{command}`, [page]({page}.md).\n\n{rows}"
    ordered = sorted(told.items(), key=lambda item: item[0].lower())
    path.write_text("\n".join([head.rstrip() + "\n", *(f"## {title}\n\n{text}\n" for title, text in ordered)]))
