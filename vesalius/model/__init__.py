"""Open a model, name its parts, run it, intervene."""

from vesalius.model.hooks import Site
from vesalius.model.intervene import Intervention
from vesalius.model.model import Capture, Model
from vesalius.model.opening import open_model
from vesalius.model.pairs import Metric, Pairs

__all__ = ["Capture", "Intervention", "Metric", "Model", "Pairs", "Site", "open_model"]
