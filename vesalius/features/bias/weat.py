"""Association tests on embeddings: WEAT on words (Caliskan et al. 2017), SEAT on bland sentences (May et al. 2019).

    s(w) = mean over a in A of cos(w, a) - mean over b in B of cos(w, b)
    S = sum over X of s - sum over Y of s
    d = (mean over X of s - mean over Y of s) / standard deviation of s over X and Y together, in [-2, 2]

p is the share of divisions of X and Y together into sets of their sizes with an S at least as large: exact when there
are at most 20,000 divisions, else from 10,000 drawn ones and the observed. d > 0: X goes with A, and Y with B.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from itertools import combinations
from math import comb
from typing import Any, Literal

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from vesalius.errors import UnknownName, VesaliusError
from vesalius.features.bias.words import Test, WordSet, bland, tests
from vesalius.features.vectors import Pool, Progress, Reading, default_reading, depth, states, vectors
from vesalius.model import Model

Floats = NDArray[np.float64]
EXACT = 20_000  # divisions of the targets up to which all are tried
PERMUTATIONS = 10_000


@dataclass(frozen=True)
class Association:
    """The outcome of one test.

    Attributes:
        d: effect size. low, high: 95 % bootstrap interval of it, over words of all four sets.
        p: one-sided, of an association this strong by chance. exact: over all divisions.
        statistic: S. n_x, n_y, n_a, n_b: words of each set.
    """

    d: float
    low: float
    high: float
    p: float
    exact: bool
    statistic: float
    n_x: int
    n_y: int
    n_a: int
    n_b: int


def associations(w: NDArray[Any], a: NDArray[Any], b: NDArray[Any]) -> Floats:
    """s(w, A, B) of each row of w (..., d), given attributes (..., d)."""
    found: Floats = _closeness(w, a).mean(axis=-1) - _closeness(w, b).mean(axis=-1)
    return found


def _closeness(x: NDArray[Any], y: NDArray[Any]) -> Floats:
    """Cosines of x (..., d) with each word of y, (word, d) or (word, sentence, d): (..., word)."""
    x, y = (_unit(np.asarray(v, dtype=float)) for v in (x, y))
    return x @ (y.mean(axis=1) if y.ndim == 3 else y).T


def _unit(x: Floats) -> Floats:
    return x / np.maximum(np.linalg.norm(x, axis=-1, keepdims=True), 1e-12)


def effect(s_x: Floats, s_y: Floats) -> float:
    """The effect size from the associations of the two target sets; NaN where all are equal."""
    spread = float(np.concatenate([s_x.ravel(), s_y.ravel()]).std())
    return float((s_x.mean() - s_y.mean()) / spread) if spread > 0 else float("nan")


def weat(
    x: NDArray[Any],
    y: NDArray[Any],
    a: NDArray[Any],
    b: NDArray[Any],
    *,
    permutations: int = PERMUTATIONS,
    draws: int = 1000,
    seed: int = 0,
) -> Association:
    """The test on vectors of targets X, Y and attributes A, B, each (word, d) or (word, sentence, d).

    With sentences, d is over sentences, as in SEAT; what is permuted and resampled are words, since sentences of one
    word say nothing new.

    Raises:
        VesaliusError: if a set has fewer than two words.

    Example:
        >>> rng = np.random.default_rng(0)
        >>> near_a, near_b = (c + 0.1 * rng.standard_normal((6, 2)) for c in np.eye(2))
        >>> weat(near_a, near_b, near_a, near_b).d > 1.9
        True
    """
    for name, words in zip("XYAB", (x, y, a, b), strict=True):
        if len(words) < 2:
            raise VesaliusError(f"set {name} has {len(words)} words; an association test needs 2 or more of each")
    rng = np.random.default_rng(seed)
    x_a, x_b, y_a, y_b = (_closeness(t, u) for t in (x, y) for u in (a, b))  # (target, [sentence,] attribute)
    s_x, s_y = x_a.mean(axis=-1) - x_b.mean(axis=-1), y_a.mean(axis=-1) - y_b.mean(axis=-1)
    by_word = np.concatenate([s.reshape(len(s), -1).mean(axis=1) for s in (s_x, s_y)])
    p, exact = _p(by_word, len(x), permutations, rng)
    low, high = _interval((x_a, x_b), (y_a, y_b), draws, rng)
    total = float(s_x.sum() - s_y.sum())
    return Association(effect(s_x, s_y), low, high, p, exact, total, len(x), len(y), len(a), len(b))


def _interval(
    x: tuple[Floats, Floats], y: tuple[Floats, Floats], draws: int, rng: np.random.Generator
) -> tuple[float, float]:
    """95 % bootstrap interval of d over words, from closeness to A and to B (target, [sentence,] attribute)."""
    if not draws:
        return float("nan"), float("nan")

    def drawn(n: int) -> Floats:
        return rng.multinomial(n, np.full(n, 1 / n), size=draws).T / n  # (word, draw)

    of_a, of_b = (drawn(v.shape[-1]) for v in x)
    moments = []
    for close_a, close_b in (x, y):
        s = (close_a @ of_a - close_b @ of_b).reshape(len(close_a), -1, draws)  # (target, sentence, draw)
        weights = drawn(len(close_a))
        moments.append([(weights * (s**k).mean(axis=1)).sum(axis=0) for k in (1, 2)] + [np.prod(s.shape[:2])])
    (mean_x, square_x, n_x), (mean_y, square_y, n_y) = moments
    mean = (n_x * mean_x + n_y * mean_y) / (n_x + n_y)
    variance = (n_x * square_x + n_y * square_y) / (n_x + n_y) - mean**2
    effects = (mean_x - mean_y) / np.sqrt(np.maximum(variance, 1e-18))
    low, high = np.quantile(effects, [0.025, 0.975])
    return float(low), float(high)


@lru_cache(maxsize=4)
def _divisions(n: int, n_x: int) -> NDArray[np.int16]:
    """Every choice of n_x of n words, (division, n_x)."""
    return np.fromiter(combinations(range(n), n_x), dtype=np.dtype((np.int16, n_x)))


def _p(s: Floats, n_x: int, permutations: int, rng: np.random.Generator) -> tuple[float, bool]:
    """One-sided p of S; with sizes fixed, S grows with the sum over X, which is what is compared."""
    observed = s[:n_x].sum()
    slack = 1e-9 * max(1.0, float(np.abs(s).sum()))  # equal sums differ by rounding
    if comb(len(s), n_x) <= EXACT:
        return float((s[_divisions(len(s), n_x)].sum(axis=1) >= observed - slack).mean()), True
    order = rng.random((permutations, len(s))).argpartition(n_x, axis=1)[:, :n_x]
    at_least = int((s[order].sum(axis=1) >= observed - slack).sum())
    return (1 + at_least) / (1 + permutations), False


# -- on a model ------------------------------------------------------------------------------------------------------


def audit(
    model: Model,
    which: Sequence[str | Test] = ("1", "6"),
    *,
    reading: str | Reading | None = None,
    form: Literal["words", "sentences"] = "words",
    permutations: int = PERMUTATIONS,
    seed: int = 0,
    known: dict[str, Test] | None = None,
    progress: Progress | None = None,
) -> pd.DataFrame:
    """WEAT (`words`) or SEAT (`sentences`) of a model at one reading.

    With `words`, a word is read alone; with `sentences`, in each of its bland sentences.

    Returns:
        One row a test: test, what, reading, form, d, low, high, p, p_holm (over the rows), exact, n_x, n_y, n_a, n_b.
    """
    at = default_reading(model) if reading is None else Reading.parse(reading)

    def read(texts: list[str], words: list[str]) -> NDArray[Any]:
        return vectors(model, texts, at, words=words if at.pool == "word" else None, progress=progress)[None]

    return _table(which, known, form, read, [str(at)], permutations, seed)


def profile(
    model: Model,
    which: Sequence[str | Test] = ("1", "6"),
    *,
    pool: Pool = "mean",
    form: Literal["words", "sentences"] = "sentences",
    permutations: int = PERMUTATIONS,
    seed: int = 0,
    known: dict[str, Test] | None = None,
    progress: Progress | None = None,
) -> pd.DataFrame:
    """The same at every block's output, from one pass; p is corrected over tests and blocks together."""
    blocks = range(depth(model))

    def read(texts: list[str], words: list[str]) -> NDArray[Any]:
        return states(model, texts, blocks, pool=pool, words=words if pool == "word" else None, progress=progress)

    found = _table(which, known, form, read, [f"{pool}@{n}" for n in blocks], permutations, seed)
    found.insert(2, "layer", [int(str(r).partition("@")[2]) for r in found["reading"]])
    return found


