"""Directions: the axis of a concept, found from labelled phrases, judged, and used to score any phrase.

Each phrase p has a vector v(p), the mean over the concept's templates. With c the mean of the labelled phrases and an
axis a of length 1,

    score(p) = (a . (v(p) - c) - offset) / scale,    scale such that the largest |score| of the labelled phrases is 1.

Four ways to find it (`AXES`): `pca`, the first principal component, which sees no label but for its sign
(Schramowski et al. 2022, arXiv 2103.11790); `mean-difference` of the two poles; `lda` with shrunk covariance (Ledoit
and Wolf 2004); `logistic` regression. A first component may be a topic or a length: what it is worth is told by the
phrases left out (`sign_accuracy`), the same with shuffled labels (`p`), and held-out phrases that were rated.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy import stats

from vesalius.errors import VesaliusError
from vesalius.features.concepts import Concept, concept
from vesalius.features.vectors import Progress, Reading, default_reading, vectors
from vesalius.model import Model
from vesalius.records import dump, read_json, typed, write_atomic
from vesalius.registry import Registry

Floats = NDArray[np.float64]
FOLDS = 10


class Line(NamedTuple):
    """An axis of length 1 and where its zero lies: score = x @ vector - offset."""

    vector: Floats
    offset: float


Fit = Callable[[Floats, NDArray[np.int_]], Line]

AXES: Registry[Fit] = Registry("way to find an axis")  # place: where it stands in tables


def _unit(vector: Floats) -> Floats:
    length = float(np.linalg.norm(vector))
    if not length > 0:
        raise VesaliusError("the phrases of the two poles have the same vectors; there is no axis between them")
    return vector / length


@AXES.register("pca", "first principal component; labels choose its sign alone", "arXiv 2103.11790", place=0)
def pca(x: Floats, y: NDArray[np.int_]) -> Line:
    """The first principal component of vectors (phrase, d); its sign agrees with labels y of 1 and -1."""
    center = x.mean(axis=0)
    _, _, components = np.linalg.svd(x - center, full_matrices=False)
    axis = components[0]
    # Agreement, not correlation: phrases of the positive pole lie on the positive side on average.
    axis = axis if (x[y > 0] @ axis).mean() >= (x[y < 0] @ axis).mean() else -axis
    return Line(axis, float(center @ axis))


@AXES.register(
    "mean-difference",
    "mean of the positive pole minus mean of the negative",
    "Kim et al. 2018, arXiv 1711.11279",
    place=1,
)
def mean_difference(x: Floats, y: NDArray[np.int_]) -> Line:
    """From the mean of one pole to that of the other, zero half-way."""
    high, low = x[y > 0].mean(axis=0), x[y < 0].mean(axis=0)
    axis = _unit(high - low)
    return Line(axis, float((high + low) @ axis / 2))


@AXES.register(
    "lda", "linear discriminant, covariance shrunk", "Ledoit & Wolf 2004, J. Multivariate Analysis 88, 365", place=2
)
def lda(x: Floats, y: NDArray[np.int_]) -> Line:
    """Fisher's discriminant with Ledoit and Wolf's covariance, which is invertible for few phrases too."""
    from sklearn.discriminant_analysis import LinearDiscriminantAnalysis

    made = LinearDiscriminantAnalysis(solver="lsqr", shrinkage="auto", priors=[0.5, 0.5]).fit(x, y)
    return _line(made.coef_[0], float(made.intercept_[0]))


@AXES.register("logistic", "logistic regression, ridge penalty", "scikit-learn", place=3)
def logistic(x: Floats, y: NDArray[np.int_]) -> Line:
    """Logistic regression on vectors scaled so that their mean squared length is their width."""
    from sklearn.linear_model import LogisticRegression

    spread = float(np.sqrt((x - x.mean(axis=0)).var(axis=0).mean())) or 1.0
    made = LogisticRegression(C=1.0, class_weight="balanced", max_iter=2000).fit(x / spread, y)
    return _line(made.coef_[0] / spread, float(made.intercept_[0]))


@AXES.register("random", "a random direction, the baseline; labels choose its sign", "none", place=4)
def random_line(x: Floats, y: NDArray[np.int_], seed: int = 0) -> Line:
    """A direction drawn at random among those in which the phrases differ."""
    center = x.mean(axis=0)
    axis = _unit(np.asarray(np.random.default_rng([seed, x.shape[1]]).standard_normal(x.shape[1])))
    axis = axis if (x[y > 0] @ axis).mean() >= (x[y < 0] @ axis).mean() else -axis
    return Line(axis, float(center @ axis))


_NUMBER = int | float
_JUDGED = {
    **dict.fromkeys(
        ("n", "sign_accuracy", "low", "high", "cross_validated", "label_correlation", "explained"), _NUMBER
    ),
    **dict.fromkeys(("p", "null_mean"), _NUMBER | None),
    "component_correlations": list,
    "stability": dict | None,
}  # what is said of every axis, and of what kind it is


def _line(weights: Floats, intercept: float) -> Line:
    return Line(_unit(np.asarray(weights, dtype=float)), -intercept / float(np.linalg.norm(weights)))


@dataclass(frozen=True)
class Axis:
    """A direction in one model's vector space.

    Attributes:
        concept, method, reading, templates: how it was found.
        vector: length 1, (d,). center: mean of the labelled phrases, (d,).
        offset, scale: score = ((v - center) @ vector - offset) / scale.
        gap: distance between the means of the two poles along the axis, in the vectors' own units.
        poles: what a high and a low score mean.
        model, fingerprint: of which model.
        quality: what is known of it; see `direction`.
    """

    concept: str
    method: str
    reading: Reading
    templates: tuple[str, ...]
    vector: NDArray[np.float32]
    center: NDArray[np.float32]
    offset: float
    scale: float
    gap: float
    poles: tuple[str, str]
    model: str
    fingerprint: str
    quality: Mapping[str, Any] = field(default_factory=dict)

    def check(self, model: Model) -> None:
        """Refuses a model other than the axis's own."""
        if model.fingerprint != self.fingerprint:
            raise VesaliusError(
                f"this axis of '{self.concept}' is of {self.model} (fingerprint {self.fingerprint}), and {model.name} "
                f"({model.fingerprint}) has another space; find it there again with `vesalius direction`"
            )

    def project(self, x: NDArray[np.floating[Any]]) -> Floats:
        """Scores of vectors (..., d)."""
        if x.shape[-1] != len(self.vector):
            raise VesaliusError(f"this axis is of width {len(self.vector)}, and what it should score of {x.shape[-1]}")
        centred = np.asarray(x, dtype=float) - self.center
        found: Floats = (centred @ self.vector.astype(float) - self.offset) / self.scale
        return found

    def score(self, model: Model, phrases: Sequence[str], progress: Progress | None = None) -> Floats:
        """How much of the concept each phrase has: above 0 the positive pole, about 1 as much as the clearest phrase.

        Raises:
            VesaliusError: if the model is not the one the axis was found in.
        """
        self.check(model)
        return self.project(phrase_vectors(model, phrases, self.reading, self.templates, progress))

    def told(self) -> dict[str, Any]:
        """Everything but the arrays, as JSON has it."""
        kept = {k: v for k, v in self.__dict__.items() if k not in ("vector", "center")}
        found: dict[str, Any] = json.loads(dump(kept | {"reading": str(self.reading)}))
        return found

    def files(self) -> dict[str, bytes]:
        """The content of its two files by suffix."""
        from safetensors.numpy import save

        arrays = {"vector": self.vector, "center": self.center}
        return {".safetensors": save(arrays), ".json": dump(self.told())}

    def save(self, path: Path | str) -> Path:
        """Writes `PATH.safetensors` (vector, center) and `PATH.json` (everything else); returns the latter's path.

        Raises:
            VesaliusError: if they cannot be written there.
        """
        stem = _stem(path)
        try:
            stem.parent.mkdir(parents=True, exist_ok=True)
            for suffix, content in self.files().items():
                write_atomic(_beside(stem, suffix), content)
        except OSError as error:
            raise VesaliusError(f"the axis cannot be saved at {stem}: {error.strerror}; choose another place") from None
        return _beside(stem, ".json")

    @classmethod
    def load(cls, path: Path | str) -> Axis:
        """Reads what `save` wrote.

        Raises:
            VesaliusError: if one of the two files is missing or damaged.
        """
        from safetensors.numpy import load_file

        stem = _stem(path)
        again, note = "save the axis again with `vesalius direction --save`", _beside(stem, ".json")
        told = read_json(note, again)
        texts = dict.fromkeys(("concept", "method", "model", "fingerprint", "reading"), str)
        numbers = dict.fromkeys(("offset", "scale", "gap"), _NUMBER)
        typed(told, note, again, **texts, **numbers, templates=list, poles=list, quality=dict)
        typed(told["quality"], note, again, **_JUDGED)
        try:
            arrays = load_file(_beside(stem, ".safetensors"))
            for name in ("vector", "center"):
                if arrays[name].ndim != 1 or len(arrays[name]) != len(arrays["vector"]):
                    raise VesaliusError(f"no readable axis at {stem}: {name} has shape {arrays[name].shape}; {again}")
                if not np.isfinite(arrays[name]).all():
                    raise VesaliusError(f"no readable axis at {stem}: {name} holds NaN or infinity; {again}")
            reading = Reading.parse(told.pop("reading"))
            (high, low), templates = told.pop("poles"), tuple(map(str, told.pop("templates")))
            return cls(
                vector=arrays["vector"],
                center=arrays["center"],
                reading=reading,
                poles=(str(high), str(low)),
                templates=templates,
                **told,
            )
        except VesaliusError:
            raise
        except Exception as error:  # safetensors' own error class is not public
            raise VesaliusError(f"no readable axis at {stem}: {' '.join(str(error).split())[:120]}") from error


