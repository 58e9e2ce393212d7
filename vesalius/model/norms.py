"""Normalisation layers as linear maps around one input: the frozen-norm view, and exact products with the Jacobian.

A norm is y = g * (x - mean(x)) * r(x) + b, where r = 1/std for LayerNorm; RMSNorm has no mean and no b, and
r = 1/sqrt(mean(x^2) + eps). With r held at the value of an actual input the map is linear; direct contributions and
the LN-rule of relevance propagation (Ali et al. 2022, arXiv 2202.07304) both use that linear map.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from vesalius.model.weights import parameter_of

NormKind = Literal["layer", "rms", "rms+1"]


@dataclass(frozen=True)
class NormView:
    """A norm module with its formula known. `x` is the module's actual input, (..., d)."""

    module: nn.Module
    kind: NormKind

    @property
    def gain(self) -> Tensor:
        """Elementwise gain (d,), ones if the norm has none."""
        weight = parameter_of(self.module, "weight")
        if weight is None:
            shape = getattr(self.module, "normalized_shape", None)
            return torch.ones(shape if shape is not None else 1)
        return weight.float() + 1.0 if self.kind == "rms+1" else weight.float()

    @property
    def bias(self) -> Tensor | None:
        bias = parameter_of(self.module, "bias")
        return None if bias is None else bias.float()

    @property
    def eps(self) -> float:
        for name in ("eps", "variance_epsilon"):
            if hasattr(self.module, name):
                return float(getattr(self.module, name))
        raise AttributeError(f"{type(self.module).__name__} has no eps")

    def scale(self, x: Tensor) -> Tensor:
        """r(x): what the centred input is multiplied with, (..., 1)."""
        x = x.float()
        if self.kind == "layer":
            x = x - x.mean(-1, keepdim=True)
        return torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps)

    def linear(self, v: Tensor, scale: Tensor) -> Tensor:
        """The frozen norm applied to a part `v` (..., d) of the input, without the bias, given `scale(x)`."""
        if self.kind == "layer":
            v = v - v.mean(-1, keepdim=True)
        return v * scale * self.gain.to(v.dtype)

    def jvp(self, v: Tensor, x: Tensor, frozen: bool = False) -> Tensor:
        """J(x) v: how the output moves when the input moves by `v`; with r held fixed if `frozen`."""
        scale = self.scale(x)
        if self.kind == "layer":
            v = v - v.mean(-1, keepdim=True)
            x = x - x.mean(-1, keepdim=True)
        v = v * scale
        if not frozen:
            unit = x * scale  # (..., d) with mean square 1
            v = v - unit * (unit * v).mean(-1, keepdim=True)
        return v * self.gain.to(v.dtype)

    def vjp(self, g: Tensor, x: Tensor, frozen: bool = False) -> Tensor:
        """J(x)^T g: a gradient at the output carried to the input; with r held fixed if `frozen` (the LN-rule)."""
        scale = self.scale(x)
        g = g * self.gain.to(g.dtype) * scale
        if not frozen:
            centred = x - x.mean(-1, keepdim=True) if self.kind == "layer" else x
            unit = centred * scale
            g = g - unit * (unit * g).mean(-1, keepdim=True)
        return g - g.mean(-1, keepdim=True) if self.kind == "layer" else g
