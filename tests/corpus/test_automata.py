"""Random regular languages against automata-theory's definitions, and how their strings are distributed."""

from __future__ import annotations

from collections import Counter
from itertools import product

import numpy as np
import pytest

from vesalius.corpus.automata import NOWHERE, Automaton, RegularLanguages, random_tables
from vesalius.corpus.documents import CorpusError
from vesalius.corpus.synthetic import synthetic_source


def drawn(n: int, symbols: int = 4, states: tuple[int, int] = (3, 6), seed: int = 0) -> list[Automaton]:
    rng = np.random.default_rng(seed)
    return [Automaton(t) for t in random_tables(rng, n, states, 3, symbols, min(3, symbols))]


def test_automata_are_as_the_paper_draws_them() -> None:
    sizes, degrees = Counter[int](), Counter[int]()
    for automaton in drawn(400, 12, (4, 8)):
        n = int((automaton.table != NOWHERE).any(1).sum())
        sizes[n] += 1
        for state, row in enumerate(automaton.table[:n]):
            targets = row[row != NOWHERE]
            assert len(set(targets)) == len(targets) and state not in targets and (targets < n).all()
            degrees[len(targets)] += 1
    assert sorted(sizes) == [4, 5, 6, 7, 8] and sorted(degrees) == [1, 2, 3]
    assert max(sizes.values()) < 2 * min(sizes.values()) and max(degrees.values()) < 1.2 * min(degrees.values())


def test_a_minimal_automaton_has_the_same_language_and_no_two_states_alike() -> None:
    words = [w for k in range(7) for w in product(range(3), repeat=k)]
    smaller = 0
    for automaton in drawn(40, 3, (2, 6)):
        least = automaton.minimal()
        smaller += least.states < automaton.states
        assert [automaton.accepts(w) for w in words] == [least.accepts(w) for w in words]
        rests = []
        for state in range(least.states):  # from different states, different strings go on
            order = [state, *[s for s in range(least.states) if s != state]]
            number = {s: i for i, s in enumerate(order)}
            moved = [[NOWHERE if t == NOWHERE else number[int(t)] for t in least.table[s]] for s in order]
            rests.append(tuple(Automaton(np.array(moved)).accepts(w) for w in words))
        assert len(set(rests)) == least.states
        assert (least.minimal().table == least.table).all()
    assert smaller > 10


def test_strings_are_walks_of_their_language() -> None:
    task = RegularLanguages(rows=200)
    batch, rows = task.told(3)
    assert np.array_equal(rows.ids, batch.ids) and batch.mask is not None
    lengths = Counter[int]()
    for row, language, states, said in zip(rows.ids, rows.languages, rows.states, rows.said, strict=True):
        assert row[0] == task.separator and said[0] == 0
        at, word, complete = 0, 0, NOWHERE
        for place, (symbol, state, strings) in enumerate(zip(row, states, said, strict=True)):
            if symbol == task.separator:
                room = place - word + task.longest < len(row)  # for the longest: else short ones are found more often
                lengths.update([word] * (complete >= 0 and room))
                at, word, complete = 0, 0, complete + 1
            else:
                assert language.table[at, symbol] != NOWHERE and language.next[at, symbol] > 0
                at, word = int(language.table[at, symbol]), word + 1
            assert at == state and complete == strings
    assert min(lengths) == 1 and max(lengths) == 20
    assert max(lengths.values()) < 1.6 * min(lengths.values())
    assert (batch.mask[:, 1:] == (batch.ids[:, 1:] != task.separator)).all()


def test_edges_are_taken_evenly() -> None:
    task = RegularLanguages(rows=400)
    _, rows = task.told(0)
    taken = Counter[int]()
    for ids, states, language in zip(rows.ids, rows.states, rows.languages, strict=True):
        for t in range(1, len(ids)):
            edges = np.flatnonzero(language.table[states[t - 1]] != NOWHERE)
            if len(edges) == 3 and ids[t] != task.separator:
                taken[int(np.flatnonzero(edges == ids[t])[0])] += 1
    assert max(taken.values()) < 1.05 * min(taken.values())


def test_hardly_a_language_comes_twice() -> None:
    keys = []
    for split in ("train", "test"):
        _, rows = RegularLanguages(rows=500, split=split).told(0)
        keys.append({a.minimal().table.tobytes() for a in rows.languages})
    assert len(keys[0] & keys[1]) <= 5 and min(len(k) for k in keys) >= 495


def test_settings_that_cannot_be_are_refused() -> None:
    for settings, said in (
        ({"states": 3}, "fewest at most as states"),
        ({"edges": 11}, "as many symbols"),
        ({"longest": 1}, "strings of 2 or more"),
    ):
        with pytest.raises(CorpusError, match=said):
            synthetic_source("icll", **settings)