def _stem(path: Path | str) -> Path:
    path = Path(path)
    return path.with_suffix("") if path.suffix in (".json", ".safetensors") else path


def _beside(stem: Path, suffix: str) -> Path:
    return stem.with_name(stem.name + suffix)


def phrase_vectors(
    model: Model,
    phrases: Sequence[str],
    reading: Reading,
    templates: Sequence[str] = (),
    progress: Progress | None = None,
) -> Floats:
    """v(p): the mean over the templates of the filled-in phrase's vector, (phrase, d)."""
    forms = tuple(templates) or ("{}",)
    texts = [form.replace("{}", phrase) for phrase in phrases for form in forms]
    words = [phrase for phrase in phrases for _ in forms] if reading.pool == "word" else None
    found = vectors(model, texts, reading, words=words, progress=progress).astype(float)
    return found.reshape(len(phrases), len(forms), -1).mean(axis=1)  # (phrase, d)


class Found(NamedTuple):
    """An axis, and every phrase it was found from or judged by.

    Attributes:
        axis: the axis.
        phrases: phrase, use (a pole's name, `graded`, or `more` and `less` of a held-out pair), rating, score, and
            left_out, the score of a labelled phrase on the axis found without it.
    """

    axis: Axis
    phrases: pd.DataFrame


