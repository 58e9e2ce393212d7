"""PaLM's optimizer: Adafactor without factoring, that is Adam whose steps are scaled by each tensor's own size.

    v <- b2 v + (1-b2) (g^2 + eps1)                 b2 = 1 - t^-0.8
    u = g / sqrt(v), divided by max(1, rms(u) / clip)
    m <- b1 m + (1-b1) lr max(eps2, rms(theta)) u
    theta <- theta - m - decay lr^2 theta

Chowdhery et al. 2022, arXiv 2204.02311, sec. 5; Shazeer and Stern 2018, arXiv 1804.04235. The learning rate of record
is 0.01 for 10,000 steps and falls with 1/sqrt(step) from there (the schedule "inverse-sqrt").
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vesalius.train.optimizers.base import TensorOptimizer, Work, by_step, local, whole


def rms(tensor: Tensor) -> float:
    """The root mean square; 0 of nothing."""
    return float(whole(torch.linalg.vector_norm(tensor))) / max(tensor.numel(), 1) ** 0.5


class PaLMAdafactor(TensorOptimizer):
    """Adafactor without factoring. The state is two tensors a parameter, as AdamW's.

    Args:
        params: parameters or groups.
        lr: relative to each tensor's root mean square.
        beta1: of the momentum, which averages updates, not gradients, and is not corrected for its start.
        beta2_decay: b2 = 1 - t^beta2_decay at step t.
        eps: added to squared gradients; and the least size a tensor is taken to have.
        weight_decay: share of lr^2 by which weights shrink; 1 is PaLM's.
        update_clip: the root mean square of u is brought down to this; 0 leaves it.
        max_grad_norm: the norm of all gradients together is brought down to this (PaLM: 1); 0 leaves them.
    """

    def __init__(
        self,
        params: Any,
        lr: float = 1e-2,
        beta1: float = 0.9,
        beta2_decay: float = -0.8,
        eps: tuple[float, float] = (1e-30, 1e-3),
        weight_decay: float = 1.0,
        update_clip: float = 1.0,
        max_grad_norm: float = 0.0,
    ) -> None:
        keys = ("lr", "betas", "beta2_decay", "eps1", "eps2", "weight_decay", "update_clip", "max_grad_norm")
        values = (lr, (beta1,), beta2_decay, *eps, weight_decay, update_clip, max_grad_norm)
        super().__init__(params, dict(zip(keys, values, strict=True)))

    def _start(self, group: dict[str, Any], p: Tensor, state: dict[str, Tensor]) -> None:
        state["m"], state["v"] = torch.zeros_like(p), torch.zeros_like(p)

    def _group(self, index: int, group: dict[str, Any], work: Work) -> None:
        lr, decay, beta1 = float(group["lr"]), group["weight_decay"], group["betas"][0]
        for done, items in by_step(work).items():
            fresh = float(done + 1) ** group["beta2_decay"]  # 1 - b2
            for p, g, state in items:
                scale = lr * max(group["eps2"], rms(p))
                u = torch.empty_like(p)
                for (g_, v, u_), _ in self._blocks(local(g), local(state["v"]), local(u)):
                    torch.mul(g_, g_, out=u_).add_(group["eps1"])
                    v.lerp_(u_, fresh)
                    torch.rsqrt(v, out=u_).mul_(g_)
                size = rms(u) if group["update_clip"] else 0.0
                if size > group["update_clip"] > 0:
                    scale *= group["update_clip"] / size
                for (p_, m, u_), _ in self._blocks(local(p), local(state["m"]), local(u)):
                    m.mul_(beta1).add_(u_, alpha=(1 - beta1) * scale)
                    if decay:
                        p_.mul_(1 - decay * lr * lr)
                    p_.sub_(m)
