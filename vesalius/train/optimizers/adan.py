"""Adan: momentum, momentum of the gradient's change, and a second moment of their extrapolation.

    m <- b1 m + (1-b1) g          d = g - g_before, zero at the first step
    v <- b2 v + (1-b2) d
    n <- b3 n + (1-b3) (g + b2 d)^2
    u = (m / (1-b1^t) + b2 v / (1-b2^t)) / (sqrt(n / (1-b3^t)) + eps)
    theta <- (theta - lr u) / (1 + lr decay)

Xie et al. 2022, arXiv 2208.06677. Its betas are one minus those written here, which are those of its code.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from vesalius.errors import VesaliusError
from vesalius.train.optimizers.base import TensorOptimizer, Work, by_step, local, use_foreach


class _Factors(NamedTuple):
    """Numbers of one step: `u = step (m + mix v) / (sqrt(n) + eps)`, the bias corrections folded in."""

    beta1: float
    beta2: float
    beta3: float
    mix: float
    step: float
    eps: float
    shrink: float  # theta <- theta * shrink - update
    divide: float  # theta <- theta / divide, after the update


class Adan(TensorOptimizer):
    """Adaptive Nesterov momentum.

    The state is four tensors a parameter (m, v, n and the gradient before), twice AdamW's. Where the gradient is
    clipped (`max_grad_norm`), the clipped one is kept. The difference means something only between gradients of equal
    scale: unscale a loss scaler's first, and divide accumulated ones by the whole batch.

    Args:
        params: parameters or groups.
        lr: 5 to 10 times what AdamW takes.
        betas: of the momentum, of the difference, of the second moment. The slow first one costs runs of a few
            hundred steps; tune the third, then the first.
        eps: added to the root.
        weight_decay: decoupled.
        no_prox: decay as AdamW does, `theta (1 - lr decay) - update`, in place of the proximal form.
        max_grad_norm: the norm of all gradients together is brought down to this; 0 leaves them.
        restart_every: the moments begin anew after so many steps; 0 for never. `restart()` does it by hand.
        foreach: lists of tensors through one kernel; by default on accelerators.
        fused: the whole rule as one kernel that `torch.compile` makes at the first step: some ten seconds then, a third
            of the time of a step afterwards. It needs a C++ compiler on a CPU, Triton on a GPU.

    Example:
        >>> w = torch.nn.Parameter(torch.ones(2))
        >>> w.grad = torch.tensor([1.0, -2.0])
        >>> Adan([w], lr=0.1, weight_decay=0.0).step()
        >>> [round(x, 4) for x in w.tolist()]
        [0.9, 1.1]
    """

    buffers = 2

    def __init__(
        self,
        params: Any,
        lr: float = 5e-3,
        betas: tuple[float, float, float] = (0.98, 0.92, 0.99),
        eps: float = 1e-8,
        weight_decay: float = 0.02,
        no_prox: bool = False,
        max_grad_norm: float = 0.0,
        restart_every: int = 0,
        foreach: bool | None = None,
        fused: bool = False,
    ) -> None:
        if len(betas) != 3:
            raise VesaliusError(f"Adan takes three betas, such as (0.98, 0.92, 0.99); got {len(betas)}")
        if fused and foreach:
            raise VesaliusError("Adan is either fused or foreach; leave one of them out")
        if restart_every < 0:
            raise VesaliusError(f"restart_every = {restart_every}: give a number of steps, or 0 for never")
        keys = ("lr", "eps", "weight_decay", "no_prox", "max_grad_norm", "restart_every", "foreach", "fused")
        values = (lr, eps, weight_decay, no_prox, max_grad_norm, restart_every, foreach, fused)
        super().__init__(params, {"betas": tuple(betas), **dict(zip(keys, values, strict=True))})

    @torch.no_grad()
    def restart(self) -> None:
        """Begins anew: zero moments, and no gradient before the next one."""
        for state in self.state.values():
            for value in state.values():
                value.zero_()

    def _start(self, group: dict[str, Any], p: Tensor, state: dict[str, Tensor]) -> None:
        for key in ("m", "v", "n", "before"):
            state[key] = torch.zeros_like(p)

    def _group(self, index: int, group: dict[str, Any], work: Work) -> None:
        every = group["restart_every"]
        for _, _, state in work:
            if every and int(state["step"]) == every:
                for value in state.values():
                    value.zero_()
        for done, items in by_step(work).items():
            if done == 0:
                for _, g, state in items:
                    local(state["before"]).copy_(local(g))
            factors = _factors(group, done + 1)
            lists = [[local(t) for t in (p, g, s["m"], s["v"], s["n"], s["before"])] for p, g, s in items]
            if group.get("fused"):
                lists = [row for row in lists if not _compiled(row, factors)]
            elif use_foreach(group, (row[0] for row in lists)):
                _many(*(list(column) for column in zip(*lists, strict=True)), f=factors)
                continue
            for row in lists:
                for parts, buffers in self._blocks(*row):
                    _one(*parts, *buffers, f=factors)


def _factors(group: dict[str, Any], t: int) -> _Factors:
    b1, b2, b3 = group["betas"]
    c1, c2, c3 = 1 - b1**t, 1 - b2**t, math.sqrt(1 - b3**t)
    lr, decay = float(group["lr"]), group["weight_decay"]
    shrink, divide = (1 - lr * decay, 1.0) if group["no_prox"] else (1.0, 1 + lr * decay)
    return _Factors(b1, b2, b3, b2 * c1 / c2, lr * c3 / c1, group["eps"] * c3, shrink, divide)


def _one(
    p: Tensor, g: Tensor, m: Tensor, v: Tensor, n: Tensor, before: Tensor, a: Tensor, b: Tensor, *, f: _Factors
) -> None:
    """One tensor, or a block of it; `a` and `b` are scratch."""
    torch.sub(g, before, out=a)
    before.copy_(g)
    m.lerp_(g, 1 - f.beta1)
    v.lerp_(a, 1 - f.beta2)
    torch.add(g, a, alpha=f.beta2, out=a)
    n.mul_(f.beta3).addcmul_(a, a, value=1 - f.beta3)
    torch.sqrt(n, out=a).add_(f.eps)
    torch.add(m, v, alpha=f.mix, out=b)
    if f.shrink != 1:
        p.mul_(f.shrink)
    p.addcdiv_(b, a, value=-f.step)
    if f.divide != 1:
        p.div_(f.divide)


def _compiled(row: list[Tensor], factors: _Factors) -> bool:
    """The same as one kernel over flat memory; False, and nothing done, for tensors that have none or a single number.

    Raises:
        VesaliusError: where `torch.compile` has no compiler to work with.
    """
    if row[0].numel() < 2 or not all(t.is_contiguous() for t in row):
        return False
    f = factors
    numbers = (1 - f.beta1, 1 - f.beta2, f.beta2, f.beta3, 1 - f.beta3, f.mix, f.step, f.eps, f.shrink, 1 / f.divide)
    try:
        _kernel()(*(t.view(-1) for t in row), torch.tensor(numbers, dtype=row[0].dtype, device=row[0].device))
    except Exception as error:
        from torch._dynamo.exc import TorchDynamoException  # a second to import

        if not isinstance(error, TorchDynamoException):
            raise
        first = str(error).strip().splitlines()[0][:160]
        raise VesaliusError(
            f"fused needs a compiler that torch.compile finds (g++ or clang++; Triton on a GPU); it failed: {first}; "
            "install one, or leave fused out"
        ) from error
    return True


@cache
def _kernel() -> Callable[..., None]:
    return torch.compile(_rule, dynamic=True, fullgraph=True)


def _rule(p: Tensor, g: Tensor, m: Tensor, v: Tensor, n: Tensor, before: Tensor, numbers: Tensor) -> None:
    rest1, rest2, beta2, beta3, rest3, mix, step, eps, shrink, divide = numbers.unbind()
    change = g - before
    before.copy_(g)
    ahead = g + beta2 * change
    m.copy_(m + rest1 * (g - m))
    v.copy_(v + rest2 * (change - v))
    n.copy_(beta3 * n + rest3 * ahead * ahead)
    p.copy_((p * shrink - step * (m + mix * v) / (n.sqrt() + eps)) * divide)


def _many(
    p: list[Tensor],
    g: list[Tensor],
    m: list[Tensor],
    v: list[Tensor],
    n: list[Tensor],
    before: list[Tensor],
    *,
    f: _Factors,
) -> None:
    """The same on lists of tensors."""
    change = torch._foreach_sub(g, before)
    torch._foreach_copy_(before, g)
    torch._foreach_lerp_(m, g, 1 - f.beta1)
    torch._foreach_lerp_(v, change, 1 - f.beta2)
    ahead = torch._foreach_add(g, change, alpha=f.beta2)
    torch._foreach_mul_(n, f.beta3)
    torch._foreach_addcmul_(n, ahead, ahead, value=1 - f.beta3)
    del change, ahead
    root = torch._foreach_sqrt(n)
    torch._foreach_add_(root, f.eps)
    mixed = torch._foreach_add(m, v, alpha=f.mix)
    if f.shrink != 1:
        torch._foreach_mul_(p, f.shrink)
    torch._foreach_addcdiv_(p, mixed, root, value=-f.step)
    if f.divide != 1:
        torch._foreach_div_(p, f.divide)
