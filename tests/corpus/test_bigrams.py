from __future__ import annotations

from collections import Counter
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import scipy.sparse
import torch
from corpora import texts, tokenizer

from vesalius.corpus import CorpusError, TokenStore, bigrams, synthetic_source
from vesalius.corpus.bigrams import BigramTable, bigram_table, count_pairs


@pytest.fixture(scope="module")
def counts() -> np.ndarray:
    rng = np.random.default_rng(0)
    found = rng.poisson(0.6, (13, 13)) * rng.integers(1, 30, (13, 13))
    found[4] = 0  # a token that nothing followed
    found[:, 11:], found[11:] = 0, 0  # padding of the vocabulary
    return found


def plain(counts: np.ndarray, tokens: int, top: int, k: float) -> np.ndarray:
    """The formula, entry by entry."""
    n = len(counts)
    u = [float(counts[:, w].sum()) + 1 if w < tokens else 0.0 for w in range(n)]
    u = [x / sum(u) for x in u]
    found = np.zeros((n, n))
    for v in range(n):
        order = sorted(range(n), key=lambda w: (-counts[v, w], w))[:top]
        kept = {w: counts[v, w] for w in order}
        lost = counts[v].sum() - sum(kept.values())
        for w in range(n):
            found[v, w] = (kept.get(w, 0) + (k + lost) * u[w]) / (counts[v].sum() + k)
    return found


@pytest.mark.parametrize(("top", "k"), [(13, 1.0), (3, 0.5), (1, 2.0)])
def test_a_table_is_the_formula(counts: np.ndarray, top: int, k: float) -> None:
    table = BigramTable(scipy.sparse.csr_array(counts), tokens=11, top=top, smoothing=k)
    expected = plain(counts, 11, top, k)
    assert np.allclose(table.matrix(), expected, atol=1e-12) and np.allclose(expected.sum(1), 1)
    assert not table.matrix()[:, 11:].any()
    v, w = np.divmod(np.arange(13 * 11), 11)
    assert np.allclose(table.log_p(v.reshape(11, 13), w.reshape(11, 13)), np.log(expected[v, w]).reshape(11, 13))
    safe = np.where(expected > 0, expected, 1)
    assert np.allclose(table.entropy(np.arange(13)), -(expected * np.log(safe)).sum(1))


def test_the_loss_over_rows_is_that_of_the_whole_table(counts: np.ndarray) -> None:
    table = BigramTable(scipy.sparse.csr_array(counts), tokens=11, top=3)
    tokens = np.array([0, 4, 12, 7, 0])
    log_q = torch.randn(5, 13, generator=torch.Generator().manual_seed(0)).log_softmax(-1)
    words, kept, rest = table.rows(tokens)
    found = (log_q.gather(-1, words) * kept).sum(-1) + rest * (log_q @ torch.from_numpy(table.unigram).float())
    expected = (torch.from_numpy(table.matrix()[tokens]).float() * log_q).sum(-1)
    assert torch.allclose(found, expected, atol=1e-5)


def test_every_pair_of_a_store_is_counted_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = TokenStore.build(texts(), tokenizer(), tmp_path / "store")
    ids = store.at(np.arange(store.n_tokens)).tolist()
    expected = Counter(pairwise(ids))
    monkeypatch.setattr(bigrams, "CHUNK", 1000)
    found = count_pairs(store, store.vocab_size)
    assert found.sum() == len(ids) - 1 and {p: found[p] for p in expected} == expected


def test_the_table_of_a_chain_is_its_matrix() -> None:
    source = synthetic_source("markov-spans", rows=64, length=64, rows_with=0.0, seed=1)
    table = bigram_table(source, source.vocab_size, batches=60)
    error = np.abs(table.matrix()[:48, :48] - source.transitions).sum(1)  # type: ignore[attr-defined]
    assert table.n == 60 * 64 * 64 and np.average(error, weights=table.total[:48]) < 0.06


def test_too_little_text_says_how_much_is_needed() -> None:
    source = synthetic_source("repeat", rows=2, length=63)
    with pytest.raises(CorpusError, match=r"126 pairs of tokens are too few .* at least [\d,]+ are needed"):
        bigram_table(source, 256, batches=1)
    with pytest.raises(CorpusError, match="the model only 10"):
        count_pairs(source, 10, batches=1)
