from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from corpus.corpora import texts, tokenizer

from vesalius.corpus import CorpusError, Order, Rewritten, TokenStore, Viewer, digest, plant, token_map
from vesalius.corpus.shuffle import Permutation
from vesalius.errors import UnknownName


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> TokenStore:
    return TokenStore.build(texts(), tokenizer(), tmp_path_factory.mktemp("order") / "s")


@pytest.mark.parametrize("n", [1, 2, 3, 7, 64, 1000, 1025])
def test_a_permutation_is_one_and_turns_back(n: int) -> None:
    for epoch in range(3):
        shuffled = Permutation(n, 5, epoch, "x")
        assert sorted(shuffled(np.arange(n))) == list(range(n))
        assert np.array_equal(shuffled.inverse(shuffled(np.arange(n))), np.arange(n))
    assert n < 8 or not np.array_equal(Permutation(n, 5, 0)(np.arange(n)), Permutation(n, 5, 1)(np.arange(n)))


def test_a_permutation_prefers_no_place() -> None:
    counts = np.zeros((6, 6))
    for seed in range(3000):
        counts[np.arange(6), Permutation(6, seed)(np.arange(6))] += 1
    assert abs(counts - 500).max() < 5 * np.sqrt(500 * 5 / 6)  # 5 standard deviations