def direction(
    model: Model,
    of: str | Path | Concept,
    method: str | Fit = "pca",
    reading: str | Reading | None = None,
    *,
    templates: Sequence[str] | None = None,
    permutations: int = 200,
    draws: int = 200,
    seed: int = 0,
    progress: Progress | None = None,
) -> Axis:
    """The axis of a concept in one model.

    Args:
        model: from `vesalius.open`: an encoder (`minilm`) or a language model.
        of: a concept's name, a `.csv` or `.jsonl` file (see `concepts`), or a `Concept`.
        method: a name in `AXES`, or a function of the same kind.
        reading: where vectors are taken; the model's default if None.
        templates: sentences with `{}` instead of the concept's own; an empty list for phrases as they stand.
        permutations: of the labels, for `p`. draws: of the bootstrap over phrases.

    Returns:
        The axis. Its `quality` holds: `n`; `sign_accuracy` of phrases left out (pairs together) with `low`, `high`
        (Wilson); `label_correlation`; `explained`, the share of the phrases' variance along the axis; `components`,
        the shares of the first five principal components, and `component_correlations` of each with the label;
        `cross_validated`, sign accuracy in ten folds, and `p` of it with shuffled labels; `stability`, the cosine of
        the axis with that of resampled phrases (median, low); and of held-out phrases `graded_spearman`, `pairs_right`.

    Example:
        >>> axis = direction(vesalius.open("minilm"), "moral")               # doctest: +SKIP
        >>> axis.score(model, ["help a friend", "steal a car"])              # doctest: +SKIP
    """
    return directions(
        model,
        of,
        [method],
        reading,
        templates=templates,
        permutations=permutations,
        draws=draws,
        seed=seed,
        progress=progress,
    )[0].axis


