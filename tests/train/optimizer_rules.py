"""The published update rules, one number at a time in float64, and the problems they are followed on."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from vesalius.train.optimizers.conda import Basis

STEPS = 50
Vector = list[float]


# -- the published rules, one number at a time ----------------------------------------------------------------------


def clipped(gradients: list[Vector], limit: float, eps: float) -> list[Vector]:
    norm = math.sqrt(sum(x * x for g in gradients for x in g))
    factor = min(1.0, limit / (norm + eps)) if limit else 1.0
    return [[x * factor for x in g] for g in gradients]


class ScalarAdan:
    def __init__(self, lr: float, decay: float, no_prox: bool, limit: float) -> None:
        self.lr, self.decay, self.no_prox, self.limit, self.t = lr, decay, no_prox, limit, 0
        self.b, self.eps = (0.98, 0.92, 0.99), 1e-8

    def step(self, tensors: list[Vector], gradients: list[Vector]) -> None:
        gradients = clipped(gradients, self.limit, self.eps)
        if self.t == 0:
            self.m, self.v, self.n = ([[0.0] * len(g) for g in gradients] for _ in range(3))
            self.before = copy.deepcopy(gradients)
        self.t += 1
        b1, b2, b3 = self.b
        for k, gs in enumerate(gradients):
            for i, g in enumerate(gs):
                d = g - self.before[k][i]
                self.m[k][i] = b1 * self.m[k][i] + (1 - b1) * g
                self.v[k][i] = b2 * self.v[k][i] + (1 - b2) * d
                self.n[k][i] = b3 * self.n[k][i] + (1 - b3) * (g + b2 * d) ** 2
                m_hat = self.m[k][i] / (1 - b1**self.t)
                v_hat = self.v[k][i] / (1 - b2**self.t)
                root = math.sqrt(self.n[k][i]) / math.sqrt(1 - b3**self.t)
                update = self.lr * (m_hat + b2 * v_hat) / (root + self.eps)
                if self.no_prox:
                    tensors[k][i] = tensors[k][i] * (1 - self.lr * self.decay) - update
                else:
                    tensors[k][i] = (tensors[k][i] - update) / (1 + self.lr * self.decay)
                self.before[k][i] = g


class ScalarSaI:
    def __init__(self, lr: float, decay: float, momentum: float, limit: float) -> None:
        self.lr, self.decay, self.mu, self.limit, self.t = lr, decay, momentum, limit, 0

    def step(self, tensors: list[Vector], gradients: list[Vector]) -> None:
        gradients = clipped(gradients, self.limit, 1e-8)
        if self.t == 0:
            self.ratio, self.m = [], copy.deepcopy(gradients)
            for g in gradients:
                mean = sum(g) / len(g)
                std = math.sqrt(sum((x - mean) ** 2 for x in g) / (len(g) - 1))
                self.ratio.append(math.sqrt(sum(x * x for x in g)) / (std + 1e-8))
        self.t += 1
        for k, gs in enumerate(gradients):
            for i, g in enumerate(gs):
                if self.t > 1:
                    self.m[k][i] = self.mu * self.m[k][i] + (1 - self.mu) * g
                shrunk = (1 - self.lr * self.decay) * tensors[k][i]
                tensors[k][i] = shrunk - self.lr * self.ratio[k] * self.m[k][i]


class ScalarPaLM:
    def __init__(self, lr: float, decay: float, clip: float, limit: float) -> None:
        self.lr, self.decay, self.clip, self.limit, self.t = lr, decay, clip, limit, 0

    def step(self, tensors: list[Vector], gradients: list[Vector]) -> None:
        gradients = clipped(gradients, self.limit, 1e-8)
        if self.t == 0:
            self.m, self.v = ([[0.0] * len(g) for g in gradients] for _ in range(2))
        self.t += 1
        b2 = 1 - self.t**-0.8
        for k, gs in enumerate(gradients):
            size = max(1e-3, math.sqrt(sum(x * x for x in tensors[k]) / len(tensors[k])))
            self.v[k] = [b2 * v + (1 - b2) * (g * g + 1e-30) for v, g in zip(self.v[k], gs, strict=True)]
            u = [g / math.sqrt(v) for g, v in zip(gs, self.v[k], strict=True)]
            rms = math.sqrt(sum(x * x for x in u) / len(u))
            u = [x / max(1.0, rms / self.clip) for x in u] if self.clip else u
            for i, x in enumerate(u):
                self.m[k][i] = 0.9 * self.m[k][i] + 0.1 * self.lr * size * x
                tensors[k][i] -= self.m[k][i] + self.decay * self.lr**2 * tensors[k][i]


class MatrixConda:
    """Conda on numpy matrices, its products written out; vectors take Adam.

    Singular vectors are unique only up to sign and complement, so the bases are taken from `bases`, a function of the
    tensor's number, at multiples of the period, and checked to be what they must be: orthogonal, and singular for the
    reference's own momentum.
    """

    def __init__(
        self, lr: float, decay: float, period: int, mode: str, limit: float, bases: Callable[[int], Basis]
    ) -> None:
        self.lr, self.decay, self.period, self.mode, self.limit, self.t = lr, decay, period, mode, limit, 0
        self.bases, self.q = bases, dict[int, tuple[Any, Any]]()

    def look_up(self, k: int) -> None:
        rows, columns = self.m[k].shape
        wide = columns > rows
        wanted = {"short": (wide, not wide), "long": (not wide, wide), "left": (True, False), "right": (False, True)}
        sides = {**wanted, "full": (True, True)}[self.mode]
        q = [None if x is None else x.numpy().copy() for x in self.bases(k)]
        assert [x is not None for x in q] == list(sides)
        for x, square in zip(q, (self.m[k] @ self.m[k].T, self.m[k].T @ self.m[k]), strict=True):
            if x is not None:
                x = x if square.shape[0] == rows and x is q[0] else x.T
                assert np.abs(x.T @ x - np.eye(len(x))).max() < 1e-12
                turned = x.T @ square @ x
                assert np.abs(turned - np.diag(np.diag(turned))).max() < 1e-10 * np.abs(square).max()
        self.q[k] = (q[0], q[1])

    def step(self, tensors: list[Any], gradients: list[Any]) -> None:
        norm = math.sqrt(sum(float((g**2).sum()) for g in gradients))
        factor = min(1.0, self.limit / (norm + 1e-8)) if self.limit else 1.0
        if self.t == 0:
            self.m, self.n = ([np.zeros_like(g) for g in gradients] for _ in range(2))
        for k, g in enumerate(gradients):
            g = g * factor
            self.m[k] = 0.9 * self.m[k] + (1 - 0.9) * g
            if g.ndim == 2 and self.mode != "identity" and self.t % self.period == 0:
                self.look_up(k)
            left, right = self.q.get(k, (None, None))

            def turn(x: Any, left: Any = left, right: Any = right) -> Any:
                x = x if left is None else left.T @ x
                return x if right is None else x @ right.T

            self.n[k] = 0.99 * self.n[k] + (1 - 0.99) * turn(g) ** 2
            t = self.t + 1
            size = self.lr * math.sqrt(1 - 0.99**t) / (1 - 0.9**t)
            step = turn(self.m[k]) / (np.sqrt(self.n[k]) + 1e-8)
            step = step if left is None else left @ step
            step = step if right is None else step @ right
            tensors[k] -= size * (0.25 if g.ndim == 2 else 1.0) * step
            tensors[k] *= 1 - self.lr * self.decay
        self.t += 1


# -- problems -------------------------------------------------------------------------------------------------------


def quadratic(tensors: list[Tensor]) -> Tensor:
    """A bowl with unequal axes and a tilt, so that no gradient has mean zero."""
    total = tensors[0].new_zeros(())
    for k, x in enumerate(tensors):
        axes = torch.linspace(0.1, 3.0 + k, x.numel(), dtype=x.dtype).reshape(x.shape)
        total = total + (0.5 * axes * x * x + (0.3 + 0.1 * k) * x).sum()
    return total


def tiny_net(tensors: list[Tensor]) -> Tensor:
    """A two-layer network's loss on fixed data; tensors (5, 3), (5,), (2, 5)."""
    x = torch.sin(0.7 * torch.arange(24, dtype=tensors[0].dtype) ** 2).reshape(8, 3)  # of full rank
    y = torch.cos(torch.arange(16, dtype=tensors[0].dtype)).reshape(8, 2)
    return ((torch.tanh(x @ tensors[0].T + tensors[1]) @ tensors[2].T - y) ** 2).mean()


