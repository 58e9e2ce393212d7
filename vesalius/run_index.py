"""Finding recorded runs again: by folder, name, hash or lateness; and the table of all of them."""

from __future__ import annotations

import contextlib
import difflib
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import pandas as pd

from vesalius.errors import RunError
from vesalius.records import read_json
from vesalius.runs import DEFAULT_ROOT, DIGITS, Run


def _folders(roots: Sequence[Path | str]) -> list[Path]:
    return [p.parent for root in roots for p in sorted(Path(root).glob("*/request.json"))]


def _touched(folder: Path) -> str:
    with contextlib.suppress(RunError):
        return str(read_json(folder / "status.json", "").get("touched", ""))
    return ""


def find_run(text: str, roots: Sequence[Path | str] = (DEFAULT_ROOT,), holding: str = "") -> Run:
    """Opens a run for reading by its folder, its name, the start of its name or of its hash, or `last`.

    Args:
        holding: a file; runs without it are passed over, unless the folder itself is named.

    Raises:
        RunError: if there is none, or more than one, with the nearest names.
    """
    if (Path(text) / "request.json").exists():
        return Run.open(text)
    folders = [f for f in _folders(roots) if not holding or (f / holding).exists()]
    where = ", ".join(str(r) for r in roots)
    if text == "last":
        if not folders:
            if holding:
                raise RunError(f"no run in {where} holds {holding}; `vesalius runs` lists what there is")
            raise RunError(f"there are no runs in {where} yet; `vesalius circuit` makes one")
        return Run.open(max(folders, key=_touched))
    exact = [f for f in folders if f.name == text]
    hits = exact or [f for f in folders if text and (f.name.startswith(text) or f.name.split("-")[-1].startswith(text))]
    if len(hits) == 1:
        return Run.open(hits[0])
    if hits:
        shown = ", ".join(str(f if exact else f.name) for f in hits[:5]) + (", ..." if len(hits) > 5 else "")
        raise RunError(f"'{text}' may be any of {len(hits)} runs: {shown}; give more of the name, or its folder")
    near = difflib.get_close_matches(text, [f.name for f in folders], n=3, cutoff=0.3)
    hint = f"; nearest: {', '.join(near)}" if near else "; `vesalius runs` lists them"
    raise RunError(f"no run '{text}' in {where}{hint}")


def find_folder(name: str, file: str) -> Path:
    """The folder that holds a file: itself, or that of a run in ./runs that holds one, by name, hash or `last`."""
    folder = Path(name)
    if folder.is_dir() or "/" in name:
        return folder
    return Path(find_run(name, holding=file).folder)


_COLUMNS = ["run", "hash", "command", "model", "task", "method", "level", "state", "when", "seconds", "accuracy"]
_COLUMNS += [
    "logit_diff",
    "faithfulness",
    "heads",
    "mlps",
    "edges",
    "random",
    "cpr",
    "cmd",
    "parameters",
    "held_out",
    "error",
]
_COLUMNS += ["folder"]


def _number(value: Any) -> float | None:
    """The middle of an estimate written as a number or as {"mean": ...}."""
    if isinstance(value, Mapping):
        value = value.get("mean")
    return float(value) if isinstance(value, (int, float)) else None


def list_runs(root: Path | str = DEFAULT_ROOT) -> pd.DataFrame:
    """All runs of a folder, the latest first: what was asked, how it stands, and the headline numbers of its summary.

    A run that cannot be read is listed too, with state `damaged` and the reason in `error`.
    """
    rows: list[dict[str, Any]] = []
    for folder in _folders([root]):
        row: dict[str, Any] = {"run": folder.name, "folder": str(folder)}
        rows.append(row)
        try:
            run = Run.open(folder)
            arguments = run.request.get("arguments")
            pool = {**run.request, **(arguments if isinstance(arguments, Mapping) else {})}
            row |= {k: pool.get(k) for k in ("command", "method", "level")}
            for key in ("model", "task"):
                value = pool.get(key, pool.get(f"{key}s"))
                row[key] = ", ".join(map(str, value)) if isinstance(value, list) else value
            status = run.status
            row |= {"hash": run.hash[:DIGITS], "state": status["state"], "error": status.get("error")}
            row["when"] = status.get("touched")
            spans = [(s["started"], s["ended"]) for s in status.get("stages", []) if s.get("ended")]
            parse = datetime.fromisoformat
            row["seconds"] = sum((parse(b) - parse(a)).total_seconds() for a, b in spans) if spans else None
            if run.has("summary.json"):
                summary = run.json("summary")
                told = summary.get("size")
                size = told if isinstance(told, Mapping) else {}  # a codebook's is a number
                row |= {k: size.get(k) for k in ("heads", "mlps", "edges")}
                for key in ("accuracy", "logit_diff", "faithfulness", "random", "cpr", "cmd", "parameters", "held_out"):
                    row[key] = _number(summary.get(key))
        except RunError as error:
            row |= {"state": "damaged", "error": str(error)}
    frame = pd.DataFrame(rows, columns=_COLUMNS)
    frame["when"] = pd.to_datetime(frame["when"], utc=True)
    return frame.sort_values("when", ascending=False, na_position="last", ignore_index=True)


__all__ = ["find_run", "list_runs"]