def directions(
    model: Model,
    of: str | Path | Concept,
    methods: Sequence[str | Fit] = ("pca", "mean-difference", "lda", "logistic"),
    reading: str | Reading | None = None,
    *,
    templates: Sequence[str] | None = None,
    permutations: int = 200,
    draws: int = 200,
    seed: int = 0,
    progress: Progress | None = None,
) -> list[Found]:
    """The axes that several methods find from the same vectors; arguments as of `direction`.

    The first method is judged in full; of the others `p`, its null and `stability` are left out, since they take
    thousands of fits.
    """
    it = concept(of)
    at = default_reading(model) if reading is None else Reading.parse(reading)
    forms = it.templates if templates is None else tuple(templates)
    fits = [AXES.get(m) if isinstance(m, str) else m for m in methods]
    held_out = [*it.graded, *(text for pair in it.pairs for text in pair)]
    every = phrase_vectors(model, [*it.phrases, *held_out], at, forms, progress)
    x, others = every[: len(it.phrases)], every[len(it.phrases) :]
    center = x.mean(axis=0)
    y = np.array([1] * len(it.positive) + [-1] * len(it.negative))
    found = []
    for i, (method, fit) in enumerate(zip(methods, fits, strict=True)):
        shuffles, resamples = (permutations, draws) if i == 0 else (0, 0)
        span, line, left_out, quality = _judged(x, y, it.held_together, fit, shuffles, resamples, seed)
        vector = span.T @ line.vector  # back from the span of the phrases to the whole space
        along = (x - center) @ vector - line.offset
        axis = Axis(
            concept=it.name,
            method=method if isinstance(method, str) else getattr(method, "__name__", "function"),
            reading=at,
            templates=forms,
            vector=vector.astype(np.float32),
            center=center.astype(np.float32),
            offset=line.offset,
            scale=float(np.abs(along).max()) or 1.0,
            gap=float(along[y > 0].mean() - along[y < 0].mean()),
            poles=it.poles,
            model=model.name,
            fingerprint=model.fingerprint,
            quality=quality,
        )
        phrases = _phrases(axis, it, held_out, x, others, left_out / axis.scale)
        quality |= _held_out(phrases)
        found.append(Found(axis, phrases))
    return found


def _phrases(
    axis: Axis, it: Concept, held_out: Sequence[str], x: Floats, others: Floats, left_out: Floats
) -> pd.DataFrame:
    n = len(it.phrases)
    pair = ["more", "less"] * len(it.pairs)
    return pd.DataFrame(
        {
            "phrase": [*it.phrases, *held_out],
            "use": [it.poles[0]] * len(it.positive)
            + [it.poles[1]] * len(it.negative)
            + ["graded"] * len(it.graded)
            + pair,
            "rating": [np.nan] * n + list(it.graded.values()) + [np.nan] * len(pair),
            "score": np.concatenate([axis.project(x), axis.project(others)]) if len(others) else axis.project(x),
            "left_out": [*left_out, *[np.nan] * len(held_out)],
        }
    )


def _held_out(phrases: pd.DataFrame) -> dict[str, Any]:
    """What the axis says of the held-out phrases: rank correlation with their ratings, pairs told apart."""
    found: dict[str, Any] = {}
    graded = phrases[phrases["use"] == "graded"]
    if len(graded) > 2:
        result = stats.spearmanr(graded["score"], graded["rating"])
        found |= {"graded_spearman": float(result.statistic), "graded_p": float(result.pvalue), "graded_n": len(graded)}
    more, less = (phrases.loc[phrases["use"] == side, "score"].to_numpy() for side in ("more", "less"))
    if len(more):
        found |= {"pairs_right": int((more > less).sum()), "pairs_n": len(more)}
    return found


