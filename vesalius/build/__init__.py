"""Models made here: planted ones, whose mechanism is set by hand and known."""

from vesalius.build.planted import PLANTED, Planted, Prompt, TrueCircuit, planted

__all__ = ["PLANTED", "Planted", "Prompt", "TrueCircuit", "planted"]
