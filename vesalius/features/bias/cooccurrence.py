"""Which words a corpus uses near women and near men: co-occurrence bias and a GenBit-like score.

    c(w, g)   occurrences of w within the context of a gendered word of g, each weighted by beta^distance
    window k  k tokens to either side          infinite   the whole document

Bordia & Bowman 2019 (arXiv 1904.03035): bias(w) = log(p(w|F) / p(w|M)), p(w|g) = c(w, g) / sum over w of c(w, g).

GenBit (Sengupta et al. 2021): p(w|g) = (c(w, g) + 1) / (n(g) + V), with n(g) the gendered words of g and V the
different words; the score is the mean of |log(p(w|M) / p(w|F))| over words that are not gendered and whose
c(w, M) + c(w, F) is at or above a percentile of all words'. Stop words go before contexts are formed. Its authors
advise 400 documents or more.

A mean of absolute values is above 0 by chance alone, and since V outweighs n(g), a corpus with more words of one gender
scores higher without any word being nearer to it. `null` is the same score after the genders of the gendered words were
shuffled over their places: it has both, and no association.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from vesalius.errors import UnknownName, VesaliusError
from vesalius.features.bias.words import Gendered, plain_lemma

Floats = NDArray[np.float64]
_WORD = re.compile(r"[^\W\d_]+")
ADVISED = 400  # documents, by GenBit's authors
MODERATE = 0.30  # GenBit's reading of a score for English: moderate from here on

Context = Literal["window", "infinite"]


def tokens(text: str) -> list[str]:
    """Lower-case words, letters alone.

    Example:
        >>> tokens("She's 30, he said.")
        ['she', 's', 'he', 'said']
    """
    return _WORD.findall(text.lower())


def stop_words() -> frozenset[str]:
    """Scikit-learn's English list."""
    from sklearn.feature_extraction.text import ENGLISH_STOP_WORDS

    return frozenset(ENGLISH_STOP_WORDS)


@dataclass(frozen=True)
class Counts:
    """Weighted co-occurrences of every word with either group, over a corpus.

    Attributes:
        words: the vocabulary, lemmatised. female, male: c(w, g), (word,). frequency: occurrences, (word,).
        n_female, n_male: gendered words. documents: how many there were.
    """

    words: tuple[str, ...]
    female: Floats
    male: Floats
    frequency: Floats
    n_female: float
    n_male: float
    documents: int
    gendered: Gendered

    @property
    def neutral(self) -> NDArray[np.bool_]:
        """Which words are not gendered themselves, (word,)."""
        both = self.gendered.female | self.gendered.male
        return np.array([w not in both for w in self.words])


