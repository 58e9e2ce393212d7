"""What a model trained on a recursive function really learnt: where it fails, which program fails alike, how."""

from vesalius.features.recursion.program import Program, Reconstruction, cutoff, reconstruct
from vesalius.features.recursion.solve import Case, ModelSolver, by_kind, cases, grid
from vesalius.features.recursion.switch import markers, mechanism, modes, moved

__all__ = [
    "Case", "ModelSolver", "Program", "Reconstruction", "by_kind", "cases", "cutoff", "grid", "markers", "mechanism",
    "modes", "moved", "reconstruct",
]  # fmt: skip
