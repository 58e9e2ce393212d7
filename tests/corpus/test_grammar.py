"""The look-up grammar: a balanced table, and tokens that are what the text says."""

from __future__ import annotations

import numpy as np
import pytest

from vesalius.corpus import CorpusError
from vesalius.corpus.grammar import LookupGrammar


@pytest.mark.parametrize("size", [2, 5, 16])
def test_neither_symbol_alone_tells_anything_of_the_middle(size: int):
    table = LookupGrammar(size, seed=3).table
    everything = set(range(size))
    assert all(set(row) == everything for row in table) and all(set(column) == everything for column in table.T)


def test_another_seed_gives_another_table_and_another_stream_other_sentences():
    grammar = LookupGrammar(seed=0)
    assert not np.array_equal(grammar.table, LookupGrammar(seed=1).table)
    first, again, other = (next(g.documents(1, stream=s)).text for g, s in
                           ((grammar, "train"), (LookupGrammar(seed=0), "train"), (grammar, "test")))  # fmt: skip
    assert first == again != other


def test_rows_are_the_tokens_of_the_documents_and_every_sentence_obeys_the_table():
    grammar = LookupGrammar(16, seed=0)
    tokenizer = grammar.tokenizer(("<extra_id_0>",))
    ids, place = grammar.rows(20, 7, "test")
    texts = [d.text for d in grammar.documents(20, 7, "test")]
    assert [tokenizer(t)["input_ids"] for t in texts] == ids.tolist()
    assert [tokenizer.decode(row) for row in ids] == texts
    a, m, b = np.split(ids.reshape(20, 7, 3), 3, axis=2)
    assert (m - 16 == grammar.table[a, b - 32]).all()
    middle = ids[np.arange(20), place]
    assert ((middle >= 16) & (middle < 32)).all() and place.min() >= 4 and place.max() <= 16
    assert tokenizer.convert_tokens_to_ids("<extra_id_0>") == len(tokenizer) - 1


def test_a_table_or_row_too_small_to_ask_about_is_refused():
    with pytest.raises(CorpusError, match="size 1"):
        LookupGrammar(1)
    with pytest.raises(CorpusError, match="inner"):
        LookupGrammar(4).rows(1, 2)


def test_every_sentence_is_listed_once():
    grammar = LookupGrammar(5, seed=2)
    tokenizer, ids = grammar.tokenizer(), grammar.every()
    told = {tokenizer.decode(row) for row in ids}
    assert len(told) == len(ids) == 25 and told == {grammar.sentence(a, b) for a in range(5) for b in range(5)}
