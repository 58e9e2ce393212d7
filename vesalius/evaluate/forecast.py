"""Whether an earlier checkpoint, or a smaller model, foretells what the final model will have memorized.

A forecast is a classification of sequences: the predictor recites a sequence well enough (score >= threshold), and the
final model recites all of it, or not. Precision is the share of what was foretold that came true, recall the share of
what came true that was foretold; who wants to keep strings out of a model needs recall. Predictors are compared at
equal compute, FLOPs = 6 N T. A checkpoint cannot have memorized what it has not read: every number is given over all
sequences and over those it had seen.

A trajectory regression (ours) foretells from the scores of several earlier checkpoints together, by logistic regression
whose every forecast is made without the sequence it is for.

Biderman et al., "Emergent and Predictable Memorization in Large Language Models", arXiv 2304.11158.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray

from vesalius.errors import VesaliusError

FOLDS = 5
DRAWS = 1000


@dataclass(frozen=True)
class Forecast:
    """How a predictor's set compares with the final one; a number that cannot be computed is NaN.

    Attributes:
        predictor: its name. among: which sequences were asked about (`all`, `seen`).
        flops: what training the predictor took, 6 N T.
        threshold: score from which a sequence counts as foretold.
        n: sequences. memorized: of them, in the final model. foretold: by the predictor. both: right ones.
        precision, recall, f1: of the foretold set. average_precision, auroc: of the scores, over all thresholds.
    """

    predictor: str
    among: str
    flops: float
    threshold: float
    n: int
    memorized: int
    foretold: int
    both: int
    precision: float
    recall: float
    f1: float
    average_precision: float
    auroc: float


def forecast(
    scores: ArrayLike,
    memorized: ArrayLike,
    *,
    threshold: float = 1.0,
    predictor: str = "",
    among: str = "all",
    flops: float = float("nan"),
) -> Forecast:
    """Scores of a predictor against what the final model memorized.

    Args:
        scores: memorization score of each sequence by the predictor, (sequence,).
        memorized: whether the final model recites it, (sequence,).
        threshold: the predictor foretells from this score on.

    Example:
        >>> it = forecast([1, 1, 0.5, 0], [True, False, True, False])
        >>> it.precision, it.recall, it.f1
        (0.5, 0.5, 0.5)
    """
    s, truth = _both(scores, memorized)
    said = s >= threshold - 1e-9
    both = int((said & truth).sum())
    foretold, positive = int(said.sum()), int(truth.sum())
    precision = both / foretold if foretold else float("nan")
    recall = both / positive if positive else float("nan")
    f1 = 2 * both / (foretold + positive) if foretold + positive else float("nan")
    average = float("nan")
    if positive:
        from sklearn.metrics import average_precision_score

        average = float(average_precision_score(truth, s))
    counts = {"n": len(s), "memorized": positive, "foretold": foretold, "both": both}
    return Forecast(
        predictor, among, float(flops), threshold, **counts, precision=precision, recall=recall, f1=f1,
        average_precision=average, auroc=auroc(s, truth),
    )  # fmt: skip


def auroc(scores: ArrayLike, memorized: ArrayLike) -> float:
    """Chance that a memorized sequence has a larger score than another one, ties counted half; NaN if all are alike."""
    s, truth = _both(scores, memorized)
    if not len(truth) or truth.all() or not truth.any():
        return float("nan")
    from sklearn.metrics import roc_auc_score

    return float(roc_auc_score(truth, s))


def precision_recall(scores: ArrayLike, memorized: ArrayLike) -> pd.DataFrame:
    """Precision and recall at every threshold of the score, rising: threshold, precision, recall, foretold."""
    s, truth = _both(scores, memorized)
    columns = ["threshold", "precision", "recall", "foretold"]
    if not truth.any():
        return pd.DataFrame(columns=columns, dtype=float)
    from sklearn.metrics import precision_recall_curve

    precision, recall, thresholds = precision_recall_curve(truth, s)
    foretold = [int((s >= t).sum()) for t in thresholds]
    found = zip(
        thresholds, precision[:-1], recall[:-1], foretold, strict=True
    )  # the last point is by convention (1, 0)
    return pd.DataFrame(list(found), columns=columns)


@dataclass(frozen=True)
class TrajectoryForecast:
    """A regression on earlier scores against the last of them alone.

    Attributes:
        auroc: of the cross-validated forecasts. single: of the last checkpoint's score.
        gain: their difference, with its 95 % interval over sequences, low to high.
        folds: of the cross-validation; 0 if there were too few sequences of either kind, and every number is NaN.
        probability: out-of-fold chance of being memorized, (sequence,).
    """

    auroc: float
    single: float
    gain: float
    low: float
    high: float
    folds: int
    probability: NDArray[np.float64]


def trajectory_forecast(
    scores: ArrayLike, memorized: ArrayLike, *, more: ArrayLike | None = None, folds: int = FOLDS, seed: int = 0
) -> TrajectoryForecast:
    """Foretells from the scores of several checkpoints, each sequence by a regression that was not fitted on it.

    Args:
        scores: (sequence, checkpoint), checkpoints in order; the last is the single predictor it is compared with.
        memorized: whether the final model recites it, (sequence,).
        more: further known features, (sequence, feature), such as exposures so far.
        folds: of the stratified cross-validation. seed: of the folds and the resampling.

    Raises:
        VesaliusError: if the shapes do not fit.
    """
    table = np.asarray(scores, dtype=float)
    truth = np.asarray(memorized, dtype=bool)
    if table.ndim != 2 or len(table) != len(truth) or not table.shape[1]:
        raise VesaliusError(f"scores of shape {table.shape} for {len(truth)} sequences; give (sequence, checkpoint)")
    single = auroc(table[:, -1], truth)
    folds = min(folds, int(truth.sum()), int((~truth).sum()))
    if folds < 2:
        nan = float("nan")
        return TrajectoryForecast(nan, single, nan, nan, nan, 0, np.full(len(truth), nan))
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import StratifiedKFold, cross_val_predict
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    features = table if more is None else np.column_stack([table, np.asarray(more, dtype=float)])
    fit = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000))
    split = StratifiedKFold(folds, shuffle=True, random_state=seed)
    probability = cross_val_predict(fit, features, truth, cv=split, method="predict_proba")[:, 1]
    whole = auroc(probability, truth)
    rng = np.random.default_rng(seed)
    gains = []
    for _ in range(DRAWS):
        pick = rng.integers(len(truth), size=len(truth))
        gains.append(_rank_auroc(probability[pick], truth[pick]) - _rank_auroc(table[pick, -1], truth[pick]))
    low, high = np.nanquantile(gains, [0.025, 0.975])
    return TrajectoryForecast(whole, single, whole - single, float(low), float(high), folds, probability)


def _rank_auroc(scores: NDArray[np.float64], truth: NDArray[np.bool_]) -> float:
    """As `auroc`, by ranks alone: quick enough to be resampled."""
    from scipy.stats import rankdata

    positive = int(truth.sum())
    negative = len(truth) - positive
    if not positive or not negative:
        return float("nan")
    return float((rankdata(scores)[truth].sum() - positive * (positive + 1) / 2) / (positive * negative))


def forecast_table(forecasts: list[Forecast]) -> pd.DataFrame:
    """Forecasts as a table, one row each."""
    return pd.DataFrame([asdict(f) for f in forecasts], columns=[f.name for f in fields(Forecast)])


def cheapest(forecasts: pd.DataFrame, recall: float = 0.9) -> pd.DataFrame:
    """The predictors that reach that recall, the one that took least compute first."""
    return forecasts[forecasts["recall"] >= recall].sort_values("flops", kind="stable").reset_index(drop=True)


def _both(scores: ArrayLike, memorized: ArrayLike) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    s, truth = np.asarray(scores, dtype=float), np.asarray(memorized, dtype=bool)
    if s.shape != truth.shape or s.ndim != 1:
        raise VesaliusError(f"{s.shape} scores for {truth.shape} sequences; give one score for each sequence")
    return s, truth
