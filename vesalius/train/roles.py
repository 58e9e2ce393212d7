"""What each trainable tensor is for: the one classification behind decay, freezing, counting and sharding."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal, NamedTuple, get_args

import pandas as pd
from torch import Tensor, nn

Role = Literal["embedding", "head", "matrix", "vector", "adapter"]
ROLES: tuple[Role, ...] = get_args(Role)


class Parameter(NamedTuple):
    """A parameter with the first of its names, and its role."""

    name: str
    tensor: nn.Parameter
    role: Role


def roles(model: nn.Module) -> list[Parameter]:
    """Every parameter once, in the model's order, with its role.

    `embedding`: rows looked up by number (tokens, positions, segments), a tied output layer too. `head`: an untied
    output layer. `adapter`: what was added to a frozen model (LoRA). `matrix`: any other tensor of two or more axes.
    `vector`: biases, gains and other tensors of one axis or none.

    Example:
        >>> from torch import nn
        >>> [(p.name, p.role) for p in roles(nn.Sequential(nn.Embedding(4, 2), nn.Linear(2, 2)))]
        [('0.weight', 'embedding'), ('1.weight', 'matrix'), ('1.bias', 'vector')]
    """
    looked_up = {id(p) for m in model.modules() if isinstance(m, nn.Embedding) for p in m.parameters(recurse=False)}
    output = getattr(model, "get_output_embeddings", lambda: None)()
    head = {id(p) for p in output.parameters()} if isinstance(output, nn.Module) else set()

    def role(name: str, tensor: Tensor) -> Role:
        if "lora_" in name or ".adapter" in name:
            return "adapter"
        if id(tensor) in looked_up:
            return "embedding"
        if tensor.ndim < 2:
            return "vector"
        return "head" if id(tensor) in head else "matrix"

    return [Parameter(n, p, role(n, p)) for n, p in model.named_parameters()]


def trainable(model: nn.Module) -> Iterator[Parameter]:
    """Those of `roles` that take a gradient."""
    return (p for p in roles(model) if p.tensor.requires_grad)


def count(model: nn.Module) -> pd.DataFrame:
    """Parameters by role: columns role, tensors, parameters, trainable."""
    found = roles(model)
    rows = []
    for role in ROLES:
        mine = [p.tensor for p in found if p.role == role]
        rows.append((role, len(mine), sum(t.numel() for t in mine), sum(t.numel() for t in mine if t.requires_grad)))
    return pd.DataFrame(rows, columns=["role", "tensors", "parameters", "trainable"])