PROBLEMS: dict[str, tuple[Callable[[list[Tensor]], Tensor], list[tuple[int, ...]]]] = {
    "quadratic": (quadratic, [(4, 3), (7,)]),
    "net": (tiny_net, [(5, 3), (5,), (2, 5)]),
}


def start(problem: str, dtype: torch.dtype = torch.float64) -> list[nn.Parameter]:
    torch.manual_seed(3)
    return [nn.Parameter(torch.randn(s, dtype=torch.float64).to(dtype)) for s in PROBLEMS[problem][1]]


def run(
    problem: str, optimizer: torch.optim.Optimizer, parameters: list[nn.Parameter], steps: int = STEPS
) -> list[list[Tensor]]:
    loss, path = PROBLEMS[problem][0], []
    for _ in range(steps):
        optimizer.zero_grad()
        loss(list(parameters)).backward()
        optimizer.step()
        path.append([p.detach().clone() for p in parameters])
    return path


def follow(problem: str, rule: Any, optimizer: torch.optim.Optimizer, parameters: list[nn.Parameter]) -> float:
    """The largest distance from the rule in 50 steps.

    In float64 each goes its own way, with the gradients of its own point. In float32 each step is compared: both get
    the rule's gradients and start from its point, with their own state, so that neither the network's rounding nor
    that of adding up fifty steps is counted as the optimizer's.
    """
    loss, shapes = PROBLEMS[problem]
    values = [p.detach().flatten().tolist() for p in start(problem)]
    worst = 0.0
    for _ in range(STEPS):
        at = [torch.tensor(v, dtype=torch.float64).reshape(s) for v, s in zip(values, shapes, strict=True)]
        grads = torch.autograd.grad(loss([x.requires_grad_() for x in at]), at)
        if parameters[0].dtype == torch.float64:
            run(problem, optimizer, parameters, 1)
        else:
            for p, x, g in zip(parameters, at, grads, strict=True):
                p.data, p.grad = x.detach().to(p.dtype), g.to(p.dtype)
            optimizer.step()
        rule.step(values, [g.flatten().tolist() for g in grads])
        wanted = [torch.tensor(v, dtype=torch.float64).reshape(s) for v, s in zip(values, shapes, strict=True)]
        worst = max(worst, gap([list(parameters)], [wanted]))
    return worst


def gap(a: list[list[Tensor]], b: list[list[Tensor]]) -> float:
    """The largest distance, relative to values above 1."""
    pairs = [
        (x.detach().double(), y.detach().double()) for p, q in zip(a, b, strict=True) for x, y in zip(p, q, strict=True)
    ]
    return max(float(((x - y).abs() / y.abs().clamp(min=1)).max()) for x, y in pairs)


def tolerance(dtype: torch.dtype) -> float:
    return 1e-12 if dtype == torch.float64 else 1e-6


DTYPES = [torch.float64, torch.float32]
