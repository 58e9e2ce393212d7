"""Every task: its prompts align, its answers follow from the clean prompt and not from the corrupted one."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
from task_helpers import opened

from vesalius.errors import TaskError
from vesalius.tasks import TASKS, Example, task, wordlist
from vesalius.tasks.facts import relation_of
from vesalius.tasks.words import lines

# Each oracle answers a prompt from its text alone: the set of right continuations, stripped.


def ioi(prompt: str) -> set[str]:
    people = [w for w in re.findall(r"[A-Z][a-z]+", prompt) if w in set(wordlist("names"))]
    return {p for p in people if people.count(p) == 1} if len(set(people)) == 2 else set()


def colored(prompt: str) -> set[str]:
    question = prompt.split("Q: ")[-1]
    thing = re.search(r"color is the (\w+)\?", question)
    assert thing is not None
    colors = [c for c, o in re.findall(r"an? (\w+) (\w+)", question) if o == thing[1]]
    return {c.capitalize() for c in colors}


def docstring(prompt: str) -> set[str]:
    arguments = re.findall(r"\w+", prompt.split("(self, ")[1].split(")")[0])
    described = re.findall(r":param (\w+):", prompt)
    if described[-1] not in arguments or arguments[-1] == described[-1]:
        return set()
    return {arguments[arguments.index(described[-1]) + 1]}


def induction(prompt: str) -> set[str]:
    row = prompt.split()
    return {row[i + 1] for i in range(len(row) - 1) if row[i] == row[-1]}


def successor(prompt: str) -> set[str]:
    shown = re.findall(r"\w+", prompt)
    for name in ("days", "months", "numbers", "letters"):
        items = wordlist(name)
        if shown[-1] in items and shown[-2] in items:
            assert items[(items.index(shown[-2]) + 1) % len(items)] == shown[-1]
            return {items[(items.index(shown[-1]) + 1) % len(items)]}
    raise AssertionError(prompt)


def capital(prompt: str) -> set[str]:
    return {
        city for country, city in (x.split(": ") for x in lines("capitals")) if re.search(rf"\b{country}\b", prompt)
    }


def arithmetic(prompt: str) -> set[str]:
    last = prompt.splitlines()[-1].strip(" =")
    return {str(eval(last))}  # digits and a sign, made by the generator


def laundry(prompt: str) -> set[str]:
    things = {*wordlist("objects"), *wordlist("colored_objects")}
    said = [w for w in re.findall(r"[a-z]+", prompt) if w in things]
    return {w for w in said if said.count(w) == 1}


def fact(prompt: str) -> set[str]:
    asked = relation_of(prompt)
    assert asked is not None
    return {a for topic, a in asked.answers.items() if re.search(rf"\b{topic}\b", prompt)}


ORACLES: list[tuple[str, dict[str, Any], Callable[[str], set[str]]]] = [
    ("ioi", {}, ioi),
    ("ioi", {"corruption": "swap"}, ioi),
    ("ioi", {"order": "baba"}, ioi),
    ("colored-objects", {}, colored),
    ("docstring", {}, docstring),
    ("docstring", {"corruption": "shuffle", "described": 3}, docstring),
    ("induction", {}, induction),
    ("induction", {"corruption": "second", "length": 5}, induction),
    ("successor", {}, successor),
    ("successor", {"kind": "days"}, successor),
    ("capital", {}, capital),
    ("capital", {"multi_token": True}, capital),
    ("facts", {}, fact),
    ("facts", {"relation": "language"}, fact),
    ("facts", {"relation": "currency", "templates": 3}, fact),
    ("arithmetic", {}, arithmetic),
    ("arithmetic", {"operation": "subtract"}, arithmetic),
    ("arithmetic", {"max_operand": 40, "max_result": 80}, arithmetic),
    ("laundry-list", {}, laundry),
    ("laundry-list", {"items": 9, "missing": 2}, laundry),
]


@pytest.mark.parametrize(("name", "params", "oracle"), ORACLES, ids=lambda v: str(v) if not callable(v) else "")
def test_answers_follow_from_the_clean_prompt_alone(
    causal_tokenizer: Any, name: str, params: dict[str, Any], oracle: Callable[[str], set[str]]
) -> None:
    for e in task(name, n=40, **params).examples(causal_tokenizer):
        answers = {a.strip() for a in e.answer}
        assert oracle(e.clean) == answers, e
        assert not oracle(e.corrupted) & answers, e
        assert not {w.strip() for w in e.wrong} & answers


@pytest.mark.parametrize(
    ("name", "params"),
    [
        ("ioi", {"corruption": "swap"}),
        ("colored-objects", {}),
        ("successor", {}),
        ("capital", {}),
        ("facts", {"relation": "language"}),
        ("arithmetic", {}),
        ("laundry-list", {"items": 5}),
    ],
)
def test_the_wrong_answer_is_right_for_the_corrupted_prompt(splitting: Any, name: str, params: dict[str, Any]) -> None:
    oracle = next(o for n, _, o in ORACLES if n == name)
    for e in task(name, n=40, **params).examples(splitting):
        assert oracle(e.corrupted) == {w.strip() for w in e.wrong}


def test_every_task_is_tested_here() -> None:
    assert {n for n, _, _ in ORACLES} | {"greater-than"} == set(TASKS.names())
    assert all(e.summary and e.paper for e in TASKS)


@pytest.mark.parametrize("name", TASKS.names())
def test_prompts_align_and_positions_name_the_same_token(causal_tokenizer: Any, name: str) -> None:
    t = task(name, n=32)
    examples, pairs = t.examples(causal_tokenizer), t.pairs(opened(causal_tokenizer))
    assert pairs.targets is None and pairs.n_rows == len(examples) == 32
    assert len({e.clean for e in examples}) == 32
    for row, e in enumerate(examples):
        real = pairs.mask[row].bool()
        assert (pairs.clean[row] != pairs.corrupted[row]).any()
        for ids, text in ((pairs.clean, e.clean), (pairs.corrupted, e.corrupted)):
            assert causal_tokenizer.decode(ids[row][real], skip_special_tokens=True) == text
        for key, (low, high) in e.positions.items():
            token = causal_tokenizer.decode([int(pairs.clean[row, pairs.positions[key][row]])])
            assert token.strip() and e.clean[low:high].strip()[-1] in token, (key, token, e)
            assert key == "S1+1" or e.clean[:high].endswith(token), (key, token, e)
        assert int(pairs.positions["END"][row]) == int(pairs.reads[row, 0]) == pairs.length - 1


def test_ioi_swap_differs_in_the_second_subject_only(causal_tokenizer: Any) -> None:
    pairs = task("ioi", n=40, corruption="swap").pairs(opened(causal_tokenizer))
    differs = pairs.clean != pairs.corrupted
    assert (differs.sum(1) == 1).all()
    assert (differs.int().argmax(1) == pairs.positions["S2"]).all()
    # and what stands there is the IO's own token
    rows = range(pairs.n_rows)
    assert all(pairs.corrupted[r, pairs.positions["S2"][r]] == pairs.clean[r, pairs.positions["IO"][r]] for r in rows)


def test_ioi_abc_has_three_fresh_names_and_nothing_else_changed(splitting: Any) -> None:
    names = set(wordlist("names"))
    t = task("ioi", n=60, corruption="abc")
    for e in t.examples(splitting):
        old, new = ([w for w in re.findall(r"[A-Z][a-z]+", x) if w in names] for x in (e.clean, e.corrupted))
        assert len(set(new)) == 3 and not set(old) & set(new)
        assert re.sub("|".join(new), "N", e.corrupted) == re.sub("|".join(old), "N", e.clean)
        assert (e.group == "ABBA") == (old[0] != old[2])
    assert {e.group for e in t.examples(splitting)} == {"ABBA", "BABA"}
    assert {e.group for e in task("ioi", n=20, order="abba").examples(splitting)} == {"ABBA"}


def test_ioi_positions(splitting: Any) -> None:
    e = next(e for e in task("ioi", n=40).examples(splitting) if e.group == "BABA")
    word = {k: e.clean[a:b] for k, (a, b) in e.positions.items()}
    assert word["S1"] == word["S2"] == e.wrong[0].strip() and word["IO"] == e.answer[0].strip()
    assert e.positions["S1"] < e.positions["IO"] < e.positions["S2"] and word["S1+1"] == " a"


def test_colored_objects_offers_three_colours_of_which_one_is_right(splitting: Any) -> None:
    t = task("colored-objects", n=50)
    for e in t.examples(splitting):
        assert len(set(e.options)) == 3 and {*e.answer, *e.wrong} < set(e.options)
        word = {k: e.clean[a:b] for k, (a, b) in e.positions.items()}
        assert word["query"] == word["right-object"] and f" {word['right-color'].capitalize()}" == e.answer[0]
        assert f" {word['wrong-color'].capitalize()}" == e.wrong[0] and word["other-color"] in colored_words(e)
    pairs = t.pairs(opened(splitting))
    assert ((pairs.clean != pairs.corrupted).sum(1) == 1).all()
    assert pairs.options is not None and all(len(o) == 3 for o in pairs.options)


@pytest.mark.parametrize(("corruption", "place"), [("first", "prev"), ("second", "first")])
def test_induction_changes_one_token_where_it_says(splitting: Any, corruption: str, place: str) -> None:
    t = task("induction", n=40, corruption=corruption)
    pairs = t.pairs(opened(splitting))
    differs = pairs.clean != pairs.corrupted
    assert (differs.sum(1) == 1).all() and (differs.int().argmax(1) == pairs.positions[place]).all()
    for e in t.examples(splitting):
        row = e.corrupted.split()
        assert len(set(row)) == (len(row) if corruption == "first" else len(row) - 1)
        assert len(set(e.clean.split())) == len(row) - 1 and e.wrong[0].strip() in (e.clean + " " + e.corrupted).split()


def colored_words(e: Example) -> set[str]:
    return {o.strip().lower() for o in e.options}


@pytest.mark.parametrize(
    ("tokenizer", "form"),
    [("splitting", "digit"), ("beginning", "digit"), ("twos", "two-digit"), ("wordpiece", "year")],
)
def test_greater_than_takes_the_form_the_tokenizer_allows(
    request: pytest.FixtureRequest, tokenizer: str, form: str
) -> None:
    t = task("greater-than", n=50)
    for e in t.examples(request.getfixturevalue(tokenizer)):
        assert e.group == form
        found = re.search(r"from the year (\d\d)(\d\d) to the year( \d\d)?$", e.clean)
        assert found is not None
        start = int(found[2])
        span = {"digit": 10, "two-digit": 1, "year": 1}[form]
        # every year that a right answer can still become is later; none that a wrong one can become is
        for texts, later in ((e.answer, True), (e.wrong, False)):
            firsts = [int(a) % 100 * span for a in texts]
            assert all((y + k > start) == later for y in firsts for k in range(span)) and firsts
        begins = re.search(r"from the year 17(\d\d)", e.corrupted)
        assert begins is not None and int(begins[1]) == 1
    assert t.metric == "prob-diff" and form in t.describe()["notes"][0]


def test_greater_than_says_so_when_no_form_works(twos: Any) -> None:
    with pytest.raises(TaskError, match="none of the forms digit"):
        task("greater-than", form="digit").examples(twos)
    with pytest.raises(TaskError, match="century must be from 10 to 20"):
        task("greater-than", century=3).examples(twos)


def test_arithmetic_writes_sums_so_that_results_are_one_token(splitting: Any, twos: Any) -> None:
    assert task("arithmetic", n=5).examples(splitting)[0].clean.endswith("= ")
    assert task("arithmetic", n=5).examples(twos)[0].clean.endswith("=")
    for tok in (splitting, twos):
        assert task("arithmetic", n=40).pairs(opened(tok), require_single=True).targets is None


def test_two_digit_results_become_sequences_where_digits_are_split(splitting: Any, twos: Any) -> None:
    t = task("arithmetic", n=40, max_operand=40, max_result=80)
    assert t.pairs(opened(splitting)).targets is not None
    with pytest.raises(TaskError, match="where one is needed"):
        t.pairs(opened(splitting), require_single=True)


@pytest.mark.parametrize(
    ("name", "params", "match"),
    [
        ("docstring", {"arguments": 2}, "at least 3 arguments"),
        ("docstring", {"described": 5}, "all but one"),
        ("induction", {"length": 4}, "at least 5 words"),
        ("induction", {"length": 1000}, "this task needs 1002"),
        ("successor", {"shortest": 6, "longest": 3}, "shortest=6"),
        ("arithmetic", {"shots": 9}, "0 to 8"),
    ],
)
def test_parameters_out_of_range_are_refused(splitting: Any, name: str, params: dict[str, Any], match: str) -> None:
    with pytest.raises(TaskError, match=match) as caught:
        task(name, **params).examples(splitting)
    assert "\n" not in str(caught.value)


@pytest.mark.real
@pytest.mark.parametrize("name", TASKS.names())
def test_smollm2_draws_every_task_with_single_token_answers(smollm2: Any, name: str) -> None:
    t = task(name)
    pairs, held = t.pairs(smollm2, require_single=True), t.held_out().pairs(smollm2, require_single=True)
    assert pairs.n_examples == held.n_examples == 64 and t.skipped["misaligned"] == 0