@pytest.mark.parametrize("shuffle", ["rows", "documents", "none"])
@pytest.mark.parametrize("tokens", [None, 333])
def test_every_token_is_a_target_once_an_epoch(store: TokenStore, shuffle: str, tokens: int | None) -> None:
    order = Order(store, 16, 5, seed=2, shuffle=shuffle, tokens=tokens)  # type: ignore[arg-type]
    n = tokens or store.n_tokens
    used = np.minimum(store.bounds, n)
    for epoch in range(2):
        ids: Counter[tuple[int, int]] = Counter()
        first, last = epoch * order.rows_per_epoch, (epoch + 1) * order.rows_per_epoch
        for running in range(first, last):
            batch = order.batch(running // 5)
            row = running % 5
            mask = np.ones(17, bool) if batch.mask is None else batch.mask[row]
            for target, segment, scored in zip(batch.ids[row, 1:], batch.segments[row, 1:], mask[1:], strict=True):
                if scored:
                    ids[int(segment), int(target)] += 1
                else:
                    assert segment == -1
        truth: Counter[tuple[int, int]] = Counter()
        for number in range(store.n_documents):
            for target in store.at(np.arange(used[number], used[number + 1])):
                truth[number, int(target)] += 1
        assert ids == truth
    assert order.dropped_tokens == 0


@pytest.mark.parametrize("shuffle", ["rows", "documents", "none", "stream"])
def test_where_is_the_inverse_of_batch(store: TokenStore, shuffle: str) -> None:
    order = Order(store, 16, 5, seed=2, shuffle=shuffle)  # type: ignore[arg-type]
    flat = store.at(np.arange(store.n_tokens))
    for epoch in (0, 1, 3):
        seen = order.where(np.arange(store.n_tokens), epoch)
        never = int((seen.steps < 0).sum())
        assert never == order.dropped_tokens and (shuffle != "stream") == (never == 0)
        per_row = Counter(zip(seen.steps.tolist(), seen.rows.tolist(), strict=True))
        assert max(v for k, v in per_row.items() if k[0] >= 0) <= 16
        for place in (0, 1, 17, store.n_tokens // 2, int(np.flatnonzero(seen.steps >= 0)[-1])):
            batch = order.batch(int(seen.steps[place]))
            row = int(seen.rows[place])
            at = [
                i
                for i in range(1, 17)
                if batch.ids[row, i] == flat[place] and batch.segments[row, i] == store.document_at(place)
            ]
            assert at, (place, epoch)


def test_rows_overlap_by_one_and_begin_with_the_separator(store: TokenStore) -> None:
    order = Order(store, 16, 1, shuffle="none")
    first, second = order.batch(0).ids[0], order.batch(1).ids[0]
    assert first[0] == store.separator and first[-1] == second[0]
    assert np.array_equal(first[1:], store.at(np.arange(16)))


def test_an_epoch_may_end_within_a_batch(store: TokenStore) -> None:
    order = Order(store, 16, 5, seed=1, tail="drop")
    assert order.rows_per_epoch % 5 and order.dropped_tokens == store.n_tokens % 16
    assert all(order.batch(s).mask is None for s in range(3 * order.rows_per_epoch // 5))
    rows = np.concatenate([order.batch(s).ids for s in range(order.rows_per_epoch)])  # five epochs
    each = Counter(row.tobytes() for row in rows)
    assert set(each.values()) == {5} and len(each) == order.rows_per_epoch
    one, two = (order.table(e) for e in (0, 1))
    assert sorted(one) == sorted(two) == list(range(order.rows_per_epoch)) and not np.array_equal(one, two)


def test_an_order_is_rebuilt_from_its_description_alone_in_another_process(store: TokenStore, tmp_path: Path) -> None:
    orders = [
        Order(store, 16, 5, seed=3),
        Order(store, 32, 4, seed=3, shuffle="documents", tokens=700),
        Order(store, 16, 4, shuffle="stream"),
        Order(store, 16, 5, seed=3).rewritten(2, tokens={40: 41}),
    ]
    (tmp_path / "orders.json").write_text(json.dumps([o.describe() for o in orders]))
    code = (
        "import json, sys; from vesalius.corpus import Order, TokenStore, digest\n"
        "store = TokenStore.open(sys.argv[1])\n"
        "for d in json.load(open(sys.argv[2])):\n"
        "    order = Order.from_description(d, store)\n"
        "    print(order.fingerprint, *(digest(order.batch(s)) for s in (37, 0, 1, 9)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(store.folder), str(tmp_path / "orders.json")],
        capture_output=True,
        text=True,
        env=dict(os.environ),
    )
    wanted = [" ".join([o.fingerprint, *(digest(o.batch(s)) for s in (37, 0, 1, 9))]) for o in orders]
    assert done.stdout.splitlines() == wanted, done.stderr


def test_another_seed_differs_and_other_stores_are_refused(store: TokenStore, tmp_path: Path) -> None:
    one, two = Order(store, 16, 5, seed=0), Order(store, 16, 5, seed=1)
    assert digest(one.batch(0)) != digest(two.batch(0)) and one.fingerprint != two.fingerprint
    other = TokenStore.build(texts(20), tokenizer(), tmp_path / "o")
    with pytest.raises(CorpusError, match="was made for a store with fingerprint"):
        Order.from_description(one.describe(), other)
    with pytest.raises(CorpusError, match="do not fill 900 streams"):
        Order(store, 16, 900, shuffle="stream")
    with pytest.raises(CorpusError, match="rows is 0"):
        Order(store, 16, 0)
    with pytest.raises(CorpusError, match="ask for at most"):
        Order(store, 16, 2, tokens=10**9)
    with pytest.raises(UnknownName, match="shuffle"):
        Order(store, 16, 2, shuffle="row")  # type: ignore[arg-type]


def test_streams_read_on_where_they_stopped(store: TokenStore) -> None:
    order = Order(store, 16, 4, shuffle="stream")
    steps = int(order.steps_per_epoch)
    for step in range(1, 2 * steps + 1):
        now, before, carried = order.batch(step), order.batch(step - 1), order.carries(step)
        assert np.array_equal(now.ids[carried, 0], before.ids[carried, -1])
        assert carried.sum() == (4 if step % steps else 3)  # at an epoch's end the last stream jumps to the start
    assert not order.carries(0).any()


def test_views_feed_orders(store: TokenStore) -> None:
    train, held = store.split(0.3)
    order = Order(train, 16, 4, seed=1, shuffle="documents")
    assert order.batch(0).segments.max() < train.n_documents
    text = "".join(Viewer(order).step(0)["text"])
    assert not any(f"number {i[1:]}." in text for i in held.index["id"])


def test_tokens_are_mapped_from_a_step_on(store: TokenStore) -> None:
    rule = token_map(store.tokenizer, {"he": "she", "she": "he"})
    order = Order(store, 16, 5, seed=1)
    branch = order.rewritten(3, tokens=rule)
    a, b = (int(i) for i in store.tokenizer(" he she", add_special_tokens=False)["input_ids"])
    assert rule[a] == b and rule[b] == a and digest(order.batch(2)) == digest(branch.batch(2))
    for step in range(3, 9):
        old, new = order.batch(step).ids, branch.batch(step).ids
        assert np.array_equal(new == a, old == b) and np.array_equal((new == a) | (new == b), (old == a) | (old == b))
        assert branch.effect(step).changed == int((old != new).sum())
    with pytest.raises(CorpusError, match="is not one token"):
        token_map(store.tokenizer, {"xylophonist": "she"})


@pytest.mark.parametrize("kind", ["bpe", "bytes", "unigram"])
def test_words_are_changed_in_the_text(tmp_path: Path, kind: str) -> None:
    store = TokenStore.build(texts(), tokenizer(kind), tmp_path / "s")
    order = Order(store, 64, 4, seed=1)
    branch = Rewritten(order, 0, words={"he": "she", "she": "he"})
    for step in range(4):
        old, new = Viewer(order).text(step), Viewer(branch).text(step)
        swapped = branch._pattern.sub
        for before, after in zip(old, new, strict=True):
            wanted = swapped(branch._replace, before)
            assert wanted.startswith(after[:-4]) or kind == "bytes" and after[:20] == wanted[:20]
        assert branch.effect(step).left <= 4
        assert branch.batch(step).ids.shape == order.batch(step).ids.shape
    assert branch._pattern.sub(branch._replace, "He said HE, other") == "She said SHE, other"
    again = Order.from_description(json.loads(json.dumps(branch.describe())), store)
    assert digest(again.batch(3)) == digest(branch.batch(3)) != digest(order.batch(3))
    with pytest.raises(CorpusError, match="one rule"):
        Rewritten(order, 0)


@pytest.mark.parametrize("kind", ["bpe", "unigram", "bytes", "wordpiece"])
@pytest.mark.parametrize("shuffle", ["rows", "documents"])
def test_exposures_counted_by_the_viewer_are_the_planted_ones(tmp_path: Path, kind: str, shuffle: str) -> None:
    made = tokenizer(kind)
    size = 24
    planted = plant(texts(), made, doses=(1, 2, 4, 8), tokens=size, controls=2, duplicates={3: 2}, seed=5)
    store = TokenStore.build(planted.documents, made, tmp_path / "s", separator=None if kind == "none" else "eos")
    order = Order(store, 32, 4, seed=1, shuffle=shuffle)  # type: ignore[arg-type]
    viewer = Viewer(order)
    end = int(np.ceil(order.steps_per_epoch))
    for row in planted.truth.itertuples():
        if row.kind == "duplicate" and kind == "wordpiece":
            continue  # its text is not kept exactly
        text = row.text if row.kind != "duplicate" else row.text.strip()
        assert viewer.exposures(text, 0) == 0
        assert viewer.exposures(text, end) == row.dose, row.id
        found = viewer.find(text)
        assert len(found) == row.dose and found.attrs["unplaced"] == 0
        for hit in found.itertuples():
            shown = " ".join(viewer.text(hit.step)[hit.row].split())
            if not hit.split:
                assert " ".join(text.split()) in shown
        if row.kind == "canary":
            assert len(row.ids) == size and viewer.exposures(text, end, how="tokens") == row.dose


def test_document_counts_agree_with_single_look_ups(store: TokenStore) -> None:
    for shuffle in ("rows", "documents", "none", "stream"):
        order = Order(store, 16, 5, seed=4, shuffle=shuffle)  # type: ignore[arg-type]
        viewer = Viewer(order)
        for step in (3, int(order.steps_per_epoch), int(2.4 * order.steps_per_epoch)):
            counts = viewer.counts(step)
            assert [viewer.exposures(n, step) for n in range(60)] == counts.tolist(), (shuffle, step)


def test_a_step_tells_its_documents(store: TokenStore) -> None:
    order = Order(store, 48, 3, seed=4, shuffle="documents")
    viewer = Viewer(order)
    frame = viewer.step(2)
    batch = order.batch(2)
    for row in range(3):
        mine = frame[frame["row"] == row]
        assert "".join(mine["text"]) == store.tokenizer.decode(batch.ids[row][batch.segments[row] >= 0].tolist())
        for part in mine.itertuples():
            source = texts()[part.document]
            assert (part.id, part.source, part.line) == (source.id, source.source, source.line)
            if part.position:
                cut = source.text[part.char_start : part.char_end]
                assert part.text.removesuffix("<|endoftext|>").strip("\ufffd") in cut + " " or "\ufffd" in part.text


def test_a_string_is_found_however_it_was_tokenised(store: TokenStore) -> None:
    viewer = Viewer(Order(store, 32, 4))
    for needle in ("Ünï", "☕", "umber 1", " é\n"):
        truth = [(n, d.text.find(needle)) for n, d in enumerate(texts()) if needle in d.text]
        found = viewer.occurrences(needle)
        assert list(zip(found["document"], found["char"], strict=True)) == truth
        for spot in found.itertuples():
            assert needle in store.tokenizer.decode(store.at(np.arange(spot.place, spot.place + spot.tokens)).tolist())
    assert viewer.occurrences("\nthe").empty and viewer.exposures("no such text", 50) == 0
    with pytest.raises(CorpusError, match="empty string"):
        viewer.find("")
