"""What every study does: run commands, keep their results, write a page of docs/results/."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RUNS = ROOT / "runs" / "studies"
RESULTS = ROOT / "docs" / "results"
CHANGING = ("prune", "quantize", "merge", "repair", "forget", "distil")


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
    return str(value).replace("\\|", "|").replace("|", "\\|")


def table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """A Markdown table."""
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    lines += ["| " + " | ".join(_cell(cell) for cell in row) + " |" for row in rows]
    return "\n".join(lines) + "\n"


def write(name: str, title: str, study: str, *body: str, seeds: str = "seed 0") -> None:
    """Writes docs/results/NAME.md; `study` is the command that makes the page, `seeds` says which it took."""
    versions = ", ".join(f"{p} {version(p)}" for p in ("vesalius", "torch", "transformers"))
    head = f"# {title}\n\nMeasured by `{study}`, {seeds}, float32 on a CPU ({versions}).\n"
    text = "\n".join([head, *(part.strip() + "\n" for part in body)])
    (RESULTS / f"{name}.md").write_text(text)
    print(f"wrote docs/results/{name}.md", file=sys.stderr)


def look_inside(system: str, claims: Sequence[Sequence[Any]], command: str, page: str) -> None:
    """Puts a system's rows into docs/results/look-inside.md, in the place of those it had.

    Args:
        system: its name in the table. claims: rows of (asked, came out, verdict). command: that makes the page.
        page: name of the system's own page.
    """
    path = RESULTS / "look-inside.md"
    text = path.read_text()
    mine = [
        "| "
        + " | ".join([system, _cell(asked), _cell(f"{came} ({verdict})"), f"`{command}`", f"[page]({page}.md)"])
        + " |"
        for asked, came, verdict in claims
    ]
    lines = text.splitlines()
    head = next(i for i, line in enumerate(lines) if line.startswith("| system |"))
    end = next((i for i in range(head, len(lines)) if not lines[i].startswith("|")), len(lines))
    rows = [line for line in lines[head + 2 : end] if not line.startswith(f"| {system} |")]
    merged = sorted([*rows, *mine], key=lambda line: line.split("|")[1].strip().lower())
    path.write_text("\n".join([*lines[: head + 2], *merged, *lines[end:]]) + "\n")
