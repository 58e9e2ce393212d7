"""Rows of a user's files: whole cells, the right lines, and nothing dropped in silence."""

from __future__ import annotations

import json

import pytest

from vesalius.errors import TaskError, VesaliusError
from vesalius.rows import csv_rows, jsonl_rows


def test_cells_keep_their_line_breaks_and_rows_their_lines() -> None:
    text = 'text, label\n\n"a\nb",1\nc\u2028d,0\n'
    assert list(csv_rows("x.csv", text)) == [(1, ["text", "label"]), (3, ["a\nb", "1"]), (5, ["c\u2028d", "0"])]
    lines = '{"text": "a\u2028b"}\n\n{"text": 3}'
    assert list(jsonl_rows("x.jsonl", lines)) == [(1, {"text": "a\u2028b"}), (3, {"text": 3})]


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("text,label\na, b,1\n", "x.csv line 2: 3 cells under 2 columns; put texts that hold a comma"),
        ("text,label\na\n", "x.csv line 2: 1 cells under 2 columns"),
        ("text,text\na,b\n", "x.csv line 1 .the header.: the key 'text' stands there twice"),
        ('text,label\n"a,1\n', "x.csv line 2: not CSV"),
        ("text\n" + "a" * 200_000, "x.csv line 2: not CSV .field larger"),
    ],
)
def test_broken_csv(text: str, told: str) -> None:
    with pytest.raises(VesaliusError, match=told):
        list(csv_rows("x.csv", text))


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("{", "x.jsonl line 2: not JSON"),
        ("[1]", "x.jsonl line 2: a list where an object is needed"),
        ("9" * 5000, "x.jsonl line 2: no row that can be read"),
        ("[" * 100_000, "x.jsonl line 2: no row that can be read"),
        ('{"a": 1, "a": 2}', "x.jsonl line 2: the key 'a' stands there twice"),
    ],
)
def test_broken_json(line: str, told: str) -> None:
    with pytest.raises(TaskError, match=told):
        list(jsonl_rows("x.jsonl", f"{json.dumps({})}\n{line}", TaskError))
