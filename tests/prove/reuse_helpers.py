"""Planted models and their tasks as a user would open them, and a damaged one that a transplant can repair."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import torch

import vesalius
from vesalius.build import planted
from vesalius.model import Model
from vesalius.parts import Part
from vesalius.tasks import Task


class Subject(NamedTuple):
    model: Model
    tasks: dict[str, Task]
    roles: dict[str, dict[Part, str]]


def subject(name: str, folder: Path, base: str = "llama", seed: int = 0, n: int = 24, damage: float = 1.0) -> Subject:
    """A planted model with each of its tasks as prompts in a file.

    Args:
        damage: factor on what the duplicate-token head writes. At 0.35 the inhibition head no longer notices its mark
            among the keys, so that who-received is lost; the mark's value, once looked at, still suffices.
    """
    made = planted(name, base, seed=seed)
    made.save(folder, n=2 * n)
    head = next((p for p, r in made.roles.items() if r == "duplicate-token"), None)
    if damage != 1.0 and head is not None:
        assert base == "llama" and head.layer is not None and head.index is not None
        out = made.hf.model.layers[head.layer].self_attn.o_proj.weight
        size = out.shape[1] // made.hf.config.num_attention_heads
        with torch.no_grad():
            out[:, head.index * size : (head.index + 1) * size] *= damage
    model = Model.wrap(made.hf, made.tokenizer, name=name)
    tasks = {task: vesalius.task(folder / f"{task}.jsonl", n=n, seed=seed) for task in made.circuits}
    roles = {task: dict(circuit.roles) for task, circuit in made.circuits.items()}
    return Subject(model, tasks, roles)


def known(subject: Subject, task: str, role: str) -> Part:
    return next(p for p, r in subject.roles[task].items() if r == role)
