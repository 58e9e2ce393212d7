"""Forecast metrics equal scikit-learn's, and a trajectory that knows more is seen to know more."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn import metrics

from vesalius.errors import VesaliusError
from vesalius.evaluate import auroc, cheapest, forecast, forecast_table, precision_recall, trajectory_forecast
from vesalius.evaluate.forecast import _rank_auroc

SCORES = np.array([1.0, 1.0, 0.75, 0.5, 1.0, 0.0, 0.25, 1.0, 0.75, 0.0])
TRUTH = np.array([1, 0, 1, 1, 1, 0, 0, 1, 0, 0], dtype=bool)


@pytest.mark.parametrize("threshold", [1.0, 0.75, 0.5, 0.25])
def test_metrics_are_scikit_learns(threshold: float):
    found = forecast(SCORES, TRUTH, threshold=threshold)
    said = threshold <= SCORES
    assert found.precision == pytest.approx(metrics.precision_score(TRUTH, said))
    assert found.recall == pytest.approx(metrics.recall_score(TRUTH, said))
    assert found.f1 == pytest.approx(metrics.f1_score(TRUTH, said))
    assert found.average_precision == pytest.approx(metrics.average_precision_score(TRUTH, SCORES))
    assert found.auroc == pytest.approx(metrics.roc_auc_score(TRUTH, SCORES))


def test_by_hand():
    found = forecast(SCORES, TRUTH)
    assert (found.n, found.memorized, found.foretold, found.both) == (10, 5, 4, 3)
    assert (found.precision, found.recall, found.f1) == (0.75, 0.6, pytest.approx(2 / 3))


def test_what_cannot_be_computed_is_missing():
    silent = forecast([0.0, 0.5], [True, False])
    assert np.isnan(silent.precision) and silent.recall == 0.0
    nothing = forecast([1.0, 0.5], [False, False])
    assert np.isnan(nothing.recall) and nothing.precision == 0.0 and np.isnan(nothing.auroc)
    assert np.isnan(forecast([], []).recall)
    assert not len(precision_recall([1.0], [False]))
    with pytest.raises(VesaliusError, match="one score for each"):
        forecast([1.0], [True, False])


def test_the_curve_passes_through_every_threshold():
    curve = precision_recall(SCORES, TRUTH)
    assert curve["threshold"].tolist() == sorted(set(SCORES))
    for row in curve.to_dict("records"):
        one = forecast(SCORES, TRUTH, threshold=row["threshold"])
        assert (row["precision"], row["recall"], row["foretold"]) == (one.precision, one.recall, one.foretold)


def test_resampling_ranks_as_auroc_does():
    assert _rank_auroc(SCORES, TRUTH) == pytest.approx(auroc(SCORES, TRUTH))


def test_a_trajectory_that_knows_more_gains_and_noise_does_not():
    rng = np.random.default_rng(0)
    n = 400
    trend, noise = rng.normal(size=n), rng.normal(size=n)
    truth = trend + 0.3 * rng.normal(size=n) > 0
    first, last = noise, noise + trend  # the last checkpoint alone mixes what the two together tell apart
    found = trajectory_forecast(np.column_stack([first, last]), truth)
    assert found.single == pytest.approx(auroc(last, truth))
    assert found.gain > 0.1 and found.low > 0.05 and found.auroc > 0.95
    useless = trajectory_forecast(np.column_stack([rng.normal(size=(n, 5)), trend]), truth)
    assert abs(useless.gain) < 0.02
    known = trajectory_forecast(last[:, None], truth, more=trend[:, None])
    assert known.auroc > found.single + 0.1


def test_no_forecast_is_fitted_on_what_it_foretells():
    """With random truth a regression on many random features would look good on its own data; held out it does not."""
    rng = np.random.default_rng(1)
    truth = np.arange(120) % 2 == 0
    found = trajectory_forecast(rng.normal(size=(120, 40)), truth)
    assert 0.35 < found.auroc < 0.65


def test_too_few_to_split():
    found = trajectory_forecast(np.ones((5, 2)), [True, False, False, False, False])
    assert found.folds == 0 and np.isnan(found.auroc) and found.single == 0.5


def test_cheapest_is_by_compute():
    table = forecast_table(
        [
            forecast(SCORES, TRUTH, predictor="poor", flops=1),
            forecast(TRUTH.astype(float), TRUTH, predictor="dear", flops=9),
            forecast(TRUTH.astype(float), TRUTH, predictor="cheap", flops=3),
        ]
    )
    assert cheapest(table)["predictor"].tolist() == ["cheap", "dear"]
