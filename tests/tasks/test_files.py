"""A user's own prompts: what is read, and what each mistake is told."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from task_helpers import opened

from vesalius.errors import TaskError, UnknownName
from vesalius.tasks import Example, task
from vesalius.tasks.files import read

COUNTRIES = ["France", "Italy", "Peru", "Cuba", "Spain", "Egypt", "Japan", "Norway", "Chile", "Kenya"]
GOOD = {
    "clean": "The city of Peru is",
    "corrupted": "The city of Cuba is",
    "answer": " Lima",
    "wrong": [" Rome", " Oslo"],
}


def jsonl(folder: Path, *rows: Any, name: str = "prompts.jsonl") -> Path:
    path = folder / name
    path.write_text("\n".join(r if isinstance(r, str) else json.dumps(r) for r in rows) + "\n", encoding="utf-8")
    return path


def many(folder: Path) -> Path:
    rows = [{**GOOD, "clean": f"The city of {c} is", "corrupted": "The city of Poland is"} for c in COUNTRIES]
    return jsonl(folder, *rows)


def test_jsonl_is_read_as_written(tmp_path: Path) -> None:
    path = jsonl(
        tmp_path, GOOD, "", {**GOOD, "group": "x", "positions": {"country": [12, 16]}, "options": [" Lima", " a"]}
    )
    found = read(path)
    plain = Example(GOOD["clean"], GOOD["corrupted"], (" Lima",), (" Rome", " Oslo"))  # type: ignore[arg-type]
    assert found.examples[0] == plain and found.where == ("prompts.jsonl line 1", "prompts.jsonl line 3")
    assert found.examples[1].positions == {"country": (12, 16)} and found.examples[1].options == (" Lima", " a")


def test_csv_says_the_same_as_jsonl(tmp_path: Path) -> None:
    path = tmp_path / "p.csv"
    path.write_text(
        "clean,corrupted,answer,wrong\nThe city of Peru is,The city of Cuba is, Lima, Rome| Oslo\n\n"
        '"One,\ntwo","One,\nfour", three, five\n',
        encoding="utf-8-sig",
    )
    found = read(path)
    assert found.examples[0] == read(jsonl(tmp_path, GOOD)).examples[0]
    assert found.examples[1].clean == "One,\ntwo" and found.where == ("p.csv line 2", "p.csv line 4")


def test_all_rows_by_default_in_their_order(tmp_path: Path, splitting: Any) -> None:
    t = task(many(tmp_path))
    assert [e.clean.split()[3] for e in t.examples(splitting)] == COUNTRIES
    assert t.pairs(opened(splitting)).n_examples == 10
    assert t.fingerprint == task(str(many(tmp_path))).fingerprint


def test_a_split_of_the_rows_is_seeded_and_disjoint(tmp_path: Path, splitting: Any) -> None:
    def rows(t: Any) -> list[str]:
        return [e.clean for e in t.examples(splitting)]

    t = task(many(tmp_path), n=6)
    held = t.held_out()
    assert len(rows(t)) == 6 and sorted(rows(t) + rows(held)) == sorted(f"The city of {c} is" for c in COUNTRIES)
    assert rows(task(many(tmp_path), n=6)) == rows(t) and rows(task(many(tmp_path), n=6, seed=1)) != rows(t)
    assert len(rows(t.held_out(2))) == 2
    find, prove = task(many(tmp_path)).halves()
    assert len(rows(find)) == len(rows(prove)) == 5 and not set(rows(find)) & set(rows(prove))
    with pytest.raises(TaskError, match=r"10 of 10 rows are in use, 0 left to hold out; build the task with n=5"):
        task(many(tmp_path)).held_out()
    with pytest.raises(TaskError, match=r"6 of 10 rows are in use, 4 left to hold out; lower n"):
        t.held_out(5)


def test_rows_with_the_same_clean_prompt_stay_on_one_side(tmp_path: Path, splitting: Any) -> None:
    twice = [{**GOOD, "corrupted": f"The city of {c} is"} for c in COUNTRIES if c != "Peru"]
    t = task(jsonl(tmp_path, *twice), n=4)
    with pytest.raises(TaskError, match="4 more are in the split 'find'"):
        t.held_out().examples(splitting)
    assert len(t.examples(splitting)) == 4


def test_repeated_rows_are_counted(tmp_path: Path, splitting: Any) -> None:
    t = task(jsonl(tmp_path, GOOD, GOOD))
    assert len(t.examples(splitting)) == 1 and t.describe()["skipped"] == {"duplicate": 1}


def test_a_glued_answer_is_noted_not_changed(tmp_path: Path, splitting: Any) -> None:
    t = task(
        jsonl(
            tmp_path,
            {**GOOD, "clean": "The price of a book", "corrupted": "The price of a ball", "answer": "s", "wrong": "x"},
        )
    )
    try:
        pairs = t.pairs(opened(splitting))
    except TaskError as error:
        pytest.fail(str(error))
    assert splitting.decode([pairs.answers[0][0]]) == "s"
    assert t.describe()["notes"] == ["answer 's' is glued to the prompt; write ' s' if a space is meant"]


BAD_JSONL = [
    (["{nonsense"], "prompts.jsonl line 1: not JSON (Expecting property name"),
    ([GOOD, "[1, 2]"], "prompts.jsonl line 2: a list where an object is needed"),
    ([GOOD, "", {k: v for k, v in GOOD.items() if k != "wrong"}], "prompts.jsonl line 3: no 'wrong'; each row needs"),
    ([{**GOOD, "anwser": " a"}], "prompts.jsonl line 1: unknown key 'anwser'; did you mean 'answer'"),
    ([{**GOOD, "answer": 7}], "line 1: 'answer' must be a text or a list of texts, not 7"),
    ([{**GOOD, "answer": []}], "line 1: 'answer' is an empty list"),
    ([{**GOOD, "wrong": [" a", ""]}], "line 1: 'wrong' holds an empty text"),
    ([{**GOOD, "wrong": " Lima"}], "line 1: ' Lima' is both in answer and in wrong"),
    ([{**GOOD, "clean": 3}], "line 1: 'clean' must be a text, not 3"),
    ([{**GOOD, "clean": " "}], "line 1: 'clean' is empty"),
    ([{**GOOD, "corrupted": GOOD["clean"]}], "line 1: clean and corrupted are the same text; change at least one word"),
    ([{**GOOD, "positions": {"x": [0, 99]}}], "position 'x' must be [start, end] within the 19 characters of clean"),
    ([{**GOOD, "positions": 4}], "'positions' must be an object"),
    ([{**GOOD, "options": [" a"]}], "no right answer among the options"),
    ([""], "is empty; write one row for each prompt"),
]


@pytest.mark.parametrize(("rows", "message"), BAD_JSONL, ids=[m[:40] for _, m in BAD_JSONL])
def test_a_bad_row_is_named_with_its_line_and_the_remedy(tmp_path: Path, rows: list[Any], message: str) -> None:
    with pytest.raises(TaskError) as caught:
        task(jsonl(tmp_path, *rows))
    assert message in str(caught.value) and "\n" not in str(caught.value)


BAD_CSV = [
    ("clean,corrupted,answer\na,b,c\n", "p.csv line 1 (the header): no 'wrong'"),
    ("clean,corupted,answer,wrong\n", "p.csv line 1 (the header): unknown key 'corupted'; did you mean 'corrupted'"),
    ("clean,corrupted,answer,wrong\n", "has a header but no rows"),
    ("clean,clean,corrupted,answer,wrong\n", "the key 'clean' stands there twice"),
    ("clean,corrupted,answer,wrong\na b,a c, d, e\na, b,c,d,e\n", "p.csv line 3: 5 cells under 4 columns; put texts"),
    ('clean,corrupted,answer,wrong\n"a b,a c, d, e\n', "p.csv line 2: not CSV"),
    ("clean,corrupted,answer,wrong\na b,a c,, e\n", "p.csv line 2: 'answer' holds an empty text"),
]


@pytest.mark.parametrize(("text", "message"), BAD_CSV, ids=[m[:40] for _, m in BAD_CSV])
def test_a_bad_csv_is_told_too(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "p.csv").write_text(text)
    with pytest.raises(TaskError) as caught:
        task(tmp_path / "p.csv")
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_files_that_are_not_there_or_not_prompts(tmp_path: Path) -> None:
    many(tmp_path)
    (tmp_path / "p.txt").write_text("x")
    (tmp_path / "bytes.jsonl").write_bytes(b"\xff\xfe\x00")
    (tmp_path / "d.jsonl").mkdir()
    cases = {
        tmp_path / "promts.jsonl": "did you mean 'prompts.jsonl'?",
        tmp_path / "zzz.csv": "there is only bytes.jsonl, d.jsonl, prompts.jsonl in that folder",
        tmp_path / "no" / "p.jsonl": "does not exist; check the path",
        tmp_path / "p.txt": "prompts are read from .jsonl or .csv files",
        tmp_path / "bytes.jsonl": "not UTF-8 text",
        tmp_path / "d.jsonl": "is a folder",
    }
    for path, message in cases.items():
        with pytest.raises(TaskError) as caught:
            task(path)
        assert message in str(caught.value) and "\n" not in str(caught.value)


def test_requests_that_a_file_cannot_meet(tmp_path: Path) -> None:
    with pytest.raises(TaskError, match="has 10 rows, but n=11 were asked for; lower n"):
        task(many(tmp_path), n=11)
    with pytest.raises(TaskError, match="unknown parameter 'order'"):
        task(many(tmp_path), order="abba")
    with pytest.raises(UnknownName, match="on_misaligned"):
        task(many(tmp_path), on_misaligned="skp")  # type: ignore[arg-type]


def test_a_row_that_does_not_align_names_its_line(tmp_path: Path, splitting: Any) -> None:
    bad = {**GOOD, "corrupted": "The city of Vincent is"}
    with pytest.raises(TaskError, match=r"prompts.jsonl line 2: clean has 5 tokens .* on_misaligned='skip'"):
        task(jsonl(tmp_path, GOOD, bad)).examples(splitting)
    assert len(task(jsonl(tmp_path, GOOD, bad), on_misaligned="skip").examples(splitting)) == 1
