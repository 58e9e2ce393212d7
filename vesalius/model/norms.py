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

NormKind = Literal["layer", "rms", "rms+1", "none"]  # none: the norm was taken out, nn.Identity stands for it
HUGE_EPS = 2.0**40  # leaves nothing of the input's size


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

    @property
    def fixed(self) -> bool:
        """Whether r is one number for every input: the norm is absent, a constant, or its eps hides the input."""
        return self.kind == "none" or self._constant is not None or self.eps >= HUGE_EPS

    @property
    def _constant(self) -> float | None:
        found = getattr(self.module, "constant", None)  # of a `ConstantNorm`
        return float(found) if found is not None else None

    def scale(self, x: Tensor) -> Tensor:
        """r(x): what the centred input is multiplied with, (..., 1)."""
        x = x.float()
        if self.kind == "none":
            return torch.ones_like(x[..., :1])
        if (constant := self._constant) is not None:
            return torch.full_like(x[..., :1], 1 / constant)
        if self.kind == "layer":
            x = x - x.mean(-1, keepdim=True)
        return torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps)

    def linear(self, v: Tensor, scale: Tensor) -> Tensor:
        """The frozen norm applied to a part `v` (..., d) of the input, without the bias, given `scale(x)`."""
        if self.kind == "layer":
            v = v - v.mean(-1, keepdim=True)
        return v * scale * self.gain.to(v.dtype)

    def transpose(self, g: Tensor) -> Tensor:
        """A functional (..., d) of the output as one of the input, up to the positive number r: (g * gain), centred."""
        g = g * self.gain.to(g)
        return g - g.mean(-1, keepdim=True) if self.kind == "layer" else g

    def jvp(self, v: Tensor, x: Tensor, frozen: bool = False) -> Tensor:
        """J(x) v: how the output moves when the input moves by `v`; with r held fixed if `frozen`."""
        scale = self.scale(x)
        if self.kind == "layer":
            v = v - v.mean(-1, keepdim=True)
            x = x - x.mean(-1, keepdim=True)
        v = v * scale
        if not frozen and not self.fixed:
            unit = x * scale  # (..., d) with mean square 1
            v = v - unit * (unit * v).mean(-1, keepdim=True)
        return v * self.gain.to(v.dtype)

    def vjp(self, g: Tensor, x: Tensor, frozen: bool = False) -> Tensor:
        """J(x)^T g: a gradient at the output carried to the input; with r held fixed if `frozen` (the LN-rule)."""
        scale = self.scale(x)
        g = g * self.gain.to(g.dtype) * scale
        if not frozen and not self.fixed:
            centred = x - x.mean(-1, keepdim=True) if self.kind == "layer" else x
            unit = centred * scale
            g = g - unit * (unit * g).mean(-1, keepdim=True)
        return g - g.mean(-1, keepdim=True) if self.kind == "layer" else g
