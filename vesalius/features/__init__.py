"""What a model's vectors carry: directions of concepts, linear probes, a bias audit."""

from vesalius.features.concepts import Concept, concept, concepts
from vesalius.features.directions import AXES, Axis, cosines, direction, directions
from vesalius.features.probes import Probes, probe
from vesalius.features.steer import AxisGuard, pushed
from vesalius.features.vectors import Reading, states, vectors

__all__ = [
    "AXES", "Axis", "AxisGuard", "Concept", "Probes", "Reading", "concept", "concepts", "cosines", "direction",
    "directions", "probe", "pushed", "states", "vectors",
]  # fmt: skip
