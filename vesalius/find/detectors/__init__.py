"""Head detectors: `detect(model, "induction,successor") -> Heads`, a score and a null for every head."""

from vesalius.find.detectors.base import DETECTORS, HeadContext, Heads, detect

__all__ = ["DETECTORS", "HeadContext", "Heads", "detect"]
