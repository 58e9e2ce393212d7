"""A user's own prompts: JSONL (one object a line) or CSV, with the keys `clean`, `corrupted`, `answer`, `wrong`.

    {"clean": "The capital of France is", "corrupted": "The capital of Italy is", "answer": " Paris", "wrong": " Rome"}

`answer` and `wrong` are a text or a list of acceptable ones (in CSV, a list is separated by `|`). Texts are used
exactly as written, spaces included. JSONL rows may also have `group` (text), `options` (list) and `positions` (name to
[start, end] characters of `clean`); CSV rows may have `group`.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from vesalius.errors import TaskError, UnknownName
from vesalius.rows import csv_rows, is_text, jsonl_rows
from vesalius.tasks.base import UserRows
from vesalius.tasks.encode import Example

NEEDED = ("clean", "corrupted", "answer", "wrong")
EXTRA = {".jsonl": ("group", "options", "positions"), ".csv": ("group",)}


def is_path(name: str) -> bool:
    """Whether a task's name is meant as a file: it has a file's ending or a folder in it."""
    return Path(name).suffix != "" or "/" in name or "\\" in name


def read(path: str | Path) -> UserRows:
    """Reads a user's prompts.

    Args:
        path: a .jsonl or .csv file, UTF-8.

    Raises:
        TaskError: the file or a line of it cannot be used; the message names the line and what to write instead.
    """
    path = Path(path)
    if path.suffix not in EXTRA:
        raise TaskError(f"{path}: prompts are read from .jsonl or .csv files; rename it or convert it")
    if not path.is_file():
        raise TaskError(_missing(path))
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise TaskError(f"{path}: not UTF-8 text (byte {error.start}); save it as UTF-8") from None
    except OSError as error:
        raise TaskError(f"{path} cannot be read: {error.strerror}; check its permissions") from None
    if not text.strip():
        raise TaskError(f"{path} is empty; write one row for each prompt, with {', '.join(NEEDED)}")
    rows = [(f"{path.name} line {n}", row) for n, row in (_jsonl if path.suffix == ".jsonl" else _csv)(path, text)]
    if not rows:
        raise TaskError(f"{path} has a header but no rows; write one row for each prompt")
    examples = tuple(_example(row, where, path.suffix) for where, row in rows)
    return UserRows(str(path), examples, tuple(where for where, _ in rows))


def _missing(path: Path) -> str:
    if path.is_dir():
        return f"{path} is a folder; name a .jsonl or .csv file in it"
    if not path.parent.is_dir():
        return f"no file {path}: the folder {path.parent} does not exist; check the path"
    there = [p.name for p in path.parent.iterdir() if p.suffix in EXTRA]
    stems = {name.rpartition(".")[0]: name for name in there}  # the ending alone makes no likeness
    near = [stems[s] for s in difflib.get_close_matches(path.stem, stems, n=3, cutoff=0.5)]
    if near:
        return f"no file {path}; did you mean " + " or ".join(f"'{n}'" for n in near) + "?"
    have = f"only {', '.join(sorted(there)[:5])}" if there else "no .jsonl or .csv file"
    return f"no file {path}; there is {have} in that folder"


def _jsonl(path: Path, text: str) -> Iterator[tuple[int, Mapping[str, Any]]]:
    return jsonl_rows(path.name, text, TaskError, '{"clean": ..., ...}')


def _csv(path: Path, text: str) -> Iterator[tuple[int, Mapping[str, Any]]]:
    rows = csv_rows(path.name, text, TaskError)
    number, header = next(rows)
    _check_keys(header, f"{path.name} line {number} (the header)", ".csv")
    for number, cells in rows:
        row: dict[str, Any] = dict(zip(header, cells, strict=True))
        yield number, {**row, "answer": row["answer"].split("|"), "wrong": row["wrong"].split("|")}


def _check_keys(keys: list[str], where: str, suffix: str) -> None:
    known = (*NEEDED, *EXTRA[suffix])
    for key in keys:
        if key not in known:
            raise TaskError(f"{where}: " + str(UnknownName("key", key, known)))
        if keys.count(key) > 1:
            raise TaskError(f"{where}: the key '{key}' stands there twice; keep one")
    for key in NEEDED:
        if key not in keys:
            raise TaskError(f"{where}: no '{key}'; each row needs {', '.join(NEEDED)}")


def _texts(row: Mapping[str, Any], key: str, where: str) -> tuple[str, ...]:
    value = row.get(key, [])
    found = [value] if isinstance(value, str) else value
    if not isinstance(found, list) or not all(isinstance(v, str) for v in found):
        raise TaskError(f"{where}: '{key}' must be a text or a list of texts, not {value!r}; write it in double quotes")
    if key == "answer" and not found:
        raise TaskError(f"{where}: 'answer' is an empty list; write at least one right answer")
    if not all(map(is_text, found)):
        raise TaskError(f"{where}: '{key}' holds half a character (\\ud800 to \\udfff alone); write it whole")
    if "" in found:
        raise TaskError(f"{where}: '{key}' holds an empty text; write what should follow the prompt, as ' Paris'")
    return tuple(found)


def _example(row: Mapping[str, Any], where: str, suffix: str) -> Example:
    _check_keys(list(row), where, suffix)
    for key in ("clean", "corrupted", "group"):
        value = row.get(key, "")
        if not isinstance(value, str):
            raise TaskError(f"{where}: '{key}' must be a text, not {value!r}; write it in double quotes")
        if not is_text(value):
            raise TaskError(f"{where}: '{key}' holds half a character (\\ud800 to \\udfff alone); write it whole")
        if key != "group" and not value.strip():
            raise TaskError(f"{where}: '{key}' is empty; write a prompt that ends where the answer begins")
    if row["clean"] == row["corrupted"]:
        raise TaskError(f"{where}: clean and corrupted are the same text; change at least one word in corrupted")
    answer, wrong = _texts(row, "answer", where), _texts(row, "wrong", where)
    for text in answer:
        if text in wrong:
            raise TaskError(f"{where}: {text!r} is both in answer and in wrong; leave it out of one")
    positions = row.get("positions", {})
    if not isinstance(positions, dict):
        raise TaskError(f"{where}: 'positions' must be an object such as {{\"subject\": [4, 10]}}, not {positions!r}")
    for name, span in positions.items():
        good = isinstance(span, list) and len(span) == 2 and all(type(v) is int for v in span)
        if not good or not 0 <= span[0] < span[1] <= len(row["clean"]):
            raise TaskError(
                f"{where}: position '{name}' must be [start, end] within the {len(row['clean'])} characters of clean, "
                f"not {span!r}"
            )
    options = _texts(row, "options", where)
    if options and not set(answer) & set(options):
        raise TaskError(f"{where}: no right answer among the options {list(options)}; add it to them")
    spans = {name: (span[0], span[1]) for name, span in positions.items()}
    return Example(row["clean"], row["corrupted"], answer, wrong, spans, row.get("group", ""), options)
