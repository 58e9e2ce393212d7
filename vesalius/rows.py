"""Rows of a user's `.csv` or `.jsonl` text, each with the number of the line it begins on.

What is wrong with a line is refused with the file's name and the line; `wrong` is the class of error that is raised.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from vesalius.errors import VesaliusError

Wrong = type[VesaliusError]


def jsonl_rows(
    name: str, text: str, wrong: Wrong = VesaliusError, example: str = "{...}"
) -> Iterator[tuple[int, dict[str, Any]]]:
    """JSON objects, one a line; empty lines are passed over. `example` shows what a row looks like."""
    # Split at line feeds alone: JSON texts may hold the other separators that splitlines() knows.
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        where = f"{name} line {number}"
        try:
            row = json.loads(line, object_pairs_hook=lambda pairs: _object(pairs, where, wrong))  # noqa: B023  # called here
        except json.JSONDecodeError as error:
            raise wrong(
                f"{where}: not JSON ({error.msg} at column {error.colno}); write one whole object on each line"
            ) from None
        except (ValueError, RecursionError):  # a number of thousands of digits, brackets in thousands of brackets
            raise wrong(f"{where}: no row that can be read; write {example}") from None
        if not isinstance(row, dict):
            raise wrong(f"{where}: a {_name(row)} where an object is needed; write {example}")
        yield number, row


def read_jsonl(path: str | Path, example: str) -> list[tuple[str, dict[str, Any]]]:
    """The objects of a .jsonl file, each with its place ("FILE line 3").

    Raises:
        VesaliusError: for a file that cannot be read or holds none, or a line that is no object.
    """
    place = Path(path)
    try:
        text = place.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise VesaliusError(f"{place} cannot be read ({error}); give a .jsonl file of lines like {example}") from error
    found = [(f"{place} line {number}", row) for number, row in jsonl_rows(str(place), text, example=example)]
    if not found:
        raise VesaliusError(f"{place} holds no line; write {example}")
    return found


def _object(pairs: list[tuple[str, Any]], where: str, wrong: Wrong) -> dict[str, Any]:
    keys = [key for key, _ in pairs]
    for key in keys:
        if keys.count(key) > 1:
            raise wrong(f"{where}: the key '{key}' stands there twice; keep one")
    return dict(pairs)


def _name(value: Any) -> str:
    names = {dict: "object", list: "list", str: "text", bool: "true/false", type(None): "null"}
    return names.get(type(value), "number")


def csv_rows(name: str, text: str, wrong: Wrong = VesaliusError) -> Iterator[tuple[int, list[str]]]:
    """Cells of every line that is not empty: first the header, stripped, then rows of as many cells."""
    header: list[str] | None = None
    reader, line = csv.reader(io.StringIO(text, newline=""), strict=True), 1
    try:
        for cells in reader:
            number, line = line, reader.line_num + 1  # a quoted cell may run over several lines: name the first
            if not any(c.strip() for c in cells):
                continue
            if header is None:
                header = cells = [c.strip() for c in cells]
                twice = next((c for c in header if header.count(c) > 1), None)
                if twice is not None:
                    raise wrong(f"{name} line {number} (the header): the key '{twice}' stands there twice; keep one")
            elif len(cells) != len(header):
                raise wrong(
                    f"{name} line {number}: {len(cells)} cells under {len(header)} columns; put texts that hold a "
                    "comma in double quotes"
                )
            yield number, cells
    except csv.Error as error:
        raise wrong(f"{name} line {line}: not CSV ({error}); close quotes, and double those inside") from None


def is_text(value: str) -> bool:
    """Whether it can be written down: JSON may escape one half of a surrogate pair."""
    return not any("\ud800" <= c <= "\udfff" for c in value)
