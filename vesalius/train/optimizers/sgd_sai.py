"""SGD-SaI: momentum, each tensor's learning rate fixed once by the signal-to-noise ratio of its first gradient.

    gsnr = |g| / (std(g) + eps)                    at the first step, then kept
    m <- g at the first step, later mu m + (1-mu) g
    theta <- (1 - lr decay) theta - lr gsnr m

Xu et al. 2024, arXiv 2412.11768. For d numbers of mean a, gsnr = sqrt((d-1) / (1 - d a^2 / sum g^2)) up to eps, that
is sqrt(d-1) for a gradient of mean zero, whatever its scale: larger tensors take larger steps.
"""

from __future__ import annotations

import logging
import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from vesalius.train.optimizers.base import TensorOptimizer, Work, local, use_foreach, whole

LOG = logging.getLogger(__name__)
CONSTANT = 1e-6  # a standard deviation below this share of the root mean square is rounding


class Ratio(NamedTuple):
    """A tensor's ratio, and why it is not the gradient's own."""

    value: float
    why: str = ""


def gsnr(gradient: Tensor, eps: float = 1e-8) -> Ratio:
    """The ratio of a gradient's norm to its standard deviation.

    A tensor of one number, and a gradient that is zero, constant or not finite, have none. They take sqrt(d-1), what a
    gradient of mean zero would give, at least 1.

    Example:
        >>> round(gsnr(torch.tensor([1.0, -1.0, 1.0, -1.0])).value, 4)
        1.7321
        >>> gsnr(torch.tensor([2.0]))
        Ratio(value=1.0, why='one number')
    """
    d = gradient.numel()
    g = whole(gradient.detach()).reshape(-1)
    g = g if g.dtype == torch.float64 else g.float()
    fallback = math.sqrt(max(d - 1, 1))
    if d < 2:
        return Ratio(fallback, "one number" if d else "empty")
    norm, std = float(torch.linalg.vector_norm(g)), float(g.std())
    if not (math.isfinite(norm) and math.isfinite(std)):
        return Ratio(fallback, "not finite")
    if norm == 0:
        return Ratio(fallback, "zero gradient")
    if std <= CONSTANT * norm / math.sqrt(d):
        return Ratio(fallback, "constant gradient")
    return Ratio(norm / (std + eps))


class SGDSaI(TensorOptimizer):
    """Stochastic gradient descent with momentum, scaled at initialisation.

    The state is one tensor a parameter, half of AdamW's, and none without momentum. The ratio is part of the state, so
    a run that goes on does not measure it again. Replicated gradients must be reduced before the first step.

    Args:
        params: parameters or groups.
        lr: learning rate.
        momentum: 0 for none.
        eps: added to the standard deviation.
        weight_decay: decoupled.
        max_grad_norm: the norm of all gradients together is brought down to this; 0 leaves them.
        foreach: lists of tensors through one kernel; by default on accelerators.

    Attributes:
        fallbacks: (shape, reason) of tensors whose first gradient gave no ratio; each was logged.

    Example:
        >>> w = torch.nn.Parameter(torch.zeros(4))
        >>> w.grad = torch.tensor([1.0, -1.0, 1.0, -1.0])
        >>> SGDSaI([w], lr=0.1).step()
        >>> [round(x, 4) for x in w.tolist()]
        [-0.1732, 0.1732, -0.1732, 0.1732]
    """

    def __init__(
        self,
        params: Any,
        lr: float = 1e-2,
        momentum: float = 0.9,
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        max_grad_norm: float = 0.0,
        foreach: bool | None = None,
    ) -> None:
        keys = ("lr", "momentum", "eps", "weight_decay", "max_grad_norm", "foreach")
        values = (lr, momentum, eps, weight_decay, max_grad_norm, foreach)
        self.fallbacks: list[tuple[tuple[int, ...], str]] = []
        self._ratios: dict[Tensor, float] = {}  # of the state's tensors, read once so that a step waits for no device
        super().__init__(params, dict(zip(keys, values, strict=True)))

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._ratios = {}
        self.fallbacks = list(getattr(self, "fallbacks", []))

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """State as it was saved."""
        super().load_state_dict(state_dict)
        self._ratios = {}

    def _start(self, group: dict[str, Any], p: Tensor, state: dict[str, Tensor]) -> None:
        pass  # both the ratio and the momentum start from the (clipped) gradient

    def _ratio(self, group: dict[str, Any], p: Tensor, g: Tensor, state: dict[str, Tensor]) -> float:
        if p not in self._ratios:
            if "gsnr" not in state:
                found = gsnr(g, group["eps"])
                if found.why:
                    self.fallbacks.append((tuple(p.shape), found.why))
                    shape = tuple(p.shape)
                    LOG.warning("no signal-to-noise ratio for a %s tensor (%s); took %g", shape, found.why, found.value)
                state["gsnr"] = torch.tensor(found.value, dtype=torch.float64, device="cpu")
            self._ratios[p] = float(state["gsnr"])
        return self._ratios[p]

    def _group(self, index: int, group: dict[str, Any], work: Work) -> None:
        mu, lr, decay = group["momentum"], float(group["lr"]), group["weight_decay"]
        params: list[Tensor] = []
        grads: list[Tensor] = []
        momenta: list[Tensor] = []
        rates: list[float] = []
        fresh: list[int] = []
        for p, g, state in work:
            rates.append(-lr * self._ratio(group, p, g, state))
            state["step"] += 1
            if mu and "m" not in state:
                state["m"] = torch.clone(g)
                fresh.append(len(params))
            params.append(local(p))
            grads.append(local(g))
            momenta.append(local(state["m"]) if mu else grads[-1])
        if not params:
            return
        if use_foreach(group, params):
            if mu:
                old = [i for i in range(len(params)) if i not in set(fresh)]
                if old:
                    torch._foreach_lerp_([momenta[i] for i in old], [grads[i] for i in old], 1 - mu)
            if decay:
                torch._foreach_mul_(params, 1 - lr * decay)
            torch._foreach_add_(params, torch._foreach_mul(momenta, rates))
            return
        new = set(fresh)
        for i, (p, g, m, rate) in enumerate(zip(params, grads, momenta, rates, strict=True)):
            for (a, b, c), _ in self._blocks(p, g, m):
                if mu and i not in new:
                    c.lerp_(b, 1 - mu)
                if decay:
                    a.mul_(1 - lr * decay)
                a.add_(c, alpha=rate)