class Corpus:
    """Documents as numbers, so that contexts are counted by whole-array steps and again with shuffled genders.

    Args:
        documents: texts, or lists of words. gendered: the two groups; the shipped list if None.
        stop: words left out before contexts are formed (gendered ones stay); scikit-learn's if None.
        lemma: what makes one word of its forms; None for words as they are.

    Raises:
        VesaliusError: if there is no document with words, or none with words of both groups.
    """

    def __init__(
        self,
        documents: Iterable[str | list[str]],
        gendered: Gendered | None = None,
        stop: Iterable[str] | None = None,
        lemma: Callable[[str], str] | None = plain_lemma,
    ) -> None:
        self.gendered = Gendered.default() if gendered is None else gendered
        both = self.gendered.female | self.gendered.male
        left_out = (stop_words() if stop is None else frozenset(stop)) - both
        index: dict[str, int] = {}
        lemmas: dict[str, str] = {}
        ids: list[int] = []
        sizes: list[int] = []
        for document in documents:
            begin = len(ids)
            for word in tokens(document) if isinstance(document, str) else [w.lower() for w in document]:
                if word in left_out:
                    continue
                form = lemmas.get(word)
                if form is None:
                    form = lemmas[word] = word if lemma is None or word in both else lemma(word)
                if form:
                    ids.append(index.setdefault(form, len(index)))
            sizes.append(len(ids) - begin)
        if not ids:
            raise VesaliusError(f"the corpus has no words ({len(sizes)} documents); give text to audit")
        self.words = tuple(index)
        self.ids = np.array(ids)
        self.document = np.repeat(np.arange(len(sizes)), sizes)
        self.documents = len(sizes)
        kind = np.array([(w in self.gendered.female) - (w in self.gendered.male) for w in self.words])
        self.gender = kind[self.ids]  # 1 female, -1 male, 0 neither; (token,)
        for name, sign in (("female", 1), ("male", -1)):
            if not (self.gender == sign).any():
                raise VesaliusError(f"the corpus has no {name} words, so nothing can be compared; give more text")

    def near(
        self, context: Context = "window", window: int = 5, beta: float = 0.95, gender: NDArray[np.int_] | None = None
    ) -> tuple[Floats, Floats]:
        """How much female and male context each token has, (token,) each; of `gender` instead of its own if given."""
        if context not in ("window", "infinite"):
            raise UnknownName("context", context, ("window", "infinite"))
        if not 0 < beta <= 1 or (context == "infinite" and beta == 1):
            raise VesaliusError(f"a distance weight of {beta:g} is not between 0 and 1; 0.95 is usual")
        if window < 1:
            raise VesaliusError(f"a window of {window} tokens holds nothing; give 1 or more")
        marks = self.gender if gender is None else gender
        spread = self._window if context == "window" else self._infinite
        female, male = (spread((marks == sign).astype(float), window, beta) for sign in (1, -1))
        return female, male

    def count(
        self, near: tuple[Floats, Floats], gender: NDArray[np.int_] | None = None, weights: Floats | None = None
    ) -> Counts:
        """Sums over tokens of what `near` gave, with documents weighted by `weights`, (document,)."""
        marks = self.gender if gender is None else gender
        each = np.ones(len(self.ids)) if weights is None else weights[self.document]
        size = len(self.words)
        return Counts(
            words=self.words,
            female=np.bincount(self.ids, near[0] * each, size).astype(float),
            male=np.bincount(self.ids, near[1] * each, size).astype(float),
            frequency=np.bincount(self.ids, each, size).astype(float),
            n_female=float(each[marks == 1].sum()),
            n_male=float(each[marks == -1].sum()),
            documents=self.documents,
            gendered=self.gendered,
        )

    def _window(self, marks: Floats, window: int, beta: float) -> Floats:
        out = np.zeros(len(marks))
        for k in range(1, window + 1):
            same = self.document[k:] == self.document[:-k]
            out[k:] += beta**k * marks[:-k] * same
            out[:-k] += beta**k * marks[k:] * same
        return out

    def _infinite(self, marks: Floats, window: int, beta: float) -> Floats:
        """Sum of beta^distance over the document's other tokens, by a filter forwards and one backwards."""
        from scipy.signal import lfilter

        out = np.zeros(len(marks))
        edges = np.flatnonzero(np.diff(self.document, prepend=-1, append=-2))
        for begin, end in zip(edges, edges[1:], strict=False):
            x = marks[begin:end]
            before = lfilter([0.0, beta], [1.0, -beta], x)
            after = lfilter([0.0, beta], [1.0, -beta], x[::-1])[::-1]
            out[begin:end] = before + after
        return out

    def shuffled(self, rng: np.random.Generator) -> NDArray[np.int_]:
        """The genders of the gendered words, shuffled over their places, (token,)."""
        out = self.gender.copy()
        at = np.flatnonzero(out)
        out[at] = rng.permutation(out[at])
        return out


def word_bias(counts: Counts, smoothing: float = 1.0) -> pd.DataFrame:
    """log(p(w|F) / p(w|M)) of every word that is not gendered (Bordia & Bowman), the largest first.

    Columns: word, bias (above 0 nearer to female words), female, male, frequency.
    """
    kept = counts.neutral
    female, male = counts.female + smoothing, counts.male + smoothing
    bias = np.log(female[kept] / female.sum()) - np.log(male[kept] / male.sum())
    table = pd.DataFrame(
        {
            "word": np.array(counts.words, dtype=object)[kept],
            "bias": bias,
            "female": counts.female[kept],
            "male": counts.male[kept],
            "frequency": counts.frequency[kept].astype(int),
        }
    )
    return table.iloc[np.argsort(-table["bias"].abs().to_numpy(), kind="stable")].reset_index(drop=True)


