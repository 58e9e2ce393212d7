"""Co-occurrence: a corpus built with a known ratio gives it back, contexts equal a plain loop, scores GenBit's."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from vesalius.errors import VesaliusError
from vesalius.features.bias import Corpus, Gendered, genbit, word_bias
from vesalius.features.bias.words import plain_lemma

GOLDEN = json.loads((Path(__file__).parent / "data" / "genbit.json").read_text())
NONE = Gendered(frozenset({"he"}), frozenset({"she"}))


def built(ratio: float, each: int = 90, seed: int = 0) -> list[list[str]]:
    """Documents of a gendered word and one of 100 others; of these, half stand `ratio` times as often by "he"."""
    rng = np.random.default_rng(seed)
    documents = []
    for i in range(100):
        lean = ratio if i % 2 == 0 else 1 / ratio  # so that both genders have as much context
        n = round(each * lean / (1 + lean))
        documents += [["he", f"word{i}"]] * n + [["she", f"word{i}"]] * (each - n)
    return [documents[i] for i in rng.permutation(len(documents))]


def test_a_corpus_with_ratio_two_scores_the_log_of_two() -> None:
    found = genbit(Corpus(built(2.0), NONE, lemma=None), percentile=0, shuffles=20, draws=20)
    assert found.considered == 100
    assert found.score == pytest.approx(np.log(2), abs=0.05)
    assert found.p < 0.05 and found.null < 0.3


def test_a_balanced_corpus_scores_near_nothing_and_the_null_says_how_near() -> None:
    found = genbit(Corpus(built(1.0), NONE, lemma=None), percentile=0, shuffles=20, draws=20)
    assert found.score <= 0.1
    # Drawn instead of built: the mean of absolute values is above 0 by chance, and the null knows by how much.
    rng = np.random.default_rng(1)
    drawn = [[str(rng.choice(["he", "she"])), f"word{i % 100}"] for i in range(4000)]
    by_chance = genbit(Corpus(drawn, NONE, lemma=None), percentile=0, shuffles=50, draws=20)
    assert by_chance.score > 0.1 and by_chance.score == pytest.approx(by_chance.null, abs=0.04)
    assert by_chance.p > 0.05


@pytest.mark.parametrize("case", GOLDEN["cases"], ids=lambda c: f"{c['window']}-{c['beta']}-{c['percentile']}")
def test_scores_are_those_of_the_genbit_package(case: dict) -> None:  # type: ignore[type-arg]
    """As genbit 2.2.0.0's own code gave them, with the lemmatiser and lists named in the file."""

    def lemma(word: str) -> str:
        return word[:-1] if len(word) > 3 and word.endswith("s") and not word.endswith("ss") else word

    gendered = Gendered(frozenset(GOLDEN["male"]), frozenset(GOLDEN["female"]))
    corpus = Corpus(GOLDEN["documents"], gendered, GOLDEN["stop"], lemma)
    found = genbit(corpus, window=case["window"], beta=case["beta"], percentile=case["percentile"], shuffles=2, draws=2)
    assert found.score == pytest.approx(case["score"], abs=1e-6)
    assert found.signed == pytest.approx(case["signed"], abs=1e-6)
    assert found.considered == case["considered"]
    mine = dict(zip(found.words["word"], found.words["log_ratio"], strict=True))
    assert mine.keys() == case["words"].keys()
    for word, value in case["words"].items():
        assert mine[word] == pytest.approx(value, abs=1e-6), word


def by_loop(documents: list[list[str]], window: int | None, beta: float) -> dict[str, list[float]]:
    out: dict[str, list[float]] = {}
    for words in documents:
        for i, word in enumerate(words):
            sums = out.setdefault(word, [0.0, 0.0])
            for j, other in enumerate(words):
                if i != j and (window is None or abs(i - j) <= window) and other in ("she", "he"):
                    sums[0 if other == "she" else 1] += beta ** abs(i - j)
    return out


@pytest.mark.parametrize(
    ("context", "window", "beta"), [("window", 3, 0.9), ("window", 50, 1.0), ("infinite", 0, 0.95)]
)
def test_contexts_are_those_of_a_plain_loop(context: str, window: int, beta: float) -> None:
    rng = np.random.default_rng(4)
    vocabulary = ["he", "she", "a", "b", "c", "d", "e"]
    documents = [[str(w) for w in rng.choice(vocabulary, rng.integers(1, 30))] for _ in range(25)]
    corpus = Corpus(documents, NONE, stop=(), lemma=None)
    near = corpus.near(context, max(window, 1), beta)  # type: ignore[arg-type]
    counts = corpus.count(near)
    expected = by_loop(documents, None if context == "infinite" else window, beta)
    for i, word in enumerate(counts.words):
        assert (counts.female[i], counts.male[i]) == pytest.approx(tuple(expected[word])), word


def test_word_bias_compares_shares_of_context() -> None:
    documents = [["he", "car"]] * 30 + [["she", "car"]] * 10 + [["he", "tea"]] * 10 + [["she", "tea"]] * 30
    corpus = Corpus(documents, NONE, lemma=None)
    table = word_bias(corpus.count(corpus.near()), smoothing=0).set_index("word")["bias"]
    assert table["tea"] == pytest.approx(np.log(3)) and table["car"] == pytest.approx(-np.log(3))


def test_stop_words_go_first_and_plurals_are_one_word() -> None:
    corpus = Corpus(["She was with the cars.", "He and his car"])
    assert set(corpus.words) == {"she", "he", "his", "car"}
    assert [plain_lemma(w) for w in ("ladies", "class", "gas", "dresses")] == ["lady", "class", "gas", "dress"]


def test_empty_and_one_sided_corpora_are_refused() -> None:
    with pytest.raises(VesaliusError, match="no words \\(2 documents\\)"):
        Corpus(["", "12 34"])
    with pytest.raises(VesaliusError, match="no female words"):
        Corpus(["He drives a car."])
    corpus = Corpus(["He drives.", "She drives."])
    with pytest.raises(VesaliusError, match="window of 0"):
        corpus.near(window=0)
    with pytest.raises(VesaliusError, match="distance weight"):
        corpus.near("infinite", beta=1.0)
    with pytest.raises(VesaliusError, match="percentile 100"):
        genbit(corpus, percentile=100)
    assert "advised" in genbit(corpus, percentile=0, shuffles=1, draws=1).notes[0]
