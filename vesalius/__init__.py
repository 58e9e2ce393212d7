"""Vesalius: the anatomist's bench for transformer language models.

import vesalius
model = vesalius.open("smollm2-135m")
task = vesalius.task("ioi", n=64, seed=0)
scores = vesalius.find("relp", model, task)
circuit = vesalius.grow(scores, fraction=0.25)
proof = circuit.prove(model, task.held_out())
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from vesalius.autoload import announce

__version__ = "0.1.0"

_LAZY = {
    "open": "vesalius.model:open_model",
    "Model": "vesalius.model:Model",
    "Intervention": "vesalius.model:Intervention",
    "task": "vesalius.tasks:task",
    "grow": "vesalius.prove:grow",
    "Circuit": "vesalius.prove:Circuit",
    "Scores": "vesalius.scores:Scores",
    "Part": "vesalius.parts:Part",
    "Edge": "vesalius.parts:Edge",
    "parse": "vesalius.parts:parse",
    "VesaliusError": "vesalius.errors:VesaliusError",
}

announce()  # transformers' Auto classes open the models of `vesalius.build`; nothing is loaded for it

if TYPE_CHECKING:
    from vesalius import lens
    from vesalius.errors import VesaliusError
    from vesalius.find import find
    from vesalius.model import Intervention, Model
    from vesalius.model import open_model as open
    from vesalius.parts import Edge, Part, parse
    from vesalius.prove import Circuit, grow, prove
    from vesalius.scores import Scores
    from vesalius.tasks import task


def __getattr__(name: str) -> Any:
    if name in ("find", "lens", "prove"):  # rooms one calls by their names; two are functions as well
        return importlib.import_module(f"vesalius.{name}")
    if name not in _LAZY:
        raise AttributeError(f"module 'vesalius' has no attribute '{name}'")
    module, attribute = _LAZY[name].split(":")
    return getattr(importlib.import_module(module), attribute)


def __dir__() -> list[str]:
    return sorted([*_LAZY, "find", "lens", "prove", "__version__"])


__all__ = [
    "Circuit",
    "Edge",
    "Intervention",
    "Model",
    "Part",
    "Scores",
    "VesaliusError",
    "__version__",
    "find",
    "grow",
    "lens",
    "open",
    "parse",
    "prove",
    "task",
]
