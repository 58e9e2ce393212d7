"""torch's own optimizers, with the defaults this project trains by."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim import SGD, Adafactor, AdamW, Optimizer

from vesalius.errors import VesaliusError

FUSED_DEVICES = ("cpu", "cuda", "mps", "xpu")


def fusible(params: Any) -> bool:
    """Whether torch's fused kernels take all of these parameters."""
    tensors: list[Tensor] = [t for p in params for t in (p["params"] if isinstance(p, dict) else [p])]
    devices = {t.device.type for t in tensors}
    return (
        bool(tensors)
        and len(devices) == 1
        and devices <= set(FUSED_DEVICES)
        and all(t.is_floating_point() for t in tensors)
    )


def sharded(params: Any) -> bool:
    """Whether some parameters are pieces of tensors that several processes share."""
    return any(isinstance(t, DTensor) for p in params for t in (p["params"] if isinstance(p, dict) else [p]))


def adamw(
    params: Any,
    lr: float = 1e-3,
    betas: tuple[float, float] = (0.9, 0.95),
    eps: float = 1e-8,
    weight_decay: float = 0.1,
    fused: bool | None = None,
) -> Optimizer:
    """AdamW with Pythia's betas and decay (arXiv 2304.01373); fused where the device has it."""
    params = list(params)
    return AdamW(params, lr, betas, eps, weight_decay, fused=fusible(params) if fused is None else fused)


def sgdm(
    params: Any,
    lr: float = 0.1,
    momentum: float = 0.9,
    nesterov: bool = False,
    weight_decay: float = 0.0,
    fused: bool | None = None,
) -> Optimizer:
    """Momentum as torch has it; the decay is part of the gradient."""
    params = list(params)
    use = fusible(params) and not sharded(params) if fused is None else fused  # torch's fused SGD takes no DTensors
    return SGD(params, lr, momentum, weight_decay=weight_decay, nesterov=nesterov, fused=use)


def adafactor(
    params: Any,
    lr: float = 1e-2,
    beta2_decay: float = -0.8,
    eps: tuple[float | None, float] = (None, 1e-3),
    d: float = 1.0,
    weight_decay: float = 0.0,
    foreach: bool | None = None,
) -> Optimizer:
    """Factored Adafactor; `lr` bounds the relative step 1/sqrt(step)."""
    params = list(params)
    if sharded(params):
        raise VesaliusError("Adafactor needs whole matrices, and these are sharded; train replicated, or with AdamW")
    return Adafactor(params, lr, beta2_decay, eps, d, weight_decay, foreach=foreach)


__all__ = ["adafactor", "adamw", "fusible", "sgdm"]
