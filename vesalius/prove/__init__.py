"""Circuits and their proof: faithfulness, areas, completeness, overlap, reuse."""

from vesalius.callable_module import callable_as
from vesalius.prove.circuit import Circuit, grow, random_circuit
from vesalius.prove.overlap import overlap
from vesalius.prove.proof import Proof, prove, smallest

callable_as(__name__, prove)

__all__ = ["Circuit", "Proof", "grow", "overlap", "prove", "random_circuit", "smallest"]
