"""Weights as mathematics wants them, wherever and however a module keeps them."""

from __future__ import annotations

from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D


def parameter_of(module: nn.Module, name: str) -> Tensor | None:
    """A module's parameter, or None; one that `device_map` keeps elsewhere is brought back for the moment."""
    found = getattr(module, name, None)
    if not isinstance(found, Tensor) or found.device.type != "meta":
        return found if isinstance(found, Tensor) else None
    from accelerate.utils import align_module_device

    with align_module_device(module):
        return getattr(module, name).detach().clone()


def matrix(module: nn.Module) -> Tensor:
    """A linear map's weight as (in, out), for `nn.Linear` and transformers' transposed `Conv1D` alike."""
    weight = parameter_of(module, "weight")
    assert weight is not None
    return weight if isinstance(module, Conv1D) else weight.T


def bias_of(module: nn.Module) -> Tensor | None:
    """A module's bias, or None."""
    return parameter_of(module, "bias")
