"""Optimizers by name, made for a model by what its parameters are for."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from vesalius.errors import UnknownName, VesaliusError
from vesalius.registry import Registry
from vesalius.train.roles import ROLES, Parameter, Role, trainable

OPTIMIZERS: Registry[Callable[..., Optimizer]] = Registry("optimizer")
for _name, _target, _summary, _paper, _state in (
    ("adamw", "stock:adamw", "Adam with decoupled decay (torch's own)", "arXiv 1711.05101", "2"),
    ("sgdm", "stock:sgdm", "gradient descent with momentum (torch's own)", "Polyak 1964", "1"),
    (
        "adafactor",
        "stock:adafactor",
        "factored second moments, no momentum (torch's own)",
        "arXiv 1804.04235",
        "rows + columns",
    ),
    ("palm", "palm:PaLMAdafactor", "Adafactor without factoring, as PaLM was trained", "arXiv 2204.02311", "2"),
    ("adan", "adan:Adan", "adaptive Nesterov momentum", "arXiv 2208.06677", "4"),
    ("conda", "conda:Conda", "Adam in the singular basis of its momentum", "arXiv 2509.24218", "2 + bases"),
    ("sgd-sai", "sgd_sai:SGDSaI", "momentum, each tensor's rate fixed by its first gradient", "arXiv 2412.11768", "1"),
    (
        "muon",
        "muon:MuonAdamW",
        "orthogonalised momentum for matrices, AdamW for the rest (torch's own)",
        "Jordan 2024",
        "1 to 2",
    ),
):
    OPTIMIZERS.add(_name, f"vesalius.train.optimizers.{_target}", _summary, _paper, state_per_parameter=_state)

# Set by `make_optimizer` itself, not by the user.
_INTERNAL = ("params", "project")
PROJECTING = ("conda", "muon")


def settings(name: str) -> dict[str, Any]:
    """The settings an optimizer takes, with their defaults of record.

    Example:
        >>> settings("adan")["betas"]
        (0.98, 0.92, 0.99)
    """
    parameters = inspect.signature(OPTIMIZERS.get(name)).parameters.values()
    return {p.name: p.default for p in parameters if p.name not in _INTERNAL}


def groups(model: nn.Module, weight_decay: float, no_decay: Sequence[Role] = ("vector",)) -> list[dict[str, Any]]:
    """Parameter groups by role, in the order of `ROLES` and of the model: what trains, with its decay.

    Args:
        model: any module; frozen parameters and empty tensors are left out.
        weight_decay: of every role but those of `no_decay`.
        no_decay: roles that do not decay.

    Returns:
        Groups with `params`, `names`, `role` and `weight_decay`.

    Example:
        >>> [(g["role"], g["weight_decay"], g["names"]) for g in groups(nn.Linear(2, 2), 0.1)]
        [('matrix', 0.1, ['weight']), ('vector', 0.0, ['bias'])]
    """
    for role in no_decay:
        if role not in ROLES:
            raise UnknownName("role", role, ROLES)
    found = [p for p in trainable(model) if p.tensor.numel()]
    return [
        _group(mine, role, 0.0 if role in no_decay else weight_decay)
        for role in ROLES
        if (mine := [p for p in found if p.role == role])
    ]


def _group(parameters: list[Parameter], role: Role, weight_decay: float, **more: Any) -> dict[str, Any]:
    members = {"params": [p.tensor for p in parameters], "names": [p.name for p in parameters]}
    return {**members, "role": role, "weight_decay": weight_decay, **more}


def _projected(model: nn.Module, made: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The groups with hidden matrices apart: one group a layout of fused ones, one of tensors of other shapes."""
    from vesalius.train.optimizers.conda import fused

    out = []
    for group in made:
        if group["role"] != "matrix":
            out.append(group)
            continue
        members = [Parameter(n, p, "matrix") for n, p in zip(group["names"], group["params"], strict=True)]
        layouts: dict[Any, list[Parameter]] = {}
        for member, pieces in fused(model, members):
            key = (member.tensor.ndim == 2, tuple(pieces) if pieces else None)
            layouts.setdefault(key, []).append(member)
        for (flat, pieces), mine in layouts.items():
            out.append(_group(mine, "matrix", group["weight_decay"], project=flat, pieces=pieces))
    return out


def make_optimizer(name: str, model: nn.Module, no_decay: Sequence[Role] = ("vector",), **chosen: Any) -> Optimizer:
    """An optimizer for a model, with the defaults of record where nothing else is asked for.

    Args:
        name: one of `OPTIMIZERS.names()`.
        model: what is trained; frozen parameters are left out.
        no_decay: roles that do not decay.
        **chosen: settings of that optimizer, see `settings(name)`.

    Raises:
        VesaliusError: for an unknown name or setting (with the nearest), or a model with nothing to train.
    """
    known = settings(name)
    for key in chosen:
        if key not in known:
            raise UnknownName(f"setting of optimizer {name}", key, known)
    merged = {**known, **chosen}
    made = groups(model, merged["weight_decay"], no_decay)
    if not made:
        raise VesaliusError(f"nothing to train: every parameter of {type(model).__name__} is frozen or empty")
    if name in PROJECTING:
        made = _projected(model, made)
    return OPTIMIZERS.get(name)(made, **chosen)


def state_bytes(optimizer: Optimizer) -> int:
    """Bytes of the optimizer's state, counters included."""
    values = (v for state in optimizer.state.values() for v in state.values() if isinstance(v, torch.Tensor))
    return sum(v.numel() * v.element_size() for v in values)


__all__ = ["OPTIMIZERS", "groups", "make_optimizer", "settings", "state_bytes"]