def _judged(
    x: Floats, y: NDArray[np.int_], groups: Sequence[str], fit: Fit, permutations: int, draws: int, seed: int
) -> tuple[Floats, Line, Floats, dict[str, Any]]:
    """The span of the phrases (rank, d), the line in it, scores of phrases left out, and what resampling says.

    Everything is done in the span of the centred phrases, which loses nothing and is smaller than the space.
    """
    from scipy.stats import binomtest

    rng = np.random.default_rng(seed)
    centred = x - x.mean(axis=0)
    _, sizes, rows = np.linalg.svd(centred, full_matrices=False)
    if not sizes[0] > 1e-5 * np.linalg.norm(x):  # what rounding leaves
        raise VesaliusError("all phrases have the same vector; there is no axis between them")
    span = rows[sizes > 1e-6 * sizes[0]]  # (rank, d)
    z = centred @ span.T  # (phrase, rank)
    line = fit(z, y)
    keys = np.unique(np.asarray(groups), return_inverse=True)[1]
    left_out = _crossed(z, y, keys, fit)
    right = int(((left_out > 0) == (y > 0)).sum())
    interval = binomtest(right, len(y)).proportion_ci(0.95, "wilson")
    folds = rng.permutation(int(keys.max()) + 1)[keys] % min(FOLDS, int(keys.max()) + 1)
    observed = _accuracy(_crossed(z, y, folds, fit), y)
    null = []
    for _ in range(permutations):
        other = _shuffled(y, keys, rng)
        null.append(_accuracy(_crossed(z, other, folds, fit), other))
    cosines = []
    for _ in range(draws):
        chosen = np.concatenate([rng.choice(np.flatnonzero(y == s), (y == s).sum()) for s in (1, -1)])
        cosines.append(float(fit(z[chosen], y[chosen]).vector @ line.vector))
    shares = (sizes**2 / (sizes**2).sum())[:5]
    quality: dict[str, Any] = {
        "n": len(y),
        "n_positive": int((y > 0).sum()),
        "n_negative": int((y < 0).sum()),
        "sign_accuracy": right / len(y),
        "low": float(interval.low),
        "high": float(interval.high),
        "sign_accuracy_seen": _accuracy(z @ line.vector - line.offset, y),
        "cross_validated": observed,
        "p": (1 + sum(v >= observed for v in null)) / (1 + permutations) if permutations else None,
        "null_mean": float(np.mean(null)) if null else None,
        "null_95": float(np.quantile(null, 0.95)) if null else None,
        "label_correlation": float(stats.pearsonr(z @ line.vector, y).statistic),
        "explained": float((z @ line.vector).var() / z.var(axis=0).sum()),
        "components": shares.tolist(),
        "component_correlations": [float(abs(stats.pearsonr(z[:, i], y).statistic)) for i in range(len(shares))],
        "stability": {"median": float(np.median(cosines)), "low": float(np.quantile(cosines, 0.025))}
        if draws
        else None,
        "permutations": permutations,
        "draws": draws,
        "seed": seed,
    }
    return span, line, left_out, quality


def _crossed(z: Floats, y: NDArray[np.int_], folds: NDArray[np.int_], fit: Fit) -> Floats:
    """The score of each phrase on the line found without its fold; 0 (no side) where a pole would be missing."""
    out = np.zeros(len(y))
    for fold in np.unique(folds):
        mine = folds == fold
        if len(set(y[~mine])) == 2:
            line = fit(z[~mine], y[~mine])
            out[mine] = z[mine] @ line.vector - line.offset
    return out


def _accuracy(scores: Floats, y: NDArray[np.int_]) -> float:
    return float((np.sign(scores) == y).mean())


def _shuffled(y: NDArray[np.int_], keys: NDArray[np.int_], rng: np.random.Generator) -> NDArray[np.int_]:
    """Shuffled labels; phrases of a pair exchange theirs, so that a pair keeps one of each."""
    sizes = np.bincount(keys)
    if (sizes == 2).all() and all(y[keys == k].sum() == 0 for k in range(len(sizes))):
        return np.where(rng.random(len(sizes))[keys] < 0.5, y, -y)
    return rng.permutation(y)


def cosines(axes: Sequence[Axis]) -> pd.DataFrame:
    """Cosines among axes of one model: columns a, b, cosine.

    Raises:
        VesaliusError: if they are of different models or readings.
    """
    first = axes[0]
    for axis in axes:
        if axis.fingerprint != first.fingerprint or str(axis.reading) != str(first.reading):
            raise VesaliusError(
                f"axes of {first.model} {first.reading} and of {axis.model} {axis.reading} lie in different spaces"
            )
    names = [f"{a.concept}, {a.method}" for a in axes]
    rows = [
        {"a": names[i], "b": names[j], "cosine": float(a.vector @ b.vector)}
        for i, a in enumerate(axes)
        for j, b in enumerate(axes)
    ]
    return pd.DataFrame(rows)
