"""Measurements of behaviour: what a model has memorized, fills in, learns from few examples, tags."""

from vesalius.evaluate.forecast import (
    Forecast,
    TrajectoryForecast,
    auroc,
    cheapest,
    forecast,
    forecast_table,
    precision_recall,
    trajectory_forecast,
)
from vesalius.evaluate.infill import Infill, infill
from vesalius.evaluate.memorization import (
    Place,
    at_checkpoint,
    by_dose,
    by_exposures,
    by_step,
    dose_response,
    forecasts,
    histogram,
    over_training,
    place_of,
    place_test,
    share,
    trajectories,
    wilson,
)
from vesalius.evaluate.normalised import TextScore, text_score
from vesalius.evaluate.recite import CLOSE, Recital, recite
from vesalius.evaluate.sequences import Sequences, documents_of, rows_of, texts_of
from vesalius.evaluate.shots import few_shot
from vesalius.evaluate.tagging import Sentence, entity_score, finetune, tag, tagged
from vesalius.evaluate.windows import last_losses

__all__ = [
    "CLOSE",
    "Forecast",
    "Infill",
    "Place",
    "Recital",
    "Sentence",
    "Sequences",
    "TextScore",
    "TrajectoryForecast",
    "at_checkpoint",
    "auroc",
    "by_dose",
    "by_exposures",
    "by_step",
    "cheapest",
    "documents_of",
    "dose_response",
    "entity_score",
    "few_shot",
    "finetune",
    "forecast",
    "forecast_table",
    "forecasts",
    "histogram",
    "infill",
    "last_losses",
    "over_training",
    "place_of",
    "place_test",
    "precision_recall",
    "recite",
    "rows_of",
    "share",
    "tag",
    "tagged",
    "text_score",
    "texts_of",
    "trajectories",
    "trajectory_forecast",
    "wilson",
]