def _table(
    which: Sequence[str | Test],
    known: dict[str, Test] | None,
    form: Literal["words", "sentences"],
    read: Callable[[list[str], list[str]], NDArray[Any]],
    names: Sequence[str],
    permutations: int,
    seed: int,
) -> pd.DataFrame:
    known = tests() if known is None else known
    chosen = []
    for name in which:
        if isinstance(name, str) and name not in known:
            raise UnknownName("association test", name, known)
        chosen.append(known[name] if isinstance(name, str) else name)
    if form not in ("words", "sentences"):
        raise UnknownName("form", form, ("words", "sentences"))
    items = [[_items(s, form) for s in (t.x, t.y, t.a, t.b)] for t in chosen]
    flat = list(dict.fromkeys(i for sets in items for one in sets for word in one for i in word))
    space = read([text for text, _ in flat], [word for _, word in flat])  # (reading, text, d)
    space = space.reshape(space.shape[0], space.shape[1], -1)
    where = {item: i for i, item in enumerate(flat)}
    rows = []
    for r, reading in enumerate(names):
        for test, sets in zip(chosen, items, strict=True):
            parts = [space[r][np.array([[where[i] for i in word] for word in one])] for one in sets]  # (word, form, d)
            found = weat(*parts, permutations=permutations, seed=seed)
            rows.append({"test": test.name, "what": test.what, "reading": reading, "form": form, **asdict(found)})
    table = pd.DataFrame(rows)
    table.insert(list(table).index("p") + 1, "p_holm", holm(table["p"].to_numpy(float)))
    return table


def _items(words: WordSet, form: str) -> list[list[tuple[str, str]]]:
    """For each word of a set the (text, word) it is read in."""
    if form == "words":
        return [[(w, w)] for w in words.words]
    return [[(s, w) for s in made] for w, made in bland(words).items()]


def holm(p: NDArray[np.float64]) -> NDArray[np.float64]:
    """Holm's correction for many tests; missing values stay missing."""
    out = np.array(p, dtype=float)
    good = np.isfinite(p)
    if good.sum() > 1:  # statsmodels collects garbage at each call, which costs more than hundreds of comparisons
        from statsmodels.stats.multitest import multipletests

        out[good] = multipletests(p[good], method="holm")[1]
    return out