@dataclass(frozen=True)
class GenderBias:
    """A corpus's score with what it is to be read against.

    Attributes:
        score: mean |log ratio| over the words considered.
        low, high: 95 % interval, the bootstrap's spread over documents laid about the score (resampled documents
            are more alike among themselves, which raises the mean of absolute values).
        null, null_95: mean and 95th percentile of the score with shuffled genders. p: of a score this high by chance.
        signed: mean log(p(w|M) / p(w|F)); above 0 when words lean to male ones.
        words: word, log_ratio, female, male, frequency of each word considered.
        cutoff: least c(w, M) + c(w, F). n_female, n_male, documents, considered: counts.
        notes: what a reader must know.
    """

    score: float
    low: float
    high: float
    null: float
    null_95: float
    p: float
    signed: float
    words: pd.DataFrame
    cutoff: float
    n_female: int
    n_male: int
    documents: int
    considered: int
    notes: tuple[str, ...] = field(default=())


def genbit(
    corpus: Corpus,
    *,
    context: Context = "window",
    window: int = 5,
    beta: float = 0.95,
    percentile: float = 80.0,
    shuffles: int = 100,
    draws: int = 200,
    seed: int = 0,
) -> GenderBias:
    """The GenBit score of a corpus.

    Args:
        corpus: the documents. context, window, beta: which tokens are near, and the weight of distance.
        percentile: words with fewer co-occurrences than this share of all words have are left out.
        shuffles: of genders, for the null. draws: of documents, for the interval.

    Example:
        >>> texts = ["she likes the red rose", "he likes the red car", "he fixed a car", "she cut a rose"]
        >>> found = genbit(Corpus(texts), percentile=0)
        >>> found.words.set_index("word")["log_ratio"]["car"] > 0
        True
    """
    if not 0 <= percentile < 100:
        raise VesaliusError(f"a cut-off at percentile {percentile:g} leaves nothing; give 0 to 99")
    rng = np.random.default_rng(seed)
    own = corpus.near(context, window, beta)
    counts = corpus.count(own)
    ratios, kept, cutoff = _ratios(counts, percentile)
    if not kept.any():
        raise VesaliusError("no word of the corpus stands near gendered words; give more text, or a lower percentile")
    null = []
    for _ in range(shuffles):
        gender = corpus.shuffled(rng)
        other, mine, _ = _ratios(corpus.count(corpus.near(context, window, beta, gender), gender), percentile)
        null.append(float(np.abs(other[mine]).mean()))
    drawn = []
    share = np.full(corpus.documents, 1 / corpus.documents)
    for _ in range(draws if corpus.documents > 1 else 0):
        weights = rng.multinomial(corpus.documents, share).astype(float)
        other, mine, _ = _ratios(corpus.count(own, weights=weights), percentile)
        drawn.append(float(np.abs(other[mine]).mean()) if mine.any() else np.nan)
    score = float(np.abs(ratios[kept]).mean())
    low = high = float("nan")
    if drawn:
        low, high = np.maximum(0, score + np.nanquantile(drawn, [0.025, 0.975]) - np.nanmean(drawn))
    words = pd.DataFrame(
        {
            "word": np.array(counts.words, dtype=object)[kept],
            "log_ratio": ratios[kept],
            "female": counts.female[kept],
            "male": counts.male[kept],
            "frequency": counts.frequency[kept].astype(int),
        }
    )
    words = words.iloc[np.argsort(-words["log_ratio"].abs().to_numpy(), kind="stable")].reset_index(drop=True)
    notes = []
    if corpus.documents < ADVISED:
        notes.append(f"{corpus.documents} documents; {ADVISED} or more are advised, and the score is above 0 by chance")
    return GenderBias(
        score=score,
        low=float(low),
        high=float(high),
        null=float(np.mean(null)) if null else float("nan"),
        null_95=float(np.quantile(null, 0.95)) if null else float("nan"),
        p=(1 + sum(v >= score for v in null)) / (1 + len(null)) if null else float("nan"),
        signed=float(ratios[kept].mean()),
        words=words,
        cutoff=cutoff,
        n_female=round(counts.n_female),
        n_male=round(counts.n_male),
        documents=corpus.documents,
        considered=int(kept.sum()),
        notes=tuple(notes),
    )


def _ratios(counts: Counts, percentile: float) -> tuple[Floats, NDArray[np.bool_], float]:
    """log(p(w|M) / p(w|F)) of every word, which words are considered, and the cut-off."""
    there = counts.frequency > 0  # a resample may lack words
    v = int(there.sum())
    female = (counts.female + 1) / (counts.n_female + v)
    male = (counts.male + 1) / (counts.n_male + v)
    together = counts.female + counts.male
    cutoff = float(np.percentile(together[there], percentile))
    kept = counts.neutral & there & (together >= cutoff)
    return np.log(male / female), kept, cutoff
