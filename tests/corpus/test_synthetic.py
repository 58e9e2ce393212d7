from __future__ import annotations

import json
from functools import cache

import numpy as np
import pytest

from vesalius.corpus import SYNTHETIC, CorpusError, digest, synthetic_source
from vesalius.errors import UnknownName


@pytest.mark.parametrize("name", SYNTHETIC.names())
def test_batches_are_a_function_of_seed_and_step(name: str) -> None:
    source = synthetic_source(name, rows=16, seed=3)
    again = synthetic_source(**json.loads(json.dumps(source.describe())))
    late = digest(source.batch(7))
    assert digest(again.batch(7)) == late == digest(source.batch(7)) and again.fingerprint == source.fingerprint
    others = [
        source.batch(8),
        *(synthetic_source(name, rows=16, **o).batch(7) for o in ({"seed": 4}, {"split": "test", "seed": 3})),
    ]
    assert late not in [digest(b) for b in others]
    batch = source.batch(0)
    assert batch.ids.shape == batch.segments.shape == (16, source.length + 1) and batch.mask is not None
    assert batch.ids.min() >= 0 and batch.ids.max() < source.vocab_size
    assert batch.mask.any(axis=1).all() and not batch.mask[:, 0].any()
    with pytest.raises(UnknownName):
        synthetic_source(name, vocabulary=3)


@cache
def languages(source: object) -> tuple[np.ndarray, list[np.ndarray], np.ndarray]:
    """Ids, next-symbol probabilities and states of step 5 of `icll`."""
    batch, rows = source.told(5)  # type: ignore[attr-defined]
    return batch.ids, [a.next for a in rows.languages], rows.states


def best(name: str, row: np.ndarray, at: int, source: object) -> int:
    """What a reader who knows the rule says stands at `at`, from the tokens before it."""
    past = row[:at].tolist()
    if name == "induction":
        return past[past.index(past[-1]) + 1]
    if name in ("assoc_recall", "mqar"):
        places = [i for i in range(0, len(past) - 1, 2) if past[i] == past[-1]]
        return past[places[0] + 1]
    if name == "selective_copy":
        mark = past.index(1)
        return [x for x in past[:mark] if x > 1][len(past) - mark - 1]
    if name == "dyck":
        open_: list[int] = []
        for x in past:
            open_.append(x) if x % 2 == 0 else open_.pop()
        return open_[-1] + 1
    if name == "parity":
        return 2 + sum(past[::2]) % 2
    if name == "markov2":
        return int(source.table[past[-1], past[-2]])  # type: ignore[attr-defined]
    if name == "succession":  # 10 last digits from 11, numbers from 31, days, months, letters
        item = next(x for x in past if x >= 31)
        if past[-1] not in (1, 2):
            return 11 + (item - 31) % 10  # or its first digit: one by chance
        return item if past[-1] == 2 else {137: 131, 149: 138}.get(item, item + 1)
    if name in ("binary_successor", "tree_traversal"):  # 3 asks, 4 fills; answers themselves: test_recursion.py
        asks = past.index(3)
        return (*source.answer([x for x in past[1:asks] if x != 4]), 1)[at - asks - 1]  # type: ignore[attr-defined]
    if name == "facts":  # 3 relations from 3, subjects from 14
        subject = next(x for x in past if x >= 14)
        return subject if 2 in past else int(source.asked(next(x for x in past if x in (3, 4, 5)) - 3, subject - 14))  # type: ignore[attr-defined]
    if name == "markov-spans":
        chain, span = source.chain, source.span  # type: ignore[attr-defined]
        before = [x for x in past if x < chain]
        inside = len(past) - len(before)  # span symbols so far
        if inside == 0 or inside == 2 * span:
            return int(source.transitions[before[-1]].argmax())  # type: ignore[attr-defined]
        if inside >= span:
            return past[at - span]
        return next(x for x in range(chain, source.vocab_size) if x not in past)  # type: ignore[attr-defined]
    if name == "icll":  # the row's automaton is no part of what it reads
        ids, next_of, states = languages(source)
        which = next(i for i in range(len(ids)) if ids[i].tobytes() == row.tobytes())
        return int(next_of[which][states[which, at - 1]].argmax())
    if name == "fsm":
        digits = past[1:]
        last = digits[-2:] if len(digits) % 2 == 0 else digits[-3:-1]
        after = [divmod(int(t), 10) for t in source.table[10 * last[0] + last[1]]]  # type: ignore[attr-defined]
        if len(digits) % 2:
            return next(ones for tens, ones in after if tens == digits[-1])
        return max((tens for tens, _ in after), key=[tens for tens, _ in after].count)
    least, most = source.span // 2, source.span  # type: ignore[attr-defined]
    period = next(p for p in range(least, most + 1) if past[p:] == past[:-p])
    return past[at - period]


@pytest.mark.parametrize("name", SYNTHETIC.names())
def test_the_best_reader_is_as_right_as_stated_and_a_guess_at_chance(name: str) -> None:
    source = synthetic_source(name, rows=300)
    batch = source.batch(5)
    assert batch.mask is not None
    spots = np.argwhere(batch.mask)[:4000]
    right = np.mean([best(name, batch.ids[r], int(c), source) == batch.ids[r, c] for r, c in spots])
    assert right == pytest.approx(
        source.optimal, abs=0.03 if source.optimal < 1 or name == "repeat" else 0
    )  # a period may look shorter for a token or two
    scored = batch.ids[batch.mask]
    commonest = np.bincount(scored).max() / len(scored)
    assert commonest == pytest.approx(source.chance, abs=4 * np.sqrt(source.chance / len(scored)) + 0.03)


def test_repeats_of_one_period_can_be_told_by_position_and_varied_ones_cannot() -> None:
    fixed, varied = (synthetic_source("repeat", rows=400, vary=v).batch(0) for v in (False, True))
    assert (fixed.ids[:, 32:] == fixed.ids[:, :32]).all()
    same = (varied.ids[:, 32:] == varied.ids[:, :32]).mean()
    assert 2 / 17 - 0.06 < same < 2 / 17 + 0.06  # of 16 to 32, drawn evenly, 16 and 32 themselves
    assert varied.mask is not None and varied.mask[:, 33:].all() and not varied.mask[:, :17].any()


def test_dyck_is_balanced_and_bounded() -> None:
    for length in (63, 64):
        source = synthetic_source("dyck", rows=200, length=length, depth=4, kinds=3)
        depth = np.cumsum(np.where(source.batch(0).ids % 2 == 0, 1, -1), axis=1)
        assert depth.min() >= 0 and depth.max() <= 4
        if length % 2:
            assert (depth[:, -1] == 0).all()


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(CorpusError, match="at least 31"):
        synthetic_source("mqar", length=20)
    with pytest.raises(CorpusError, match="an odd length"):
        synthetic_source("parity", length=20)
    with pytest.raises(UnknownName, match="did you mean 'induction'"):
        synthetic_source("inductoin")
