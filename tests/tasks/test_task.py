"""The Task itself: drawing, splits, identity, and its refusals."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any, Literal

import pytest
from task_helpers import UNSEEN, opened

from vesalius.errors import TaskError, UnknownName, VesaliusError
from vesalius.tasks import TASKS, Example, Task, Words, generator, task
from vesalius.tasks.encode import Encoder


def made(stream: Any, n: int = 5, **changes: Any) -> Task:
    return Task("mine", n, 0, {}, stream, **changes)


@pytest.mark.parametrize("name", TASKS.names())
def test_the_same_request_draws_the_same_examples(splitting: Any, name: str) -> None:
    first, again, other = task(name, n=30), task(name, n=30), task(name, n=30, seed=1)
    assert first.examples(splitting) == again.examples(splitting)
    assert first.fingerprint == again.fingerprint != other.fingerprint
    assert first.examples(splitting) != other.examples(splitting)
    # a longer draw begins with the shorter one
    assert task(name, n=40).examples(splitting)[:30] == first.examples(splitting)


@pytest.mark.parametrize("name", TASKS.names())
def test_held_out_shares_no_clean_prompt(splitting: Any, name: str) -> None:
    find = task(name, n=40)
    held = find.held_out(30)
    third = held.held_out()
    sets = [{e.clean for e in t.examples(splitting)} for t in (find, held, third)]
    assert [len(s) for s in sets] == [40, 30, 30]
    assert not sets[0] & sets[1] and not sets[0] & sets[2] and not sets[1] & sets[2]
    assert [t.split for t in (find, held, third)] == ["find", "held-out", "held-out-2"]
    assert len({t.fingerprint for t in (find, held, third)}) == 3


def test_held_out_of_a_small_space_takes_what_the_find_set_left(splitting: Any) -> None:
    find = task("arithmetic", n=30, shots=0)  # 36 sums exist
    assert len(find.held_out(6).examples(splitting)) == 6
    with pytest.raises(
        TaskError, match=r"6 different examples exist .* n=7 .*30 more are in the split 'find'.*lower n"
    ):
        find.held_out(7).examples(splitting)


def test_far_too_many_are_refused_without_drawing_for_hours(splitting: Any) -> None:
    """Draws in vain are counted by what was found, not by what was asked for."""
    draws = 0

    @generator()
    def few(words: Words, rng: random.Random) -> Iterator[Example]:
        nonlocal draws
        while True:
            draws += 1
            yield Example(f"the {rng.choice('abcdefgh')}", "the ball", (" of",), (" is",))

    with pytest.raises(TaskError, match=r"\d different examples exist .*n=1000000 were asked for; lower n"):
        made(few, n=1_000_000, on_misaligned="skip").examples(splitting)
    assert draws < 30_000
    with pytest.raises(TaskError, match="1,000,001 prompts are more than can be kept; give at most 1,000,000"):
        task("ioi", n=1_000_001)


def test_asking_for_more_than_exist_says_how_many_do(splitting: Any) -> None:
    with pytest.raises(TaskError, match="36 different examples exist .*n=37 were asked for; lower n"):
        task("arithmetic", n=37, shots=0).examples(splitting)


def test_defaults_written_out_are_the_same_request() -> None:
    assert task("ioi").fingerprint == task("ioi", order="both", corruption="swap").fingerprint
    assert task("ioi").fingerprint != task("ioi", corruption="abc").fingerprint
    assert task("ioi").fingerprint != task("ioi", metric="log-prob").fingerprint
    assert task("induction", length="9").params["length"] == 9  # text from a command line


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (lambda: task("iio"), "did you mean 'ioi'"),
        (lambda: task("ioi", corupt="abc"), "task 'ioi': unknown parameter 'corupt'; did you mean 'corruption'"),
        (lambda: task("colored-objects", x=1), "unknown parameter 'x'; there are none"),
        (lambda: task("ioi", order="abc"), "task 'ioi': order must be one of 'both', 'abba', 'baba', not 'abc'"),
        (lambda: task("induction", length="many"), "length must be of type int, not 'many'"),
        (lambda: task("induction", length=2.5), "length must be of type int, not 2.5"),
        (lambda: task("capital", multi_token=1), "multi_token must be of type bool, not 1"),
        (lambda: task("ioi", n=0), "n must be a whole number of at least 1, not 0"),
        (lambda: task("ioi", metric="logit_diff"), "unknown metric 'logit_diff'; did you mean 'logit-diff'"),
        (lambda: task("ioi", scoring="sequnce"), "did you mean 'sequence'"),  # type: ignore[arg-type]
        (lambda: task("ioi").pairs(opened(None)), "opened without a tokenizer"),
    ],
)
def test_bad_requests_are_one_clear_line(request_: Any, message: str) -> None:
    with pytest.raises(VesaliusError) as caught:
        request_()
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_unknown_task_is_an_unknown_name() -> None:
    with pytest.raises(UnknownName):
        task("nothing")


def test_words_in_pieces_are_left_out(splitting: Any) -> None:
    words = Words(Encoder(splitting))
    assert UNSEEN[0] not in words("names") and len(words("names")) > 100
    with pytest.raises(TaskError, match=r"only 16 of 17 words of the word list 'colored_objects'.*'bracelet' is \["):
        words("colored_objects", least=17)
    with pytest.raises(UnknownName, match="did you mean 'names'"):
        words("name")


@generator()
def _sometimes(words: Words, rng: random.Random, shape: Literal["good", "bad"] = "good") -> Iterator[Example]:
    """Every second draw does not align, since the other name is in pieces."""
    for name in words("names"):
        yield Example(f"Then {name} met", f"Then {UNSEEN[0]} met", (" the",), (" a",))
        yield Example(f"Then {name} met", "Then Tom met" if name != "Tom" else "Then Tim met", (" the",), (" a",))


def test_draws_that_do_not_align_are_counted_not_used(splitting: Any) -> None:
    t = made(_sometimes)
    assert all(UNSEEN[0] not in e.corrupted for e in t.examples(splitting))
    assert t.skipped["misaligned"] == 5 and t.describe()["skipped"] == {"misaligned": 5}
    assert "draw 0: clean has 3 tokens and corrupted" in t.describe()["first_skipped"]
    with pytest.raises(TaskError, match="task 'mine', draw 0: clean has 3 tokens and corrupted"):
        made(_sometimes, on_misaligned="error").examples(splitting)


def test_an_endless_stream_of_the_same_ends(splitting: Any) -> None:
    @generator()
    def same(words: Words, rng: random.Random) -> Iterator[Example]:
        while True:
            yield Example("the book", "the ball", (" of",), (" is",))

    with pytest.raises(TaskError, match="1 different examples exist"):
        made(same).examples(splitting)


def test_only_duplicates_and_misaligned_draws_explain_themselves(splitting: Any) -> None:
    @generator()
    def never(words: Words, rng: random.Random) -> Iterator[Example]:
        while True:
            yield Example("the book", "the book", (" of",), (" is",))

    with pytest.raises(TaskError, match="0 different examples exist .*the first because .*have the same tokens"):
        made(never).examples(splitting)


def test_it_shows_itself(splitting: Any) -> None:
    t = task("ioi", n=8)
    assert "drawn when a model is given" in t._repr_html_()
    e = t.examples(splitting)[0]
    assert e.clean in t._repr_html_() and "<th" in t._repr_html_()
    assert repr(t) == "Task(ioi: n=8, seed=0, find, logit-diff, order='both', corruption='swap')"
    told = t.describe(opened(splitting))
    assert told["examples"] == 8 and told["paper"] == "arXiv 2211.00593" and told["skipped"] == {}
